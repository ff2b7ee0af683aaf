"""A whole run in a second: a recipe, a model and texts small enough to be killed a hundred times, and ways to kill it.

A run goes on in a process of its own, forked from one that has imported everything and run nothing: SIGKILL there is
what it is anywhere, nothing is cleaned up, and the next one starts at once.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tiny import write_tiny

WORDS = "state house tax law man war year bank road ship farm note bill vote".split()
PRELOAD = [
    "moeslim.cli",
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
        form={"dtype": "bfloat16", "tokenizer_from": _write_tokenizer(home / "tokenizer"), "shard_bytes": 60_000},
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
            **{"documents_per_domain": 2, "prompts": 2, "prompt_tokens": 4, "new_tokens": 6},
            **{"samples": 1, "speed_prompt_tokens": 8, "speed_new_tokens": 2, "speed_repeats": 0},
        },
        "compare_random_init": True,
        **changes,
    }
    path = home / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _write_tokenizer(folder: Path) -> Path:
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
    os.environ["OMP_NUM_THREADS"] = "1"  # read once, when the server starts
    process = context.Process(target=target, args=args)
    process.start()
    return process


def finish(target: Callable[..., None], *args: Any) -> int:
    """Run `target` to its end; its exit code."""
    process = start(target, *args)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def carry_out(recipe: Path, out: Path) -> None:
    """The whole run, or what is left of it."""
    from moeslim import pipeline

    pipeline.run(recipe, out)


def carry_out_until_new(recipe: Path, out: Path, ledger: Path, after: bool) -> None:
    """The same, killed at the first rename (right before or after it) that no process before has been killed at."""
    done = set(ledger.read_text().split("\n")) if ledger.exists() else set()
    rename = os.rename

    def dying(source: Path, target: Path) -> None:
        key = _key(Path(source), Path(target), out)
        new = key is not None and key not in done
        if new:
            with ledger.open("a") as file:
                file.write(f"{key}\n")
        if not (new and not after):
            rename(source, target)
        if new:
            os.kill(os.getpid(), signal.SIGKILL)

    os.rename = dying  # type: ignore[assignment]  # what everything that commits or discards goes through
    carry_out(recipe, out)


def _key(source: Path, target: Path, out: Path) -> str | None:
    """The name of a rename in the run; None for one inside a folder that is not committed yet."""
    place = target.resolve().relative_to(out.resolve())
    if any(part.endswith(".partial") for part in place.parts):
        return None
    layers = len(json.loads(source.read_text())["done"]) if place.name == "walk.json" else ""
    return f"{place} {layers}".strip()


def command_line(*arguments: str) -> None:
    """The command line in this process; ends it with its exit code."""
    from moeslim import cli

    sys.argv = ["moeslim", *arguments]
    cli.main()
