"""What a disturbed run left, held against one that nobody disturbed."""

import json
from pathlib import Path

from moeslim.artifacts.fingerprint import hash_file
from moeslim.checkpoint.verify import verify


def results(run: Path) -> dict[str, object]:
    """What must not depend on interruptions: the bytes of every file but times, and all curves without their times."""
    found: dict[str, object] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.name == "curve.jsonl":
            found[name] = [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]
        elif path.is_file() and path.name != ".lock" and not name.startswith(("records/", "report.html")):
            found[name] = hash_file(path)
    return found


def differences(run: Path, whole: Path, *, states: bool = True) -> list[str]:
    """Names of what is not as in the undisturbed run: files, what was left behind beside them, figures.

    Without `states` those of trainings do not count, as where a signal saved one at a step of its own.
    """
    ours, theirs = results(run), results(whole)
    names = [name for name in sorted({*ours, *theirs}) if states or "/states/" not in name]
    found = [name for name in names if ours.get(name) != theirs.get(name)]
    for path in (whole / "records").iterdir():
        one, other = (_measured(folder / "records" / path.name) for folder in (run, whole))
        if one != other:
            found.append(f"records/{path.name}")
    return found


def _measured(record: Path) -> dict[str, object] | None:
    """A record without its times; None where there is none."""
    if not record.is_file():
        return None
    facts = json.loads(record.read_text())
    return {**facts, "figures": {metric: facts["figures"].get(metric) for metric in ("bits_per_byte", "kl", "top1")}}


class Watch:
    """Looks at a run folder after each kill: what stands under a final name must be whole."""

    def __init__(self, run: Path) -> None:
        self.run, self.seen = run, set[tuple[str, int]]()

    def look(self) -> None:
        """AssertionError for a model under a final name that is not whole."""
        for config in self.run.rglob("config.json"):
            folder = config.parent
            place = (str(folder), config.stat().st_ino)
            if place in self.seen or any(part.startswith(".") for part in folder.relative_to(self.run).parts):
                continue
            assert verify(folder).problems == []
            self.seen.add(place)


def where(run: Path, whole: Path) -> str:
    """The stage that a killed run was in: the first of the undisturbed one's that has no record."""
    order = sorted((whole / "stages").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    missing = [path.stem for path in order if not (run / "stages" / path.name).exists()]
    if missing:
        return missing[0] if (run / "tokens" / "heldout").exists() else "tokens"
    return (
        "report"
        if all((run / "records" / path.name).exists() for path in (whole / "records").iterdir())
        else "evaluate"
    )
