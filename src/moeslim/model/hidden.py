"""Hidden states of all calibration rows as files: what a layer gets and what it gives, never one over the other."""

import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F

from moeslim.artifacts.commit import disk_errors, named
from moeslim.errors import ResourceError


class HiddenFiles:
    """Two generations of hidden states, one the inputs of the current layer and one its outputs."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], *, dtype: torch.dtype, device: str) -> None:
        self.folder, self.shape, self.dtype, self.device = folder, shape, dtype, device
        self.source: str | None = None
        self.row_bytes = shape[1] * shape[2] * dtype.itemsize

    @property
    def target(self) -> str:
        """The generation that is being written."""
        return "b" if self.source == "a" else "a"

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Input rows [start, stop) on the device."""
        assert self.source is not None
        path = self._path(self.source)
        with named(path), path.open("rb") as file:
            file.seek(start * self.row_bytes)
            # Into torch's own memory for its alignment: a matmul's last bits may depend on it.
            x_BTd = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
            got = file.readinto(x_BTd.flatten().view(torch.uint8).numpy().data)
        assert got == x_BTd.nbytes, "the hidden states end early"
        return x_BTd.to(self.device)

    def write(self, start: int, y_BTd: torch.Tensor) -> None:
        """Output rows from `start` on; columns that they lack are zeros."""
        if y_BTd.shape[-1] < self.shape[2]:
            y_BTd = F.pad(y_BTd, (0, self.shape[2] - y_BTd.shape[-1]))
        path = self._path(self.target)
        # Made if it is not there, and never emptied: another thread may just have made it.
        with disk_errors(path), open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            file.seek(start * self.row_bytes)
            file.write(y_BTd.to(self.dtype).contiguous().cpu().flatten().view(torch.uint8).numpy().data)

    def turn(self) -> None:
        """Make the outputs, durable on disk, the next layer's inputs."""
        path = self._path(self.target)
        with disk_errors(path), path.open("rb") as file:
            os.fsync(file.fileno())
        self.source = self.target

    @property
    def missing_bytes(self) -> int:
        """What both generations will take beyond the bytes written already."""
        found = [path.stat() for g in "ab" if (path := self._path(g)).exists()]
        existing = sum(min(file.st_size, 512 * file.st_blocks) for file in found)  # a part may be a hole
        return 2 * self.shape[0] * self.row_bytes - existing

    def check_disk(self, *others: "HiddenFiles") -> None:
        """ResourceError unless what is still to be written fits, beside what `others` on the same disk will write."""
        needed = sum(files.missing_bytes for files in (self, *others))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ResourceError(
                f"{self.folder}: hidden states need {needed / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free; "
                "use fewer or shorter sequences, or put the output on a larger disk"
            )

    def _path(self, generation: str) -> Path:
        return self.folder / f"hidden-{generation}.bin"
