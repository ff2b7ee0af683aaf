"""moeslim makes a mixture-of-experts language model smaller and keeps what made it good.

From Python: `from moeslim import api` (docs/python.md). Importing the package alone loads nothing.
"""

__version__ = "0.1.0"
