"""Everything an interrupted training needs to go on bit-identically, as a folder committed by rename.

    step-0000123/state.json                         step, cursor, random state, Adam's step counts, fingerprint
    step-0000123/{weights,exp_avg,exp_avg_sq}/      config.json and model.safetensors, fp32, experts stacked

The three sub-folders have the form of a checkpoint in the stacked layout, under the weights' own disk names: what
slices a checkpoint by a plan slices the optimizer's moments in the same way.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moeslim.artifacts.commit import committed_folder, discard, read_json, write_json
from moeslim.checkpoint.reader import Reader
from moeslim.data.cursor import Cursor
from moeslim.errors import RunError
from moeslim.model.student import Student

SCHEMA = 1
MOMENTS = ("exp_avg", "exp_avg_sq")


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
    return sorted(path for path in root.iterdir() if re.fullmatch(r"step-\d{7,}", path.name))


def _write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], *, config: Mapping[str, Any]) -> None:
    folder.mkdir()
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", dict(config))


def save(
    root: Path,
    position: Position,
    *,
    student: Student,
    optimizer: torch.optim.Optimizer,
    fingerprint: str,
    keep_last: int,
) -> Path:
    """Write the state after `position.step` steps and remove all but the newest `keep_last`; returns its folder."""
    parameters = parameters_by_disk_name(student)
    steps = {name: int(optimizer.state[p]["step"]) if p in optimizer.state else 0 for name, p in parameters.items()}
    folder = root / f"step-{position.step:07d}"
    with committed_folder(folder) as temporary:
        _write_tensors(temporary / "weights", student.disk_state(), config=student.config)
        for moment in MOMENTS:
            # A weight that no gradient has reached yet has no moments: zeros, so that the folder is a whole checkpoint.
            found = {n: optimizer.state[p][moment] if steps[n] else torch.zeros_like(p) for n, p in parameters.items()}
            _write_tensors(temporary / moment, found, config=student.config)
        facts = {
            "schema": SCHEMA,
            "step": position.step,
            "cursor": position.cursor.state(),
            "fingerprint": fingerprint,
            "adam_steps": steps,
            "random": torch.get_rng_state().numpy().tobytes().hex(),
        }
        write_json(temporary / "state.json", facts)
    keep_newest(root, keep_last)
    return folder


def keep_newest(root: Path, count: int) -> None:
    """Remove all but the newest `count` states under `root`; one stays in any case."""
    for old in step_folders(root)[: -max(count, 1)]:
        discard(old)


def forget_others(root: Path, fingerprint: str) -> None:
    """Remove the states under `root` that were made with other settings, models or data than `fingerprint` names."""
    for folder in step_folders(root):
        if read_json(folder / "state.json")["fingerprint"] != fingerprint:
            discard(folder)


def load_moments(folder: Path, student: Student, *, optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimizer from a state folder's moments; tensors without moments there start empty.

    A moment whose shape is not its weight's means that a cut was not applied to it: RunError.
    """
    facts = read_json(folder / "state.json")
    moments = {moment: Reader(folder / moment) for moment in MOMENTS}
    for name, parameter in parameters_by_disk_name(student).items():
        if not facts["adam_steps"].get(name):
            continue
        found = {moment: reader.tensor(name) for moment, reader in moments.items()}
        for moment, tensor in found.items():
            if tensor.shape != parameter.shape:
                raise RunError(
                    f"{folder / moment}: {name} has shape {tuple(tensor.shape)}, the weight {tuple(parameter.shape)}; "
                    "slice the moments with the same plan, or use optimizer_state: reset"
                )
        count = torch.tensor(float(facts["adam_steps"][name]), device=parameter.device)
        device = {moment: tensor.to(parameter.device, copy=True) for moment, tensor in found.items()}
        optimizer.state[parameter] = {"step": count, **device}


def slice_moments(folder: Path, out: Path, *, cut: Callable[[Path, Path], object]) -> None:
    """Write to `out` the moments of state `folder` as they are after a cut, for a stage that starts from the cut model.

    `cut(source, target)` writes to `target` what the stage's plan leaves of the checkpoint `source`, without the
    rescale of the norms (a moment is no weight). Layers may have been renumbered, so all tensors get the largest step
    count; they differ only for weights that no gradient reached.
    """
    facts = read_json(folder / "state.json")
    steps = max(facts["adam_steps"].values(), default=0)
    with committed_folder(out) as temporary:
        for moment in MOMENTS:
            cut(folder / moment, temporary / moment)
        names = Reader(temporary / MOMENTS[0]).rows
        write_json(temporary / "state.json", {"schema": SCHEMA, "adam_steps": dict.fromkeys(names, steps)})


def resume(root: Path, student: Student, *, optimizer: torch.optim.Optimizer, fingerprint: str) -> Position | None:
    """Restore the newest state under `root` into student, optimizer and torch's generator; None if there is none.

    What killed saves and removals left there goes. Raises RunError where the state was made with other settings, models
    or data.
    """
    for left in root.glob(".step-*"):
        shutil.rmtree(left)
    folders = step_folders(root)
    if not folders:
        return None
    folder = folders[-1]
    facts = read_json(folder / "state.json")
    if facts["schema"] != SCHEMA or facts["fingerprint"] != fingerprint:
        raise RunError(
            f"{folder}: this training state was made with other settings, models or data "
            f"(fingerprint {facts['fingerprint']}, now {fingerprint}); restore them to go on, or remove {root} to "
            "start again"
        )
    weights = Reader(folder / "weights")
    live = student.disk_state()
    if weights.rows.keys() != live.keys():
        raise RunError(f"{folder / 'weights'}: its tensors are not the model's; remove {root} to start again")
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(weights.tensor(name))
    load_moments(folder, student, optimizer=optimizer)
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(facts["random"]), dtype=torch.uint8))
    return Position(step=facts["step"], cursor=Cursor(**facts["cursor"]))
