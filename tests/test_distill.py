"""The loop: accumulation, guards, exact resume, teachers, and a stage from folder to folder."""

import gc
import json
import os
import shutil
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import sharded
from moeslim.artifacts import commit
from moeslim.artifacts.commit import write_json
from moeslim.data.tokens import TokenSet
from moeslim.distill import loop, run, state
from moeslim.distill.loop import TrainInputs
from moeslim.distill.optimizer import make_optimizer
from moeslim.distill.run import TrainPaths, distill, last_state
from moeslim.distill.settings import Stage, TrainSettings
from moeslim.distill.teacher import OnlineTeacher
from moeslim.distill.vocab_check import check_same_vocab
from moeslim.distill.watch import Watch
from moeslim.errors import (
    CheckpointError,
    DataError,
    Interrupted,
    RecipeError,
    ResourceError,
    RunError,
    TrainingError,
)
from moeslim.losses import Coefficients, LossWeights, Signal, coefficients, fused_loss, term_counts
from moeslim.model.load import load_student
from moeslim.model.student import Student
from tiny import changed, train_settings, write_tiny

pytestmark = pytest.mark.bits("how a step is divided into calls must not move the weights where the sums are the same")

T = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=2, initializer_range=0.1)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    """24 rows of a text in which each token is followed by its successor, a tenth of it noise."""
    folder = tmp_path_factory.mktemp("tokens")
    generator = np.random.default_rng(0)
    stream = np.cumsum(np.where(generator.random(24 * T + 1) < 0.1, 7, 1)) % 64
    np.save(folder / "tokens.npy", stream.astype(np.uint16))
    np.save(folder / "mask.npy", generator.random((24, T)) > 0.1)
    np.save(folder / "documents.npy", np.array([[1, 24 * T, 24 * T, 0]]))
    meta = {"schema": 1, "fingerprint": "x", "sequence_length": T, "eos": 1, "vocab_size": 64, "domains": ["d"]}
    write_json(folder / "meta.json", {**meta, "tokens": 24 * T, "targets": 24 * T, "sources": ["s"]})
    return TokenSet.open(folder)


def _settings(steps: int = 6, **changes: object) -> TrainSettings:
    base = train_settings(steps * 4 * T, rows_per_step=4, micro_rows=2, learning_rate=3e-3, save_every=100)
    return changed(base, lm_only=True, **changes)


def _train(student: Student, tokens: TokenSet, folder: Path, **changes: object) -> list[dict]:
    stage = Stage(fingerprint="one")
    return loop.train(student, TrainInputs(tokens), settings=_settings(**changes), folder=folder, stage=stage)


def _batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    rows, mask = torch.randint(0, 64, (4, T + 1), generator=generator), torch.rand(4, T, generator=generator) > 0.3
    return rows, mask, np.arange(4)


def _same(one: Student, two: Student) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_training_learns_and_logs_every_step(folder: Path, tokens: TokenSet, tmp_path: Path) -> None:
    records = _train(load_student(folder), tokens, tmp_path, steps=12)
    assert [r["step"] for r in records] == list(range(1, 13))
    assert records[-1]["tokens"] == 12 * 4 * T
    assert records[-1]["lm"] < records[0]["lm"] - 0.2
    first = records[0]
    wanted = first["lm"] + first["beta"] * first["mtp_lm"] + 1e-3 * first["balance"]
    assert first["total"] == pytest.approx(wanted, rel=1e-5)
    assert 0 <= first["least_load"] <= 1 <= first["balance"] * 1.2


def test_micro_batches_give_the_gradient_of_the_whole_batch(folder: Path) -> None:
    weights = LossWeights(lam=0.4, beta=0.3, alpha=0.0)  # balance is defined per micro-batch
    teacher = OnlineTeacher(load_student(write_tiny_teacher(folder)))
    found = []
    for micro in (4, 2, 1):
        student = load_student(folder)
        settings = _settings(micro_rows=micro, depths=2)
        gradient = loop.accumulate(student, _batch(), weights=weights, settings=settings, teacher=teacher)
        found.append((gradient, [p.grad for p in student.parameters()]))
    for gradient, grads in found[1:]:
        same = gradient.terms | {"balance": found[0][0].terms["balance"]}
        assert same == pytest.approx(found[0][0].terms, rel=1e-5)
        assert gradient.loss == pytest.approx(found[0][0].loss, rel=1e-5)
        for one, whole in zip(grads, found[0][1], strict=True):
            torch.testing.assert_close(one, whole, rtol=1e-3, atol=1e-6)
    assert {"lm", "kd", "mtp_lm.2", "mtp_kd.1", "mtp_lm", "mtp_kd"} <= found[0][0].terms.keys()


def write_tiny_teacher(beside: Path) -> Path:
    """A teacher of another hidden size, written once."""
    folder = beside.parent / "teacher"
    return folder if folder.exists() else write_tiny(folder, hidden_size=24, num_hidden_layers=2, seed=5)


def test_kd_falls_on_a_batch_that_is_seen_again(folder: Path) -> None:
    student, batch = load_student(folder), _batch()
    teacher = OnlineTeacher(load_student(write_tiny_teacher(folder)))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    values = []
    for _ in range(8):
        weights = LossWeights(lam=1.0, beta=0.3)
        gradient = loop.accumulate(student, batch, weights=weights, settings=_settings(), teacher=teacher)
        optimizer.step()
        optimizer.zero_grad()
        values.append((gradient.terms["kd"], gradient.terms["mtp_kd"]))
    assert values[-1][0] < 0.7 * values[0][0]
    assert values[-1][1] < 0.7 * values[0][1]


@pytest.fixture(scope="module")
def uninterrupted(
    folder: Path, tokens: TokenSet, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Student, list[dict]]:
    """Four steps without a pause, and their log."""
    student = load_student(folder)
    return student, _train(student, tokens, tmp_path_factory.mktemp("whole"), steps=4)


@pytest.mark.parametrize("stop", [2, 3])
def test_resumed_equals_uninterrupted(
    folder: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, uninterrupted: tuple
) -> None:
    """Killed within step 2 (no state yet) or 3 (one step after a state): the same weights and the same log."""
    one, two = load_student(folder), load_student(folder)
    original = Watch.write

    def write(self: Watch, record: dict) -> None:
        original(self, record)
        if record["step"] == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "write", write)
    with pytest.raises(KeyboardInterrupt):
        _train(one, tokens, tmp_path, steps=4, save_every=2)
    monkeypatch.setattr(Watch, "write", original)
    records = _train(two, tokens, tmp_path, steps=4, save_every=2)
    assert _same(uninterrupted[0], two)
    assert not _same(one, two)
    assert [r | {"seconds": 0} for r in records] == [r | {"seconds": 0} for r in uninterrupted[1]]
    assert [p.name for p in state.step_folders(tmp_path / "states")] == ["step-0000002", "step-0000004"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_goes_on_exactly(
    folder: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, uninterrupted: tuple
) -> None:
    one, two = load_student(folder), load_student(folder)
    before = signal.getsignal(number)
    original = loop.accumulate

    def accumulate(*args: object, **named: object) -> loop.Gradient:
        os.kill(os.getpid(), number)
        return original(*args, **named)

    monkeypatch.setattr(loop, "accumulate", accumulate)
    with pytest.raises(Interrupted, match="after step 1 of 4") as caught:
        _train(one, tokens, tmp_path / "part", steps=4)
    assert caught.value.exit_code == 130
    assert signal.getsignal(number) == before
    monkeypatch.setattr(loop, "accumulate", original)
    _train(two, tokens, tmp_path / "part", steps=4)
    assert _same(uninterrupted[0], two)


@pytest.mark.parametrize("step", [1, 4])
def test_a_signal_after_the_sums_of_a_step_counts_in_the_next_and_behind_the_last(
    folder: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    original = loop.check_finite

    def check(*args: object, **named: int) -> None:
        original(*args, **named)
        if named["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "check_finite", check)
    with pytest.raises(Interrupted, match=f"SIGTERM: stopped after step {min(step + 1, 4)} of 4"):
        _train(load_student(folder), tokens, tmp_path, steps=4)
    assert [path.name for path in state.step_folders(tmp_path / "states")] == [f"step-000000{min(step + 1, 4)}"]


def test_a_step_that_finds_no_room_says_what_to_lower(
    folder: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = Student.forward, 0

    def full(self: Student, *args: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, *args, **named)

    monkeypatch.setattr(Student, "forward", full)
    with pytest.raises(ResourceError, match=r"step 2: out of memory .*distill.micro_rows to 1 \(now 2\)"):
        _train(load_student(folder), tokens, tmp_path)


def test_nan_stops_before_the_weights_are_touched(folder: Path, tokens: TokenSet, tmp_path: Path) -> None:
    student = load_student(folder)
    with torch.no_grad():
        student.trunk.model.embed_tokens.weight.fill_(float("nan"))
        before = student.head.clone()
    with pytest.raises(TrainingError, match=r"step 1: .*lm is nan"):
        _train(student, tokens, tmp_path)
    assert torch.equal(student.head, before)


def test_a_foreign_state_is_refused(folder: Path, tokens: TokenSet, tmp_path: Path) -> None:
    _train(load_student(folder), tokens, tmp_path, steps=1)
    with pytest.raises(RunError, match="other models, data or place"):
        loop.train(
            load_student(folder), TrainInputs(tokens), settings=_settings(1), folder=tmp_path, stage=Stage("other")
        )


def test_a_kill_while_saving_leaves_the_state_before(
    folder: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: tuple
) -> None:
    one, two = load_student(folder), load_student(folder)
    original = commit.rename

    def rename(source: Path, target: Path) -> None:
        if target.name == "step-0000002":
            raise KeyboardInterrupt
        original(source, target)

    monkeypatch.setattr(commit, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        _train(one, tokens, tmp_path / "part", steps=4, save_every=1)
    assert [p.name for p in state.step_folders(tmp_path / "part" / "states")] == ["step-0000001"]
    monkeypatch.setattr(commit, "rename", original)
    _train(two, tokens, tmp_path / "part", steps=4, save_every=1)
    assert _same(uninterrupted[0], two)


def test_leftovers_of_killed_saves_and_removals_go(folder: Path, tokens: TokenSet, tmp_path: Path) -> None:
    for name in (".step-0000009.partial", ".step-0000003.removed"):
        (tmp_path / "states" / name / "weights").mkdir(parents=True)
    _train(load_student(folder), tokens, tmp_path, steps=2, save_every=1)
    for number in (3, 4):  # a kill came before the removal of old states, and nothing is left to train
        shutil.copytree(tmp_path / "states" / "step-0000002", tmp_path / "states" / f"step-000000{number}")
    _train(load_student(folder), tokens, tmp_path, steps=2, keep_last=1)
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["step-0000004"]


def test_bf16_keeps_fp32_weights_and_learns(folder: Path, tokens: TokenSet, tmp_path: Path) -> None:
    aligned = write_tiny(tmp_path / "m", num_hidden_layers=2, initializer_range=0.1, moe_intermediate_size=16)
    student = load_student(aligned, experts="moeslim_sorted")
    records = _train(student, tokens, tmp_path, steps=6, precision="bfloat16")
    assert student.head.dtype == torch.float32
    assert records[-1]["lm"] < records[0]["lm"]


def test_teacher_of_other_words_is_refused(folder: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other", num_hidden_layers=2, vocab_size=72)
    with pytest.raises(CheckpointError, match="vocab_size is 72"):
        check_same_vocab(folder, other)
    one, two = tmp_path / "one", tmp_path / "two"
    for paths, word in ((one, "a"), (two, "b")):
        paths.mkdir()
        write_json(paths / "config.json", {"vocab_size": 64})
        write_json(paths / "tokenizer.json", {"model": {"vocab": {word: 0}}})
    with pytest.raises(CheckpointError, match="other tokens"):
        check_same_vocab(one, two)
    check_same_vocab(one, one)


def test_online_teacher_is_frozen(folder: Path) -> None:
    teacher = OnlineTeacher(load_student(folder))
    signal_: Signal = teacher(*_batch()[::2])
    assert signal_.hidden.shape == (4, T, 16)
    assert not signal_.hidden.requires_grad
    assert not signal_.head.requires_grad


def test_distill_from_folder_to_folder_in_two_stages(folder: Path, tokens: TokenSet, tmp_path: Path) -> None:
    settings = changed(_settings(4), lm_only=False)
    teacher = write_tiny_teacher(folder)
    first = TrainPaths(tmp_path / "stage-1", start=0.0, end=0.5)
    record = distill(folder, teacher, tokens=tokens, out=tmp_path / "one", settings=settings, paths=first)
    assert record["first"]["lam"] == pytest.approx(1 - 0.25 * 0.5 / 4)
    kept = last_state(first.work)
    assert kept is not None
    state.slice_moments(kept, tmp_path / "moments", cut=shutil.copytree)
    second = TrainPaths(tmp_path / "stage-2", start=0.5, end=1.0, moments=tmp_path / "moments")
    record = distill(tmp_path / "one", teacher, tokens=tokens, out=tmp_path / "two", settings=settings, paths=second)
    assert record["last"]["lam"] == pytest.approx(0.75)
    assert record["last"]["learning_rate"] == pytest.approx(settings.distill.min_learning_rate)
    facts = json.loads((last_state(second.work) / "state.json").read_text())  # it is there
    assert set(facts["adam_steps"].values()) == {8}
    again = distill(tmp_path / "one", teacher, tokens=tokens, out=tmp_path / "three", settings=settings, paths=second)
    assert again["files"] == record["files"]  # from the finished state, the same bytes
    assert (tmp_path / "two" / "receipt.json").read_bytes() == (tmp_path / "three" / "receipt.json").read_bytes()


def test_what_was_trained_leaves_the_memory(
    folder: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When `distill` is back, also with blocks that refer to themselves: a GPU has room for the next stage."""
    weights: list[weakref.ref] = []

    def noted(*args: object, **options: object) -> Student:
        student = load_student(*args, **options)
        weights.extend(weakref.ref(parameter) for parameter in student.parameters())
        return student

    monkeypatch.setattr(run, "load_student", noted)
    settings = changed(_settings(1), activation_checkpointing=True)
    gc.disable()  # it may come at any moment, or not before the next stage
    try:
        distill(
            folder, None, tokens=tokens, out=tmp_path / "out", settings=settings, paths=TrainPaths(tmp_path / "work")
        )
        assert len(weights) > 20
        assert [weight for weight in weights if weight() is not None] == []
    finally:
        gc.enable()


def test_the_state_of_a_model_is_the_best_one_where_it_was_chosen(tmp_path: Path) -> None:
    assert last_state(tmp_path) is None
    for step, bits in ((2, 3.0), (4, 1.5), (6, 1.5), (8, None)):
        facts = {
            "schema": state.SCHEMA,
            "step": step,
            "cursor": {"seed": 0},
            "fingerprint": "",
            "settings": {"final": "last"},
        }
        facts |= {
            "config": {},
            "adam_steps": {},
            "random": torch.get_rng_state().numpy().tobytes().hex(),
            "bits_per_byte": bits,
        }
        write_json(tmp_path / "states" / f"step-000000{step}" / "state.json", facts)
    assert last_state(tmp_path).name == "step-0000008"
    write_json(tmp_path / "states" / "step-0000008" / "state.json", {**facts, "settings": {"final": "best"}})
    assert last_state(tmp_path).name == "step-0000004"


def test_reset_in_mid_run_warms_up_again(folder: Path, tokens: TokenSet, tmp_path: Path) -> None:
    paths = TrainPaths(tmp_path / "w", start=0.5, end=1.0)
    record = distill(folder, None, tokens=tokens, out=tmp_path / "o", settings=_settings(2), paths=paths)
    assert record["steps"] == 2
    moments = tmp_path / "moments"
    state.slice_moments(tmp_path / "w" / "states" / "step-0000002", moments, cut=shutil.copytree)
    other = load_student(write_tiny(tmp_path / "m", num_hidden_layers=2, hidden_size=24))
    with pytest.raises(RunError, match="slice the moments"):
        state.load_moments(moments, other, optimizer=make_optimizer(other, _settings()))


def test_what_cannot_work_is_refused_first(folder: Path, tokens: TokenSet, tmp_path: Path) -> None:
    paths, settings = TrainPaths(tmp_path / "w"), _settings(1)
    options = {"tokens": tokens, "out": tmp_path / "o", "paths": paths}
    with pytest.raises(RecipeError, match="lm_only is on"):
        distill(folder, folder, settings=settings, **options)
    with pytest.raises(RecipeError, match="needs a teacher"):
        distill(folder, None, settings=changed(settings, lm_only=False), **options)
    with pytest.raises(RecipeError, match="no text is held out to measure on"):
        distill(folder, None, settings=changed(settings, measure_every=5), **options)
    with pytest.raises(RecipeError, match="train_only names dense of a model where it has none"):
        distill(folder, None, settings=changed(settings, train_only=("dense",)), **options)
    small = write_tiny(tmp_path / "small", num_hidden_layers=2, vocab_size=32)
    with pytest.raises(DataError, match="64 tokens"):
        distill(small, None, settings=settings, **options)
    assert not paths.work.exists()


def test_a_stage_reads_on_where_the_one_before_ended(tokens: TokenSet) -> None:
    settings = train_settings(90 * tokens.sequence_length, rows_per_step=1, micro_rows=1)
    later = loop.first_row(tokens, settings=settings, stage=Stage(fingerprint="x", start=0.1, end=1.0))
    assert later.epoch * len(tokens) + later.position == 10  # a tenth of 100 steps of one row
    assert loop.first_row(tokens, settings=settings, stage=Stage(fingerprint="x")).position == 0


class _Small(torch.nn.Module):
    """As much of a student as a compiler has to get through: embedding, a layer, the loss, what comes after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = torch.nn.Embedding(64, 16), torch.nn.Linear(16, 16)
        self.head = torch.nn.Parameter(torch.randn(64, 16))

    def forward(self, rows: torch.Tensor, mask: torch.Tensor, factors: Coefficients, teacher: Signal) -> torch.Tensor:
        states = torch.tanh(self.layer(self.embedding(rows[:, :-1])))
        loss, sums = fused_loss(
            [states, states[:, :-1] * 0.5],
            self.head,
            targets=rows[:, 1:],
            mask=mask,
            coefficients=factors,
            teacher=teacher,
        )
        return loss * 2.0 + 0.0 * sums["lm"]


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_leaves_its_graph_for_the_loss() -> None:
    rows, mask, teacher = sharded.batch()
    factors = coefficients(LossWeights(lam=0.5, beta=0.5), counts=term_counts(mask, 1), tokens=mask.numel())
    found = []
    for build in (lambda model: model, torch.compile):
        model = _Small()
        loss = build(model)(rows, mask, factors, teacher)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert float(found[0][-1].abs().max()) > 1e-3
