"""The model run layer by layer over files: one layer's weights in memory at a time, hidden states on disk.

`walk` is a generator. It yields a visit per decoder layer ("0".."L-1"), for the final norm ("norm") and for the MTP
block ("mtp.0"). A visit runs its layer over all rows, batch by batch; the caller hangs hooks on the live
modules, and leaves files of its own in `visit.folder`. Advancing the generator commits both, the layer's outputs and
that folder, by renaming one file; `send` may pass a replacement for the layer, whose outputs are then used instead.

An interrupted walk resumes at its layer, from the same inputs: the outputs of a layer are written beside its
inputs and never over them. The hidden states equal the whole model's bit by bit (same rows per batch, same number of
threads, "eager" experts).
Masks, rotary and position arguments are those of the class's own forward, taken by recorders in place of its layers:
by hand, "eager" attention with a mask of None is silently not causal.

WORKDIR/walk.json           what is committed: the done keys and the generation that holds the next inputs
WORKDIR/hidden-{a,b}.bin    (rows, T, d) in the compute dtype; more columns where layers hand on more (carry.py)
WORKDIR/layers/<key>/       the driver's files
"""

import copy
import json
import shutil
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from moeslim.artifacts.commit import flush, read_json, write_json
from moeslim.checkpoint.reader import Reader
from moeslim.errors import FamilyError, RunError
from moeslim.families import Row, Shape, is_mtp
from moeslim.model.carry import Carry, CarryColumns
from moeslim.model.experts import ExpertFile, FileExperts, activation_of, by_rows
from moeslim.model.hidden import HiddenFiles
from moeslim.model.load import check_copies
from moeslim.model.moe import MoeBlock
from moeslim.model.names import live_dtype, live_rows
from moeslim.model.student import Student

SCHEMA = 1
RunRows = Callable[[nn.Module, torch.Tensor, int, int], torch.Tensor]
"""A module's outputs (B, T, d) for its inputs, which are the rows from one number up to another."""


@dataclass(frozen=True)
class WalkSettings:
    """How layers are run. `group`: routed experts in memory at once (None: as many as fit, see `ExpertFile`).

    `max_memory`: bytes that `memory_check.fit_to_memory` turns into a group. Neither changes a bit.
    """

    rows_per_batch: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    attn: str = "sdpa"
    group: int | None = None
    max_memory: int | None = None


class BatchOutput(NamedTuple):
    """Rows [start, stop) of a visit: inputs x and outputs y of its root, both (rows, T, d) and carry.py's columns."""

    start: int
    stop: int
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class LayerVisit:
    """One layer, live, with all its inputs.

    `root` is what runs (decoder layer, final norm or MTP block), `decoder` the decoder layer in it (None for the final
    norm), `moe` its mixture of experts (None without), `rows` the tensors that `root` holds, experts left out, and
    `places` where in it each of them is, by its name on disk.
    """

    key: str
    shape: Shape
    root: nn.Module
    decoder: nn.Module | None
    moe: MoeBlock | None
    rows: tuple[Row, ...]
    places: Mapping[str, str]
    folder: Path
    run: RunRows
    hidden: HiddenFiles
    rows_per_batch: int
    carried: CarryColumns
    done_rows: int = 0

    def module(self, row: Row) -> nn.Module:
        """The live module whose weight is the tensor of that row."""
        return self.root.get_submodule(self.places[row.name].rpartition(".")[0])

    @property
    def experts(self) -> FileExperts | None:
        """The routed experts, None in a layer without."""
        return None if self.moe is None else self.moe.experts

    def clone(self) -> "LayerVisit":
        """The same layer for another thread: modules and hooks of its own, on the same weights and experts' file."""
        kept: list[Any] = [*self.root.parameters(), *self.root.buffers()]
        if self.experts is not None:
            kept.append(self.experts.file)
        copies: dict[int, Any] = {id(each): each for each in kept}
        root = copy.deepcopy(self.root, copies)
        moe = None if self.moe is None else replace(self.moe, block=copies[id(self.moe.block)])
        return replace(self, root=root, decoder=copies.get(id(self.decoder)), moe=moe)

    def batches(
        self,
        root: nn.Module | None = None,
        *,
        first: int = 0,
        end: int | None = None,
        split: tuple[int, int] = (0, 1),
    ) -> Iterator[BatchOutput]:
        """Run the layer (or `root` in its place) over rows [first, end), by default all, writing its outputs.

        Rows go in whole sequences, `rows_per_batch` at a time from `first` on; ranges must be
        run in order. A `split` (i, n) is every n-th batch, from the i-th one on.
        """
        self.done_rows = first
        rows = self.hidden.shape[0] if end is None else end
        number, step = (count * self.rows_per_batch for count in split)
        for start in range(first + number, rows, step):
            stop = min(start + self.rows_per_batch, rows)
            x_BTd = self.hidden.read(start, stop)
            with torch.no_grad():
                y_BTd = self.run(self.root if root is None else root, x_BTd, start, stop)
            self.hidden.write(start, y_BTd)
            self.done_rows = stop
            yield BatchOutput(start, stop, x_BTd, y_BTd)

    def release(self) -> None:
        """Release the weights: the caller still holds this visit while the next layer is read."""
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
    check_copies(reader)
    keys = reader.shape.keys
    skeleton = _Skeleton(reader, rows, settings=settings)
    lengths = (rows.shape[0], rows.shape[1] - 1, skeleton.carried.columns(settings.dtype))
    hidden = HiddenFiles(workdir, lengths, dtype=settings.dtype, device=settings.device)
    done = _open(workdir, name, hidden=hidden)
    with ThreadPoolExecutor(1, thread_name_prefix="commit") as thread:
        committing: Future[None] | None = None
        if hidden.source is None:
            for start in range(0, rows.shape[0], settings.rows_per_batch):
                stop = min(start + settings.rows_per_batch, rows.shape[0])
                hidden.write(start, skeleton.enter(rows[start:stop, :-1]))
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


class _Skeleton:
    """The model without weights: its own forward for masks and positions, and its layers, to be filled one by one."""

    def __init__(self, reader: Reader, rows: np.ndarray, *, settings: WalkSettings) -> None:
        self.reader, self.rows, self.settings = reader, rows, settings
        with torch.device("meta"):
            student = Student.from_config(reader.config, shape=reader.shape, attn=settings.attn, experts="eager")
        self.parts, self.mtp, self.moe, self.names = student.parts, student.mtp, student.moe, student.names
        self.layers = dict(zip(reader.shape.trunk_keys, self.parts.layers, strict=True))
        self.norm = self.parts.norm
        self.recorders = self.parts.recorders()
        self.parts.layers = nn.ModuleList(self.recorders)
        self.parts.norm = nn.Identity()
        self.parts.renew_buffers(settings.device)
        if isinstance(self.parts.embed, nn.Embedding):
            self.parts.embed.padding_idx = None  # it means nothing here, and may lie outside the few rows in memory
        self._recorded: tuple[int, ...] = ()
        self._recording = threading.Lock()
        self.carried = self._carried()

    def _carried(self) -> CarryColumns:
        """How much a layer hands on, by a run of the first one that computes nothing."""
        none = CarryColumns(self.reader.shape["hidden"])
        if not self.reader.shape.family.carries:
            return none
        x_BTd = torch.zeros(1, self.rows.shape[1] - 1, none.hidden, dtype=self.settings.dtype)
        self._record(x_BTd.to(self.settings.device))
        more, named = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), self.recorders[0].arguments)
        return CarryColumns.like(self.layers["0"](x_BTd.to("meta"), *more, **named)[1], hidden=none.hidden)

    def embed(self, tokens_BT: np.ndarray) -> torch.Tensor:
        """Embeddings (B, T, d) of token ids, only the rows that occur being read from the file."""
        found, places = np.unique(tokens_BT.astype(np.int64), return_inverse=True)
        table = self.reader.read_rows(self.reader.shape.outer("embedding"), found.tolist())
        table = table.to(self.settings.device, self.settings.dtype)
        places_BT = torch.from_numpy(places.reshape(tokens_BT.shape)).to(table.device)
        embedded: torch.Tensor = functional_call(self.parts.embed, {"weight": table}, (places_BT,))
        return embedded

    def enter(self, tokens_BT: np.ndarray) -> torch.Tensor:
        """What the first layer gets (B, T, d) of token ids: the embeddings as the model's own forward hands them on."""
        self._record(self.embed(tokens_BT))
        x_BTd = self.recorders[0].x
        assert x_BTd is not None
        return x_BTd

    def visit(self, key: str, folder: Path, *, hidden: HiddenFiles) -> LayerVisit:
        """The layer with its weights, ready to run."""
        shape = self.reader.shape
        root, decoder, run = self._part(key)
        moe = self.moe.get(key)
        if moe is not None:
            settings = self.settings
            file = ExpertFile(self.reader, key, dtype=settings.dtype, device=settings.device, group=settings.group)
            moe.experts = FileExperts(file, activation_of(moe.experts), by_rows=by_rows(moe.experts))
        own = list(live_rows(self.reader.rows, self.names, key=key))
        self._fill(root, own)
        rows, places = tuple(row for row, _ in own), {row.name: place for row, place in own}
        return LayerVisit(
            key,
            shape,
            root,
            decoder,
            moe,
            rows,
            places,
            folder,
            run,
            hidden,
            self.settings.rows_per_batch,
            self.carried,
        )

    def _part(self, key: str) -> tuple[nn.Module, nn.Module | None, RunRows]:
        """What runs at `key`, still empty, the decoder layer in it, and how it is run."""
        if key == "norm":
            return self.norm, None, self._run_norm
        if is_mtp(key):
            assert self.mtp is not None
            return self.mtp, self.mtp.layers[0], self._run_mtp
        layer = self.layers.pop(key)
        return layer, layer, self._trunk_run(int(key))

    def _fill(self, module: nn.Module, rows: Sequence[tuple[Row, str]]) -> None:
        dtype, device = self.settings.dtype, self.settings.device
        state = {place: self.reader.read(row.name).to(device, live_dtype(row, dtype)) for row, place in rows}
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False).eval()
        assert not any(tensor.is_meta for tensor in module.buffers()), "a buffer that is in no file was left empty"

    def _record(self, x_BTd: torch.Tensor) -> None:
        """Let the model hand every recorder its arguments: they depend on the shape alone, rows being unpadded."""
        self.parts.body(inputs_embeds=x_BTd, use_cache=False)
        self._recorded = tuple(x_BTd.shape)

    def _trunk_run(self, index: int) -> RunRows:
        def run(layer: nn.Module, x_BTd: torch.Tensor, start: int, stop: int) -> torch.Tensor:
            second = self.carried.second(x_BTd)
            x_BTd = self.carried.states(x_BTd)
            with self._recording:
                if self._recorded != tuple(x_BTd.shape):
                    self._record(x_BTd)
                more, named = self.recorders[index].arguments
            if self.carried.width:
                more, named = tree_map_only(Carry, lambda _: second, (more, named))
            output = layer(x_BTd, *more, **named)
            if isinstance(output, torch.Tensor):  # of a layer that was left out, too: what it got goes on
                return self.carried.joined(output, second)
            if not self.carried.width:
                raise FamilyError(
                    f"{type(layer).__name__} returns {type(output).__name__}; layers that hand on more than their "
                    "output are run one by one if their page says `carries`"
                )
            return self.carried.joined(*output)

        return run

    def _run_norm(self, norm: nn.Module, x_BTd: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return self.parts.before_head(norm(self.carried.states(x_BTd)))

    def _run_mtp(self, block: nn.Module, x_BTd: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        tokens = self.rows[start:stop, 1 : x_BTd.shape[1] + 1]  # the caller may run fewer positions
        return block(self.carried.states(x_BTd), self.embed(tokens), rotary=self.parts.rotary)


def _open(workdir: Path, name: str, *, hidden: HiddenFiles) -> list[str]:
    """The keys done so far; `hidden` is set to the generation that holds the next inputs."""
    workdir.mkdir(parents=True, exist_ok=True)
    hidden.check_disk()
    state = check_existing(workdir, name)
    hidden.source = state.get("generation")
    return list(state.get("done", []))


def check_existing(workdir: Path, name: str) -> dict[str, Any]:
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
