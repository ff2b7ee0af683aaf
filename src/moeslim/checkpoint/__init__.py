"""A model as files: where it lies, what its headers say, reading and writing one tensor at a time, and its proof.

Import from the files themselves; only reader.py and writer.py load torch.
"""
