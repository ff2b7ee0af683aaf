"""Checkpoints in the forms that models are released in, packed by plain formulas, and the same models in bf16.

What a packed tensor means is said here a second time, in float32 and block by block or value by value; nothing here
imports the code under test.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moeslim.checkpoint.index import INDEX_NAME, SINGLE_NAME

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
Parts = dict[str, torch.Tensor]  # what a file holds of one tensor: ending of the name -> tensor
Packing = Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
"""A matrix -> what lies in the file, and the bf16 matrix that this is."""


def spread_scales(scale: torch.Tensor, shape: tuple[int, ...], *, block: tuple[int, int]) -> torch.Tensor:
    """Every value's scale in float32; a block of 0 is a whole axis."""
    rows, columns = shape[-2:]
    every = scale.float().reshape(*shape[:-2], -(-rows // (block[0] or rows)), -(-columns // (block[1] or columns)))
    every = every.repeat_interleave(block[0] or rows, -2)[..., :rows, :]
    return every.repeat_interleave(block[1] or columns, -1)[..., :columns]


def largest(matrix: torch.Tensor, *, block: tuple[int, int]) -> torch.Tensor:
    """The largest magnitude in each block."""
    rows, columns = matrix.shape
    down, across = block[0] or rows, block[1] or columns
    padded = torch.nn.functional.pad(matrix.float().abs(), (0, -columns % across, 0, -rows % down))
    return padded.unflatten(1, (-1, across)).unflatten(0, (-1, down)).amax(dim=(1, 3)).clamp_min(1e-12)


def fp8(block: tuple[int, int], *, scale: str = "_scale_inv", dtype: torch.dtype = torch.float32) -> Packing:
    """E4M3 with a scale for every block."""

    def pack(matrix: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        scales = (largest(matrix, block=block) / 448).to(dtype)
        every = spread_scales(scales, tuple(matrix.shape), block=block)
        codes = (matrix.float() / every).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored = scales.squeeze() if block == (0, 0) else scales
        return {"": codes, scale: stored}, (codes.float() * every).bfloat16()

    return pack


def packed_int(bits: int, group: int) -> Packing:
    """Symmetric whole numbers in words of 32 bits, a bf16 scale for `group` of a row (0: all)."""

    def pack(matrix: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        rows, columns = matrix.shape
        top = 2 ** (bits - 1)
        scales = (largest(matrix, block=(1, group)) / (top - 1)).bfloat16()
        every = spread_scales(scales, (rows, columns), block=(1, group))
        codes = (matrix.float() / every).round().clamp(-top, top - 1)
        each = 32 // bits
        words = torch.zeros(rows, -(-columns // each), dtype=torch.int64)
        for column in range(columns):
            words[:, column // each] += (codes[:, column].long() + top) << (column % each * bits)
        words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
        parts = {"_packed": words, "_scale": scales, "_shape": torch.tensor([rows, columns])}
        return parts, (codes.int() * every).bfloat16()  # whole numbers have no -0

    return pack


def mxfp4_values(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(..., columns, rows / 32, 16) and (..., columns, rows / 32) -> (..., rows, columns) in bf16."""
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    values = E2M1.double()[codes] * torch.pow(2.0, scales.double() - 127)[..., None]
    return values.flatten(-2).transpose(-1, -2).float().bfloat16().contiguous()


def mxfp4(stack: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """Stacked matrices in E2M1 along their rows, every 32 with a power of 2."""
    groups = stack.float().transpose(-1, -2).unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).clamp_min(2.0**-100).log2().ceil()
    close = (groups / torch.pow(2.0, exponents)[..., None])[..., None] - E2M1
    codes = close.abs().argmin(-1).to(torch.uint8)
    blocks, scales = codes[..., ::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)
    return {"_blocks": blocks, "_scales": scales}, mxfp4_values(blocks, scales)


METHODS: dict[str, tuple[dict[str, Any], Packing]] = {
    "fp8 block": ({"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "dynamic"}, fp8((8, 8))),
    "fp8 block 128": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, fp8((128, 128), dtype=torch.bfloat16)),
    "fp8 per tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8((0, 0))),
    "fp8 per row": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
            },
        },
        fp8((1, 0), scale="_scale", dtype=torch.bfloat16),
    ),
    "int4": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head", "re:.*self_attn.*"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "input_activations": None,
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "strategy": "group",
                        "group_size": 4,
                        "symmetric": True,
                        "dynamic": False,
                    },
                }
            },
        },
        packed_int(4, 4),
    ),
    "int8": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
            },
        },
        packed_int(8, 0),
    ),
    "mxfp4": ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}, mxfp4),
}
"""Name -> what config.json says, and how a matrix is packed."""
MATRICES = r".*(self_attn|experts\.\d+)\.\w+_proj\.weight"
STACKS = r".*experts\.\w+_proj"


def packed_pair(
    source: Path, out: Path, *, method: str, shard: Callable[[str], str] | None = None
) -> tuple[Path, Path]:
    """A model whose attention and experts are packed, and the same in bf16, in `out`/packed and `out`/plain.

    MXFP4 packs stacked experts alone. `shard` gives the file of a tensor; without it there is one.
    """
    said, pack = METHODS[method]
    names = STACKS if method == "mxfp4" else MATRICES
    packed: Parts = {}
    plain: Parts = {}
    for name, tensor in tensors_of(source).items():
        if re.fullmatch(names, name):
            parts, plain[name] = pack(tensor)
            packed |= {name + ending: part.contiguous() for ending, part in parts.items()}
        else:
            packed[name] = plain[name] = tensor
    config = json.loads((source / "config.json").read_text())
    write_folder(out / "packed", {**config, "quantization_config": said}, packed, beside=source, shard=shard)
    write_folder(out / "plain", config, plain, beside=source)
    return out / "packed", out / "plain"


def tensors_of(folder: Path) -> Parts:
    """All tensors of a folder's files."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Parts,
    *,
    beside: Path | None = None,
    shard: Callable[[str], str] | None = None,
) -> Path:
    """A checkpoint of these tensors, with the tokenizer of `beside`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for path in () if beside is None else beside.glob("token*"):
        shutil.copy(path, folder / path.name)
    if shard is None:
        save_file(tensors, folder / SINGLE_NAME, {"format": "pt"})
        return folder
    weight_map = {name: shard(name) for name in tensors}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
