"""The values of packed tensors in bf16: codes looked up in float32, times their scale, rounded once.

This is what transformers computes when it dequantises to bf16, bit for bit. Some rows at a time are unpacked, so what
is needed beside the result is small.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from moeslim.checkpoint.packed import Packed
from moeslim.errors import CheckpointError

_AT_ONCE = 1 << 18  # values: what is made of them stays in the processor's cache
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)  # with halves of the powers, so that 2^128 does not overflow before 0.5
_SCALE_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E8M0": torch.float8_e8m0fnu,
}

ReadBytes = Callable[[str, int, int], np.ndarray]
"""(part, first byte, number of bytes) -> those of the tensor of the file that holds this part."""


def unpack(rows_NC: torch.Tensor, packed: Packed, *, first: int, read: ReadBytes) -> None:
    """Fill `rows_NC` (bf16, contiguous) from row `first` on, the rows of stacked matrices counted one behind the other.

    Raises CheckpointError where the file says another shape than the headers do.
    """
    if "shape" in packed.parts:
        _check_shape(packed, read)
    fill = _fill_transposed if packed.format.kind == "mxfp4" else _fill
    with torch.no_grad():
        fill(rows_NC, packed, first=first, read=read)


def _fill(rows_NC: torch.Tensor, packed: Packed, *, first: int, read: ReadBytes) -> None:
    """Formats whose rows lie one behind the other, as the rows of the result do."""
    height, width = packed.shape[-2:]
    scale_rows, scale_columns = packed.format.grid(packed.shape)
    block_rows, block_columns = packed.format.block
    scales = packed.parts["scales"]
    row_bytes = packed.parts["values"].bytes // max(1, packed.rows)
    line_bytes = scale_columns * (scales.bytes // (packed.rows // height * scale_rows * scale_columns))
    step = max(1, _AT_ONCE // width)
    for start in range(0, len(rows_NC), step):
        out_NC = rows_NC[start : start + step]
        number_N = torch.arange(first + start, first + start + len(out_NC))
        line_N = number_N // height * scale_rows + (number_N % height // block_rows if block_rows else 0)
        low, high = int(line_N[0]), int(line_N[-1]) + 1
        raw = torch.from_numpy(read("scales", low * line_bytes, (high - low) * line_bytes))
        scale_NS = raw.view(_SCALE_DTYPES[scales.dtype]).view(-1, scale_columns).to(torch.float32)[line_N - low]
        codes = read("values", (first + start) * row_bytes, len(out_NC) * row_bytes)
        value_NC = _looked_up(codes, packed).view(len(out_NC), -1)[:, :width]
        out_NC.copy_(_scaled(value_NC, scale_NS, block=block_columns))


def _fill_transposed(rows_NC: torch.Tensor, packed: Packed, *, first: int, read: ReadBytes) -> None:
    """MXFP4: a matrix lies as (columns, rows / 32, 16 bytes), so rows are a part of each of its lines."""
    height, width = packed.shape[-2:]
    group = 2 * packed.parts["values"].shape[-1]
    groups = height // group
    done = 0
    while done < len(rows_NC):
        matrix, top = divmod(first + done, height)
        out_NC = rows_NC[done : done + height - top]
        done += len(out_NC)
        low, high = top // group, -(-(top + len(out_NC)) // group)
        step = max(1, _AT_ONCE // height)
        for start in range(0, width, step):
            stop = min(start + step, width)
            line = matrix * width + start
            scale_CG = read("scales", line * groups, (stop - start) * groups).reshape(-1, groups)[:, low:high]
            codes = read("values", line * groups * group // 2, (stop - start) * groups * group // 2)
            codes = codes.reshape(stop - start, groups, -1)[:, low:high]
            value_CN = _looked_up(codes, packed).view(stop - start, -1)
            value_CN = _scaled(value_CN, _half_powers(scale_CG), block=group)
            out_NC[:, start:stop].copy_(value_CN.bfloat16()[:, top - low * group :][:, : len(out_NC)].T)


def _looked_up(codes: np.ndarray, packed: Packed) -> torch.Tensor:
    """The values of codes in float32, flat, in the codes' order."""
    table = _table(packed.format.kind, packed.format.bits)
    return torch.from_numpy(table.take(codes)).view(torch.float32).flatten()


@cache
def _table(kind: str, bits: int) -> np.ndarray:
    """The value of every byte in float32, or its two values, the one of the low four bits first, in eight bytes."""
    byte = np.arange(256)
    if kind == "fp8":
        return torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    if (kind, bits) == ("int", 8):
        return (byte - 128).astype(np.float32)
    codes = _e2m1_doubled() if kind == "mxfp4" else np.arange(16, dtype=np.float32) - 8
    return np.stack([codes[byte & 15], codes[byte >> 4]], axis=-1).view(np.int64)[:, 0]


def _e2m1_doubled() -> np.ndarray:
    halves = np.array(_E2M1_DOUBLED, np.float32)
    return np.concatenate([halves, -halves])


def _half_powers(exponents: np.ndarray) -> torch.Tensor:
    """2^(e - 128) in float32 of bytes e."""
    return torch.from_numpy(np.ldexp(np.float32(1), exponents.astype(np.int32) - 128))


def _scaled(value_NC: torch.Tensor, scale_NS: torch.Tensor, *, block: int) -> torch.Tensor:
    """The values times their scale, in place; `block` columns share one (0: all), the last ones perhaps fewer."""
    if not block:
        return value_NC.mul_(scale_NS)
    blocks = value_NC.shape[1] // block
    value_NC[:, : blocks * block].unflatten(1, (blocks, block)).mul_(scale_NS[:, :blocks, None])
    value_NC[:, blocks * block :].mul_(scale_NS[:, blocks:])
    return value_NC


def _check_shape(packed: Packed, read: ReadBytes) -> None:
    """CheckpointError where the file gives other lengths than the config."""
    entry = packed.parts["shape"]
    problem = packed.shape_problem(read("shape", 0, entry.bytes).tobytes())
    if problem is not None:
        raise CheckpointError(problem)
