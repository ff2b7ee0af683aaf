"""Laws of the files that must survive: equal contents equal names, all or nothing, one process, skip what stands."""

import errno
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeslim.artifacts import commit, fingerprint, lock
from moeslim.artifacts.commit import committed_folder, discard, read_json, replace_file, write_json
from moeslim.artifacts.fingerprint import file_fingerprint, folder_fingerprint, hash_file
from moeslim.artifacts.lock import run_lock
from moeslim.artifacts.run import Run, open_run
from moeslim.errors import CheckpointError, ResourceError, RunError

FLOATS = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)  # a test before may have flushed them
values = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, dot files too, so that nothing left behind goes unseen."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def enter(final: Path) -> None:
    """Begin to write a folder, and leave it."""
    with committed_folder(final):
        raise Killed


class Killed(BaseException):
    """Stands for a kill at a chosen place."""


def kill(source: Path, target: Path) -> None:
    raise Killed


def write_half(path: Path) -> None:
    path.write_bytes(b"half")
    raise TypeError


# fingerprints


@given(st.dictionaries(st.text(), values, max_size=5))
def test_fingerprint_ignores_the_order_of_keys_and_survives_json(value: dict[str, object]) -> None:
    name = fingerprint.fingerprint(value)
    assert len(name) == 16
    assert fingerprint.fingerprint(dict(reversed(value.items()))) == name
    assert fingerprint.fingerprint(json.loads(json.dumps(value))) == name


def test_fingerprint_is_stable_and_sees_changes() -> None:
    # sha256 of the nine characters {"a":[1]}, from `printf '{"a":[1]}' | sha256sum`
    known = subprocess.run(["sha256sum"], input=b'{"a":[1]}', capture_output=True, check=True).stdout[:16].decode()
    assert fingerprint.fingerprint({"a": [1]}) == known
    assert fingerprint.fingerprint({"a": [2]}) != known
    with pytest.raises(ValueError, match="JSON compliant"):
        fingerprint.fingerprint({"a": float("nan")})


def test_file_fingerprint_samples_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_LIMIT", 1000)
    path = tmp_path / "weights"
    body = bytearray(3 << 20)
    path.write_bytes(body)
    whole = file_fingerprint(path)
    for place in (0, len(body) // 2, len(body) - 1):
        changed = bytearray(body)
        changed[place] = 1
        path.write_bytes(changed)
        assert file_fingerprint(path) != whole
    path.write_bytes(body + b"\0")
    assert file_fingerprint(path) != whole


def test_folder_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.txt").write_text("one")
    before = folder_fingerprint(tmp_path)
    (tmp_path / ".lock").write_text("not part of it")
    assert folder_fingerprint(tmp_path) == before
    (tmp_path / "a/x.txt").rename(tmp_path / "a/y.txt")
    renamed = folder_fingerprint(tmp_path)
    (tmp_path / "a/y.txt").write_text("two")
    assert len({before, renamed, folder_fingerprint(tmp_path)}) == 3


def test_a_receipt_names_the_folder_as_long_as_it_is_true(tmp_path: Path) -> None:
    weights = tmp_path / "w"
    weights.write_bytes(b"1234")
    receipt = {"files": {"w": {"sha256": hash_file(weights), "bytes": 4}}}
    write_json(tmp_path / "receipt.json", receipt)
    named = folder_fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("a card is not the model")
    assert folder_fingerprint(tmp_path) == named
    weights.write_bytes(b"1235")
    assert folder_fingerprint(tmp_path) != named


# writing


def test_committed_folder_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "model"
    with committed_folder(final) as folder:
        assert folder.name.startswith(".")
        (folder / "sub").mkdir()
        (folder / "sub/x").write_text("x")
        assert not final.exists()
    assert contents(tmp_path) == {"deep/model/sub/x": b"x"}


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path: Path, problem: type[BaseException]) -> None:
    def write() -> None:
        with committed_folder(tmp_path / "model") as folder:
            (folder / "x").write_text("x")
            raise problem

    with pytest.raises(problem):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_kill_at_the_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "rename", kill)
    with pytest.raises(Killed), committed_folder(tmp_path / "model") as folder:
        (folder / "x").write_text("x")
    write = tmp_path / "old.json"
    write.write_text("old")
    with pytest.raises(Killed):
        write_json(write, {"new": 1})
    assert contents(tmp_path) == {"old.json": b"old"}


def test_what_sigkill_leaves_is_no_model_and_is_cleared(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from moeslim.artifacts.commit import committed_folder\n"
        "with committed_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "model")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".model.partial"]
    with committed_folder(tmp_path / "model") as folder:
        (folder / "whole").write_text("x")
    assert contents(tmp_path) == {"model/whole": b"x"}


def test_a_living_writer_is_not_robbed(tmp_path: Path) -> None:
    with committed_folder(tmp_path / "model") as folder:
        (folder / "x").write_text("x")
        with pytest.raises(RunError, match=f"model: in use by process {os.getpid()} on "):
            enter(tmp_path / "model")
    assert contents(tmp_path) == {"model/x": b"x"}


def test_who_clears_what_a_kill_left_is_not_robbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes find the same half-written folder: the second comes while the first one clears it."""
    left = tmp_path / ".model.partial" / "deep"
    left.mkdir(parents=True)
    clear, refused = commit.shutil.rmtree, []

    def clearing(folder: Path, **how: bool) -> None:
        if Path(folder).name in ("deep", ".model.partial") and not refused:
            with pytest.raises(RunError, match="in use by process") as caught:
                enter(tmp_path / "model")
            refused.append(caught.value)
        clear(folder, **how)

    monkeypatch.setattr(commit.shutil, "rmtree", clearing)
    with committed_folder(tmp_path / "model") as folder:
        (folder / "x").write_text("x")
    assert refused
    assert contents(tmp_path) == {"model/x": b"x"}


def test_writers_of_one_file_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with replace_file(path) as temporary:
        temporary.write_bytes(b"half")
        other = threading.Thread(target=commit.write_bytes, args=(path, b"the other one's"))
        other.start()
        other.join(0.3)
        assert contents(tmp_path) == {".record.json.partial": b"half"}
        temporary.write_bytes(b"whole")
    other.join()
    assert contents(tmp_path) == {"record.json": b"the other one's"}


def test_who_waited_for_a_lock_holds_the_file_that_stands_then(tmp_path: Path) -> None:
    path, got = tmp_path / "file", list[int]()
    before = lock.hold(path, place=path)
    other = threading.Thread(target=lambda: got.append(lock.hold(path, place=path, wait=True)))
    other.start()
    other.join(0.3)
    assert not got
    path.write_text("committed")
    path.rename(tmp_path / "final")
    os.close(before)
    other.join()
    assert os.path.samestat(os.fstat(got[0]), path.stat())
    assert (tmp_path / "final").read_text() == "committed"
    os.close(got[0])


def refuse(problem: OSError) -> None:
    raise problem


FULL = OSError(errno.ENOSPC, "No space left on device")
FAILS = OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        (FULL, r"the disk is full \(\d+\.\d+ GB free\).*Make room"),
        (FAILS, r"could not be written \(Input/output error\).*Look at the disk"),
    ],
)
def test_what_the_disk_says_is_told_with_the_place(tmp_path: Path, problem: OSError, says: str) -> None:
    with pytest.raises(ResourceError, match=f"{tmp_path}/model: {says}"), committed_folder(tmp_path / "model"):
        refuse(problem)
    with pytest.raises(ResourceError, match=f"{tmp_path}/a.json: {says}"), replace_file(tmp_path / "a.json"):
        refuse(problem)
    with (
        pytest.raises(ResourceError, match=f"{tmp_path}/model/a.json: {says}"),
        committed_folder(tmp_path / "model") as folder,
        replace_file(folder / "a.json"),
    ):
        refuse(problem)
    assert list(tmp_path.iterdir()) == []


def test_a_read_error_has_the_name_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fingerprint, "open", lambda *_: Failing(), raising=False)
    with pytest.raises(OSError, match=rf"Input/output error: '{tmp_path}/w'"):
        hash_file(tmp_path / "w")


def test_errors_about_other_files_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), committed_folder(tmp_path / "model"):
        (tmp_path / "elsewhere").read_bytes()
    with pytest.raises(OSError, match="^a tokenizer that cannot be had$"), committed_folder(tmp_path / "model"):
        refuse(OSError("a tokenizer that cannot be had"))


def test_a_file_that_may_not_grow_is_told_whoever_writes_it(tmp_path: Path) -> None:
    """numpy and statistics under a real limit of the kernel, where numpy's error has no number."""
    program = (
        "import resource, sys\n"
        "import numpy as np\n"
        "from moeslim.artifacts.commit import committed_folder, read_json\n"
        "from moeslim.errors import ResourceError\n"
        "from moeslim.stats import NormStats, Stats\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "stats = Stats('m', ('t',), 1, 1, norms={'n': NormStats(abs_sum=np.zeros(9000))})\n"
        "for write in (lambda folder: np.save(folder / 'x.npy', np.zeros(9000)), stats.save):\n"
        "    try:\n"
        "        with committed_folder(sys.argv[1]) as folder:\n"
        "            write(folder)\n"
        "    except ResourceError as problem:\n"
        "        print(problem)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.stdout.count("the disk is full") == 2, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_use_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("model", "file"):
        with pytest.raises(RunError, match="not empty"), committed_folder(tmp_path / name):
            pass
    assert contents(tmp_path) == {"model/mine": b"mine", "file": b"mine"}
    (tmp_path / "empty").mkdir()
    with committed_folder(tmp_path / "empty") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "empty/x").exists()


def test_json_keeps_its_order_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": "ä"})
    assert list(read_json(path)) == ["b", "a"]
    assert "ä" in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"b": float("inf")})
    assert read_json(path) == {"b": 1, "a": "ä"}
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"a\.json: not valid JSON"):
        read_json(path, error=CheckpointError)
    with pytest.raises(RunError, match="no such file"):
        read_json(tmp_path / "b.json")


def test_replace_file_and_discard(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), replace_file(path) as temporary:
        write_half(temporary)
    assert contents(tmp_path) == {"x.bin": b"old"}
    with replace_file(path) as temporary:
        temporary.write_bytes(b"new")
    assert contents(tmp_path) == {"x.bin": b"new"}
    (tmp_path / "folder").mkdir()
    (tmp_path / ".never there.removed" / "left by a killed removal").mkdir(parents=True)
    for name in ("x.bin", "folder", "never there"):
        discard(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# locks and stages


def test_a_second_process_is_told_who_holds_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/moeslim", "run", "my recipe.yaml"])
    program = "import sys; from moeslim.artifacts.lock import run_lock\nwith run_lock(sys.argv[1]): print('got it')"
    command = [sys.executable, "-c", program, str(tmp_path)]
    with run_lock(tmp_path):
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"in use by process {os.getpid()} on {socket.gethostname()} since 20" in refused.stderr
    assert "(moeslim run 'my recipe.yaml')" in refused.stderr
    assert refused.returncode == 1
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "got it\n"


def test_a_lock_holds_on_a_full_disk_and_not_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock.os, "pwrite", lambda *_: refuse(FULL))
    with run_lock(tmp_path), pytest.raises(RunError, match="in use by another process"), run_lock(tmp_path):
        pass
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: refuse(OSError(errno.ENOLCK, "No locks available")))
    with (
        pytest.raises(RunError, match=r"keeps no locks \(No locks available\).*choose another disk"),
        run_lock(tmp_path),
    ):
        pass


def finished(run: Run, inputs: dict[str, object]) -> None:
    with committed_folder(run.path("cut")) as folder:
        (folder / "w").write_text("weights")
    run.finish("cut", inputs, outputs=["cut"])


def test_what_stands_is_skipped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs: dict[str, object] = {"recipe": {"keep": {"experts": "50%"}}, "model": "abc"}
    with open_run(tmp_path / "run") as run:
        assert not run.is_current("cut", inputs, outputs=["cut"])
        finished(run, inputs)
    with caplog.at_level(logging.INFO, "moeslim"), open_run(tmp_path / "run") as run:
        assert run.is_current("cut", dict(reversed(inputs.items())), outputs=["cut"])
    assert "cut: already done" in caplog.text
    assert list(run.outputs("cut")) == ["cut"]


def write_stage(
    run: Run, *outputs: str, problem: type[BaseException] | None = None, resumes: bool = False
) -> list[str]:
    """Write `outputs` in a stage that promises a plan and perhaps rows, then raise `problem`; what stood there before.

    With a problem what stood is said in the exception.
    """
    with run.stage("plan", {}, outputs=["plan"], optional=["rows"], resumes=resumes) as due:
        assert due
        found = [output for output in ("plan", "rows") if run.path(output).exists()]
        for output in outputs:
            run.path(output).write_text("written")
        if problem is not None:
            raise problem(*found)
    return found


def fail(run: Run, problem: type[BaseException], *, resumes: bool = False) -> list[str]:
    with pytest.raises(problem) as caught:
        write_stage(run, "plan", "rows", problem=problem, resumes=resumes)
    assert not run.finished("plan")
    return list(caught.value.args)


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt])
def test_a_stage_is_recorded_when_its_block_has_ended(tmp_path: Path, problem: type[BaseException]) -> None:
    with open_run(tmp_path / "run") as run:
        assert fail(run, problem) == []
        assert fail(run, problem) == []  # what is left without a record is gone before the next
        assert fail(run, problem, resumes=True) == ["plan", "rows"]
        assert write_stage(run, "plan") == []
        assert list(run.outputs("plan")) == ["plan"]  # what it left out is not expected later
        before = contents(tmp_path / "run")
        with run.stage("plan", {}, outputs=["plan"], optional=["rows"]) as due:
            assert not due
        assert contents(tmp_path / "run") == before
    with open_run(tmp_path / "other", redo=True) as run:
        assert fail(run, problem) == []
        assert fail(run, problem, resumes=True) == []
        assert write_stage(run, "plan", "rows") == []
        assert list(run.outputs("plan")) == ["plan", "rows"]


def test_other_inputs_are_refused_by_name_or_done_again(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        finished(run, {"recipe": {"keep": {"experts": "50%"}, "seed": 0}})
        other: dict[str, object] = {"recipe": {"keep": {"experts": "25%"}, "seed": 0}}
        with pytest.raises(RunError, match=r"\(recipe.keep.experts: '50%' -> '25%'\)"):
            run.is_current("cut", other, outputs=["cut"])
        assert run.path("cut").exists()
    with open_run(tmp_path / "run", redo=True) as run:
        assert not run.is_current("cut", other, outputs=["cut"])
        assert not run.path("cut").exists()
        finished(run, other)
        assert run.is_current("cut", other, outputs=["cut"])


def test_edited_outputs_are_kept_and_lost_ones_made_again(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        finished(run, {})
        (run.path("cut") / "w").write_text("edited by hand")
        with pytest.raises(RunError, match="its output cut was changed"):
            run.is_current("cut", {}, outputs=["cut"])
        discard(run.path("cut"))
        assert not run.is_current("cut", {}, outputs=["cut"])
        finished(run, {})
        assert run.is_current("cut", {})


def test_an_output_outside_is_removed_for_who_names_it_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    with open_run(tmp_path / "run", redo=True) as run:
        run.finish("cut", {}, outputs=["../mine"])
        with pytest.raises(RunError, match=r"cut.json: the output '../mine' lies outside the run folder"):
            run.is_current("cut", {"seed": 1})
        assert mine.exists()
        assert not run.is_current("cut", {"seed": 1}, outputs=["../mine"])
    assert not mine.exists()


def test_a_kill_between_output_and_record_does_the_stage_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(tmp_path / "run") as run:
        with committed_folder(run.path("cut")) as folder:
            (folder / "w").write_text("weights")
        monkeypatch.setattr(commit, "rename", kill)
        with pytest.raises(Killed):
            run.finish("cut", {}, outputs=["cut"])
        monkeypatch.undo()
        assert not run.is_current("cut", {}, outputs=["cut"])
        finished(run, {})
        assert run.is_current("cut", {}, outputs=["cut"])


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="not a run of moeslim"), open_run(tmp_path):
        pass
    with pytest.raises(RunError, match="a file stands"), open_run(tmp_path / "thesis.tex"):
        pass
    assert contents(tmp_path) == {"thesis.tex": b"precious"}


def test_outputs_of_an_unfinished_stage(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run, pytest.raises(RunError, match="stage cut is not finished"):
        run.outputs("cut")
    write_json(tmp_path / "run/stages/cut.json", {"schema": 99})
    with open_run(tmp_path / "run") as run, pytest.raises(RunError, match="another version"):
        run.is_current("cut", {})
