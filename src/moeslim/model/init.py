"""Random checkpoints of any shape, written one tensor at a time: baselines for training, and models for tests."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from moeslim.artifacts.commit import committed_folder
from moeslim.checkpoint.config_json import write_config
from moeslim.checkpoint.packed import quantisation_of
from moeslim.checkpoint.reader import TORCH_DTYPES
from moeslim.checkpoint.side_files import copy_side_files
from moeslim.checkpoint.writer import SHARD_BYTES, ShardWriter, write_receipt
from moeslim.errors import CheckpointError
from moeslim.families import Layouts, Row, expert_prefix, file_layouts, pieces, table, text_config
from moeslim.families.config import with_mtp
from moeslim.families.shape import Shape

_NAMES = {"bfloat16": "BF16", "float32": "F32", "float16": "F16", "float64": "F64"}


class FormOptions(TypedDict, total=False):
    """The keyword arguments of `Form`."""

    layouts: Layouts | None
    dtype: str
    float32: tuple[str, ...]
    mtp: bool
    spread: bool
    shard_bytes: int


@dataclass(frozen=True)
class Form:
    """How a random checkpoint lies on disk, and how far its values spread.

    `layouts` of the experts, None: the first that the family's page names.
    `float32` names what is written in fp32 whatever `dtype` is: kinds of init ("a_log", "dt_bias") or components
    ("norm"), as many released bf16 models have it. `spread` moves norms and biases off their neutral start, so that a
    test sees them.
    """

    layouts: Layouts | None = None
    dtype: str = "bfloat16"
    float32: tuple[str, ...] = ()
    mtp: bool = True
    spread: bool = False
    shard_bytes: int = SHARD_BYTES

    def dtype_of(self, row: Row) -> str:
        """The dtype of a tensor as safetensors spells it."""
        return "F32" if row.tensor.init in self.float32 or row.component in self.float32 else _NAMES[self.dtype]


def write_random(
    folder: Path | str,
    config: Mapping[str, Any],
    *,
    seed: int,
    tokenizer_from: Path | str | None = None,
    recipe: Any = None,
    **form: Unpack[FormOptions],
) -> dict[str, Any]:
    """Write a randomly initialised checkpoint of `config` and return its receipt.

    Every matrix comes from a generator of its own, seeded by (seed, name), so neither layout nor shard size nor order
    changes a value: the same seed is the same model, per expert or stacked. Values as transformers initialises them:
    normal with `initializer_range`, zero-centred norms 0, DeltaNet's A uniform in (0.01, 16), dt_bias 1; the
    convolution as torch does (uniform within 1/sqrt(kernel)). Raises FamilyError for an impossible config,
    CheckpointError for one of packed weights and RunError for a folder that is not empty.
    """
    how = Form(**form)
    quantisation = quantisation_of(config, folder)
    if quantisation is not None:
        raise CheckpointError(
            f"{folder}: the config has a quantization_config ({quantisation.method}), and random weights are written "
            "as floats; remove it"
        )
    shape = Shape.from_config(config)
    shape = shape if how.mtp else shape.trunk
    layouts = how.layouts or file_layouts(shape.family)
    rows = table(shape, layouts)
    written = with_mtp(config, how.mtp)
    fill = _Fill(shape, seed=seed, std=float(text_config(config).get("initializer_range", 0.02)), spread=how.spread)
    with committed_folder(folder) as temporary:
        write_config(temporary, written)
        if tokenizer_from is not None:
            copy_side_files(tokenizer_from, temporary)
        planned = [(row.name, row.shape, how.dtype_of(row)) for row in rows.values()]
        writer = ShardWriter(temporary, planned, shard_bytes=how.shard_bytes)
        for name in writer.order:
            row = rows[name]
            expert = row.component == "experts"
            values = fill.experts(row, layouts[row.subtree]) if expert else fill.plain(row)
            writer.add(name, values.to(TORCH_DTYPES[how.dtype_of(row)]))
        return write_receipt(temporary, kind="init", weights=writer.finish(), recipe=recipe, seed=seed)


class _Fill:
    """Values in fp32 for the rows of one model."""

    def __init__(self, shape: Shape, *, seed: int, std: float, spread: bool) -> None:
        self.shape, self.seed, self.std, self.spread = shape, seed, std, spread

    def plain(self, row: Row) -> torch.Tensor:
        """One tensor by the init kind of its page."""
        generator = self._generator(row.name)
        kind, shape = row.tensor.init, row.shape
        if kind == "normal":
            return self._normal(row.name, shape)
        if kind == "a_log":
            return torch.empty(shape).uniform_(0.01, 16, generator=generator).log_()
        if kind == "conv":
            bound = shape[-1] ** -0.5
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)
        start = {"zeros": 0.0, "ones": 1.0, "dt_bias": 1.0}[kind]
        noise = torch.randn(shape, generator=generator) * 0.2 if self.spread else 0.0
        return torch.full(shape, start) + noise

    def experts(self, row: Row, layout: str) -> torch.Tensor:
        """One tensor of a layer's experts, every matrix by its name per expert: a seed is a model in any layout."""
        assert row.layer is not None
        prefix = expert_prefix(self.shape, row.layer)
        values = torch.empty(row.shape)
        for expert in range(self.shape["experts"]) if row.expert is None else (row.expert,):
            for matrix, piece in pieces(layout, prefix, expert=expert).items():
                if piece.name == row.name:
                    part = piece.view(values)
                    part.copy_(self._of_expert(f"{prefix}.{expert}", matrix, shape=tuple(part.shape)))
        return values

    def _of_expert(self, expert: str, matrix: str, *, shape: tuple[int, ...]) -> torch.Tensor:
        kind, _, bias = matrix.partition("_")
        if not bias:
            return self._normal(f"{expert}.{kind}_proj.weight", shape)
        noise = torch.randn(shape, generator=self._generator(f"{expert}.{kind}_proj.bias")) * 0.2
        return noise if self.spread else torch.zeros(shape)

    def _normal(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator(name)) * self.std

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
