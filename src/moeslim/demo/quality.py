"""Is the bundled teacher a model? Its figures on held-out text beside simple means, and what losing experts costs it.

    python -m moeslim.demo.quality WORK [--model FOLDER]     # a few minutes; the record is WORK/quality.json

Bits per byte in windows of 256 tokens, each 128 further, over every held-out document (its first 1024 tokens);
unigram, bigram and xz stand beside it from text/baselines.json. Half of the experts, drawn at random, are dropped
without training with three seeds: a teacher that does not mind could not tell expert methods apart.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import read_json, write_json
from moeslim.checkpoint.structure import read_structure
from moeslim.data.corpus import read_corpus
from moeslim.data.tokens import pack
from moeslim.demo import teacher_path, text_path, tokenizer_path
from moeslim.errors import MoeslimError
from moeslim.evaluate.pairs import paired
from moeslim.evaluate.record import Record
from moeslim.evaluate.run import evaluate
from moeslim.evaluate.settings import Settings
from moeslim.figures import Figure
from moeslim.log import logger
from moeslim.machine.host import tune_cpu
from moeslim.plan.make import make_plan
from moeslim.plan.schedule import Target
from moeslim.recipe import Evaluate, Methods
from moeslim.surgery.apply import cut

SEEDS = (0, 1, 2)


def quality(model: Path, work: Path) -> dict[str, Any]:
    """The record of `model`, by domain where that makes sense; cut models and single records stay in `work`."""
    tune_cpu()
    heldout = read_corpus([(text_path("heldout"), None)])
    tokens = pack(heldout, tokenizer_path(), out_folder=work / "tokens", sequence_length=256, seed=0)
    section = Evaluate(documents_per_domain=64, stride=128, prompts=32, samples=0, speed_repeats=0)
    settings = Settings(section, window=256, seed=0, dtype="float32", device="cpu", max_memory=None)
    models = {"teacher": model, **{f"random-half-{seed}": _without_half(model, work, seed=seed) for seed in SEEDS}}
    records = evaluate(
        models, tokens.documents(), teacher=None, tokenizer=tokenizer_path(), settings=settings, out=work / "records"
    )
    return _record(records, read_json(text_path("heldout").parent / "baselines.json"))


def _without_half(model: Path, work: Path, *, seed: int) -> Path:
    out = work / f"random-half-{seed}"
    if not out.exists():
        shape = read_structure(model).shape
        target = Target(experts=shape["experts"] // 2)
        plan = make_plan(shape, stats=None, target=target, methods=Methods(experts="random"), seed=seed)
        cut(model, plan, out_folder=out)
    return out


def _record(records: dict[str, Record], baselines: dict[str, Any]) -> dict[str, Any]:
    teacher = records["teacher"]
    domains = {}
    for domain, figure in teacher.figures["bits_per_byte"].items():
        simple = baselines["domains"][domain]
        costs = [paired(records[f"random-half-{seed}"], teacher)[domain] for seed in SEEDS]
        domains[domain] = {
            "bits_per_byte": _plain(figure),
            **{name: simple[name]["bits_per_byte"] for name in ("unigram", "bigram", "xz_alone", "xz_after_train")},
            "cost_of_half_the_experts": [_plain(cost) for cost in costs],
            **{f"acc_{j}": _plain(teacher.figures[f"acc_{j}"][domain]) for j in range(5)},
        }
    least = {key: min(loads) for key, loads in teacher.load.items()}
    return {"schema": 1, "model": teacher.model, "domains": domains, "least_load_by_layer": least}


def _plain(figure: Figure) -> dict[str, Any]:
    return {"value": round(figure.value, 4), "se": figure.se and round(figure.se, 4), "n": figure.n}


def main() -> int:
    """Measure, write WORK/quality.json, say it line by line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, default=teacher_path())
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        record = quality(args.model, args.work)
    except MoeslimError as problem:
        logger.error("%s", problem)
        return problem.exit_code
    write_json(args.work / "quality.json", record)
    for domain, facts in record["domains"].items():
        logger.info("%s: %s", domain, facts)
    logger.info("least load of any expert, 1 is fair: %s", record["least_load_by_layer"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
