"""Training a student: with a teacher (distillation) or without one, by the same visible loop."""
