"""The machine that a job runs on: its processes, memory, processor settings and GPUs. Knows nothing of models."""
