"""The figures, the table and the page of benchmarks/experts.py.

Shapes: S calibration samples, D documents.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeslim.artifacts.commit import write_bytes
from moeslim.artifacts.fingerprint import folder_fingerprint
from moeslim.demo import teacher_path
from moeslim.search.probe import ProbeResult

DEFAULT = "drop/reap"


@dataclass(frozen=True)
class Documents:
    """The held-out documents: scored tokens, their UTF-8 bytes, domain, and the teacher's nats."""

    tokens: np.ndarray
    bytes: np.ndarray
    domains: np.ndarray
    nats: np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A mean over domains of equal weight; `documents` and `samples` are the two parts of its standard error."""

    value: float
    documents: float
    samples: float

    @property
    def error(self) -> float:
        """Of both: their squares add. What documents and samples do together counts twice, so it is not too small."""
        return float(np.hypot(self.documents, self.samples))


@dataclass(frozen=True)
class Compared:
    """One method at one ratio: KL in nats per token, bits per byte, and both less the default's."""

    kl: Estimate
    bits: Estimate
    kl_difference: Estimate
    bits_difference: Estimate


def mean(sums_SD: np.ndarray, sizes_D: np.ndarray, documents: Documents) -> Estimate:
    """The ratio of sums per domain, meaned over domains and samples, with its error.

    A cell's value is `D_s = mean over domains g of sum_{i in g} x_si / sum_{i in g} n_i`, the estimate their mean over
    samples. Documents and samples are two crossed causes of error. Documents: x_si is averaged over samples first (the
    samples share the documents), then each domain's ratio is linearised, `e_i = (x_i - r_g n_i) / sum n`, and
    `n_g/(n_g-1) sum e_i^2` adds up over domains, which are fixed strata. Samples: the variance of D_s over S.
    One sample tells nothing of the second part (nan).
    """
    names = np.unique(documents.domains)
    values, variance = np.zeros(len(sums_SD)), 0.0
    for name in names:
        own = documents.domains == name
        total = sizes_D[own].sum()
        values += sums_SD[:, own].sum(1) / total / len(names)
        x_D = sums_SD[:, own].mean(0)
        e_D = (x_D - x_D.sum() / total * sizes_D[own]) / total
        variance += own.sum() / (own.sum() - 1) * (e_D**2).sum() / len(names) ** 2
    spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return Estimate(float(values.mean()), float(np.sqrt(variance)), float(spread))


def compared(
    cells: Sequence[Mapping[str, Any]], documents: Documents, *, default: Sequence[Mapping[str, Any]]
) -> Compared:
    """One method's cells, a sample each, beside the default's on the same samples and documents."""
    own, base = ({key: np.array([cell[key] for cell in one]) for key in ("kl", "nats")} for one in (cells, default))
    bits = documents.bytes * np.log(2)
    return Compared(
        kl=mean(own["kl"], documents.tokens, documents),
        bits=mean(own["nats"], bits, documents),
        kl_difference=mean(own["kl"] - base["kl"], documents.tokens, documents),
        bits_difference=mean(own["nats"] - base["nats"], bits, documents),
    )


Table = Mapping[int, Mapping[str, Compared]]


@dataclass(frozen=True)
class Findings:
    """All that the page tells. `measured`: KL by count of the cuts that a probe has predicted."""

    arguments: argparse.Namespace
    documents: Documents
    table: Table
    predicted: ProbeResult
    measured: Mapping[int, float]
    rank: float


def verdict(table: Table) -> dict[str, dict[str, Any]]:
    """Per share kept the method of least KL, its difference to the default, and the difference's standard error."""
    found = {}
    for ratio, methods in table.items():
        best = min(methods, key=lambda name: methods[name].kl.value)
        difference = methods[best].kl_difference
        error = None if np.isnan(difference.error) else round(difference.error, 6)
        found[f"{ratio / 100:g}"] = {"best": best, "difference": round(difference.value, 6), "error": error}
    return found


def challengers(table: Table) -> dict[str, list[int]]:
    """Method -> ratios at which its KL is below the default's by more than two standard errors."""
    beaten: dict[str, list[int]] = {}
    for ratio, methods in table.items():
        for name, one in methods.items():
            if one.kl_difference.value < -2 * one.kl_difference.error:
                beaten.setdefault(name, []).append(ratio)
    return beaten


def write(path: Path, findings: Findings) -> None:
    """The page, and its figure beside it."""
    figure = path.with_suffix(".svg")
    write_figure(figure, findings.table)
    write_bytes(path, page(findings, figure.name).encode())


def page(findings: Findings, figure: str) -> str:
    """The page as Markdown."""
    arguments, documents = findings.arguments, findings.documents
    samples, rows = arguments.samples, arguments.rows
    ratios = list(findings.table)
    bits = mean(documents.nats[None], documents.bytes * np.log(2), documents).value
    parts = [
        "# Which experts to keep, and what to do with the others",
        "Written by `make bench-experts` (`benchmarks/experts.py`); do not edit.",
        f"The bundled teacher (model {folder_fingerprint(teacher_path())}, {bits:.3f} bits per byte on the text below) "
        f"keeps {listed(ratios)} % of its routed experts, in trunk and MTP head, by every operation and importance. "
        "There is no training. Each cell is a cut checkpoint, loaded and scored.",
        f"- **Calibration**: {samples} disjoint samples of {rows} rows of 256 tokens ({rows * 256:,} tokens each) of "
        "the bundled calibration text. `random` is drawn again for each.\n"
        f"- **Measured on** {len(documents.tokens)} held-out documents in {len(set(documents.domains))} domains, the "
        f"first {arguments.tokens} tokens of each ({int(documents.tokens.sum()):,} in total); domains have equal "
        "weight. KL is KL(teacher || cut) in nats per token.\n"
        "- **Errors** (after ±, one standard error) are of the paired difference to the default, `drop` by `reap`, "
        "which was chosen before the measurement. All methods use the same documents and samples, so the difficulty of "
        "a document cancels. The squares of two parts are added: documents (differences averaged over samples, "
        "clustered by document within domains) and samples (spread of the difference over samples). Their interaction "
        f"is in both, so the error is more likely too large. With {samples} samples the second part is uncertain.",
        *_results(findings.table, figure),
        *_probe(findings),
    ]
    return "\n\n".join(parts) + "\n"


def _results(table: Table, figure: str) -> list[str]:
    best = [f"{float(ratio) * 100:g} %: {_best(one)}" for ratio, one in verdict(table).items()]
    beaten = challengers(table)
    needed = min(2, len(table))
    strong = [name for name, ratios in beaten.items() if len(ratios) >= needed]
    if strong:
        word = f"More than two standard errors below the default at {needed} ratios or more: {', '.join(strong)}."
    else:
        word = f"No method is more than two standard errors below the default at {needed} ratios or more: it is kept."
    picked = "The lowest of so many values is low partly by chance, so its difference is biased."
    return [
        "## Results",
        "\n".join(_table(table)),
        f"![KL by method and share of experts kept]({figure})",
        f"Lowest KL, with its difference to the default: {'; '.join(best)}. {picked} {word}",
    ]


def _best(one: dict[str, Any]) -> str:
    if one["best"] == DEFAULT:
        return "the default itself"
    return f"{one['best']} ({one['difference']:+.4f} ± {one['error'] or float('nan'):.4f})"


def _table(table: Table) -> list[str]:
    ratios = list(table)
    heads = [f"{ratio} %: {what}" for ratio in ratios for what in ("KL", "minus default", "bits/byte", "minus default")]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" + "|--:" * len(heads) + "|"]
    for name in table[ratios[0]]:
        cells = []
        for ratio in ratios:
            one = table[ratio][name]
            differences = [_difference(d) if name != DEFAULT else "" for d in (one.kl_difference, one.bits_difference)]
            cells += [f"{one.kl.value:.4f}", differences[0], f"{one.bits.value:.4f}", differences[1]]
        lines.append(f"| {name.replace('/', ' by ')} | " + " | ".join(cells) + " |")
    return lines


def _difference(one: Estimate) -> str:
    return f"{one.value:+.4f} ± {one.error:.4f}"


def _probe(findings: Findings) -> list[str]:
    """Predicted against measured KL by expert count."""
    predicted, experts = findings.predicted, max(findings.predicted.figures)
    off = [predicted.figures[count]["kl"].value / measured - 1 for count, measured in findings.measured.items()]
    lines = ["| experts kept | predicted KL | measured KL |", "|---|--:|--:|"]
    for count, measured in sorted(findings.measured.items(), reverse=True):
        kl = predicted.figures[count]["kl"]
        mark = "**" if 100 * count in (75 * experts, 50 * experts, 25 * experts) else ""
        error = f" ± {kl.se:.4f}" if kl.se is not None else ""
        lines.append(
            f"| {mark}{count} ({100 * count / experts:.0f} %){mark} | {kl.value:.4f}{error} | {measured:.4f} |"
        )
    return [
        "## Prediction of `moeslim probe`",
        f"Predicted by one probe (`drop` by `reap`, {predicted.stats.tokens:,} tokens observed) on {predicted.rows} "
        f"rows ({predicted.tokens:,} tokens) of calibration text that its statistics do not use; measured on the "
        "documents above with checkpoints cut by the same statistics. Rank correlation (Spearman) over "
        f"{len(findings.measured)} counts: {findings.rank:.3f}. Any two decreasing curves have 1, so compare the "
        f"values: the mean error of the prediction is {100 * np.mean(np.abs(off)):.0f} %, and the texts differ.",
        "\n".join(lines),
    ]


def listed(values: Sequence[object]) -> str:
    """`75, 50 and 25`."""
    words = [str(value) for value in values]
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def write_figure(path: Path, table: Table) -> None:
    """KL of every method, a panel per ratio, with two standard errors of the difference to the default."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    pyplot.rcParams.update({"svg.hashsalt": "moeslim", "font.size": 9, "svg.fonttype": "none"})
    names = list(next(iter(table.values())))
    figure, panels = pyplot.subplots(
        1, len(table), figsize=(3.3 * len(table) + 1.4, 0.23 * len(names) + 1.1), sharey=True, squeeze=False
    )
    operations = list(dict.fromkeys(name.split("/")[0] for name in names))
    for panel, (ratio, methods) in zip(panels[0], table.items(), strict=True):
        panel.axvline(methods[DEFAULT].kl.value, color="0.6", linestyle="--", linewidth=1)
        for place, name in enumerate(names):
            one = methods[name]
            bar = 2 * np.nan_to_num(one.kl_difference.error)
            colour = f"C{operations.index(name.split('/')[0])}"
            panel.errorbar(one.kl.value, place, xerr=bar, fmt="o", markersize=4, color=colour, capsize=2)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.grid(axis="x", which="both", color="0.92")
        panel.set_axisbelow(True)
        panel.set_title(f"{ratio} % of the experts kept")
        panel.set_xlabel("KL from the teacher, nats/token")
    panels[0][0].set_yticks(range(len(names)), [name.replace("/", " by ") for name in names])
    panels[0][0].invert_yaxis()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
