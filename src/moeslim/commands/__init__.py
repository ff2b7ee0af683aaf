"""What the command line can do, one function per command with its arguments; each returns a record (a JSON-able dict).

`lines` in a record is what the command line prints. Whole runs are in pipeline.py; api.py lists all of them.
"""
