"""A whole study on a model of a few thousand parameters, by the command line: two losses, two seeds, a minute.

make study-smoke    # or: .venv/bin/python tests/study_smoke.py [OUT]
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from micro import write_micro

KEYS = {"schedule": "one_shot", "compare_random_init": False}


def write_study(home: Path, **changes: Any) -> Path:
    """Write a micro model, its text and a study of the two losses with two seeds; returns the study's file."""
    study = {
        "base": str(write_micro(home, **KEYS)),
        "overrides": {"evaluate.documents_per_domain": 4, "evaluate.prompts": 2},
        "variants": {"kd": {}, "lm": {"distill.lm_only": True}},
        "seeds": [0, 1],
        "measure": {"models": ["distilled", "cut"]},
        **changes,
    }
    path = home / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def main() -> None:
    """Run it in the folder that is named, or in a temporary one."""
    with tempfile.TemporaryDirectory() as home:
        out = sys.argv[1] if len(sys.argv) > 1 else str(Path(home) / "out")
        command = [sys.executable, "-m", "moeslim", "study", str(write_study(Path(home))), out, "--jobs", "2"]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
