"""Every operation by every importance on the bundled teacher: what fewer experts cost before any training.

    make bench-experts                       everything, about half an hour on two idle cores
    .venv/bin/python benchmarks/experts.py --ratios 50 --documents 2 --samples 2 --only drop merge --page /tmp/x.md

Per calibration sample (disjoint rows of the bundled calibration text) the teacher is calibrated once; every cell, a
ratio, a method and a sample, is planned from these statistics, really cut, loaded again and scored on held-out
documents. Methods that try things on live layers calibrate for themselves, on the same rows. A cell is a file below
OUT/cells, so a killed run goes on where it was. The last line of stdout is JSON: per share of the experts kept the
method of least KL, its paired difference to the default (drop by reap, fixed beforehand) and the difference's standard
error.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import experts_page
import numpy as np
import torch
from scipy.stats import spearmanr

from moeslim.artifacts.commit import read_json, write_json
from moeslim.artifacts.fingerprint import fingerprint, folder_fingerprint
from moeslim.calibrate.observe import Observe
from moeslim.calibrate.run import calibrate
from moeslim.checkpoint.config_json import read_config
from moeslim.checkpoint.structure import read_structure
from moeslim.data.corpus import read_corpus
from moeslim.data.tokens import TokenSet, pack
from moeslim.demo import teacher_path, text_path, tokenizer_path
from moeslim.evaluate.measure import EvalData, load
from moeslim.evaluate.score import Scores, score
from moeslim.evaluate.settings import Settings
from moeslim.families import Shape
from moeslim.machine.host import tune_cpu
from moeslim.model.walk import WalkSettings
from moeslim.plan import Plan
from moeslim.plan.make import make_plan
from moeslim.plan.schedule import Target
from moeslim.recipe import Evaluate, Methods
from moeslim.search.probe import ProbeResult, ProbeSettings, probe
from moeslim.search.run import expert_search
from moeslim.stats import Stats
from moeslim.surgery.apply import cut

LENGTH = 256
"""Tokens per calibration row, as the teacher was trained."""
IMPORTANCES = (
    "reap",
    "reap_squared",
    "frequency",
    "soft_logits",
    "ean",
    "weighted_ean_sum",
    "router_blind",
    "removal",
    "random",
)
OPERATIONS = ("drop", "merge", "partial", "partial_pairs")
WHOLE = ("m_smoe", "hc_smoe", "ream", "ream_code")
"""Operations that bring their own importance."""
WALK = WalkSettings(rows_per_batch=16)


def methods(only: list[str] | None) -> dict[str, Methods]:
    """Name -> methods, the default first; `only` keeps some operations."""
    found = {f"{op}/{name}": Methods(expert_op=op, experts=name) for op in OPERATIONS for name in IMPORTANCES}
    found |= {op: Methods(expert_op=op) for op in WHOLE}
    chosen = {name: one for name, one in found.items() if only is None or name.split("/")[0] in only}
    return {experts_page.DEFAULT: found[experts_page.DEFAULT], **chosen}


@dataclass(frozen=True)
class Bench:
    """The teacher, the text, and the folder of what is finished."""

    out: Path
    ground: EvalData
    teacher: Scores
    rows: TokenSet
    samples: list[np.ndarray]

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Bench":
        out = Path(arguments.out)
        text = pack(
            read_corpus([(text_path("calibration"), None)]),
            tokenizer_path(),
            out_folder=out / "calibration",
            sequence_length=LENGTH,
            seed=0,
        )
        held_out = pack(
            read_corpus([(text_path("heldout"), None)]),
            tokenizer_path(),
            out_folder=out / "heldout",
            sequence_length=LENGTH,
            seed=0,
        )
        settings = Settings(
            Evaluate(documents_per_domain=arguments.documents, prompts=32, samples=2),
            document_tokens=arguments.tokens,
            window=arguments.tokens,
            seed=0,
            dtype="float32",
            device="cpu",
            max_memory=None,
        )
        ground = EvalData.of(held_out.documents(), tokenizer=tokenizer_path(), settings=settings)
        order = np.random.default_rng(0).permutation(len(text))
        if arguments.samples * arguments.rows > len(text):
            raise SystemExit(f"{arguments.samples} samples of {arguments.rows} rows: there are {len(text)} rows")
        samples = [np.sort(part) for part in np.split(order[: arguments.samples * arguments.rows], arguments.samples)]
        facts = [folder_fingerprint(teacher_path()), text.fingerprint, ground.fingerprint, arguments.rows]
        _check_same(out / "ground.json", fingerprint([*facts, settings.facts()]))
        teacher = score(load(teacher_path(), settings), ground.documents, layout=ground.layout, keep_states=True)
        return cls(out, ground, teacher, text, [text.rows[part].astype(np.int32) for part in samples])

    def statistics(self, sample: int) -> Stats:
        """What calibration on one sample learns, removal included."""
        out = self.out / "stats" / str(sample)
        return calibrate(teacher_path(), self.samples[sample], out=out, settings=WALK, observe=Observe(removal=True))

    def plan(self, stats: Stats, *, count: int, by: Methods, sample: int) -> Plan:
        """The plan of one cell; methods that search calibrate for it."""
        shape, target = read_structure(teacher_path()).shape, Target(experts=count)
        search = expert_search(shape, target, methods=by, seed=sample)
        if search is not None:
            with tempfile.TemporaryDirectory(dir=self.out) as folder:
                rows, observe = self.samples[sample], Observe(search=search)
                stats = calibrate(teacher_path(), rows, out=Path(folder) / "stats", settings=WALK, observe=observe)
        return make_plan(shape, stats=stats, target=target, methods=by, seed=sample)

    def scored(self, plan: Plan) -> dict[str, list[float]]:
        """KL and nats per document of the model that the plan leaves."""
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            cut(teacher_path(), plan, out_folder=Path(folder) / "cut")
            student = load(Path(folder) / "cut", self.ground.settings)
            found = score(student, self.ground.documents, layout=self.ground.layout, teacher=self.teacher.states)
        assert found.kl is not None
        return {"kl": found.kl, "nats": found.nats}

    def cells(self, ratios: list[int], chosen: dict[str, Methods]) -> Iterator[tuple[int, str, int, Any]]:
        """(ratio, method, sample, sums per document) of every cell, made or read."""
        experts = Shape.from_config(read_config(teacher_path()))["experts"]
        total, done, began = len(ratios) * len(chosen) * len(self.samples), 0, time.monotonic()
        for sample in range(len(self.samples)):
            stats = self.statistics(sample)
            for ratio in ratios:
                for name, by in chosen.items():
                    path = self.out / "cells" / f"{ratio}-{name.replace('/', '-')}-{sample}.json"
                    if not path.is_file():
                        plan = self.plan(stats, count=experts * ratio // 100, by=by, sample=sample)
                        write_json(path, self.scored(plan))
                    done += 1
                    say(f"{done}/{total} {ratio} % {name} sample {sample}, {time.monotonic() - began:.0f} s")
                    yield ratio, name, sample, read_json(path)

    def probed(self) -> tuple[ProbeResult, dict[int, dict[str, list[float]]]]:
        """What a probe predicts, and what the same cuts are measured to give, by count."""
        probe_settings = ProbeSettings(Methods(), sequences=sum(len(rows) for rows in self.samples))
        found = probe(
            teacher_path(), self.rows, out=self.out / "probe", probe_settings=probe_settings, settings=WALK, redo=False
        )
        measured = {}
        for count in list(found.figures)[:-1]:
            path = self.out / "cells" / f"probe-{count}.json"
            if not path.is_file():
                write_json(path, self.scored(self.plan(found.stats, count=count, by=Methods(), sample=0)))
            say(f"probe, {count} experts")
            measured[count] = read_json(path)
        return found, measured


def _check_same(path: Path, name: str) -> None:
    """Stop where the folder holds cells of another teacher, text or settings."""
    if not path.is_file():
        write_json(path, name)
    elif read_json(path) != name:
        raise SystemExit(f"{path.parent}: holds cells of another teacher, text or settings; remove it")


def say(words: str) -> None:
    """A line on stderr."""
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    """Make what is missing, write the page and its figure, and print the verdict as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/bench-experts", help="folder of cells and statistics")
    parser.add_argument("--page", default="docs/experts.md", help="the page; its figure lies beside it")
    parser.add_argument("--samples", type=int, default=3, help="calibration samples")
    parser.add_argument("--rows", type=int, default=128, help=f"rows of {LENGTH} tokens per sample")
    parser.add_argument("--documents", type=int, default=16, help="held-out documents per domain")
    parser.add_argument("--tokens", type=int, default=512, help="first tokens of each document that are scored")
    parser.add_argument("--ratios", type=int, nargs="+", default=[75, 50, 25], help="per cent of the experts kept")
    parser.add_argument("--only", nargs="+", choices=[*OPERATIONS, *WHOLE], help="operations, all unless given")
    arguments = parser.parse_args()
    tune_cpu()
    torch.manual_seed(0)  # nothing draws from it
    bench, chosen = Bench.of(arguments), methods(arguments.only)
    ground = experts_page.Documents(
        tokens=np.array(bench.teacher.tokens, float),
        bytes=np.array(bench.teacher.bytes, float),
        domains=np.array(bench.teacher.domains),
        nats=np.array(bench.teacher.nats),
    )
    sums: dict[int, dict[str, list[Any]]] = {ratio: {name: [] for name in chosen} for ratio in arguments.ratios}
    for ratio, name, _, cell in bench.cells(arguments.ratios, chosen):
        sums[ratio][name].append(cell)
    found = {
        ratio: {
            name: experts_page.compared(cells, ground, default=by_name[experts_page.DEFAULT])
            for name, cells in by_name.items()
        }
        for ratio, by_name in sums.items()
    }
    predicted, measured = bench.probed()
    counts = list(measured)
    kl = {
        count: experts_page.mean(np.array([cell["kl"]]), ground.tokens, ground).value
        for count, cell in measured.items()
    }
    rank = spearmanr([predicted.figures[count]["kl"].value for count in counts], [kl[count] for count in counts])
    experts_page.write(
        Path(arguments.page),
        experts_page.Findings(arguments, ground, found, predicted=predicted, measured=kl, rank=float(rank.statistic)),
    )
    print(json.dumps(experts_page.verdict(found)))


if __name__ == "__main__":
    main()
