"""What each stage of a run did, from its folder's files: plan, config and receipt of the cut, statistics, log."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import read_json
from moeslim.checkpoint.config_json import read_config
from moeslim.errors import RunError
from moeslim.families import Count, Shape, count, is_mtp
from moeslim.report.cuts import CutFacts
from moeslim.report.training import Training, read_trainings


@dataclass(frozen=True)
class StageFacts:
    """One stage: what its model is and what it took; None where its file is not there.

    `sizes` after the plan, and whether it says that there is an `mtp` head; `counted` and `bytes` of the cut model; the
    `tokens` of the calibration, and the fingerprint of the model that was `observed` there.
    """

    number: int
    sizes: Mapping[str, int] | None = None
    mtp: bool = False
    counted: Count | None = None
    bytes: int | None = None
    tokens: int | None = None
    observed: str | None = None
    training: Training | None = None


def stage_folders(folder: Path) -> dict[int, Path]:
    """The folders stage-1, stage-2, ... of a run by their number, in order."""
    found = [(int(m[1]), path) for path in folder.iterdir() if (m := re.fullmatch(r"stage-(\d+)", path.name))]
    return dict(sorted(found))


def read_stages(folders: Mapping[int, Path], cut: CutFacts | None) -> tuple[StageFacts, ...]:
    """Every stage of a run; `cut` is the replay of the existing plans. RunError or CheckpointError name a file."""
    planned = [number for number, path in folders.items() if (path / "plan.json").is_file()]
    after = dict(zip(planned, cut.sizes[1:], strict=True)) if cut else {}
    mtp = cut is not None and any(is_mtp(layer.key) for layer in cut.layers)
    trainings = read_trainings(list(folders.values()))
    return tuple(
        replace(_stage(number, path), sizes=after.get(number), mtp=mtp, training=training)
        for (number, path), training in zip(folders.items(), trainings, strict=True)
    )


def _stage(number: int, path: Path) -> StageFacts:
    """What statistics and cut hold."""
    cut = path / "cut"
    receipt, seen = cut / "receipt.json", _values_in(path / "stats" / "stats.json", "tokens", "model")
    return StageFacts(
        number=number,
        counted=count(Shape.from_config(read_config(cut))) if (cut / "config.json").is_file() else None,
        bytes=_weights(receipt) if receipt.is_file() else None,
        tokens=seen.get("tokens"),
        observed=seen.get("model"),
    )


def _values_in(path: Path, *names: str) -> dict[str, Any]:
    """The values of `names` in the file at `path`; {} where there is no file."""
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict) or any(name not in value for name in names):
        raise RunError(f"{path}: does not tell {' and '.join(names)}; make it again")
    return {name: value[name] for name in names}


def _weights(receipt: Path) -> int:
    """Bytes of the weights that a receipt lists."""
    files = _values_in(receipt, "files")["files"]
    try:
        return sum(int(entry["bytes"]) for name, entry in files.items() if name.endswith(".safetensors"))
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise RunError(f"{receipt}: a broken receipt ({type(problem).__name__}: {problem}); cut again") from None
