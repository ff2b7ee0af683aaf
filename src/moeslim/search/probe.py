"""What fewer experts would cost, for many expert counts at once: one calibration, and a stream of rows per count.

The calibration holds some rows out. When a layer's statistics are known, and the layer is still live, these rows go
through it once per count, cut to that count by these statistics, each stream starting from its own outputs of the layer
before. After the final norm (and the MTP block) every stream is compared with the uncut model, token by token. So what
is measured is what a cut by these statistics gives, on rows that they have not seen.

LAYER/kept-<count>/   a stream's hidden states after that layer; those of two layers exist at once
LAYER/sums.json       per count the sums of every held-out row, at the final norm and the MTP block
"""

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moeslim.artifacts.commit import read_json, write_json
from moeslim.calibrate.observe import Observe
from moeslim.calibrate.run import calibrate, hold_out
from moeslim.checkpoint.reader import Reader
from moeslim.errors import CheckpointError, DataError, PlanError
from moeslim.families import Shape, is_mtp
from moeslim.figures import Figure, ratio
from moeslim.log import progress
from moeslim.losses import Capped
from moeslim.model.hidden import HiddenFiles
from moeslim.model.walk import LayerVisit, WalkSettings
from moeslim.plan.experts import layer_scores
from moeslim.plan.grouping import Wanted, cut_layer, needs_search
from moeslim.recipe import Methods
from moeslim.search.layer import cut_as
from moeslim.search.streams import Streams, Targets, compare
from moeslim.stats import LayerStats, Stats

FEWEST_ROWS = 16
"""Rows of text below which fewer than two would be held out, and no error could be estimated."""


class Text(Protocol):
    """Rows (N, T+1) of token ids, and which of their targets count (N, T)."""

    @property
    def rows(self) -> Any: ...

    @property
    def mask(self) -> Any: ...


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of a probe: decisions by `methods` (and `seed`, for random ones), expert counts in `parts` equal steps.

    `sequences` rows of the text (None: all) are taken; at most `sample` of those held out go through every count.
    """

    methods: Methods
    seed: int = 0
    sequences: int | None = None
    sample: int = 32
    parts: int = 16


@dataclass(frozen=True)
class ProbeResult:
    """Per expert count, ascending, the figures by name, their errors over rows; and from how much text.

    `kl`: KL(uncut || cut) in nats per token; `rise`: how much the loss rises; `mtp_kl` and `mtp_rise` are the same for
    what the MTP block predicts behind the cut trunk, where there is one. With all experts they are 0.
    """

    figures: dict[int, dict[str, Figure]]
    stats: Stats
    rows: int
    tokens: int


def grid(shape: Shape, *, parts: int = 16) -> tuple[int, ...]:
    """Expert counts in `parts` equal steps up to all, ascending, as far down as the router's top-k can be served.

    Multiples of the router's groups, each of which keeps as many experts as rank it and, where several are open to a
    token, enough of them together.
    """
    groups, top_k = shape.groups, shape["top_k"]
    least = top_k if groups == 1 else groups * max(shape.family.ranked_by, -(-top_k // shape.topk_group))
    each = shape["experts"] // groups
    steps = {(2 * each * part + parts) // (2 * parts) * groups for part in range(1, parts + 1)}
    return tuple(sorted(count for count in steps if count >= least))


def probe(
    model: Path | str, text: Text, *, out: Path | str, probe_settings: ProbeSettings, settings: WalkSettings, redo: bool
) -> ProbeResult:
    """What each expert count is predicted to cost; the statistics that decided are in the folder `out` afterwards.

    An interrupted probe resumes at its layer (`redo`: half-finished work of something else is removed). Raises
    PlanError for methods that need a search of their own and where no fewer experts can be kept, DataError for too
    little text, ResourceError where the disk cannot hold the streams.
    """
    reader, out = Reader(model), Path(out)
    counts = _counts(reader, probe_settings)
    there = len(text.rows)
    wanted = min(probe_settings.sequences or there, there)
    if wanted < FEWEST_ROWS:
        raise DataError(
            f"{wanted} rows of {text.rows.shape[1] - 1} tokens, and a probe needs {FEWEST_ROWS}, of which it holds two "
            "out; bring more text, shorten data.sequence_length or raise calibrate.sequences"
        )
    chosen = np.arange(wanted) * there // wanted
    rows, mask = text.rows[chosen], text.mask[chosen]
    held = [hold_out(part, rows_per_batch=settings.rows_per_batch) for part in (rows, mask)]
    tried = _Probe(
        reader, probe_settings, counts=counts, sample=[part[-count:][: probe_settings.sample] for part, count in held]
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    streamed = len(tried.rows) * (len(counts) - 1)
    lengths = (wanted + streamed, rows.shape[1] - 1, reader.shape["hidden"])
    HiddenFiles(out.parent, lengths, dtype=settings.dtype, device=settings.device).check_disk()
    observe = Observe(removal=probe_settings.methods.experts == "removal", search=tried, redo=redo)
    stats = calibrate(model, rows, out=out, settings=settings, observe=observe)
    figures = _figures(read_json(out / "probe.json"), reader)
    return ProbeResult(figures, stats, rows=len(tried.rows), tokens=int(tried.mask.sum()))


def _counts(reader: Reader, settings: ProbeSettings) -> tuple[int, ...]:
    if keys := needs_search(settings.methods):
        raise PlanError(
            f"{' and '.join(keys)}: a probe decides from statistics alone; leave it out, or try with `moeslim prune`"
        )
    if not reader.shape["experts"]:
        raise PlanError(
            f"{reader.folder}: a {reader.shape.family.model_type} has no routed experts, and a probe tries how many "
            "are needed; `moeslim prune` cuts layers, hidden and dense_size"
        )
    counts = grid(reader.shape, parts=settings.parts)
    if len(counts) < 2:
        raise PlanError(
            f"{reader.folder}: a token is sent to {reader.shape['top_k']} of {reader.shape['experts']} experts, and "
            "no fewer can be kept; lower num_experts_per_tok first"
        )
    return counts


class _Probe:
    """The search that decides nothing: it sends the held-out rows through every layer, once per count."""

    holds_out = True

    def __init__(
        self, reader: Reader, settings: ProbeSettings, *, counts: Sequence[int], sample: Sequence[np.ndarray]
    ) -> None:
        """`sample`: the first held-out rows (S, T+1), and which of their targets count (S, T)."""
        self.reader, self.settings = reader, settings
        self.rows, self.mask = sample
        self.cuts = [count for count in counts if count < reader.shape["experts"]]
        self.keys = reader.shape.keys

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "probe": self.cuts,
            "rows": len(self.rows),
            "mask": hashlib.sha256(self.mask.tobytes()).hexdigest()[:16],
            "methods": self.settings.methods.model_dump(mode="json"),
            "seed": self.settings.seed,
        }

    def visit(self, visit: LayerVisit, *, observed: int, held_out: int) -> "_Trial":
        return _Trial(self, visit, first=observed // visit.hidden.shape[1])

    def gather(self, parts: Sequence[Path], *, out: Path) -> None:
        """OUT/probe.json: the sums of every held-out row by place and count."""
        found = {part.name: read_json(part / "sums.json") for part in parts if _compares(part.name)}
        write_json(out / "probe.json", found)


def _compares(key: str) -> bool:
    """Whether streams are compared behind this visit: those of the last norm and the MTP head make predictions."""
    return key == "norm" or is_mtp(key)


class _Trial:
    """One layer of a probe."""

    def __init__(self, probe: _Probe, visit: LayerVisit, *, first: int) -> None:
        """`first`: the number of the first held-out row."""
        self.probe, self.visit = probe, visit
        place = probe.keys.index(visit.key)
        before = visit.folder.parent / probe.keys[place - 1] if place else None
        self.streams = Streams(visit, before, first=first, rows=len(probe.rows))

    def watching(self) -> AbstractContextManager[None]:
        return nullcontext()

    def decide(self, stats: LayerStats | None) -> tuple[None, None]:
        """Nothing is decided and nothing replaced; the streams are in the visit's folder."""
        self.streams.forget()
        cuts, name = self.probe.cuts, f"probe layer {self.visit.key}"
        with progress(name, len(cuts) * self.probe.mask.size, unit="tokens") as advance:
            for count in cuts:
                with self._cut(stats, count):
                    for tokens in self.streams.run(count):
                        advance(tokens, f"{count} experts")
        if _compares(self.visit.key):
            self._compare()
        return None, None

    def _cut(self, stats: LayerStats | None, count: int) -> AbstractContextManager[Any]:
        if stats is None or not stats.is_moe:
            return nullcontext()
        methods, shape, key = self.probe.settings.methods, self.probe.reader.shape, self.visit.key
        wanted = Wanted(count, methods, groups=shape.groups, always=tuple(methods.protect.get(key, ())))
        scores = layer_scores(stats, methods, key=key, seed=self.probe.settings.seed)
        return cut_as(self.visit, cut_layer(stats, wanted, scores=scores), top_k=shape["top_k"])

    def _compare(self) -> None:
        """Put the sums of all streams, beside the uncut model's own, into the visit's folder."""
        rows, mask, reader = self.probe.rows, self.probe.mask, self.probe.reader
        skipped = 0 if self.visit.key == "norm" else 1  # the MTP block predicts one token further
        head = reader.tensor(reader.shape.outer("head"))
        # copied: a product's last bits may depend on where in a file a mapped operand lies
        head = head.to(self.visit.hidden.device, self.visit.hidden.dtype, copy=True)
        cap = reader.shape.logit_cap
        targets = Targets(rows[:, 1 + skipped :], mask[:, skipped:], Capped(head, cap) if cap else head)
        sums = compare(self.streams, self.probe.cuts, targets=targets)
        bad = [count for count, found in sums.items() if not np.isfinite([found["kl"], found["rise"]]).all()]
        if bad:
            raise CheckpointError(
                f"with {bad[0]} experts the predictions of {self.visit.key} are NaN or Inf; look for bad weights with "
                "`moeslim verify`"
            )
        write_json(self.visit.folder / "sums.json", {str(count): found for count, found in sums.items()})


def _figures(sums: dict[str, dict[str, dict[str, list[float]]]], reader: Reader) -> dict[int, dict[str, Figure]]:
    """Count -> figures by name, from the sums by place, count and row."""
    found: dict[int, dict[str, Figure]] = {}
    for place in filter(_compares, reader.shape.keys):
        prefix = "mtp_" if is_mtp(place) else ""
        for count, own in sums.get(place, {}).items():
            for name in ("kl", "rise"):
                figure = ratio(own[name], own["tokens"], unit="nats/token", per="row")
                found.setdefault(int(count), {})[prefix + name] = figure
    names = dict.fromkeys(name for figures in found.values() for name in figures)
    return found | {reader.shape["experts"]: {name: Figure.exact(0.0, "nats/token") for name in names}}
