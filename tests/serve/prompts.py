"""What both sides are asked: text as the demo's model knows it, below and above DeltaNet's chunk of 64 tokens."""

TOP = 8
"""How many of the best logits are kept per step; two candidates of a near-tie are among them."""

PROMPTS = (
    "Fellow citizens of the Senate and of the House of Representatives:",
    "def main(argv=None):\n    parser = argparse.ArgumentParser(",
    "The Congress shall have power to lay and collect taxes, and to provide for the common defense and general "
    "welfare of the United States; but all duties shall be uniform throughout the land. I have therefore asked the "
    "Secretary of the Treasury to prepare, before the end of this session, a full account of the public debt, of the "
    "revenue which may be expected, and of the appropriations that the several Departments will need. The people",
    'class Reader:\n    """Reads lines from a file.\n\n    The file is opened when the first line is asked for, and it '
    'is closed by\n    close() or at the end of a with statement.\n    """\n\n    def __init__(self, path, encoding='
    '"utf-8"):\n        self.path = path\n        self.encoding = encoding\n        self._file = None\n\n'
    "    def close(self):\n        if self._file is not None:\n            self._file.close()\n\n    def read",
)
