"""What is made of an engine's answer, what is refused, and, where there is vLLM, its answer itself."""

import json
import sys
from pathlib import Path

import pytest

from moeslim.demo import teacher_path
from moeslim.errors import RecipeError
from moeslim.evaluate.engine import check_engine, engine_figures
from moeslim.evaluate.settings import Settings
from moeslim.recipe import Evaluate
from tiny import changed

SERVING = Path(__file__).parents[1] / ".venv-serve/bin/python"
SETTINGS = Settings(Evaluate(), window=1024, seed=0, dtype="float32", device="cpu", max_memory=None)
PROMPTS = [[0, 5, 6], [0, 7, 8], [0, 9, 4]]


def interpreter(folder: Path, body: str) -> str:
    """An executable that is called as a Python would be: SCRIPT ASKED ANSWER."""
    path = folder / "python"
    head = f"#!{sys.executable}\nimport json, pathlib, sys\n"
    path.write_text(f"{head}if sys.argv[1] != '-c':\n    asked, answer = map(pathlib.Path, sys.argv[2:])\n{body}")
    path.chmod(0o755)
    return str(path)


def test_medians_over_prompts_and_the_engines_own_count(tmp_path: Path) -> None:
    body = """
told = json.loads(asked.read_text())
drafts = told["drafts"]
answer.write_text(json.dumps({
    "version": "1.2", "first_seconds": [0.5, 0.1, 0.2], "tokens_per_second": [10 + drafts, 30 + drafts, 20 + drafts],
    "peak_bytes": 1000 + len(told["prompts"]), "counts": {"drafts": 40, "accepted_tokens": 30} if drafts else {},
}))
"""
    python = interpreter(tmp_path, body)
    figures, notes = engine_figures(tmp_path, PROMPTS, new_tokens=4, drafts=(0, 2), python=python)
    told = {metric: (figure[""].value, figure[""].n) for metric, figure in figures.items()}
    assert told == {
        "vllm_prefill_seconds": (0.2, 3),
        "vllm_decode": (20.0, 3),
        "vllm_peak_memory": (1003.0, 1),
        "vllm_mtp_prefill_seconds": (0.2, 3),
        "vllm_mtp_decode": (22.0, 3),
        "vllm_mtp_peak_memory": (1003.0, 1),
        "vllm_mtp_accepted_length": (1.75, 40),  # 30 drafts kept in 40 rounds, and one token of the trunk's in each
    }
    assert notes == ["vLLM 1.2"]


def test_an_engine_that_stops_is_a_note_and_no_figure(tmp_path: Path) -> None:
    python = interpreter(tmp_path, "sys.exit('loading\\nRuntimeError: no kernel for this head')")
    figures, notes = engine_figures(tmp_path, PROMPTS, new_tokens=4, drafts=(0, 2), python=python)
    assert figures == {}
    assert notes == [
        "vLLM measured nothing: loading / RuntimeError: no kernel for this head",
        "vLLM with 2 drafts measured nothing: loading / RuntimeError: no kernel for this head",
    ]


def test_what_cannot_be_asked_is_said_first(tmp_path: Path) -> None:
    bare = interpreter(tmp_path, "")  # ends well whatever it is asked, as one that has vLLM does
    check_engine(bare)
    Path(bare).write_text(f"#!{sys.executable}\nimport sys; sys.exit(1)\n")
    with pytest.raises(RecipeError, match=r"has no vLLM; install it there, or name .* in evaluate\.engine_python"):
        check_engine(bare)
    with pytest.raises(RecipeError, match="cannot be started"):
        changed(SETTINGS, engine="vllm", engine_python=str(tmp_path / "gone")).check()
    with pytest.raises(RecipeError, match="speed_repeats is 0"):
        changed(SETTINGS, engine="vllm", speed_repeats=0).check()


@pytest.mark.slow
@pytest.mark.skipif(not SERVING.exists(), reason="no environment with vLLM (make serve-check makes one)")
def test_vllm_itself_answers() -> None:
    """On a CPU, the demo's teacher: it starts, writes, and drafts with the MTP head."""
    check_engine(str(SERVING))
    prompts = [[0, *range(20 + i, 60 + i)] for i in range(2)]
    figures, notes = engine_figures(teacher_path(), prompts, new_tokens=12, drafts=(0, 2), python=str(SERVING))
    assert len(notes) == 1, json.dumps(notes)
    for kind in ("vllm", "vllm_mtp"):
        assert figures[f"{kind}_decode"][""].value > 0
        assert figures[f"{kind}_prefill_seconds"][""].n == 2
        assert figures[f"{kind}_peak_memory"][""].value > 1e8
    assert 1 <= figures["vllm_mtp_accepted_length"][""].value <= 3
