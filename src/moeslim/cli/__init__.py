"""The command line: commands (main), their options (options), and terminal output (display)."""
