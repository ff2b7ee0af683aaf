"""What a run and its verbs hand to a training: held-out text, and what is refused before the first stage."""

import importlib.util
import json
from pathlib import Path

import pytest

from command import SMALL, TRAIN, write_model, write_text
from micro import write_micro
from moeslim import api, pipeline
from moeslim.data.tokens import TokenSet
from moeslim.distill.watch import read_log
from moeslim.errors import RecipeError

pytestmark = pytest.mark.bits("a run that goes on ends as one that was not stopped")

MEASURED = (*SMALL, *TRAIN, "distill.measure_every=1", "distill.measure_rows=4")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("student") / "student")


def words_of(tokens: TokenSet) -> set[bytes]:
    return {document.tokens.tobytes() for document in tokens.documents()}


def test_distill_measures_on_documents_that_it_does_not_train_on(student: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl")
    record = api.distill(str(student), tmp_path / "out", data=[str(text)], overrides=MEASURED)
    curve = read_log(tmp_path / "out.work" / "curve.jsonl")
    assert len(curve) == record["steps"] == 2
    assert all(0 < step["bits_per_byte"] < 20 for step in curve)
    trained, held = (words_of(TokenSet.open(tmp_path / "out.work" / name)) for name in ("tokens", "heldout"))
    assert trained
    assert held
    assert not trained & held
    # and without, nothing is packed for it
    api.distill(str(student), tmp_path / "not", data=[str(text)], overrides=[*SMALL, *TRAIN])
    assert not (tmp_path / "not.work" / "heldout").exists()


def test_a_cache_has_no_text_to_measure_on(student: Path, tmp_path: Path) -> None:
    text, other = write_text(tmp_path / "text.jsonl"), write_text(tmp_path / "other.jsonl", 6, seed=1)
    cache = tmp_path / "cache"
    api.cache_teacher(str(student), text, out=cache, overrides=SMALL, k=9, samples=0)
    with pytest.raises(RecipeError, match="a cache holds none; give the text that the cache was made from with --data"):
        api.distill(str(student), tmp_path / "out", teacher_cache=cache, overrides=MEASURED)
    assert not (tmp_path / "out.work").exists()
    named = [*MEASURED, f"data.heldout=[{{path: {other}}}]"]
    record = api.distill(str(student), tmp_path / "out", teacher_cache=cache, overrides=named)
    assert 0 < record["last"]["bits_per_byte"] < 20
    assert len(words_of(TokenSet.open(tmp_path / "out.work" / "heldout"))) == 6


def test_a_run_hands_its_held_out_text_to_every_training(tmp_path: Path) -> None:
    """With `final: best` another held-out text is another training; one that measures and saves otherwise is not."""
    section = {"tokens": 192, "rows_per_step": 4, "micro_rows": 4, "measure_every": 1, "measure_rows": 2}
    section |= {"save_every": 1, "final": "best"}
    light = {"schedule": "one_shot", "compare_random_init": False}
    recipe, run = write_micro(tmp_path, distill=section, **light), tmp_path / "run"
    pipeline.run(recipe, run)
    assert all("bits_per_byte" in step for step in read_log(run / "stage-1" / "curve.jsonl"))
    made = json.loads((run / "stages" / "stage-1-distill.json").read_text())["inputs"]
    assert made["chosen_by"] == TokenSet.open(run / "tokens" / "heldout").fingerprint
    assert made["distill"]["final"] == "best"
    assert not {"measure_every", "save_every", "micro_rows", "teacher_cache"} & made["distill"].keys()
    pipeline.run(recipe, run, overrides=["distill.save_every=7", "distill.measure_rows=3", "distill.keep_best=2"])


def test_what_a_training_cannot_do_is_refused_before_the_first_stage(tmp_path: Path) -> None:
    recipe = write_micro(tmp_path)
    with pytest.raises(RecipeError, match=r"distill\.train_only names dense of a model where it has none"):
        pipeline.run(recipe, tmp_path / "run", overrides=["distill.train_only=[dense]"])
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(RecipeError, match="wandb, which is not installed"):
            pipeline.run(recipe, tmp_path / "run", overrides=["distill.watch=[wandb]"])
    assert not (tmp_path / "run").exists()
