"""Where a model lies: a folder, or a name on the hub, downloaded once. The hub enters through this file alone."""

import re
from pathlib import Path

from moeslim.checkpoint.index import INDEX_NAME
from moeslim.checkpoint.side_files import OTHER_WEIGHTS
from moeslim.errors import CheckpointError
from moeslim.log import logger

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CONFIG = ("config.json", INDEX_NAME)
_LEFT = (*(f"*{suffix}" for suffix in OTHER_WEIGHTS), "*/*.safetensors", ".*", "original/*", "onnx/*", "openvino/*")


def resolve(name_or_path: Path | str, *, revision: str | None = None, config_only: bool = False) -> Path:
    """The local folder of a model; a hub name is downloaded to the hub's cache, at `revision` (commit, tag, branch).

    The folder of a download is named by its commit, so one without a revision is pinned from then on by what the log
    says. With `config_only` only config and index are fetched, and the path of a bare config.json is allowed too.
    Raises CheckpointError for what is neither there nor downloadable.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir() or (config_only and path.is_file()):
        if revision is not None:
            raise CheckpointError(f"{path}: a revision ({revision}) belongs to a name on the hub, this is a local path")
        return path
    if path.exists():
        raise CheckpointError(f"{path}: give the folder with config.json and *.safetensors, not a file of it")
    if not _HUB_NAME.fullmatch(str(name_or_path)):
        raise CheckpointError(f"{name_or_path}: no such folder, and not a name on the hub (owner/model)")
    return _download(str(name_or_path), revision, config_only=config_only)


def _download(name: str, revision: str | None, *, config_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(_CONFIG) if config_only else None,
                ignore_patterns=None if config_only else list(_LEFT),
            )
        )
    except (OSError, ValueError) as problem:  # the hub's own errors are one or the other
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise CheckpointError(
            f"{name}: there is no such folder here, and the hub did not give it ({reason}); "
            "check the name, the revision and the connection, or download it elsewhere and give its folder"
        ) from None
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{name}: has no config.json on the hub, so it is no model that transformers can read")
    if not config_only and not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{name}: has no *.safetensors on the hub; use a safetensors release of this model")
    logger.info("%s: commit %s", name, folder.name)
    return folder
