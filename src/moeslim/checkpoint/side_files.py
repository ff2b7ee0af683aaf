"""The small files that travel with the weights: tokenizer, chat templates, licence, code that a config names.

They are found by exclusion, since every release adds kinds of its own. Code is copied like all else and never run.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from moeslim.checkpoint.index import path_inside
from moeslim.errors import CheckpointError

LOADED = (
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
"""What transformers reads by name: it must be sound, and a receipt must name it."""
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".pkl", ".zip")
_OURS = ("config.json", "receipt.json", "plan.json", "README.md")
"""Written anew or, the model card, true of the uncut model alone."""
_STATES = ("trainer_state.json", "adapter_config.json")
_FOLDERS_LEFT = ("original", "onnx", "openvino", "figures", "assets")  # other forms of the weights; pictures of a card
_LARGEST = 200_000_000  # bytes of a side file; the largest tokenizers have 33 MB
_LARGEST_OTHER = 20_000_000  # of one that has no known name: more is data


def side_files(folder: Path) -> list[str]:
    """Names of the files that travel with the weights, those of sub-folders like `additional_chat_templates/a.jinja`.

    Left out are weights of any kind, hidden files and caches, training states, and what a cut writes itself.
    """
    return sorted({*loaded_files(folder), *_others(folder)})


def loaded_files(folder: Path) -> list[str]:
    """Those side files that decide how a model is loaded."""
    names = {name for name in LOADED if (folder / name).exists() or (folder / name).is_symlink()}
    names |= {path.name for pattern in ("*.jinja", "*.tiktoken", "*.py") for path in folder.glob(pattern)}
    return sorted(names)


def copy_side_files(source: Path | str, target: Path | str) -> list[str]:
    """Copy the side files, byte for byte; returns their names. Those of `check_side_files` are refused."""
    source, target = Path(source), Path(target)
    check_side_files(source)
    for name in side_files(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(side_path(source, name), target / name)
    return side_files(target)


def check_side_files(folder: Path) -> None:
    """CheckpointError for a side file that is a folder, a pipe (it would be waited for), a link out, or too large."""
    for name in loaded_files(folder):
        path = path_inside(folder, name)
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is a folder, pipe or device and no file; fetch it again")
        if path.stat().st_size > _LARGEST:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, at most {_LARGEST:,} belong to a tokenizer")


def side_path(folder: Path, name: str) -> Path:
    """The path of a side file, perhaps in a sub-folder; CheckpointError where it or a link leaves the folder."""
    *parents, last = PurePosixPath(name).parts or (name,)
    if not parents:
        return path_inside(folder, name)
    below = path_inside(folder, parents[0])
    if len(parents) > 1 or last == ".." or below.is_symlink():
        raise CheckpointError(f"{folder}: {name!r} is not in the folder or in one of its own sub-folders")
    path = below / last
    if path.is_symlink() and path.resolve().parent not in (folder.resolve(), *_blobs(folder)):
        raise CheckpointError(f"{path}: a link that leaves the folder; put a copy of the file there")
    return path


def _others(folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if _travels(path):
            yield path.name
        elif path.is_dir() and not (
            path.is_symlink() or path.name.startswith((".", "_")) or path.name in _FOLDERS_LEFT
        ):
            yield from (f"{path.name}/{own.name}" for own in sorted(path.iterdir()) if _travels(own))


def _travels(path: Path) -> bool:
    name = path.name
    return (
        path.is_file()
        and not name.startswith(".")
        and name not in (*_OURS, *_STATES)
        and path.suffix not in (".safetensors", *OTHER_WEIGHTS)
        and not name.endswith(".index.json")
        and path.stat().st_size <= _LARGEST_OTHER
        and (not path.is_symlink() or path.resolve().parent in (path.parent.resolve(), *_blobs(path.parent)))
    )


def _blobs(folder: Path) -> list[Path]:
    """Where the links of a download by huggingface_hub lead: snapshots/COMMIT[/SUB] beside blobs."""
    home = folder.resolve()
    return [up.parent / "blobs" for up in (home.parent, home.parent.parent) if up.name == "snapshots"]
