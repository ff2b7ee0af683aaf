"""A training small enough for many processes on two cores, and the ways to disturb it in all of them at once."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

from micro import WORDS, write_tokenizer
from moeslim.data.corpus import read_corpus
from moeslim.data.tokens import TokenSet, pack
from moeslim.distill import loop
from moeslim.distill.run import TrainPaths, distill
from moeslim.distill.settings import TrainSettings
from moeslim.distill.watch import read_log
from moeslim.errors import MoeslimError
from moeslim.machine import parallel
from moeslim.model.student import Student
from tiny import changed, train_settings, write_tiny

STEPS, ROWS, LENGTH = 30, 8, 12


def write_home(home: Path) -> Path:
    """Teacher and student of different widths with a token per byte, words to learn, and digits held out.

    The more it knows of words the less it thinks of digits: on the text held out the first state is the best.
    """
    form = {"tokenizer_from": write_tokenizer(home / "tokenizer")}
    for name, width, seed in (("teacher", 16, 5), ("student", 24, 3)):
        own = {"hidden_size": width, "seed": seed, "num_hidden_layers": 2, "initializer_range": 0.1}
        own |= {"moe_intermediate_size": 16}  # bf16's grouped products take multiples of 8
        write_tiny(home / name, form=form, vocab_size=257, num_experts=4, eos_token_id=0, **own)
    learnt = "\n".join(f"{one} of the {other}" for one in WORDS for other in WORDS)
    for part, content in (("tokens", learnt), ("heldout", "".join(map(str, range(500))))):
        text = home / f"{part}.txt"
        text.write_text(content)
        pack(read_corpus([(text, None)]), home / "student", out_folder=home / part, sequence_length=LENGTH, seed=0)
    return home


def settings(micro_rows: int, **changes: Any) -> TrainSettings:
    """Every term has a weight; two micro-batches per step where `micro_rows` times the processes is 4."""
    base = train_settings(STEPS * ROWS * LENGTH, rows_per_step=ROWS, micro_rows=micro_rows, learning_rate=3e-3)
    return changed(base, **{"depths": 2, "alpha": 1e-2, "clip": 0.25, "save_every": 10, "keep_last": 9, **changes})


def learn(home: Path, name: str, teacher: str = "teacher", **changes: Any) -> None:
    """A stage from folder to folder, in `home/name`."""
    distill(
        home / "student",
        home / teacher,
        tokens=TokenSet.open(home / "tokens"),
        out=home / name / "model",
        settings=settings(**changes),
        paths=TrainPaths(home / name, heldout=TokenSet.open(home / "heldout")),
    )


def curve(home: Path, name: str) -> list[dict[str, Any]]:
    """What a training logged, without its times."""
    return [{**record, "seconds": 0} for record in read_log(home / name / "curve.jsonl")]


def leave_off(home: Path, name: str, *, of: str, step: int) -> None:
    """A training that was killed after `step` steps of the training `of`, and had logged more."""
    state = f"states/step-{step:07d}"
    shutil.copytree(home / of / state, home / name / state)
    shutil.copy(home / of / "curve.jsonl", home / name)


def refusal(home: Path, name: str, **changes: Any) -> str:
    """What this process says against a training."""
    try:
        learn(home, name, **changes)
    except MoeslimError as problem:
        return f"{type(problem).__name__}: {problem}"
    return "nothing"


def stop_in_step(home: Path, name: str, *, rank: int, step: int) -> str:
    """Train until SIGTERM reaches one rank in `step`; what this rank raised."""
    accumulate, calls = loop.accumulate, 0

    def disturbed(*args: Any, **named: Any) -> loop.Gradient:
        nonlocal calls
        calls += 1
        if (parallel.world().rank, calls) == (rank, step):
            os.kill(os.getpid(), signal.SIGTERM)
        return accumulate(*args, **named)

    with patch.object(loop, "accumulate", disturbed):
        return refusal(home, name, micro_rows=2)


def spoil(home: Path, name: str, *, rank: int, micro_batch: int) -> str:
    """Train with a loss that is NaN in one micro-batch of one rank; what this rank raised."""
    forward, calls = Student.forward, 0

    def spoilt(self: Student, *args: Any, **named: Any) -> Any:
        nonlocal calls
        found = forward(self, *args, **named)
        if not self.training:  # the teacher
            return found
        calls += 1
        hit = (parallel.world().rank, calls) == (rank, micro_batch)
        return found._replace(loss=found.loss * float("nan")) if hit else found

    with patch.object(Student, "forward", spoilt):
        return refusal(home, name, micro_rows=2, save_every=1)
