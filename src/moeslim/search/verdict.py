"""What a probe found, as a record: every count with its size, where the knee is, what is safe, and from how much."""

from collections.abc import Mapping
from dataclasses import asdict
from math import expm1
from typing import Any

from moeslim import __version__
from moeslim.families import Shape, count
from moeslim.plan.experts import expert_importance_of
from moeslim.recipe import Methods
from moeslim.search.knee import knee, safe
from moeslim.search.probe import ProbeResult


def verdict(found: ProbeResult, shape: Shape, *, methods: Methods, tolerance: float) -> dict[str, Any]:
    """A JSON-able record; its `lines` say in text what the table cannot.

    `parameters` are those of the trunk. A rise without an error (one row) counts as exact.
    """
    counts = sorted(found.figures)
    total = counts[-1]
    sizes = {experts: count(shape.resized(experts=experts)) for experts in counts}
    rises = [(figures["rise"].value, figures["rise"].se or 0.0) for figures in map(found.figures.__getitem__, counts)]
    record: dict[str, Any] = {
        "experts": total,
        "importance": expert_importance_of(methods),
        "operation": methods.expert_op,
        "observed_tokens": found.stats.tokens,
        "sample": {"rows": found.rows, "tokens": found.tokens},
        "tolerance": tolerance,
        "knee": knee(counts, [found.figures[experts]["kl"].value for experts in counts]),
        "safe": safe(counts, rises, tolerance=tolerance),
        "counts": [
            {
                "experts": experts,
                "share": experts / total,
                "parameters": sizes[experts].total,
                "active": sizes[experts].active,
                **{name: asdict(figure) for name, figure in found.figures[experts].items()},
            }
            for experts in counts
        ],
        "moeslim": __version__,
    }
    return {**record, "lines": _lines(record)}


def _lines(record: Mapping[str, Any]) -> list[str]:
    sample, total = record["sample"], record["experts"]
    first = (
        f"predicted on {sample['tokens']:,} tokens in {sample['rows']} rows that the decisions have not seen; "
        f"decided by {record['operation']} and {record['importance']} from {record['observed_tokens']:,} tokens; "
        "nothing was trained"
    )
    turn = "knee: none, the KL falls evenly over this range"
    if record["knee"] is not None:
        turn = f"knee: {record['knee']} of {total} experts; below it an expert costs more KL than the average one"
    allowed = f"{record['tolerance']:g} nats per token (perplexity {100 * expm1(record['tolerance']):.1f} % higher)"
    rule = f"the loss rises by at most {allowed}, two standard errors included"
    certain = f"safe: {record['safe']} of {total} experts: {rule}"
    if record["safe"] == total:
        certain = f"safe: only all {total} experts: with fewer it cannot be said that {rule}"
    return [first, turn, certain, "text like the calibration's, and no task, was looked at: measure what you need"]
