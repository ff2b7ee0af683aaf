"""Everything an interrupted training needs to resume bit-identically, as a folder committed by rename.

    step-0000123/state.json     step, cursor, random state, Adam's step counts, bits per byte, settings, fingerprint
    step-0000123/tensors/       weights/NAME, exp_avg/NAME and exp_avg_sq/NAME, each process's parts of them, fp32

NAME is a tensor's name on disk, experts stacked. A state of any number of processes can be resumed by any other
(distill/stored.py).
"""

import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moeslim.artifacts.commit import committed_folder, discard, read_json, write_json
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.writer import ShardWriter
from moeslim.data.cursor import Cursor
from moeslim.distill.settings import MAY_CHANGE, TrainSettings, differences
from moeslim.distill.stored import Stored, Writing, seal, write
from moeslim.errors import MoeslimError, RunError
from moeslim.log import logger
from moeslim.machine import parallel
from moeslim.model.sharding import as_shared, rows_here
from moeslim.model.student import Student

SCHEMA = 2
MOMENTS = ("exp_avg", "exp_avg_sq")
FACTS, TENSORS = "state.json", "tensors"
_PATIENCE = timedelta(days=1)  # a process may write its part of a large state for long while the others are done


@dataclass(frozen=True)
class Position:
    """How far a training is: steps done, and where in the data the next one begins."""

    step: int
    cursor: Cursor


def parameters_by_disk_name(student: Student) -> dict[str, torch.nn.Parameter]:
    """The trainable tensors under the names of `Student.disk_state`."""
    state = student.disk_state()
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.nn.Parameter)}


def step_folders(root: Path) -> list[Path]:
    """The committed states under `root`, oldest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if re.fullmatch(r"step-\d{7,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def ranking(bits: Mapping[Path, float | None]) -> list[Path]:
    """The states that were measured, lowest bits per byte first, of equal ones the earlier; `bits` is oldest first."""
    measured = {folder: value for folder, value in bits.items() if value is not None}
    return sorted(measured, key=lambda folder: measured[folder])


def forget_others(root: Path, fingerprint: str) -> None:
    """Remove the states under `root` that were made with other settings, models or data than `fingerprint` names."""
    for folder in step_folders(root):
        if read_facts(folder)["fingerprint"] != fingerprint:
            discard(folder)


def read_facts(folder: Path) -> dict[str, Any]:
    """The contents of a state's state.json; RunError where it is no such file, or of another version."""
    facts = read_json(folder / FACTS)
    schema = facts.get("schema") if isinstance(facts, dict) else None
    if schema != SCHEMA:
        raise RunError(
            f"{folder}: a training state of schema {schema}, this version reads {SCHEMA}; "
            f"go on with the version that wrote it, or remove {folder.parent} to start again"
        )
    _adam_steps(facts, folder)
    try:
        Cursor(**facts["cursor"])
        sound = len(bytes.fromhex(facts["random"])) == torch.get_rng_state().numel() and facts["step"] >= 0
        kinds = {"step": int, "cursor": dict, "fingerprint": str, "settings": dict, "config": dict, "random": str}
        sound = sound and all(type(facts[key]) is kind for key, kind in kinds.items())
        bits = facts["bits_per_byte"]
        sound = sound and (bits is None or isinstance(bits, int | float))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise RunError(
            f"{folder / FACTS}: not the facts of a training state; remove {folder} to resume from the one before"
        )
    return facts


def _adam_steps(facts: Any, folder: Path) -> dict[str, int]:
    steps = facts.get("adam_steps") if isinstance(facts, dict) else None
    if not isinstance(steps, dict) or not all(type(count) is int and count >= 0 for count in steps.values()):
        raise RunError(f"{folder / FACTS}: adam_steps must give a number of steps per tensor; remove {folder}")
    return steps


class States:
    """The states of one training under `root`, which all its processes see; each makes one of these and calls the same.

    A context manager: leaving it, by an error too, finishes the save that is under way.
    """

    def __init__(self, root: Path, *, settings: TrainSettings, fingerprint: str) -> None:
        self.root, self.settings, self.fingerprint = root, settings, fingerprint
        world = parallel.world()
        self._leads, self._alone = world.rank == 0, world.size == 1
        asked = settings.distill.async_save
        self._background = torch.device(settings.device).type == "cuda" if asked is None else asked
        # A group of its own: a save in the background must not come between the collectives of the steps.
        self._group = None if self._alone else dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._open: tuple[ExitStack, Path, Writing] | None = None

    def __enter__(self) -> "States":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except (MoeslimError, RuntimeError) as failed:
            if problem is None:
                raise
            logger.warning("%s", failed)  # what ended the training is the news

    def save(
        self, position: Position, student: Student, *, optimizer: torch.optim.Optimizer, bits: float | None = None
    ) -> None:
        """Write the state after `position.step` steps; `bits` is its bits per byte on held-out text, if measured.

        In the background this returns as soon as the tensors are copied to memory of their own; a save that is still
        under way is waited for. Raises ResourceError where the disk is full.
        """
        self.wait()
        tensors, steps = _tensors(student, optimizer)
        folder = self.root / f"step-{position.step:07d}"
        with ExitStack() as place:
            temporary = None
            if self._leads:
                temporary = place.enter_context(committed_folder(folder))
                write_json(temporary / FACTS, self._facts(position, student, steps=steps, bits=bits))
            temporary = parallel.gather(temporary)[0]  # no process writes there before it is cleared
            assert temporary is not None
            writing = write(tensors, temporary / TENSORS, group=self._group, background=self._background)
            self._open = place.pop_all(), temporary / TENSORS, writing
        if not self._background:
            self.wait()

    def poll(self) -> None:
        """Commit the save in the background if it has ended; raises what went wrong in it."""
        if self._open is not None and self._open[-1].done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save that is under way and commit it; raises what went wrong in it."""
        if self._open is None:
            return
        (place, folder, writing), self._open = self._open, None
        with place:  # by its end the folder is renamed, or gone after an exception
            writing.wait()
            if self._leads:  # for whom the wait is over when every process has written
                seal(folder)
        self._tidy()

    def best(self) -> Path | None:
        """The state of the lowest bits per byte, None where none was measured."""
        self.wait()
        ranked = ranking(self._bits()) if self._leads else []
        return parallel.gather(ranked[0] if ranked else None)[0]

    def resume(self, student: Student, optimizer: torch.optim.Optimizer) -> Position | None:
        """Restore the newest state into student, optimizer and torch's generator; None if there is none.

        What killed saves and removals left goes. Raises RunError where the state was made with other settings, models
        or data.
        """
        folder = None
        if self._leads:
            for left in self.root.glob(".step-*"):
                shutil.rmtree(left)
            folder = next(reversed(step_folders(self.root)), None)
        folder = parallel.gather(folder)[0]
        if folder is None:
            return None
        facts = read_facts(folder)
        self._check(folder, facts)
        tensors = _weights(student)
        for name, parameter in parameters_by_disk_name(student).items():
            if steps := facts["adam_steps"].get(name):
                found = {moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS}
                tensors |= {f"{moment}/{name}": tensor for moment, tensor in found.items()}
                _give_moments(optimizer, parameter, steps=steps, moments=found)
        Stored(folder / TENSORS).fill(tensors)
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(facts["random"]), dtype=torch.uint8))
        self._tidy()  # a kill may have come between a save and the removals after it
        return Position(step=facts["step"], cursor=Cursor(**facts["cursor"]))

    def _facts(
        self, position: Position, student: Student, *, steps: dict[str, int], bits: float | None
    ) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "step": position.step,
            "cursor": position.cursor.state(),
            "fingerprint": self.fingerprint,
            "settings": self.settings.facts(),
            "bits_per_byte": bits,
            "processes": parallel.world().size,
            "config": student.config,
            "adam_steps": steps,
            "random": torch.get_rng_state().numpy().tobytes().hex(),
        }

    def _check(self, folder: Path, facts: Mapping[str, Any]) -> None:
        again = f"or remove {self.root} to start again"
        if facts["fingerprint"] == self.fingerprint:
            return
        changed = differences(facts["settings"], self.settings.facts())
        others = f"other settings ({'; '.join(changed)})" if changed else "other models, data or place in the run"
        rule = f" ({MAY_CHANGE})" if changed else ""
        raise RunError(f"{folder}: this training state was made with {others}; restore them to resume{rule}, {again}")

    def _bits(self) -> dict[Path, float | None]:
        return {folder: read_facts(folder)["bits_per_byte"] for folder in step_folders(self.root)}

    def _tidy(self) -> None:
        """Remove all states but the newest `keep_last`, of which one stays in any case, and the best `keep_best`."""
        if not self._leads:
            return
        bits = self._bits()
        section = self.settings.distill
        kept = {*list(bits)[-max(section.keep_last, 1) :], *ranking(bits)[: section.keep_best]}
        for old in [folder for folder in bits if folder not in kept]:
            discard(old)


def load_weights(folder: Path, student: Student) -> None:
    """Fill the student, sharded or not, with the weights of a state folder; RunError if they are another model's."""
    Stored(folder / TENSORS).fill(_weights(student))


def load_moments(folder: Path, student: Student, *, optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimizer from a folder of `slice_moments`; tensors without moments there, or frozen, start empty.

    A moment whose shape is not its weight's means that a cut was not applied to it: RunError.
    """
    steps = _adam_steps(read_json(folder / FACTS), folder)
    readers = {moment: Reader(folder / moment) for moment in MOMENTS}
    for name, parameter in parameters_by_disk_name(student).items():
        if not steps.get(name) or not parameter.requires_grad:
            continue
        found = {moment: reader.tensor(name) for moment, reader in readers.items()}
        for moment, tensor in found.items():
            if tensor.shape != parameter.shape:
                raise RunError(
                    f"{folder / moment}: {name} has shape {tuple(tensor.shape)}, the weight {tuple(parameter.shape)}; "
                    "slice the moments with the same plan, or use optimizer_state: reset"
                )
        own = {moment: _part_like(parameter, tensor) for moment, tensor in found.items()}
        _give_moments(optimizer, parameter, steps=steps[name], moments=own)
    for reader in readers.values():
        reader.release()


def slice_moments(folder: Path, out: Path, *, cut: Callable[[Path, Path], object]) -> None:
    """Write to `out` the moments of state `folder` as they are after a cut, for a stage that starts from the cut model.

    Each moment becomes a whole checkpoint under the weights' own names, tensor by tensor (zeros where there is none:
    frozen, or no gradient yet); then `cut(source, target)` writes what the stage's plan leaves of it, without the
    rescale of the norms (a moment is no weight). So moments are sliced as weights are. Layers may have been renumbered,
    so all tensors get the largest step count; they differ only for weights that no gradient reached.
    """
    facts = read_facts(folder)
    steps = max(facts["adam_steps"].values(), default=0)
    with committed_folder(out) as temporary:
        for moment in MOMENTS:
            source = temporary / "before"
            _write_checkpoint(folder, moment, out=source, config=facts["config"])
            cut(source, temporary / moment)
            shutil.rmtree(source)
        names = Reader(temporary / MOMENTS[0]).rows
        write_json(temporary / FACTS, {"schema": SCHEMA, "adam_steps": dict.fromkeys(names, steps)})


def _weights(student: Student) -> dict[str, torch.Tensor]:
    return {f"weights/{name}": tensor.detach() for name, tensor in student.disk_state().items()}


def _tensors(student: Student, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """What a state holds by key, and Adam's steps by name; a tensor that no gradient has reached has no moments."""
    tensors, steps = _weights(student), {}
    for name, parameter in parameters_by_disk_name(student).items():
        if held := optimizer.state.get(parameter):
            steps[name] = int(held["step"])
            tensors |= {f"{moment}/{name}": held[moment] for moment in MOMENTS}
    return tensors, steps


def _write_checkpoint(folder: Path, kind: str, *, out: Path, config: Mapping[str, Any]) -> None:
    """One kind of a state's tensors as a checkpoint in the stacked layout; zeros for those that have none."""
    stored = Stored(folder / TENSORS)
    sizes = {key.removeprefix("weights/"): size for key, size in stored.sizes.items() if key.startswith("weights/")}
    out.mkdir()
    writer = ShardWriter(out, [(name, tuple(size), "F32") for name, size in sizes.items()])
    for name in writer.order:
        tensor = torch.zeros(sizes[name])
        if f"{kind}/{name}" in stored.sizes:
            stored.fill({f"{kind}/{name}": tensor})
        writer.add(name, tensor)
    writer.finish()
    write_json(out / "config.json", dict(config))


def _give_moments(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, *, steps: int, moments: dict[str, torch.Tensor]
) -> None:
    optimizer.state[parameter] = {"step": torch.tensor(float(steps), device=parameter.device), **moments}


def _part_like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """This process's own copy of a tensor in a file, sharded and placed as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device, copy=True)
    own = tensor[rows_here(parameter)].to(parameter.device, copy=True)
    return as_shared(own, parameter)
