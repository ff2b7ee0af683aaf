"""config.json as a raw dictionary, and the small files that travel with the weights."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeslim.artifacts import strict_json
from moeslim.checkpoint.config_values import check_values
from moeslim.checkpoint.index import path_inside
from moeslim.errors import CheckpointError

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)


_LARGEST = 200_000_000  # bytes of a side file; the largest tokenizers have 33 MB


def read_config(folder_or_file: Path | str) -> dict[str, Any]:
    """The raw config of a folder, or of a bare config.json; CheckpointError when it is missing, not JSON or impossible.

    What is looked at is in `config_values`; sizes are the shape's to check.
    """
    path = Path(folder_or_file)
    if path.is_dir():
        path = path_inside(path, "config.json")
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; a checkpoint folder holds config.json and *.safetensors")
    try:
        config = strict_json.load(path, infinities=True)
    except ValueError as problem:
        raise CheckpointError(f"{path}: not valid JSON ({problem}); fetch the file again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, found {type(config).__name__}")
    check_values(config, path)
    return config


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json the way that released models have it: two spaces, keys in the order given."""
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def side_files(folder: Path) -> list[str]:
    """Names of the files beside config and weights that make the model: tokenizer, templates, generation config."""
    names = {name for name in SIDE_FILES if (folder / name).exists() or (folder / name).is_symlink()}
    names |= {path.name for pattern in ("*.jinja", "*.tiktoken") for path in folder.glob(pattern)}
    return sorted(names)


def copy_side_files(source: Path | str, target: Path | str) -> list[str]:
    """Copy the side files, byte for byte; returns their names. Those of `check_side_files` are refused."""
    source, target = Path(source), Path(target)
    check_side_files(source)
    for name in side_files(source):
        shutil.copyfile(path_inside(source, name), target / name)
    return side_files(target)


def check_side_files(folder: Path) -> None:
    """CheckpointError for a side file that is a folder, a pipe (it would be waited for), a link out, or too large."""
    for name in side_files(folder):
        path = path_inside(folder, name)
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is a folder, pipe or device and no file; fetch it again")
        if path.stat().st_size > _LARGEST:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, at most {_LARGEST:,} belong to a tokenizer")
