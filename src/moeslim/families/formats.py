"""How a tensor's values lie in files: as they are, or packed in few bits with a scale for every block.

A packed tensor is several tensors of a file. Its format says which, in what shapes and dtypes, so that the table
expects each of them; what reads them gives the values in bf16 (checkpoint/unpack.py).
"""

from dataclasses import dataclass
from typing import NamedTuple

from moeslim.errors import CheckpointError

FLOATS = ("BF16", "F16", "F32", "F64")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
MXFP4_GROUP = 32  # values that share a scale, in 16 bytes


class Stored(NamedTuple):
    """One tensor of a file: the part that it is of a value (values, scales, shape), shapes and dtypes that it may have.

    The first of `shapes` is the usual one.
    """

    part: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Format:
    """`kind` is how values are coded, `block` how many rows and columns share a scale (0: all of them).

    float: one tensor of floats, no scales. fp8: E4M3 under the tensor's own name, scales under name + `scale`. int:
    `bits` each, in words of 32 bits along the last axis, low bits first, 0 stored as 2^(bits - 1), under name +
    "_packed" with scales and the shape beside. mxfp4: E2M1, two to a byte, under name + "_blocks", along the axis
    before the last one, so each matrix lies transposed; scales are exponents of 2.
    """

    kind: str = "float"
    block: tuple[int, int] = (0, 0)
    scale: str = ""
    bits: int = 16

    @property
    def label(self) -> str:
        """As people name it: FP8 block 128x128, int4 groups of 32, MXFP4."""
        if self.kind == "mxfp4":
            return "MXFP4"
        name = {"fp8": "FP8", "int": f"int{self.bits}"}.get(self.kind, self.kind)
        rows, columns = self.block
        if self.block == (0, 0):
            return f"{name} per tensor"
        if rows == 1:
            return f"{name} groups of {columns}" if columns else f"{name} per row"
        return f"{name} block {rows}x{columns}"

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, Stored]:
        """The tensors of a file that hold the tensor `name` of `shape`, by their names.

        A packed tensor has two axes, or three if its matrices are stacked. CheckpointError for a shape that cannot be
        packed like this.
        """
        if self.kind == "float":
            return {name: Stored("values", (shape,), FLOATS)}
        if len(shape) not in (2, 3):
            raise CheckpointError(f"{name} has shape {shape}, and only matrices can be {self.label}")
        *stack, rows, columns = shape
        if self.kind == "mxfp4":
            if rows % MXFP4_GROUP:
                raise CheckpointError(f"{name} has {rows} rows, and MXFP4 packs them in groups of {MXFP4_GROUP}")
            groups = (*stack, columns, rows // MXFP4_GROUP)
            blocks = Stored("values", ((*groups, MXFP4_GROUP // 2),), ("U8",))
            return {f"{name}_blocks": blocks, f"{name}_scales": Stored("scales", (groups,), ("U8",))}
        scales = Stored("scales", self._grids(shape), _SCALES)
        if self.kind == "fp8":
            return {name: Stored("values", (shape,), ("F8_E4M3",)), name + self.scale: scales}
        words = Stored("values", ((*stack, rows, -(-columns * self.bits // 32)),), ("I32",))
        lengths = Stored("shape", ((len(shape),),), ("I64", "I32"))
        return {f"{name}_packed": words, name + self.scale: scales, f"{name}_shape": lengths}

    def values_name(self, name: str) -> str:
        """The tensor of a file that holds the values of the tensor `name`."""
        return name + {"mxfp4": "_blocks", "int": "_packed"}.get(self.kind, "")

    def whole_shape(self, values: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor whose values are stored in this one."""
        if self.kind == "mxfp4":
            *stack, columns, groups, _ = values if len(values) >= 3 else (0, 0, 0)
            return (*stack, groups * MXFP4_GROUP, columns)
        return (*values[:-1], values[-1] * 32 // self.bits) if self.kind == "int" and values else values

    def companions(self, name: str) -> tuple[str, ...]:
        """The tensors of a file that belong to those of `values_name`."""
        return {"float": (), "int": (name + self.scale, f"{name}_shape")}.get(self.kind, (name + self.scale,))

    def unread(self, name: str) -> tuple[str, ...]:
        """What may lie beside and is not needed for the values: scales of what a layer receives."""
        stem = name.removesuffix("weight")
        stem = f"{name}_" if stem == name else stem
        return (f"{stem}activation_scale", f"{stem}input_scale") if self.kind == "fp8" else ()

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the scales of one matrix."""
        rows, columns = (
            -(-length // block) if block else 1 for length, block in zip(shape[-2:], self.block, strict=True)
        )
        return rows, columns

    def _grids(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        usual = (*shape[:-2], *self.grid(shape))
        return (usual, (), (1,)) if self.block == (0, 0) and len(shape) == 2 else (usual,)


FLOAT = Format()
