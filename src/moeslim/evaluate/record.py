"""The record that keeps all figures of one model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import read_json, write_json
from moeslim.errors import RunError
from moeslim.figures import Figure

SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """Everything measured on one model.

    `figures[metric][domain]`, domain "" for the whole; `load[layer key][expert]` is the expert's share of the
    assignments over its fair share and `load_se` its error over documents; `documents` are columns of per-document
    sums (for paired differences); `inputs` is the fingerprint of all that the figures depend on; `notes` say what was
    left out, and why.
    """

    label: str
    inputs: str
    model: str
    teacher: str | None
    data: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    figures: Mapping[str, Mapping[str, Figure]]
    load: Mapping[str, Sequence[float]] = field(default_factory=dict)
    load_se: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    documents: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    samples: Sequence[Mapping[str, str]] = ()
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file, with the schema's version."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, where: str) -> "Record":
        """The record that `to_json` wrote; RunError, naming `where`, if it is none of this schema."""
        if not isinstance(value, Mapping) or value.get("schema") != SCHEMA:
            raise RunError(f"{where}: not a record of schema {SCHEMA}; evaluate again")
        try:
            facts = {name: content for name, content in value.items() if name != "schema"}
            facts["figures"] = {
                metric: {domain: Figure(**figure) for domain, figure in domains.items()}
                for metric, domains in value["figures"].items()
            }
            return cls(**facts)
        except (AttributeError, KeyError, TypeError, ValueError) as problem:
            raise RunError(f"{where}: a broken record ({problem}); evaluate again") from None

    def write(self, path: Path) -> None:
        """Put the record at `path`, all or nothing."""
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> "Record":
        """The record at `path`; RunError if there is none."""
        return cls.from_json(read_json(path), where=str(path))
