"""The model run layer by layer over files: one layer's weights in memory at a time, hidden states on disk.

`walk` is a generator. It yields a visit per decoder layer ("0".."L-1"), for the final norm ("norm") and for the MTP
block ("mtp.0"). A visit runs its layer over all rows, batch by batch; whoever drives the walk hangs hooks on the live
modules, and leaves files of its own in `visit.folder`. Advancing the generator commits both, the layer's outputs and
that folder, by renaming one file; `send` may hand over a replacement for the layer, whose outputs then go on instead.

A killed walk goes on at the layer it was in, from the same inputs: the outputs of a layer are written beside its
inputs and never over them. The hidden states equal the whole model's bit by bit (same rows per batch, same number of
threads, "eager" experts).
Masks, rotary and position arguments are those of the class's own forward, taken by recorders in place of its layers:
by hand, "eager" attention with a mask of None is silently not causal.

WORKDIR/walk.json           what is committed: the done keys and the generation that holds the next inputs
WORKDIR/hidden-{a,b}.bin    (rows, T, d) in the compute dtype
WORKDIR/layers/<key>/       the driver's files
"""

import copy
import json
import shutil
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from moeslim.artifacts.commit import flush, read_json, write_json
from moeslim.checkpoint.reader import Reader
from moeslim.errors import RunError
from moeslim.families import Row, is_mtp, layer_prefix
from moeslim.model.experts import ExpertFile, FileExperts
from moeslim.model.hidden import HiddenFiles
from moeslim.model.student import Student

SCHEMA = 1


@dataclass(frozen=True)
class WalkSettings:
    """How layers are run. `group`: routed experts in memory at once (None: as many as fit, see `ExpertFile`).

    `max_memory`: bytes that whoever walks has `room.with_room` turn into a group. Neither changes a bit.
    """

    rows_per_batch: int = 8
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    attn: str = "sdpa"
    group: int | None = None
    max_memory: int | None = None


class Batch(NamedTuple):
    """Rows [start, stop) of a visit: what its root got and gave, both (rows, T, d)."""

    start: int
    stop: int
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class LayerVisit:
    """One layer, live, with all its inputs.

    `root` is what runs (decoder layer, final norm or MTP block), `decoder` the decoder layer in it (None for the final
    norm), `experts` its routed experts (None without), `rows` the tensors that `root` holds, experts left out.
    """

    key: str
    root: nn.Module
    decoder: nn.Module | None
    experts: FileExperts | None
    rows: tuple[Row, ...]
    prefix: str
    folder: Path
    run: Callable[[nn.Module, torch.Tensor, int, int], torch.Tensor]
    hidden: HiddenFiles
    rows_per_batch: int
    done_rows: int = 0

    def module(self, row: Row) -> nn.Module:
        """The live module whose weight is the tensor of that row."""
        return self.root.get_submodule(row.name.removeprefix(self.prefix).removesuffix("weight").rstrip("."))

    def twin(self) -> "LayerVisit":
        """The same layer for another thread: modules and hooks of its own, on the same weights and experts' file."""
        kept: list[Any] = [*self.root.parameters(), *self.root.buffers()]
        if self.experts is not None:
            kept.append(self.experts.file)
        copies: dict[int, Any] = {id(each): each for each in kept}
        root = copy.deepcopy(self.root, copies)
        decoder, experts = (copies.get(id(module)) for module in (self.decoder, self.experts))
        return replace(self, root=root, decoder=decoder, experts=experts)

    def batches(
        self,
        root: nn.Module | None = None,
        *,
        first: int = 0,
        end: int | None = None,
        lane: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """Run the layer (or `root` in its place) over rows [first, end), all unless told, writing its outputs.

        Rows go in whole sequences, `rows_per_batch` at a time from `first` on; whoever runs a part runs the parts in
        order. A `lane` (l, n) is every n-th batch, from the l-th one on.
        """
        self.done_rows = first
        rows = self.hidden.shape[0] if end is None else end
        number, step = (count * self.rows_per_batch for count in lane)
        for start in range(first + number, rows, step):
            stop = min(start + self.rows_per_batch, rows)
            x_BTd = self.hidden.read(start, stop)
            with torch.no_grad():
                y_BTd = self.run(self.root if root is None else root, x_BTd, start, stop)
            self.hidden.write(start, y_BTd)
            self.done_rows = stop
            yield Batch(start, stop, x_BTd, y_BTd)

    def release(self) -> None:
        """Let go of the weights: whoever drives the walk still holds this visit while the next layer is read."""
        self.root.to("meta")
        if self.experts is not None:
            self.experts.file.release()

    def complete(self, replacement: nn.Module | None) -> None:
        """Make sure that all outputs are written, by the replacement if there is one."""
        if replacement is not None or self.done_rows < self.hidden.shape[0]:
            for _ in self.batches(replacement):
                pass


def walk(
    reader: Reader,
    rows: np.ndarray,
    *,
    workdir: Path | str,
    settings: WalkSettings,
    name: str = "",
) -> Generator[LayerVisit, nn.Module | None, None]:
    """Visit every layer over `rows` (N, T+1) token ids; the trunk reads the first T, the MTP block also the next ones.

    `name` is the fingerprint of everything that decides the hidden states: RunError if `workdir` holds a walk of
    another name. ResourceError if the disk cannot hold two generations of hidden states.
    """
    workdir = Path(workdir)
    keys = reader.shape.keys
    lengths = (rows.shape[0], rows.shape[1] - 1, reader.shape["hidden"])
    hidden = HiddenFiles(workdir, lengths, dtype=settings.dtype, device=settings.device)
    done = _open(workdir, name, hidden=hidden)
    skeleton = _Skeleton(reader, rows, settings=settings)
    with ThreadPoolExecutor(1, thread_name_prefix="commit") as thread:
        committing: Future[None] | None = None
        if hidden.source is None:
            for start in range(0, rows.shape[0], settings.rows_per_batch):
                stop = min(start + settings.rows_per_batch, rows.shape[0])
                hidden.write(start, skeleton.embed(rows[start:stop, :-1]))
            committing = thread.submit(_commit, workdir, name, done=[], hidden=hidden)
        for key in keys[len(done) :]:
            folder = workdir / "layers" / key
            shutil.rmtree(folder, ignore_errors=True)  # what a killed visit left
            folder.mkdir(parents=True)
            visit = skeleton.visit(key, folder, hidden=hidden)
            if committing is not None:  # the disk took the last layer in while this one was read
                committing.result()
            replacement = yield visit
            visit.complete(replacement)
            visit.release()
            reader.release()
            done.append(key)
            committing = thread.submit(_commit, workdir, name, done=list(done), hidden=hidden)
        if committing is not None:
            committing.result()


class _Recorder(nn.Module):
    """Stands where a decoder layer was, keeps the arguments that the model hands it and returns its input."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.arguments = arguments
        return hidden_states


class _Skeleton:
    """The model without weights: its own forward for masks and positions, and its layers as moulds."""

    def __init__(self, reader: Reader, rows: np.ndarray, *, settings: WalkSettings) -> None:
        self.reader, self.rows, self.settings = reader, rows, settings
        with torch.device("meta"):
            student = Student.from_config(reader.config, shape=reader.shape, attn=settings.attn, experts="eager")
        self.trunk, self.mtp = student.trunk.model, student.mtp
        self.moulds = {str(index): layer for index, layer in enumerate(self.trunk.layers)}
        self.moulds["norm"] = self.trunk.norm
        if self.mtp is not None:
            self.moulds |= dict.fromkeys(reader.shape.mtp_keys, self.mtp)
        self.recorders = [_Recorder() for _ in self.trunk.layers]
        self.trunk.layers = nn.ModuleList(self.recorders)
        self.trunk.norm = nn.Identity()
        # Built anew outside meta: its frequencies are a buffer that is in no file.
        self.trunk.rotary_emb = type(self.trunk.rotary_emb)(self.trunk.config).to(settings.device)
        self._recorded: tuple[int, ...] = ()
        self._recording = threading.Lock()

    def embed(self, tokens_BT: np.ndarray) -> torch.Tensor:
        """Embeddings (B, T, d) of token ids, only the rows that occur being read from the file."""
        found, places = np.unique(tokens_BT.astype(np.int64), return_inverse=True)
        table = self.reader.read_rows("model.embed_tokens.weight", found.tolist())
        table = table.to(self.settings.device, self.settings.dtype)
        return table[torch.from_numpy(places.reshape(tokens_BT.shape)).to(table.device)]

    def visit(self, key: str, folder: Path, *, hidden: HiddenFiles) -> LayerVisit:
        """The layer with its weights, ready to run."""
        shape, family = self.reader.shape, self.reader.shape.family
        root = self.moulds.pop(key)
        prefix = "model.norm." if key == "norm" else "mtp." if is_mtp(key) else layer_prefix(shape, key)
        decoder = None
        if key != "norm":
            decoder = root.get_submodule(layer_prefix(shape, key).removeprefix(prefix).rstrip("."))
        experts = None
        if decoder is not None and shape.is_moe(key):
            file = ExpertFile(
                self.reader,
                key,
                dtype=self.settings.dtype,
                device=self.settings.device,
                group=self.settings.group,
            )
            experts = FileExperts(file, decoder.get_submodule(family.expert_prefix).act_fn)
            decoder.set_submodule(family.expert_prefix, experts)
        self._fill(root, prefix)
        rows = tuple(r for n, r in self.reader.rows.items() if n.startswith(prefix) and r.component != "experts")
        run = self._run_norm if key == "norm" else self._run_mtp if is_mtp(key) else self._trunk_run(int(key))
        per_batch = self.settings.rows_per_batch
        return LayerVisit(key, root, decoder, experts, rows, prefix, folder, run, hidden, per_batch)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        state = {
            name: self.reader.read(prefix + name).to(self.settings.device, self.settings.dtype)
            for name, _ in module.named_parameters()
        }
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False).eval()
        assert not any(tensor.is_meta for tensor in module.buffers()), "a buffer that is in no file was left empty"

    def _trunk_run(self, index: int) -> Callable[[nn.Module, torch.Tensor, int, int], torch.Tensor]:
        def run(layer: nn.Module, x_BTd: torch.Tensor, start: int, stop: int) -> torch.Tensor:
            with self._recording:
                if self._recorded != tuple(x_BTd.shape):  # they depend on the shape alone: rows are whole and unpadded
                    self.trunk(inputs_embeds=x_BTd, use_cache=False)
                    self._recorded = tuple(x_BTd.shape)
                arguments = self.recorders[index].arguments
            return layer(x_BTd, **arguments)

        return run

    def _run_norm(self, norm: nn.Module, x_BTd: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return norm(x_BTd)

    def _run_mtp(self, block: nn.Module, x_BTd: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        words = self.rows[start:stop, 1 : x_BTd.shape[1] + 1]  # whoever drives may run fewer positions
        return block(x_BTd, self.embed(words), rotary=self.trunk.rotary_emb)


def _open(workdir: Path, name: str, *, hidden: HiddenFiles) -> list[str]:
    """The keys done so far; `hidden` is set to the generation that holds the next inputs."""
    workdir.mkdir(parents=True, exist_ok=True)
    hidden.check_disk()
    state = check_standing(workdir, name)
    hidden.source = state.get("generation")
    return list(state.get("done", []))


def check_standing(workdir: Path, name: str) -> dict[str, Any]:
    """What is committed in `workdir`, nothing before the first commit; RunError if it is a walk of another name."""
    path = workdir / "walk.json"
    if not path.exists():
        return {}
    state: dict[str, Any] = read_json(path)
    if state.get("schema") != SCHEMA or state.get("name") != name:
        raise RunError(
            f"{workdir}: holds the half-finished calibration of another model, other tokens or other settings "
            f"({json.dumps(state.get('name'))}, now {json.dumps(name)}); remove the folder or calibrate elsewhere"
        )
    return state


def _commit(workdir: Path, name: str, *, done: list[str], hidden: HiddenFiles) -> None:
    hidden.turn()
    if done:
        flush(workdir / "layers" / done[-1])
    write_json(workdir / "walk.json", {"schema": SCHEMA, "name": name, "done": done, "generation": hidden.source})
