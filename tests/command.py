"""The command line inside this process, as `moeslim ...` runs it, with a tiny model and text to try it on."""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moeslim import log
from moeslim.cli.main import main
from tiny import write_tiny

TOKENIZER = Path(log.__file__).parent / "demo" / "tokenizer"
SMALL = ("data.sequence_length=32", "calibrate.sequences=8", "calibrate.rows_per_batch=4", "methods.round_to=4")
MEASURE = (
    "evaluate.documents_per_domain=2",
    "evaluate.prompt_tokens=8",
    "evaluate.new_tokens=6",
    "evaluate.speed_repeats=0",
)
TRAIN = ("distill.tokens=128", "distill.rows_per_step=2", "distill.micro_rows=2")


def settings(*keys: str) -> list[str]:
    """`--set` for each of them."""
    return [part for key in keys for part in ("--set", key)]


@dataclass(frozen=True)
class Answer:
    """How a command ended and what it said where."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document that stdout must be."""
        return json.loads(self.out)


class Command:
    """Call it with what stands behind `moeslim` on the command line."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: object) -> Answer:
        """What a command says that goes well."""
        answer = self._run(arguments)
        assert answer.code == 0, answer.err
        return answer

    def fails(self, *arguments: object) -> Answer:
        """What a command says that is refused."""
        answer = self._run(arguments)
        assert answer.code != 0, answer.out
        return answer

    def _run(self, arguments: tuple[object, ...]) -> Answer:
        self._monkeypatch.setattr(sys, "argv", ["moeslim", *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = self._capsys.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Answer(code or 0, said.out, said.err)


@pytest.fixture
def moeslim(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """The command line; what it sets in the process (messages, progress, denormals) is set back behind the test."""
    import torch

    monkeypatch.setattr(log, "_sink", log._sink)
    monkeypatch.setattr(log.logger, "handlers", list(log.logger.handlers))
    level = log.logger.level
    yield Command(capsys, monkeypatch)
    log.logger.setLevel(level)
    torch.set_flush_denormal(False)


def write_model(folder: Path, **form: Any) -> Path:
    """A tiny model of the demo tokenizer's vocabulary, with that tokenizer."""
    return write_tiny(folder, vocab_size=2048, form={"tokenizer_from": TOKENIZER, **form})


def write_text(path: Path, documents: int = 24, *, seed: int = 0) -> Path:
    """JSON lines of short made-up documents in two domains, no two alike."""
    draw = random.Random(seed)
    words = ("the", "router", "sends", "every", "token", "to", "two", "experts", "and", "a", "shared", "one", "more")
    lines = [
        {"text": " ".join(draw.choices(words, k=40)), "domain": ("prose", "verse")[number % 2]}
        for number in range(documents)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
