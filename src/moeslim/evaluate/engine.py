"""What a model costs in the engine that will serve it: vLLM, started in a process of its own.

As the engine serves it: the checkpoint's own precision, compiled on a GPU (eager on a CPU), one prompt at a time.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeslim.errors import RecipeError
from moeslim.figures import Figure, median

DRAFTS = 2
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, whose memory is the engine's
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
_HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
_LAST_LINES = 3


def check_engine(python: str | None) -> None:
    """RecipeError unless the interpreter (None: this one) has vLLM."""
    try:
        done = subprocess.run([python or sys.executable, "-c", _HAS_VLLM], capture_output=True, check=False)
    except OSError as problem:
        raise RecipeError(f"evaluate.engine_python is {python}, which cannot be started ({problem.strerror})") from None
    if done.returncode:
        raise RecipeError(
            f"evaluate.engine is vllm, and {python or sys.executable} has no vLLM; install it there, or name the "
            "Python of an environment that has it in evaluate.engine_python"
        )


def engine_figures(
    folder: Path, prompts: Sequence[Sequence[int]], *, new_tokens: int, drafts: Sequence[int], python: str | None
) -> tuple[dict[str, dict[str, Figure]], list[str]]:
    """Figures `vllm_...` without drafting, `vllm_mtp_...` with each number of `drafts` but 0, and what went wrong.

    Medians over the prompts: `prefill_seconds` to the first token, `decode` in tokens per second behind it.
    `accepted_length` is the engine's own count per round, the trunk's token included.
    """
    figures: dict[str, dict[str, Figure]] = {}
    notes = []
    for number in drafts:
        asked = {"model": str(folder), "prompts": prompts, "new_tokens": new_tokens, "drafts": number}
        answer = _asked(asked, python=python)
        if isinstance(answer, str):
            notes.append(f"vLLM{f' with {number} drafts' if number else ''} measured nothing: {answer}")
            continue
        found = {
            "prefill_seconds": median(answer["first_seconds"], unit="s", per="prompt"),
            "decode": median(answer["tokens_per_second"], unit="tokens/s", per="prompt"),
            "peak_memory": Figure(float(answer["peak_bytes"]), None, 1, "bytes", "run"),
        }
        if rounds := answer["counts"].get("drafts"):
            length = 1 + answer["counts"]["accepted_tokens"] / rounds
            found["accepted_length"] = Figure(length, None, int(rounds), "tokens", "round")
        kind = "vllm_mtp" if number else "vllm"
        figures |= {f"{kind}_{metric}": {"": figure} for metric, figure in found.items()}
        notes += [f"vLLM {answer['version']}"] if not number else []
    return figures, notes


def _asked(asked: Mapping[str, Any], *, python: str | None) -> dict[str, Any] | str:
    """What the engine's process answers, or the end of its output before it stopped."""
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "asked.json", Path(folder) / "answer.json"
        question.write_text(json.dumps(asked), encoding="utf-8")
        script = Path(__file__).with_name("engine_process.py")
        command: list[str | Path] = [python or sys.executable, script, question, answer]
        done = subprocess.run(
            command, env=os.environ | _ENVIRONMENT, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode or not answer.is_file():
            output = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            return " / ".join(output[-_LAST_LINES:]) or f"it ended with exit code {done.returncode}"
        return json.loads(answer.read_text(encoding="utf-8"))
