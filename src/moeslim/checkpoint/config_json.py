"""config.json as a raw dictionary."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeslim.artifacts import strict_json
from moeslim.checkpoint.config_values import check_values
from moeslim.checkpoint.index import path_inside, refuse_adapter
from moeslim.errors import CheckpointError


def read_config(folder_or_file: Path | str) -> dict[str, Any]:
    """The raw config of a folder, or of a bare config.json; CheckpointError when it is missing, not JSON or impossible.

    What is looked at is in `config_values`; sizes are the shape's to check.
    """
    path = Path(folder_or_file)
    if path.is_dir():
        refuse_adapter(path)
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
