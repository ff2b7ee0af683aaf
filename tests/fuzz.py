"""Corrupted inputs against the command line: every one must be refused in one message, soon and within a memory bound.

make fuzz    # or: .venv/bin/python tests/fuzz.py --inputs 600 --seed 0 [--only 17]

Each input is a copy of good artifacts of which one file was spoilt (mutations.py) and one command, in a process of its
own. The last line is JSON: `tracebacks` (anything that ends without a message of ours, crashes too), `hangs` (10 s of
processor time, or half a minute of sleep), `over_memory` (1 GB more than the process began with), `false_success`: the
command ended well though the input must be refused, what came out differs from what the good input gives where it must
be the same, a cut that the safetensors library cannot open, something half-written after a refusal, or code that ran.
"""

import argparse
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch
import transformers.models.qwen3_next.modeling_qwen3_next  # noqa: F401 - once for all processes
from safetensors import safe_open

import mutations
from command import MEASURE, SMALL, TRAIN, settings, write_model, write_text
from moeslim.artifacts.commit import write_json
from moeslim.cli import main as cli

CPU_SECONDS, WALL_SECONDS, MEMORY = 10, 30, 1 << 30
RAN = Path("/tmp/fuzz-ran-code")  # what the inputs that hold code would make
SHORT = settings(*SMALL, *MEASURE, "evaluate.prompts=1")
LEARN = settings(*SMALL, *TRAIN)
Line = list[object]


class Subject(NamedTuple):
    """What may be spoilt (patterns below the home) and the commands that read it."""

    files: tuple[str, ...]
    commands: tuple[Callable[[Path], Line], ...]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    text: str
    cpu: float
    memory: int


def _cut(model: str) -> Callable[[Path], Line]:
    return lambda home: ["cut", home / model, home / "plan.json", home / "out"]


def _evaluate(home: Path) -> Line:
    return ["evaluate", home / "bare", "--out", home / "out", "--data", home / "text.jsonl", *SHORT]


def _distill(*more: str) -> Callable[[Path], Line]:
    def line(home: Path) -> Line:
        data = ["--data", home / "text.jsonl"] if "--teacher-cache" not in more else []
        named = [home / part if part == "cache" else part for part in more]
        out = home / ("learnt" if data else "taught")  # beside the former lie its states
        return ["distill", home / "bare", out, *data, *named, *LEARN]

    return line


def _texts(name: str) -> Callable[[Path], Line]:
    return lambda home: ["calibrate", home / "bare", home / "out", "--data", home / name, *settings(*SMALL)]


def _model(model: str) -> tuple[Callable[[Path], Line], ...]:
    dry = lambda home: ["prune", home / model, home / "out", "--experts", "50%", "--dry-run"]  # noqa: E731
    return (
        _cut(model),
        _cut(model),
        lambda home: ["verify", home / model],
        lambda home: ["inspect", home / model],
        dry,
    )


SUBJECTS = {
    "a model with a receipt": Subject(("model/*",), _model("model")),
    "a model": Subject(("bare/*",), (*_model("bare"), _evaluate, _texts("text.jsonl"), _distill())),
    "a model's files": Subject(("bare/*.json", "bare/*.safetensors"), _model("bare")),
    "a plan": Subject(("plan.json",), (_cut("bare"),)),
    "statistics": Subject(
        ("stats/*",),
        (lambda home: ["plan", home / "bare", home / "out.json", "--stats", home / "stats", "--experts", "4"],),
    ),
    "a recipe": Subject(("recipe.yaml",), (lambda home: ["run", home / "recipe.yaml", home / "out", "--dry-run"],)),
    "a study": Subject(("study.yaml",), (lambda home: ["study", home / "study.yaml", home / "out", "--dry-run"],)),
    "packed tokens": Subject(("out.tokens/*",), (_texts("text.jsonl"),)),
    "a teacher cache": Subject(("cache/*.json", "cache/*.bin"), (_distill("--teacher-cache", "cache"),)),
    "a training state": Subject(
        (
            "learnt.work/states/*/*.json",
            "learnt.work/states/*/tensors/.metadata",
            "learnt.work/states/*/tensors/*.distcp",
        ),
        (_distill(),),
    ),
    "a run": Subject(
        ("run/*.json", "run/stages/*", "run/stage-1/*.json", "run/records/*", "run/*/curve.jsonl"),
        (lambda home: ["run", home / "recipe.yaml", home / "run"], lambda home: ["report", home / "run"]),
    ),
    "records": Subject(("run/records/*",), (lambda home: ["compare", home / "run", home / "other"],)),
    "text": Subject(("text.jsonl",), (_texts("text.jsonl"),)),
    "compressed text": Subject(("text.jsonl.gz",), (_texts("text.jsonl.gz"),)),
    "a table of text": Subject(("text.parquet",), (_texts("text.parquet"),)),
}


def make_good(home: Path) -> None:
    """Everything that commands read, made by the commands themselves."""
    import gzip

    import pyarrow
    import pyarrow.parquet

    write_model(home / "model", shard_bytes=200_000)
    shutil.copytree(home / "model", home / "bare")
    (home / "bare" / "receipt.json").unlink()
    lines = write_text(home / "text.jsonl").read_text()
    (home / "text.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    rows = [json.loads(line) for line in lines.splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), home / "text.parquet")
    keys = {key: value for key, value in (one.split("=") for one in (*SMALL, *MEASURE, *TRAIN, "evaluate.prompts=1"))}
    recipe: dict[str, object] = {"model": str(home / "bare"), "keep": {"experts": 4}}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        recipe.setdefault(section, {})[name] = int(value)  # type: ignore[index]
    recipe["distill"] |= {"lm_only": True}  # type: ignore[operator]
    heap = [{"path": str(home / "text.jsonl")}]
    recipe["data"] |= {"train": heap, "calibration": heap, "heldout": []}  # type: ignore[operator]
    write_json(home / "recipe.yaml", recipe)
    write_json(
        home / "study.yaml", {"base": str(home / "recipe.yaml"), "variants": {"a": {}, "b": {}}, "seeds": [0, 1]}
    )
    for line in (
        ["calibrate", home / "bare", home / "stats", "--data", home / "text.jsonl", *settings(*SMALL)],
        ["plan", home / "bare", home / "plan.json", "--stats", home / "stats", "--experts", "4"],
        ["cache-teacher", home / "bare", home / "text.jsonl", home / "cache", "--k", "5", *settings(*SMALL)],
        ["run", home / "recipe.yaml", home / "run"],
        _distill()(home),
    ):
        ended = run(line, home, seconds=600)
        assert ended.code == 0, f"{line}: {ended.text}"
    (home / "stats.tokens").rename(home / "out.tokens")
    shutil.rmtree(home / "learnt")
    shutil.copytree(home / "run" / "records", home / "other")


def run(line: Line, home: Path, *, seconds: int = CPU_SECONDS + 1) -> Ended:
    """A command in a process that has all modules loaded already, ended behind `seconds` of its processor time."""
    said, before = home / "said.txt", _resident()
    child = os.fork()
    if child == 0:
        _command([str(part) for part in line], said, seconds=seconds)
    slept, worked = time.monotonic(), 0.0
    while not (found := os.wait4(child, os.WNOHANG))[0]:
        time.sleep(0.03)
        state, cpu = _busy(child)
        if state not in "SD" or cpu > worked:
            slept, worked = time.monotonic(), cpu
        elif time.monotonic() - slept > WALL_SECONDS:
            os.kill(child, signal.SIGKILL)
    _, status, usage = found
    text = said.read_text(errors="replace") if said.exists() else ""
    cpu = usage.ru_utime + usage.ru_stime
    return Ended(os.waitstatus_to_exitcode(status), text, cpu, usage.ru_maxrss * 1024 - before)


def _command(line: list[str], said: Path, *, seconds: int) -> None:
    """In the child: the command with its limits; never returns."""
    code = 70
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(out, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (space + 6 * MEMORY,) * 2)  # so that the machine survives
        from moeslim.cli.display import err
        from moeslim.cli.display import out as shown

        shown.file, err.file = sys.stdout, sys.stderr
        sys.argv = ["moeslim", *line]
        cli.main()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:  # noqa: B036 - the worst is what is looked for
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _busy(child: int) -> tuple[str, float]:
    """State (S: it sleeps) and processor time in ticks."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return fields[0], float(fields[11]) + float(fields[12])


def _resident() -> int:
    """Bytes that a fork of this process begins with: its own memory, without the files that are mapped."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def outcome(home: Path, line: Line) -> str:
    """A name for what a command has made: weights, plan, statistics, or what `inspect` says."""
    digest = hashlib.sha256()
    if line[0] == "inspect":
        digest.update((home / "said.txt").read_bytes().replace(str(home).encode(), b""))
    made = sorted([*home.glob("out*"), *home.glob("learnt"), *home.glob("taught")])
    files = [
        path for top in made if not top.name.endswith(".tokens") for path in (top, *top.rglob("*")) if path.is_file()
    ]
    for path in files:
        if path.suffix == ".safetensors" or path.name == "out.json":
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def expected(place: str, what: str, *, line: Line, verdict: str) -> str:
    """What a mutation's verdict means for this file and this command."""
    verb, weights = line[0], place.endswith(".safetensors") and not place.startswith("stats")
    if place.startswith(("model/", "bare/")):
        if weights and what in mutations.REPLACED or what in ("a link out of the folder", "a link to /dev/zero"):
            return "refuse"
        if place == "model/receipt.json" or verb in ("inspect", "prune") and "data" in what:
            return "any"
        if place.startswith("model/") and (verb == "verify" or (verb == "cut" and weights)):
            return "refuse"
        if "NaN" in what and verb not in ("verify", "inspect"):
            return "same" if verb == "cut" else "any"
    if place.startswith("stats/") and what == "a name twice":
        return "same"  # the library that reads them takes the second, which is the first again
    if place.startswith("out.tokens/") and place.endswith(".npy") and verdict == "any":
        return "refuse"
    if place.endswith((".bin", ".distcp")) and verdict == "any":
        return "refuse" if what != "gone" or place.endswith(".bin") else "any"
    return verdict


def faults(home: Path, line: Line, ended: Ended, *, wanted: str, good: str) -> list[str]:
    """What is wrong with how a command ended."""
    found = []
    if ended.cpu > CPU_SECONDS or ended.code in (-signal.SIGXCPU, -signal.SIGKILL):
        found.append("hangs")
    if ended.memory > MEMORY or "MemoryError" in ended.text:
        found.append("over_memory")
    told = ended.code == 0 or (ended.code in (1, 2) and ended.text.strip())
    if not found and (not told or "Traceback" in ended.text):
        found.append("tracebacks")
    if RAN.exists():
        RAN.unlink()
        found.append("false_success")
    elif ended.code == 0:
        well = wanted == "any" or (wanted == "same" and outcome(home, line) == good)
        found += [] if well and (line[0] != "cut" or _opens(home / "out")) else ["false_success"]
    elif line[0] == "cut" and (home / "out").exists():
        found.append("false_success")  # half-written
    return found


def _opens(folder: Path) -> bool:
    """Whether the safetensors library reads every tensor of a folder, all of them finite."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            if not all(torch.isfinite(opened.get_tensor(name)).all() for name in opened.keys()):  # noqa: SIM118 - no dictionary
                return False
    return any(folder.glob("*.safetensors"))


def _inputs(
    good: Path, count: int, *, seed: int
) -> Iterator[tuple[int, str, str, Callable[[Path], Line], random.Random]]:
    """(number, subject, file, command, generator) of every input; each is drawn apart, so that one can be repeated."""
    names = list(SUBJECTS)
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        name = names[number % len(names)]
        files = sorted(
            {str(p.relative_to(good)) for pattern in SUBJECTS[name].files for p in good.glob(pattern) if p.is_file()}
        )
        assert files, name
        yield number, name, draw.choice(files), draw.choice(SUBJECTS[name].commands), draw


def fuzz(count: int, *, seed: int, only: int | None, kept: Path | None) -> dict[str, int]:
    """Try `count` inputs; says what is wrong with which, and counts."""
    counts = Counter(dict.fromkeys(("inputs", "tracebacks", "hangs", "over_memory", "false_success"), 0))
    codes: Counter[str] = Counter()
    most = Ended(0, "", 0.0, 0)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        home, good = (kept or Path(place)) / "home", (kept or Path(place)) / "good"
        shutil.rmtree(home, ignore_errors=True)
        if not good.exists():
            home.mkdir(parents=True)
            make_good(home)  # paths are written into it, so it always lies at the same place
            home.rename(good)
        known: dict[str, str] = {}
        for number, name, file, command, draw in _inputs(good, count, seed=seed):
            if only not in (None, number):
                continue
            shutil.copytree(good, home)
            line = command(home)
            if (key := " ".join(map(str, line))) not in known:
                ended = run(line, home)
                assert ended.code == 0, f"the good command fails ({ended}): {line}"
                known[key] = outcome(home, line)
                shutil.rmtree(home)
                shutil.copytree(good, home)
            what, verdict = mutations.spoil(home / file, draw)
            wanted = expected(file, what, line=line, verdict=verdict)
            ended = run(line, home)
            wrong = faults(home, line, ended, wanted=wanted, good=known[key])
            counts.update({"inputs": 1, **dict.fromkeys(wrong, 1)})
            most = replace(most, cpu=max(most.cpu, ended.cpu), memory=max(most.memory, ended.memory))
            if counts["inputs"] % 50 == 0:
                print(dict(counts), flush=True)
            codes["passed" if ended.code == 0 else "refused"] += 1
            if wrong or only is not None:
                told = ended.text.strip().splitlines()
                print(f"{number}: {', '.join(wrong) or 'well'}: {name}, {file}: {what}, {line[0]} ({wanted}) "
                      f"ended with {ended.code} after {ended.cpu:.1f} s, {ended.memory / 1e6:.0f} MB: "
                      + (ended.text if only is not None else " | ".join(told[-3:])[:600]), flush=True)  # fmt: skip
            shutil.rmtree(home)
            for left in home.parent.glob("beyond-*"):
                left.unlink()
    print(f"{codes['refused']} refused, {codes['passed']} passed as the good input or another valid one; at most "
          f"{most.cpu:.1f} s and {most.memory / 1e6:.0f} MB above the loaded program")  # fmt: skip
    return dict(counts)


def main() -> None:
    """Exit code 1 where anything was found."""
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    ask.add_argument("--inputs", type=int, default=600)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--only", type=int, help="this input alone, with all that it says")
    ask.add_argument("--kept", type=Path, help="a folder where the good artifacts stay, for the next time")
    given = ask.parse_args()
    counts = fuzz(given.inputs, seed=given.seed, only=given.only, kept=given.kept)
    print(json.dumps(counts))
    sys.exit(int(math.fsum(value for key, value in counts.items() if key != "inputs") > 0))


if __name__ == "__main__":
    main()
