"""What a training says: its log, its line, its trackers and their failures, spikes, the share of a device's peak."""

import io
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moeslim.cli import display
from moeslim.distill import trackers, watch
from moeslim.distill.watch import Watch, format_step, read_log, spike
from moeslim.errors import RecipeError
from moeslim.log import progress, set_sink
from moeslim.machine.gpus import device_peak, peak_of
from tiny import changed, train_settings

SETTINGS = train_settings(1000, lm_only=True)
STEPS, TOKENS = 100, 64


def _record(step: int, total: float = 2.0, **more: Any) -> dict[str, Any]:
    terms = {
        "lm": total,
        "kd": 0.41234,
        "mtp_lm.1": 3.0,
        "mtp_kd.1": 0.8,
        "mtp_lm": 3.0,
        "mtp_kd": 0.8,
        "balance": 1.04,
    }
    rest = {"balance": 1.04, "gradient_norm": 0.8312, "learning_rate": 3e-4, "lam": 0.9, "beta": 0.3}
    rest |= {"least_load": 0.2, "seconds": 0.5}
    return {"step": step, "tokens": step * TOKENS, "total": total, **terms, **rest, **more}


def _watch(folder: Path, step: int = 0, *, flops: float | None = None, **changes: Any) -> Watch:
    folder.mkdir(exist_ok=True)
    settings = changed(SETTINGS, **changes)
    return Watch(folder, settings=settings, steps=STEPS, tokens_per_step=TOKENS, flops_per_token=flops, step=step)


class Sink:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def start(self, label: str, total: float, *, unit: str, done: float) -> object:
        self.said.append((label, total, unit, done))
        return None

    def advance(self, handle: object, amount: float, *, note: str) -> None:
        self.said.append((amount, note))

    def finish(self, handle: object) -> None:
        self.said.append(("end",))


@pytest.fixture
def sink() -> Iterator[Sink]:
    from moeslim import log

    before, found = log._sink, Sink()
    set_sink(found)
    yield found
    set_sink(before)


# Spikes


def test_spike_by_hand() -> None:
    before = [1.0, 3.0] * 10  # mean 2, sum of squares 20 over 19: deviation sqrt(20/19) = 1.02598
    assert spike(8.2, before, deviations=6.0) == pytest.approx(6.2 / 1.02598, rel=1e-5)
    assert spike(8.1, before, deviations=6.0) is None  # 5.95 deviations
    assert spike(8.1, before, deviations=5.9) == pytest.approx(5.9455, rel=1e-4)
    assert spike(-50.0, before, deviations=6.0) is None  # a fall is none
    assert spike(1e9, before[:-1], deviations=6.0) is None  # 19 steps say too little
    assert spike(1e9, before, deviations=0.0) is None
    assert spike(8.2, [1000.0] * 30 + before * 2 + before[:10], deviations=6.0) is not None  # 50 steps, no more
    assert spike(2.0, [2.0] * 30, deviations=6.0) is None


def test_a_spike_is_said_once_and_logged_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    losses = [2.0 + 0.1 * (step % 2) for step in range(1, 31)]
    losses[24] = 9.0
    with _watch(tmp_path) as log:
        for step, loss in enumerate(losses, start=1):
            log.write(_record(step, loss))
    records = read_log(tmp_path / "curve.jsonl")
    assert [record["step"] for record in records if record.get("spike")] == [25]
    (said,) = caplog.records
    deviations = (9.0 - statistics.fmean(losses[:24])) / statistics.stdev(losses[:24])
    assert said.levelname == "WARNING"
    wanted = (
        f"step 25: the loss is 9, {deviations:.1f} standard deviations above the mean of the 24 steps before (2.05)"
    )
    assert said.getMessage().startswith(wanted)


def test_a_training_that_goes_on_sees_the_same_spikes(tmp_path: Path) -> None:
    """The steps before come from the log, so a restart right before the spike changes nothing."""
    losses = [2.0 + 0.1 * (step % 2) for step in range(1, 31)]
    losses[24] = 9.0
    for start, stop in ((0, 27), (24, 30)):
        with _watch(tmp_path, start) as log:
            for step in range(start + 1, stop + 1):
                log.write(_record(step, losses[step - 1]))
            log.sync()
    records = read_log(tmp_path / "curve.jsonl")
    assert [record["step"] for record in records] == list(range(1, 31))
    assert [record["step"] for record in records if record.get("spike")] == [25]


def test_a_torn_line_is_skipped_and_a_silent_watch_leaves_nothing(tmp_path: Path, sink: Sink) -> None:
    path = tmp_path / "curve.jsonl"
    path.write_text(json.dumps(_record(1)) + "\n" + '{"step": 2, "tot')
    assert [record["step"] for record in read_log(path)] == [1]
    assert read_log(tmp_path / "none.jsonl") == []
    with Watch.silent() as quiet:
        quiet.write(_record(2))
        quiet.sync()
        assert quiet.path is None
    assert sink.said == []
    assert sorted(tmp_path.iterdir()) == [path]


# The line


def test_the_line_has_every_term(tmp_path: Path, sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "device_peak", lambda _device, *, precision: 1e12)
    with _watch(tmp_path, flops=1e9, step=10) as log:
        log.write(_record(11))
        log.write(_record(12, seconds=1.5, bits_per_byte=0.9))
        log.write(_record(13, bits_per_byte=0.95))
    # 128 tokens in 2 s: 64 tokens/s of 1e9 operations are 6.4 % of 1e12; a third step of 0.5 s makes it 76.8
    terms = "total 2, lm 2, kd 0.4123, mtp_lm.1 3, mtp_kd.1 0.8, balance 1.04, gradient 0.831, rate 3.00e-04"
    assert sink.said == [
        ("train", STEPS, "steps", 10),
        (1, f"{terms}, 128 tokens/s, 13 % of peak"),
        (1, f"{terms}, 64 tokens/s, 6 % of peak, held out 0.9000 bits per byte at step 12"),
        (
            1,
            f"{terms}, 77 tokens/s, 8 % of peak, held out 0.9500 bits per byte at step 13 (best 0.9000 at step 12)",
        ),
        ("end",),
    ]


def test_the_line_names_a_cached_teachers_terms_and_a_gpus_memory() -> None:
    record = {name.replace("kd", "kd_topk"): value for name, value in _record(1, **{"mtp_kd.2": 0.7}).items()}
    line = format_step(record, pace={"tokens_per_second": 12345.6, "peak_memory_bytes": 61.26e9})
    assert "kd_topk 0.4123, mtp_lm.1 3, mtp_kd_topk.1 0.8, balance 1.04, mtp_kd_topk.2 0.7, gradient" in line
    assert line.endswith("12,346 tokens/s, 61.3 GB at most")
    assert "mtp_kd_topk 0.8" not in line
    assert "of peak" not in line


def test_without_a_terminal_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of an earlier process do not count for the speed: 2 steps in 20 s, 48 left are 8 minutes."""
    clock = iter([0.0, 9.0, 20.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    console = Console(width=40, record=True, quiet=False, file=io.StringIO())
    monkeypatch.setattr(display, "err", console)
    lines = display._Lines()
    handle = lines.start("train", 100, unit="steps", done=50)
    lines.advance(handle, 1, note="total 3.1, [lm] 2.9")
    lines.advance(handle, 1, note="total 3, [lm] 2.8")
    assert console.export_text() == "train: 52 of 100 steps, 8.0 min left; total 3, [lm] 2.8\n"
    assert display._counted(1.25e9, 2.5e9, unit="B") == "1.2 of 2.5 GB"


def test_on_a_terminal_the_note_has_lines_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=60, force_terminal=True, record=True, file=io.StringIO())
    monkeypatch.setattr(display, "err", console)
    bars = display._Bars()
    handle = bars.start("train", 1000, unit="steps", done=400)
    note = "total 2.345, lm 2.511, kd 0.4121, mtp_lm.1 3.011, mtp_kd.1 0.8012, balance 1.043"
    bars.advance(handle, 50, note=note)
    table, *below = bars._progress.get_renderables()
    console.print(table)
    assert "450 of 1,000 steps" in console.export_text()
    console.print(*below)
    lines = [line.rstrip() for line in console.export_text().splitlines() if line.startswith("  ")]
    assert lines == [
        "  total 2.345, lm 2.511, kd 0.4121, mtp_lm.1 3.011, mtp_kd.1",
        "  0.8012, balance 1.043",
    ]
    bars.finish(handle)


# A device's peak


def test_peaks() -> None:
    assert peak_of("NVIDIA H200", bfloat16=True) == 989e12
    assert peak_of("NVIDIA H200 NVL", bfloat16=True) == 835e12
    assert peak_of("NVIDIA H100 80GB HBM3", bfloat16=False, tf32=True) == 495e12
    assert peak_of("NVIDIA H100 PCIe", bfloat16=False) == 51e12
    assert peak_of("NVIDIA A100-SXM4-80GB", bfloat16=True) == 312e12
    assert peak_of("NVIDIA A100 80GB PCIe", bfloat16=True) == 312e12
    assert peak_of("NVIDIA L4", bfloat16=True) == 121e12
    assert peak_of("NVIDIA L40S", bfloat16=True) == 362e12
    assert peak_of("NVIDIA GB200", bfloat16=True) == 2500e12
    assert peak_of("NVIDIA H100 80GB HBM3 MIG 3g.40gb", bfloat16=True) is None
    assert peak_of("NVIDIA GeForce GTX 1080", bfloat16=True) is None
    assert device_peak("cpu", precision="float32") is None


# Trackers

WANDB = """
import json, os, pathlib
PLACE = pathlib.Path(__file__).with_name("said.jsonl")
def note(*words):
    with PLACE.open("a") as file: file.write(json.dumps(words) + "\\n")
class Settings:
    def __init__(self, **named): self.named = named
class Run:
    def log(self, values, step):
        if step == int(os.environ.get("FAKE_FAILS_AT", "0")): raise ConnectionError("the network is gone")
        note("log", step, values)
    def finish(self): note("finish")
def init(*, settings, **named):
    note("init", named | settings.named)
    return Run()
"""

TRACKIO = WANDB.replace("def init(*, settings, **named):", "def init(**named):").replace(
    "named | settings.named", "named"
)


def _package(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a package of that name in the way of the real one; returns the file of what it was told."""
    (folder / "packages" / name).mkdir(parents=True)
    (folder / "packages" / name / "__init__.py").write_text(text)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder / "packages")
    return folder / "packages" / name / "said.jsonl"


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def _said(path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("no_account")
@pytest.mark.parametrize(("name", "text"), [("wandb", WANDB), ("trackio", TRACKIO)])
def test_trackers_get_every_step_once_over_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    file = _package(tmp_path, name, text, monkeypatch)
    work = tmp_path / "demo.work"
    with _watch(work, watch=(name,)) as log:
        for step in range(1, 6):
            log.write(_record(step))
    with _watch(work, step=3, watch=(name,)) as log:  # the state of step 3 is gone on from, 4 and 5 were told already
        for step in range(4, 8):
            log.write(_record(step, bits_per_byte=0.9))
    with _watch(work, watch=(name,)) as log:  # begun anew: another run
        log.write(_record(1))
    said = _said(file)
    inits = [words[1] for words in said if words[0] == "init"]
    assert [words[1] for words in said if words[0] == "log"] == [1, 2, 3, 4, 5, 6, 7, 1]
    assert [words[0] for words in said if words[0] != "log"] == ["init", "finish"] * 3
    runs = [init["id"] if name == "wandb" else init["name"] for init in inits]
    assert runs[0] == runs[1] != runs[2]
    assert inits[0]["project"] == "moeslim"
    assert inits[0]["resume"] == "allow"
    assert inits[0]["config"] == SETTINGS.facts()
    if name == "wandb":
        assert inits[0]["mode"] == "offline"
        assert inits[0]["console"] == "off"
        assert inits[0]["dir"] == str(work)
    _, step, values = next(words for words in said if words[0] == "log" and words[1] == 6)
    wanted = {name: value for name, value in _record(6, bits_per_byte=0.9).items() if name != "step"}
    assert values == pytest.approx(wanted | {"tokens_per_second": 128.0})
    assert [record["step"] for record in read_log(work / "curve.jsonl")] == [1]


@pytest.mark.usefixtures("no_account")
def test_wandb_decides_itself_for_whoever_has_an_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not trackers._has_account()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password none")
    assert trackers._has_account()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")
    assert not trackers._has_account()
    monkeypatch.setenv("WANDB_MODE", "online")
    assert trackers._has_account()


@pytest.mark.usefixtures("no_account")
def test_a_tracker_that_fails_is_left_out_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = _package(tmp_path, "wandb", WANDB, monkeypatch)
    other = _package(tmp_path / "beside", "trackio", TRACKIO.replace("FAKE_FAILS_AT", "NOTHING"), monkeypatch)
    monkeypatch.setenv("FAKE_FAILS_AT", "3")
    with _watch(tmp_path / "work", watch=("wandb", "trackio")) as log:
        for step in range(1, 7):
            log.write(_record(step))
    (said,) = caplog.records
    assert said.getMessage().startswith("wandb failed (ConnectionError: the network is gone); the training goes on")
    assert [words[1] for words in _said(file) if words[0] == "log"] == [1, 2]
    assert [words[1] for words in _said(other) if words[0] == "log"] == [1, 2, 3, 4, 5, 6]
    assert len(read_log(tmp_path / "work" / "curve.jsonl")) == 6


@pytest.mark.usefixtures("no_account")
def test_a_tracker_that_cannot_begin_is_left_out_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _package(tmp_path, "wandb", "Settings = dict\ndef init(**named): raise TimeoutError('nobody there')", monkeypatch)
    with _watch(tmp_path / "work", watch=("wandb",)) as log:
        log.write(_record(1))
        log.write(_record(2))
    (said,) = caplog.records
    assert "wandb failed (TimeoutError: nobody there)" in said.getMessage()


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _name: None)
    wanted = r"distill\.watch names wandb, which is not installed: pip install wandb, or leave it out"
    with pytest.raises(RecipeError, match=wanted):
        _watch(tmp_path / "work", watch=("wandb",))
    with pytest.raises(RecipeError, match="names mlflow; it knows tensorboard, trackio, wandb"):
        trackers.check_trackers(["mlflow"])


STUCK = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from moeslim.distill import trackers
trackers.CLOSING_SECONDS = 0.5
run = trackers.TrackerRun(Path(sys.argv[1]), "run", "1234", {}, 0)
many = trackers.Trackers(["trackio"], run, sent=0)
for step in range(1, 100): many.log(step, {"lm": 1.0})
many.close()
"""


def test_a_tracker_that_hangs_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Neither the steps, nor the end of the training, nor the end of the process."""
    (tmp_path / "trackio.py").write_text("import time\ndef init(**named): time.sleep(1000)")
    done = subprocess.run([sys.executable, "-c", STUCK, str(tmp_path)], timeout=500, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


def _scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_reads_every_step_once_over_a_restart(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with _watch(tmp_path, watch=("tensorboard",)) as log:
        for step in range(1, 6):
            log.write(_record(step, 10.0 + step))
    with _watch(tmp_path, step=3, watch=("tensorboard",)) as log:
        for step in range(4, 8):
            log.write(_record(step, 20.0 + step))
    found = _scalars(tmp_path / "tensorboard", "total")
    assert found == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 24.0), (5, 25.0), (6, 26.0), (7, 27.0)]
    assert len(_scalars(tmp_path / "tensorboard", "mtp_kd.1")) == 7


def test_tensorboard_is_told_where_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the real package: what its writer gets."""
    said: list[Sequence[Any]] = []

    class Writer:
        def __init__(self, folder: str, *, purge_step: int) -> None:
            said.append((folder, purge_step))

        def add_scalar(self, *words: Any) -> None:
            said.append(words)

        def flush(self) -> None:
            pass

        def close(self) -> None:
            said.append(("close",))

    monkeypatch.setattr(trackers, "check_trackers", lambda _names: None)
    monkeypatch.setattr(trackers.importlib, "import_module", lambda _name: type("board", (), {"SummaryWriter": Writer}))
    (tmp_path / "curve.jsonl").write_text("".join(json.dumps(_record(step)) + "\n" for step in range(1, 6)))
    with _watch(tmp_path, step=3, watch=("tensorboard",)) as log:
        log.write(_record(4, 7.0))
    assert said[0] == (str(tmp_path / "tensorboard"), 4)
    assert ("total", 7.0, 4) in said
    assert ("mtp_kd.1", 0.8, 4) in said
    assert said[-1] == ("close",)


def test_progress_counts_what_stood_before(sink: Sink) -> None:
    with progress("work", 10, unit="rows", done=4) as advance:
        advance(2, note="x")
        advance()
    assert sink.said == [("work", 10, "rows", 4), (2, "x"), (1, ""), ("end",)]
