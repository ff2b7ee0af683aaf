"""Router rows from a file beside the plan: their reading, checked before anything is written."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from moeslim.artifacts.fingerprint import hash_file
from moeslim.checkpoint.index import path_inside, read_header
from moeslim.checkpoint.reader import TORCH_DTYPES
from moeslim.errors import CheckpointError, PlanError
from moeslim.plan import Plan
from moeslim.plan.outputs import Output
from moeslim.plan.steps import SetRouters


class PlanFiles:
    """The files that a plan's `set_routers` steps name, in the folder where the plan lies.

    They may hold more tensors than the steps ask for. Raises PlanError where no folder is given or a file is another
    one than the plan's, CheckpointError where it is not a safetensors file.
    """

    def __init__(self, folder: Path | str | None, plan: Plan) -> None:
        self._paths: dict[str, Path] = {}
        for number, step in enumerate(plan.steps, 1):
            if isinstance(step, SetRouters):
                where = f"step {number} (set_routers)"
                if folder is None:
                    raise PlanError(
                        f"{where}: the new router rows lie in {step.file}, which stands beside the plan; say in which "
                        "folder (`beside`)"
                    )
                self._paths[step.file] = _unchanged(path_inside(Path(folder), step.file), step, where=where)
        self._headers = {file: read_header(path) for file, path in self._paths.items()}

    def check(self, outputs: Iterable[Output]) -> None:
        """Whether every row that the outputs take from a file is there, in its shape, as finite floats."""
        for output in outputs:
            for source in output.slots[0].sources:
                if source.file is not None:
                    self._check(source.file, source.name, shape=output.shape)

    def tensor(self, file: str, name: str) -> torch.Tensor:
        """One tensor of a file, in the file's dtype."""
        with safe_open(self._paths[file], framework="pt") as opened:
            return opened.get_tensor(name)

    def _check(self, file: str, name: str, *, shape: tuple[int, ...]) -> None:
        path, header = self._paths[file], self._headers[file]
        if name not in header:
            raise CheckpointError(f"{path}: there is no tensor {name}; the plan takes this layer's router rows from it")
        if header[name].shape != shape:
            raise CheckpointError(f"{path}: {name} is {list(header[name].shape)}, the cut model's is {list(shape)}")
        if header[name].dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{path}: {name} is {header[name].dtype}; router rows must be one of {', '.join(TORCH_DTYPES)}"
            )
        if not self.tensor(file, name).isfinite().all():
            raise CheckpointError(f"{path}: {name} has values that are NaN or Inf")


def _unchanged(path: Path, step: SetRouters, *, where: str) -> Path:
    if not path.is_file():
        raise PlanError(f"{where}: {path} is not there; it belongs beside the plan, so move or copy the two together")
    found = hash_file(path)
    if found != step.sha256:
        raise PlanError(
            f"{where}: {path} is not the file that the plan was made with (sha256 {found[:16]}..., the plan says "
            f"{step.sha256[:16]}...); restore it, or make the plan anew"
        )
    return path
