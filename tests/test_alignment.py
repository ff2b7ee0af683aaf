"""The same bits wherever in a file a weight lies: what is walked and trained is copied to torch's own memory.

MKL's matrix products have other last bits for an operand that does not begin with a line of 64 bytes, and safetensors
puts a tensor at any multiple of 8. A rewritten header must not make a resumed run another one.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from moeslim.checkpoint.reader import Reader
from moeslim.data.cursor import Cursor
from moeslim.distill.optimizer import make_optimizer
from moeslim.distill.state import Position, States
from moeslim.losses import LossWeights, coefficients, term_counts
from moeslim.model.load import load_student
from moeslim.model.student import Student
from moeslim.model.walk import WalkSettings, walk
from tiny import moved_in_file, train_settings, write_tiny

pytestmark = pytest.mark.bits("the contract of determinism: where a weight lies in its file changes no bit")
LINE = 64
OFFSETS = (0, 8, 24, 40)
ROWS = np.random.default_rng(3).integers(0, 64, (4, 22))
SETTINGS = train_settings(84, rows_per_step=4, micro_rows=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """One model four times, its first tensor at each of OFFSETS behind a line of the file."""
    root = tmp_path_factory.mktemp("models")
    source = write_tiny(root / "source", layouts="stacked")
    return {offset: moved_in_file(source, root / str(offset), offset=offset) for offset in OFFSETS}


def train(student: Student, steps: int) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    """The losses of `steps` real steps: forward, backward, AdamW."""
    optimizer, losses = make_optimizer(student, SETTINGS), []
    rows, mask = torch.from_numpy(ROWS), torch.ones(4, 21, dtype=torch.bool)
    factors = coefficients(LossWeights(beta=0.3), counts=term_counts(mask, depths=1), tokens=mask.numel())
    for _ in range(steps):
        loss = student(rows, mask, coefficients=factors).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return losses, optimizer


def assert_aligned(student: Student) -> None:
    assert {name: p.data_ptr() % LINE for name, p in student.named_parameters() if p.data_ptr() % LINE} == {}


def test_the_files_differ_in_where_their_tensors_lie(moved: dict[int, Path]) -> None:
    for offset, folder in moved.items():
        index = Reader(folder).index.tensors.values()
        assert min(entry.start for entry in index) % LINE == offset
        assert Reader(folder).tensor("model.layers.0.mlp.gate.weight").data_ptr() % 8 == 0


def test_a_walk_has_the_same_bits(moved: dict[int, Path], tmp_path: Path) -> None:
    found: dict[str, torch.Tensor] = {}
    for offset, folder in moved.items():
        settings = WalkSettings(rows_per_batch=2)
        for visit in walk(Reader(folder), ROWS, workdir=tmp_path / str(offset), settings=settings):
            assert all(parameter.data_ptr() % LINE == 0 for parameter in visit.root.parameters())
            y = torch.cat([batch.y for batch in visit.batches()])
            assert torch.equal(found.setdefault(visit.key, y), y), (visit.key, offset)


def test_training_has_the_same_bits(moved: dict[int, Path]) -> None:
    first: tuple[list[torch.Tensor], dict[str, torch.Tensor]] | None = None
    for folder in moved.values():
        student = load_student(folder)
        assert_aligned(student)
        found = train(student, 3)[0], student.state_dict()
        first = first or found
        assert all(torch.equal(one, other) for one, other in zip(found[0], first[0], strict=True))
        assert all(torch.equal(found[1][name], tensor) for name, tensor in first[1].items())


def test_what_is_resumed_lies_as_what_was_loaded(moved: dict[int, Path], tmp_path: Path) -> None:
    student = load_student(moved[24])
    _, optimizer = train(student, 1)
    with States(tmp_path, settings=SETTINGS, fingerprint="one") as states:
        states.save(Position(1, Cursor(seed=0)), student, optimizer=optimizer)
    again = load_student(moved[8])
    fresh = make_optimizer(again, SETTINGS)
    assert States(tmp_path, settings=SETTINGS, fingerprint="one").resume(again, fresh) is not None
    assert_aligned(again)
    moments = [tensor for held in fresh.state.values() for name, tensor in held.items() if name != "step"]
    assert moments
    assert all(moment.data_ptr() % LINE == 0 for moment in moments)
