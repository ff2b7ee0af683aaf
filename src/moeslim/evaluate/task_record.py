"""What one model scored on tasks of lm-eval, question by question, and the file that keeps it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import read_json, write_json
from moeslim.errors import RunError
from moeslim.figures import Figure

SCHEMA = 1


@dataclass(frozen=True)
class TaskScore:
    """One task. `metrics` are lm-eval's own values and standard errors, `main` the one that is compared.

    `items` are its scores per question, in the order of the questions, None where its value is not their mean (a
    perplexity, a corpus score); `chance` is what guessing scores on each question, None where that is not known.
    `inputs` is the fingerprint of all that the figures depend on, `questions` of what was asked.
    """

    task: str
    inputs: str
    questions: str
    output_type: str
    fewshot: int
    version: str
    n: int
    main: str
    metrics: Mapping[str, Mapping[str, float | None]]
    items: Sequence[float] | None = None
    chance: Sequence[float] | None = None

    @property
    def figure(self) -> Figure:
        """The main metric as lm-eval gives it."""
        values = self.metrics[self.main]
        value = values["value"]
        assert value is not None
        unit = "share" if self.items is not None and all(0 <= item <= 1 for item in self.items) else ""
        return Figure(value, values["stderr"], self.n, unit, "question")


@dataclass(frozen=True)
class TaskRecord:
    """Every task that one model was measured on, whenever that was."""

    label: str
    model: str
    environment: Mapping[str, Any]
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Put the record at `path`, all or nothing."""
        write_json(path, {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> "TaskRecord":
        """The record at `path`; RunError if there is none, or none of this schema."""
        value = read_json(path)
        if not isinstance(value, Mapping) or value.get("schema") != SCHEMA:
            raise RunError(f"{path}: not task scores of schema {SCHEMA}; evaluate again into another folder")
        try:
            facts = {name: content for name, content in value.items() if name != "schema"}
            facts["tasks"] = {name: TaskScore(**task) for name, task in value["tasks"].items()}
            return cls(**facts)
        except (AttributeError, KeyError, TypeError) as problem:
            raise RunError(f"{path}: broken task scores ({problem}); remove the file and evaluate again") from None
