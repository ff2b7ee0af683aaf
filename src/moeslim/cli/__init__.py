"""The command line: commands (main), what they take (options) and what a terminal shows (display)."""
