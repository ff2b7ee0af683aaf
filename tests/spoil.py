"""A good checkpoint, and ways to spoil one."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moeslim.checkpoint.index import INDEX_NAME, SINGLE_NAME
from tiny import write_tiny


def write_good(home: Path) -> Path:
    """A bf16 model in several shards, with A_log and norms in fp32, a small tokenizer and a receipt."""
    tokenizer = home / "tokenizer"
    tokenizer.mkdir()
    vocab = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 63}]}
    (tokenizer / "tokenizer.json").write_text(json.dumps(vocab))
    (tokenizer / "generation_config.json").write_text('{"eos_token_id": 1}')
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    form = {"dtype": "bfloat16", "float32": ("a_log", "norm"), "shard_bytes": 30_000, "tokenizer_from": tokenizer}
    return write_tiny(home / "model", form=form)


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> Path:
    """A safetensors file with exactly this header, true or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a folder by hand and write them as one file, without a receipt."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE_NAME, {"format": "pt"})
    (folder / INDEX_NAME).unlink(missing_ok=True)
    (folder / "receipt.json").unlink(missing_ok=True)
