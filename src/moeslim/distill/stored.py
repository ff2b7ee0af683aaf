"""Named tensors as a folder that any number of processes write and any other number read: torch's distributed
checkpoint.

Every process writes the parts that it holds and reads those that it needs. `.metadata`, written when all parts are
durable, says which part lies where. It is a pickle, and is read with the few classes alone that describe tensors: one
that names anything else is refused before that is looked up, so a state from a stranger runs no code.
"""

import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from moeslim.artifacts import strict_json
from moeslim.artifacts.commit import unwritten
from moeslim.artifacts.fingerprint import file_fingerprint
from moeslim.errors import RunError

_METADATA = "Metadata MetadataIndex TensorStorageMetadata TensorProperties ChunkStorageMetadata _MEM_FORMAT_ENCODING"
_CLASSES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": tuple(_METADATA.split()),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
}
"""What `.metadata` may name, besides torch's dtypes."""
_BROKEN_PICKLE = (
    pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, MemoryError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
"""What reading one raises when its bytes are not what was written."""

SEAL = "files.json"


@dataclass(frozen=True)
class Writing:
    """A write under way: `done` says whether it has ended; `wait` waits for that and raises what went wrong."""

    done: Callable[[], bool]
    wait: Callable[[], None]


def write(
    tensors: dict[str, torch.Tensor], folder: Path, *, group: dist.ProcessGroup | None, background: bool
) -> Writing:
    """Write tensors, whole or each process's parts of them, together with the others of `group` (None: alone).

    In the background this returns as soon as the tensors are copied to memory of their own. Waiting raises
    ResourceError where the disk is full or fails.
    """
    options: dict[str, Any] = {"storage_writer": _Writer(folder), "process_group": group, "no_dist": group is None}
    _expect_one_process()
    if not background:
        return Writing(lambda: True, lambda: _finish_write(folder, lambda: dcp.save(tensors, **options)))
    future = dcp.async_save(tensors, async_stager=_Copies(), **options)
    assert not isinstance(future, AsyncSaveResponse), "_Copies copies at once"
    return Writing(future.done, lambda: _finish_write(folder, future.result))


def seal(folder: Path) -> None:
    """Note the fingerprints of all files of a finished `write`; an opened folder is compared with them."""
    files = {path.name: file_fingerprint(path) for path in sorted(folder.iterdir())}
    (folder / SEAL).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")  # the folder is not committed yet


def _check_seal(folder: Path) -> None:
    """ValueError where a file is gone or another one; folders of older versions have no seal."""
    if not (folder / SEAL).exists():
        return
    for name, found in strict_json.load(folder / SEAL).items():
        path = folder / Path(name).name
        if not path.is_file() or file_fingerprint(path) != found:
            raise ValueError(f"{name} is torn, altered or gone")


class Stored:
    """An opened folder of `write`: `sizes` by name. RunError where it cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            _check_seal(folder)
            self._reader = _Reader(folder)
            known = self._reader.metadata.state_dict_metadata
            self.sizes = {name: found.size for name, found in known.items() if isinstance(found, TensorStorageMetadata)}
        except (OSError, *_BROKEN_PICKLE) as problem:
            raise self._unreadable(str(problem) or type(problem).__name__) from problem

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Read into the tensors given, each process its own parts of them, without the others' help."""
        for name, tensor in tensors.items():
            if self.sizes.get(name) != tensor.shape:
                has = f"shape {tuple(self.sizes[name])}" if name in self.sizes else "no place"
                raise RunError(
                    f"{self.folder.parent}: {name} has {has} in it and shape {tuple(tensor.shape)} in the model, so it "
                    f"is the state of another one; remove {self.folder.parent.parent} to start again"
                )
        if not tensors:
            return
        _expect_one_process()
        try:
            dcp.load(tensors, storage_reader=self._reader, no_dist=True)
        except dcp.CheckpointException as problem:
            raise self._unreadable(_reason(problem)) from problem

    def _unreadable(self, reason: str) -> RunError:
        return RunError(
            f"{self.folder.parent}: this training state cannot be read ({reason}); remove it to resume from the one "
            "before it"
        )


class _Writer(dcp.FileSystemWriter):
    """Files without the random number and the working name that are noted otherwise: equal states are equal bytes."""

    def __init__(self, folder: Path) -> None:
        # Copying ahead goes by a stream of the thread's GPU, and in a thread of every process that is the first one.
        super().__init__(folder, per_thread_copy_ahead=0)

    def storage_meta(self) -> None:
        return None

    def write_data(self, plan: Any, planner: Any) -> Any:
        """As the class does, but the disk's error is not hidden by torch.save.

        Its archive is closed while the disk's error flies, and complains that it is not whole.
        """
        try:
            return super().write_data(plan, planner)
        except RuntimeError as problem:
            cause: BaseException | None = problem
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or problem from None


class _Reader(dcp.FileSystemReader):
    """Finds out once what lies where, however many loads ask for it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metadata = _metadata(folder)

    def read_metadata(self, *_args: Any, **_more: Any) -> dcp.Metadata:
        return self.metadata


class _Unpickler(pickle.Unpickler):
    """Reads descriptions of tensors, and no other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f".metadata names {module}.{name}, which describes no tensor")
        return super().find_class(module, name)


def _metadata(folder: Path) -> dcp.Metadata:
    """What lies where, all of it in files of the folder itself."""
    path = folder / ".metadata"
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise OSError(f"{path} is no file")
    with path.open("rb") as file:
        metadata = _Unpickler(file).load()
    if not isinstance(metadata, dcp.Metadata):
        raise TypeError(".metadata describes no tensors")
    for info in {info.relative_path for info in metadata.storage_data.values()}:
        if Path(info).name != info or ((folder / info).exists() and not (folder / info).is_file()):
            raise ValueError(f"{info!r} is no file of the folder")
    metadata.storage_meta = dcp.metadata.StorageMeta()
    return metadata


class _Copies(BlockingAsyncStager):
    """Copies of all tensors in the CPU's memory, made at once: the next step changes the originals."""

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor.to("cpu", copy=True) for name, tensor in state_dict.items()}


def _finish_write(folder: Path, finish: Callable[[], object]) -> None:
    """Carry a write to its end; what the processes report to each other is turned into one error."""
    try:
        finish()
    except dcp.CheckpointException as problem:
        causes = [cause for cause, _ in problem.failures.values()]
        for cause in causes:
            if not isinstance(cause, OSError):
                raise cause from problem
        raise unwritten(folder.parent, next(cause for cause in causes if isinstance(cause, OSError))) from problem


def _reason(problem: dcp.CheckpointException) -> str:
    """What is behind an error of one or more processes, in a line."""
    return "; ".join(dict.fromkeys(f"{type(cause).__name__}: {cause}" for cause, _ in problem.failures.values()))


def _expect_one_process() -> None:
    """Keep torch from warning that it works without a process group: it is meant to."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
