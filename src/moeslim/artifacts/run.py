"""A run folder: which stages are finished, from which inputs, and whether their outputs are current.

RUN/run.json              schema and version of the code that made the folder
RUN/stages/<name>.json    inputs (as given, and their fingerprint), outputs (path -> content fingerprint)
RUN/<output>              what the stage wrote: a folder or a file, committed before its record
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeslim import __version__
from moeslim.artifacts.commit import discard, read_json, write_json
from moeslim.artifacts.fingerprint import content_fingerprint, fingerprint
from moeslim.artifacts.lock import run_lock
from moeslim.errors import RunError
from moeslim.log import logger

SCHEMA = 1


@contextmanager
def open_run(folder: Path | str, *, redo: bool = False) -> Iterator["Run"]:
    """Yield the run at `folder`, new or half finished, locked for this process; RunError where that cannot be."""
    folder = Path(folder)
    _check_ours(folder)
    with run_lock(folder):
        yield Run(folder, redo=redo)


class Run:
    """The stages of one run folder. With `redo`, a stage whose inputs or outputs changed is done anew, not refused."""

    def __init__(self, folder: Path | str, *, redo: bool = False) -> None:
        self.folder = Path(folder)
        self.redo = redo
        _check_ours(self.folder)
        if not (self.folder / "run.json").exists():
            write_json(self.folder / "run.json", {"schema": SCHEMA, "moeslim": __version__})

    def path(self, name: str) -> Path:
        """Where the output `name` lies or will lie."""
        return self.folder / name

    @contextmanager
    def stage(
        self,
        name: str,
        inputs: Mapping[str, object],
        *,
        outputs: Sequence[str],
        optional: Sequence[str] = (),
        resumes: bool = False,
    ) -> Iterator[bool]:
        """Yield whether stage `name` is to be done (see `is_current`); if so, record its outputs when the block ends.

        A block that raises is not recorded. `optional`: outputs that it may leave out. `resumes`: what an earlier block
        left without a record is not removed (unless with `redo`), since this one knows whether to resume from it.
        """
        cleared = [*outputs, *optional] if self.redo or not resumes else []
        due = not self.is_current(name, inputs, outputs=cleared)
        if due:
            logger.info("%s: begins", name)
        began = time.monotonic()
        yield due
        if due:
            logger.info("%s: done after %.0f s", name, time.monotonic() - began)
            made = [*outputs, *(output for output in optional if self.path(output).exists())]
            self.finish(name, inputs, outputs=made)

    def is_current(self, name: str, inputs: Mapping[str, object], *, outputs: Iterable[str] = ()) -> bool:
        """True if stage `name` was finished from the same inputs and its outputs are untouched: skip it.

        False: do it. Then nothing lies at the recorded outputs nor at those named in `outputs` (a run killed between
        writing an output and recording it leaves one), so the stage can commit there. RunError, without `redo`,
        where the inputs differ from the recorded ones or an output was edited: silently doing it anew would destroy it.
        """
        record, outputs = self._record(name), list(outputs)
        if record is None:
            self._clear(outputs)
            return False
        self._check_inside(name, [output for output in record["outputs"] if output not in outputs])
        gone = [output for output in record["outputs"] if not (self.folder / output).exists()]
        difference = f"its output {', '.join(gone)} is gone" if gone else self._difference(record, inputs)
        if difference is None:
            logger.info("%s: already done in %s, skipped", name, self.folder)
            return True
        if not gone and not self.redo:
            raise RunError(f"{self.folder}: stage {name}: {difference}; choose another output folder or pass --redo")
        logger.info("%s: %s; doing it again", name, difference)
        self._record_path(name).unlink()  # before its outputs: a kill between the two must not leave a false record
        self._clear([*record["outputs"], *outputs])
        return False

    def finish(self, name: str, inputs: Mapping[str, object], *, outputs: Iterable[str] = ()) -> None:
        """Record that stage `name` made `outputs` (paths relative to the run folder) from `inputs` (JSON-able)."""
        record = {
            "schema": SCHEMA,
            "stage": name,
            "moeslim": __version__,
            "inputs_fingerprint": fingerprint(dict(inputs)),
            "inputs": dict(inputs),
            "outputs": {output: content_fingerprint(self.folder / output) for output in outputs},
        }
        write_json(self._record_path(name), record)

    def finished(self, name: str) -> bool:
        """Whether stage `name` was ever finished here, from whatever inputs."""
        return self._record_path(name).exists()

    def outputs(self, name: str) -> dict[str, str]:
        """Path -> content fingerprint of what stage `name` wrote; RunError if it is not finished."""
        record = self._record(name)
        if record is None:
            raise RunError(f"{self.folder}: stage {name} is not finished; run the stages before first")
        return dict(record["outputs"])

    def _record_path(self, name: str) -> Path:
        return self.folder / "stages" / f"{name}.json"

    def _record(self, name: str) -> dict[str, Any] | None:
        path = self._record_path(name)
        if not path.exists():
            return None
        record = read_json(path)
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise RunError(f"{path}: written by another version of moeslim (schema {SCHEMA} is wanted here)")
        outputs = record.get("outputs")
        if not isinstance(outputs, dict) or not isinstance(record.get("inputs"), dict):
            raise RunError(f"{path}: no record of a stage (inputs, outputs); remove it to do the stage again")
        return record

    def _check_inside(self, name: str, outputs: Iterable[str]) -> None:
        """RunError where a record, which anyone may have written, names an output that is not ours to remove."""
        for output in outputs:
            if not output or Path(output).is_absolute() or ".." in Path(output).parts:
                raise RunError(
                    f"{self._record_path(name)}: the output {output!r} lies outside the run folder; remove the record"
                )

    def _difference(self, record: dict[str, Any], inputs: Mapping[str, object]) -> str | None:
        """Why the record is not current, as text; None if it is."""
        if record.get("inputs_fingerprint") != fingerprint(dict(inputs)):
            changed = ", ".join(_changed(record["inputs"], dict(inputs)))
            return f"its output was made from other inputs ({changed})"
        for output, recorded in record["outputs"].items():
            if content_fingerprint(self.folder / output) != recorded:
                return f"its output {output} was changed since the stage wrote it"
        return None

    def _clear(self, outputs: Iterable[str]) -> None:
        for output in outputs:
            discard(self.folder / output)


def _changed(before: Any, now: Any, *, place: str = "") -> list[str]:
    """`place: before -> now` for each leaf that differs, at most five."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        found = [
            line for key in keys for line in _changed(before.get(key), now.get(key), place=f"{place}.{key}".strip("."))
        ]
        return found if len(found) <= 5 else [*found[:5], f"and {len(found) - 5} more"]
    if fingerprint(before) == fingerprint(now):
        return []
    return [f"{place}: {_short(before)} -> {_short(now)}"]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_ours(folder: Path) -> None:
    """Raise RunError if `folder` holds something and is no run of ours (dot files, such as the lock, do not count)."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: a file stands where the run folder should be; choose another output folder")
    if not folder.is_dir() or (folder / "run.json").exists():
        return
    if any(not path.name.startswith(".") for path in folder.iterdir()):
        raise RunError(f"{folder}: not empty and not a run of moeslim; choose another output folder")
