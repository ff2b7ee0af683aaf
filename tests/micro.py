"""A whole run in a second: a recipe, a model and texts small enough to be killed a hundred times, and ways to kill it.

A run goes on in a process of its own, forked from one that has imported everything and run nothing: SIGKILL there is
what it is anywhere, nothing is cleaned up, and the next one starts at once.
"""

import json
import logging
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tiny import write_tiny

WORDS = ["state", "house", "tax", "law", "man", "war", "year", "bank", "road", "ship", "farm", "note", "bill", "vote"]
PRELOAD = [
    "moeslim.cli.main",
    "moeslim.pipeline",
    "moeslim.calibrate.run",
    "moeslim.distill.run",
    "moeslim.evaluate.run",
    "moeslim.model.init",
    "moeslim.plan.make",
    "moeslim.report.card",
    "moeslim.report.page",
    "moeslim.surgery.apply",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3_next.modeling_qwen3_next",
]


def write_micro(home: Path, **changes: Any) -> Path:
    """Write model, tokenizer, texts and recipe into `home`; returns the recipe's file."""
    write_tiny(
        home / "source",
        layouts="mixed",
        form={"dtype": "bfloat16", "tokenizer_from": write_tokenizer(home / "tokenizer"), "shard_bytes": 60_000},
        vocab_size=257,
        num_experts=4,
        initializer_range=0.1,
        eos_token_id=0,
    )
    rng = random.Random(0)
    data = {"sequence_length": 16}
    for part, documents in (("train", 24), ("calibration", 6), ("heldout", 4)):
        lines = [{"text": " ".join(rng.choices(WORDS, k=20)), "domain": "ab"[i % 2]} for i in range(documents)]
        path = home / f"{part}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        data[part] = [{"path": str(path)}]
    recipe = {
        "model": str(home / "source"),
        "device": "cpu",
        "data": data,
        "calibrate": {"sequences": 6, "rows_per_batch": 4},
        "keep": {"layers": "50%", "hidden": 12, "experts": "50%", "top_k": 1},
        "methods": {"round_to": 2},
        "schedule": "depth_first",
        "distill": {"tokens": 448, "rows_per_step": 4, "micro_rows": 2, "save_every": 2, "learning_rate": 3e-3},
        "evaluate": {
            **{"documents_per_domain": 2, "prompts": 1, "prompt_tokens": 4, "new_tokens": 6},
            **{"samples": 0, "speed_repeats": 0},
        },
        "compare_random_init": True,
        **changes,
    }
    path = home / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer without merges (a token per byte, EOS as token 0), template and generation config."""
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<eos>": 0, **{c: i for i, c in enumerate(alphabet, start=1)}}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    return folder


def start(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Run `target` in a forked process with one thread; its `exitcode` is -9 after a SIGKILL, as in subprocess."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=target, args=args)
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):  # read once, when the server starts
        process.start()
    return process


def finish(target: Callable[..., None], *args: Any) -> int:
    """Run `target` to its end; its exit code."""
    process = start(target, *args)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def carry_out(recipe: Path, out: Path, overrides: Sequence[str] = (), redo: bool = False) -> dict[str, Any]:
    """The whole run, or what is left of it."""
    from moeslim import pipeline

    return pipeline.run(recipe, out, overrides=overrides, redo=redo)


def carry_out_watched(recipe: Path, out: Path) -> None:
    """The same; leaves beside `out` its table, and what the optimizer holds before each training's first step."""
    from safetensors.torch import save_file

    from moeslim.distill import loop
    from moeslim.distill.state import parameters_by_disk_name

    begin = loop.begin

    def watched(student: Any, tokens: Any, *, folder: Path, **more: Any) -> Any:
        optimizer, states, position = begin(student, tokens, folder=folder, **more)
        found = {
            f"{part}/{name}": value
            for name, parameter in parameters_by_disk_name(student).items()
            for part, value in optimizer.state.get(parameter, {}).items()
        }
        if found:
            save_file(found, out.parent / "optimizer" / f"{folder.name}.safetensors")
        return optimizer, states, position

    (out.parent / "optimizer").mkdir(parents=True)
    loop.begin = watched
    record = carry_out(recipe, out)
    (out.parent / "table").write_text(json.dumps(record["table"]))


def carry_out_without_models(recipe: Path, out: Path, report: Path) -> None:
    """The same where no model can be made live; writes what was said, and the table."""
    from moeslim.log import logger
    from moeslim.model.student import Student

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    Student.from_config = None  # whoever calls it fails
    record = carry_out(recipe, out)
    report.write_text(json.dumps({"said": said, "table": record["table"]}))


def carry_out_until_new(recipe: Path, out: Path, ledger: Path, after: bool) -> None:
    """The same, killed at the first rename (right before or after it) that no process before has been killed at."""
    done = set(ledger.read_text().split("\n")) if ledger.exists() else set()

    def new(place: str) -> bool:
        if place in done:
            return False
        with ledger.open("a") as file:
            file.write(f"{place}\n")
        return True

    _die_at_rename(out, new, after=after)
    carry_out(recipe, out)


def carry_out_until(recipe: Path, out: Path, place: str) -> None:
    """The same, killed right before the rename to `place`."""
    _die_at_rename(out, lambda name: name == place, after=False)
    carry_out(recipe, out)


def run_until_full(recipe: Path, out: Path, said: Path, moment: tuple[str, int]) -> None:
    """`moeslim run` on a disk of its own that has so many bytes left after a rename; what it says goes to `said`."""
    place, left = moment
    _at_rename(out, lambda name: name == place, act=lambda: fill(out.parent, left), after=True)
    command_line_said(str(said), "run", str(recipe), str(out))


def fill(disk: Path, left: int = 0) -> None:
    """Take the room that a disk has, but for `left` bytes, with the file `filler`."""
    free = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - left)


def _die_at_rename(out: Path, chosen: Callable[[str], bool], *, after: bool) -> None:
    _at_rename(out, chosen, act=lambda: os.kill(os.getpid(), signal.SIGKILL), after=after)


def _at_rename(out: Path, chosen: Callable[[str], bool], *, act: Callable[[], None], after: bool) -> None:
    rename = os.rename

    def watched(source: Path, target: Path) -> None:
        place = _place(Path(source), Path(target), out)
        hit = place is not None and chosen(place)
        if hit and not after:
            act()
        rename(source, target)
        if hit and after:
            act()

    os.rename = watched  # what everything that commits or discards goes through


def carry_out_until_tensor(recipe: Path, out: Path, name: str, tensor: int) -> None:
    """The same, killed when `tensor` tensors of the folder `name` are written."""
    from moeslim.checkpoint.writer import ShardWriter

    add = ShardWriter.add

    def dying(self: ShardWriter, *args: Any) -> None:
        add(self, *args)
        if self.folder.name == f".{name}.partial" and self._next == tensor:
            os.kill(os.getpid(), signal.SIGKILL)

    ShardWriter.add = dying
    carry_out(recipe, out)


def run_until_signal(recipe: Path, out: Path, said: Path, moment: tuple[str, int, int]) -> None:
    """`moeslim run`, sending itself a signal at a moment (folder, step, signal); its stderr goes to `said`.

    The folder is that of a training, or `stats`: then the signal comes in the first calibration's second layer.
    """
    from moeslim.calibrate import run as calibration
    from moeslim.distill import loop

    folder, step, number = moment
    begin, rate, leave = loop.begin, loop.learning_rate_at, calibration._save_visit
    training = ""

    def beginning(student: Any, tokens: Any, *, folder: Path, **more: Any) -> Any:
        nonlocal training
        training = folder.name
        return begin(student, tokens, folder=folder, **more)

    def in_step(settings: Any, stage: Any, **more: int) -> float:
        if (training, more["step"]) == (folder, step):
            os.kill(os.getpid(), number)
        return rate(settings, stage, **more)

    def leaving(visit: Any, *args: Any, **more: Any) -> None:
        leave(visit, *args, **more)
        if (folder, visit.key) == ("stats", "1"):
            os.kill(os.getpid(), number)

    # A shell that starts the tests in the background has them ignore Ctrl-C, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    loop.begin, loop.learning_rate_at = beginning, in_step
    calibration._save_visit = leaving
    with said.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    command_line("run", str(recipe), str(out))


def open_with_transformers(folder: Path, report: Path) -> None:
    """Load a checkpoint as its users do and let it write; what was found goes to `report` as JSON."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moeslim.checkpoint.reader import Reader

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("state house", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    reader = Reader(folder)
    routers = [name for name in reader.rows if name.endswith("mlp.gate.weight")]
    found = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
        "tokens": written[0, prompt["input_ids"].shape[1] :].tolist(),
        "experts": [reader.rows[name].shape[0] for name in routers],
    }
    report.write_text(json.dumps(found))


def _place(source: Path, target: Path, out: Path) -> str | None:
    """The name of a rename in the run; None for one inside a folder that is not committed yet.

    walk.json commits a layer; its name goes with the number of layers done.
    """
    place = target.resolve().relative_to(out.resolve())
    if any(part.endswith(".partial") or part == "layers" for part in place.parts):
        return None
    layers = len(json.loads(source.read_text())["done"]) if place.name == "walk.json" else ""
    return f"{place} {layers}".strip()


def command_line(*arguments: str) -> None:
    """The command line in this process; ends it with its exit code."""
    from moeslim.cli import main as cli

    sys.argv = ["moeslim", *arguments]
    cli.main()


def command_line_said(said: str, *arguments: str) -> None:
    """The same, with all that it says in a file."""
    with open(said, "a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    command_line(*arguments)
