"""A stated bound of memory: what is counted beforehand is not exceeded, what cannot hold is refused, no bit changes."""

import hashlib
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cuts import merge_step, moe_keys, plan_for, size_step
from moeslim.artifacts.commit import committed_folder
from moeslim.calibrate.memory_check import batch_size_of
from moeslim.calibrate.run import calibrate
from moeslim.checkpoint import shard
from moeslim.checkpoint.finite import not_finite
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.writer import ShardWriter
from moeslim.commands.settings import memory_bound
from moeslim.errors import CheckpointError, MoeslimError, RecipeError, ResourceError
from moeslim.model import experts, memory_check
from moeslim.model.experts import ExpertFile
from moeslim.model.memory_check import BatchSize, fit_to_memory, needed
from moeslim.model.walk import WalkSettings
from moeslim.plan import write_plan
from moeslim.plan.outputs import Source
from moeslim.recipe import Recipe, parse_memory
from moeslim.surgery import read as source_parts
from moeslim.surgery.apply import cut
from moeslim.surgery.memory_check import check_cut
from moeslim.surgery.routers import PlanFiles
from tiny import write_tiny

pytestmark = pytest.mark.bits("a bound of memory changes no bit")

ROWS = np.random.default_rng(0).integers(0, 64, (4, 17)).astype(np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("bound") / "m", layouts="stacked")


@pytest.fixture
def standing(monkeypatch: pytest.MonkeyPatch) -> int:
    """The process as it stands, the same whenever it is asked."""
    monkeypatch.setattr(memory_check, "memory_used", lambda: 1_000_000)
    return 1_000_000


# Amounts


def test_amounts_of_memory() -> None:
    assert parse_memory("4GB") == 4_000_000_000
    assert parse_memory("3.5 GiB") == 3_758_096_384  # 3.5 * 2^30
    assert parse_memory("800MB") == 800_000_000
    assert memory_bound(None) is None
    assert Recipe.parse({"model": "m", "max_memory": "2GB"}).max_memory == "2GB"
    for wrong in ("4", "4XB", "0GB", "-1GB", 4, ""):
        with pytest.raises(RecipeError, match="like 4GB, 3.5GiB or 800MB"):
            Recipe.parse({"model": "m", "max_memory": wrong})


# The walk


def test_the_bound_decides_how_many_experts_stay(model: Path, standing: int) -> None:
    """Each expert beyond the first takes its bytes and the heap's share on top; all are enough."""
    reader, batch = Reader(model), BatchSize(2, 16)
    need = needed(reader, WalkSettings(8), batch=batch)
    assert need.process == standing
    assert need.expert == need.stored == 3 * 12 * 16 * 4  # three matrices of I d
    for bound, group in ((need.least, 1), (need.least + round(2.5 * 1.15 * need.expert), 3), (10**10, 8)):
        assert fit_to_memory(reader, WalkSettings(8, max_memory=bound), batch=batch).group == group
    assert fit_to_memory(reader, WalkSettings(8, max_memory=10**10, group=2), batch=batch).group == 2
    assert fit_to_memory(reader, WalkSettings(8), batch=batch) == WalkSettings(8)


def test_what_has_no_room_is_refused_with_what_to_lower(model: Path, standing: int, tmp_path: Path) -> None:
    reader = Reader(model)
    many, few = (needed(reader, WalkSettings(8), batch=BatchSize(rows, 512)).least for rows in (8, 3))
    settings = WalkSettings(8, max_memory=few + 1000)
    with pytest.raises(ResourceError, match=rf"needs at least {many / 1e9:.2f} GB .*rows_per_batch to 3 \(now 8\)"):
        fit_to_memory(reader, settings, batch=BatchSize(8, 512))
    assert fit_to_memory(reader, settings, batch=BatchSize(3, 512)).group is not None  # what it says to do helps
    with pytest.raises(ResourceError, match="sequence_length to") as told:
        fit_to_memory(reader, settings, batch=BatchSize(1, 4096))
    found = re.search(r"sequence_length to (\d+)", str(told.value))
    assert found is not None
    assert fit_to_memory(reader, settings, batch=BatchSize(1, int(found[1]))).group is not None
    with pytest.raises(ResourceError, match="Shorter rows do not help"):
        fit_to_memory(reader, WalkSettings(8, max_memory=standing), batch=BatchSize(8, 512))
    with pytest.raises(ResourceError, match="max_memory is"):
        calibrate(model, ROWS, out=tmp_path / "stats", settings=WalkSettings(8, max_memory=standing))
    assert not list(tmp_path.iterdir())


def test_a_bound_changes_no_bit(model: Path, standing: int, tmp_path: Path) -> None:
    settings = WalkSettings(rows_per_batch=2)
    need = needed(
        Reader(model), settings, batch=batch_size_of(Reader(model), settings, rows=4, length=16, removal=False)
    )
    tight = WalkSettings(rows_per_batch=2, max_memory=need.least)
    calibrate(model, ROWS, out=tmp_path / "free", settings=settings)
    calibrate(model, ROWS, out=tmp_path / "tight", settings=tight)
    files = sorted(path.name for path in (tmp_path / "free").iterdir())
    assert files
    for name in files:
        assert (tmp_path / "free" / name).read_bytes() == (tmp_path / "tight" / name).read_bytes()


def test_experts_that_are_expected_are_read_ahead_and_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ExpertFile(Reader(model), "1", dtype=torch.float32, group=1)
    ahead = ExpertFile(Reader(model), "1", dtype=torch.float32, group=1)
    ahead.expect([1, 4, 6])
    assert ahead.weights(1)
    assert not ahead._ahead  # these are too small to be worth it
    monkeypatch.setattr(experts, "_WORTH_A_THREAD", 1)
    ahead.expect([1, 4, 6])
    for expert in (1, 4, 2, 6, 7):  # some that nobody expected, in between
        for mine, theirs in zip(ahead.weights(expert), plain.weights(expert), strict=True):
            assert torch.equal(mine, theirs)
        assert set(ahead._ahead) == {1: {4}, 4: {6}, 2: {6}, 6: set(), 7: set()}[expert]


# Cutting


def test_large_tensors_come_in_parts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a part, sorted rows, rows that change places and other axes give what indexing gives."""
    reader, files = Reader(model), PlanFiles(None, plan_for(model))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    whole = reader.tensor(name)
    some, mixed, columns = np.array([0, 1, 9, 20, 21]), np.array([9, 2, 23]), np.array([3, 1])
    for part_bytes in (1, 130, 1 << 20):
        monkeypatch.setattr(source_parts, "PART_BYTES", part_bytes)
        for rows in (None, some, mixed):
            for cols in (None, columns):
                expected = whole[5]
                expected = expected if rows is None else expected[torch.from_numpy(rows)]
                expected = expected if cols is None else expected[:, torch.from_numpy(cols)]
                parts = list(source_parts.parts(Source(name, 5, (rows, cols)), reader, files=files))
                assert torch.equal(torch.cat(parts), expected)
                assert (len(parts) == 1) == (rows is mixed or part_bytes > 130)


def test_a_cut_in_small_parts_is_the_same_files(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = moe_keys(model)
    plan = plan_for(model, merge_step(keys, 5), size_step(keys, 5))
    cut(model, plan, out_folder=tmp_path / "one")
    monkeypatch.setattr(source_parts, "PART_BYTES", 100)
    monkeypatch.setattr(shard, "_BLOCK", 64)
    cut(model, plan, out_folder=tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_cut_without_room_is_refused(model: Path) -> None:
    with pytest.raises(ResourceError, match="the cut takes up to"):
        check_cut(model, plan_for(model), bound=10_000_000)
    check_cut(model, plan_for(model), bound=10**11)


# The writer's threads


def test_what_a_writing_thread_meets_ends_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tensors than there are blocks, so that whoever gives would wait for ever if none came back."""

    def full(*_: object) -> int:
        raise OSError(5, "Input/output error")

    planned = [(f"t{number}", (64,), "F32") for number in range(50)]

    def write() -> None:
        with committed_folder(tmp_path / "out") as folder:
            writer = ShardWriter(folder, planned)
            monkeypatch.setattr(shard.os, "write", full)
            for name, _, _ in planned:
                writer.add(name, torch.ones(64))
            writer.finish()

    monkeypatch.setattr(shard, "_BLOCK", 64)
    with pytest.raises((OSError, MoeslimError), match="(?i)input/output error"):
        write()
    assert not list(tmp_path.iterdir())


def test_what_is_read_back_is_what_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that change between memory and file are in the hash, and those that are missing are an error."""
    given = shard.os.write
    monkeypatch.setattr(
        shard.os, "write", lambda fd, block: given(fd, bytes(block).replace(b"\x00\x00\x80\x3f", b"abcd"))
    )

    def written() -> dict[str, object]:
        writer = ShardWriter(tmp_path, [("t", (4,), "F32")])
        writer.add("t", torch.ones(4))
        return writer.finish()["model.safetensors"]

    facts = written()
    content = (tmp_path / "model.safetensors").read_bytes()
    assert content.endswith(b"abcd" * 4)
    assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    monkeypatch.setattr(shard.os, "write", lambda fd, block: len(block))
    with pytest.raises(CheckpointError, match="can be read back"):
        written()


def test_the_giver_may_change_its_tensor(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, [(f"t{number}", (1000,), "F32") for number in range(20)])
    buffer = torch.empty(1000)
    for number in range(20):
        writer.add(f"t{number}", buffer.fill_(number))
    writer.finish()
    content = np.frombuffer((tmp_path / "model.safetensors").read_bytes()[-80_000:], np.float32)
    assert (content.reshape(20, 1000) == np.arange(20)[:, None]).all()
    assert not writer.not_finite


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_nan_and_inf_are_counted(dtype: str) -> None:
    """Both signs, first and last, and numbers one step below Inf, which are good."""
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}[dtype]
    values = torch.randn(300_000).to(kind)
    values[:3] = torch.tensor([torch.finfo(kind).max, torch.finfo(kind).min, -0.0], dtype=torch.float64).to(kind)
    raw = values.view(torch.uint8).numpy().data
    assert not_finite(raw, dtype) == 0
    values[[5, 131_071, 131_072, -1]] = torch.tensor([np.nan, np.inf, -np.inf, -np.nan], dtype=kind)
    assert not_finite(raw, dtype) == 4
    assert not_finite(raw[:-1], dtype) == 0  # ends within a value


# Against what a process really takes


def peak_of(program: str, *words: object) -> int:
    """The largest RssAnon, sampled from outside every 5 ms, of a Python process that runs `program`."""
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, words)], env={"OMP_NUM_THREADS": "1"})
    peak, done = 0, threading.Event()

    def sample(read: Callable[[], str]) -> None:
        nonlocal peak
        while not done.wait(0.005):
            found = re.search(r"RssAnon:\s+(\d+)", read())
            peak = max(peak, 1024 * int(found[1])) if found else peak

    watcher = threading.Thread(target=sample, args=[Path(f"/proc/{process.pid}/status").read_text])
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    assert code == 0
    return peak


CALIBRATE = """
import sys, numpy, moeslim.log
from moeslim.calibrate.run import calibrate
from moeslim.machine.host import tune_cpu
from moeslim.model.walk import WalkSettings
tune_cpu()
rows = numpy.random.default_rng(0).integers(0, 64, (4, 257))
calibrate(sys.argv[1], rows, out=sys.argv[2], settings=WalkSettings(rows_per_batch=2, max_memory=int(sys.argv[3])))
"""
CUT = """
import sys
from moeslim.plan.file import read_plan
from moeslim.surgery.apply import cut
from moeslim.surgery.memory_check import check_cut
check_cut(sys.argv[1], read_plan(sys.argv[3]), bound=int(sys.argv[4]))
cut(sys.argv[1], read_plan(sys.argv[3]), out_folder=sys.argv[2])
"""
BOUND = 900_000_000


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what a process takes")
def test_a_process_stays_below_its_bound(tmp_path: Path) -> None:
    """A model of 1.6 GB, whose layers of 0.8 GB in float32 do not fit beside the process, at the tightest bound.

    Without a bound the same calibration takes more than that, so the test can fail.
    """
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 4}
    model = write_tiny(tmp_path / "m", form={"dtype": "bfloat16"}, num_hidden_layers=2, **sizes)
    assert peak_of(CALIBRATE, model, tmp_path / "stats", BOUND) <= BOUND
    assert peak_of(CALIBRATE, model, tmp_path / "free", 10**11) > BOUND
    plan = tmp_path / "plan.json"
    write_plan(plan, plan_for(model))
    assert peak_of(CUT, model, tmp_path / "out", plan, 500_000_000) <= 500_000_000
