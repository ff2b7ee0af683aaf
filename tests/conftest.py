"""What holds for every test: no network, no surprises from the machine, the same examples every time."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

# derandomised and without deadlines: a test that passes here passes on a slower machine and tomorrow
settings.register_profile("moeslim", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("moeslim")

# subprocesses that tests start (kills, import checks) find the package as the tests themselves do
_SOURCE = str(Path(__file__).parents[1] / "src")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_SOURCE, os.environ.get("PYTHONPATH")]))
if _SOURCE not in sys.path:
    sys.path.insert(0, _SOURCE)
