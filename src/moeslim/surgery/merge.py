"""Routed experts: which stay, which take others in, and the weighted mean that a merged one is.

Averaging experts by weight is how M-SMoE (arXiv 2310.01334), HC-SMoE (2410.08589) and REAM (2604.04356) merge; who
joins whom, with which weight and in which order of neurons has been decided in the plan.
"""

from collections.abc import Iterable, Sequence

import torch

from moeslim.plan.steps import CutExperts, Merge
from moeslim.surgery.view import Expert, Part, View, among


def cut_experts(view: View, step: CutExperts) -> View:
    """The experts listed per layer, with what each takes in; the router row is the kept expert's own."""
    experts = dict(view.experts)
    for key, ids in step.kept.items():
        old = view.source_key(key)
        here = view.experts_of(old)
        merges = {merge.base: merge for merge in step.merged.get(key, ())}
        experts[old] = tuple(_together(here, merges[e]) if e in merges else here[e] for e in ids)
    return view.changed(experts=experts)


def _together(here: Sequence[Expert], merge: Merge) -> Expert:
    """One expert of several, each perhaps merged before: weights multiply as shares of their mean, orders compose."""
    parts = []
    for place, (member, weight) in enumerate(zip(merge.experts, merge.weights, strict=True)):
        inside = here[member].parts
        total = sum(part.weight for part in inside)
        for part in inside:
            neurons = among(part.neurons, merge.orders[place]) if merge.orders else part.neurons
            parts.append(Part(part.expert, weight * (part.weight / total), neurons))
    return Expert(here[merge.base].base, tuple(sorted(parts, key=lambda part: part.expert)))


def merged(parts: Iterable[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """`sum_j w_j x_j / sum_j w_j`, elementwise, for parts of one shape and dtype, in that dtype.

    Sum and quotient are float64, in the order given; then one conversion (torch's to bfloat16 goes through float32).
    A mean lies between its members, so what float64's rounding puts outside of them is brought back: equal members
    give themselves bit for bit, in float64 too. Members of weight 0 do not count. Parts are taken one at a time.
    """
    total = low = high = None
    for part, weight in zip(parts, weights, strict=True):
        if weight == 0:
            continue
        term = part.double() * weight
        if total is None or low is None or high is None:
            total, low, high = term, part, part
        else:
            total += term  # no first zero to add to: it would turn -0.0 into 0.0
            low, high = torch.minimum(low, part), torch.maximum(high, part)
    assert total is not None, "a merge has a weight above 0"
    assert low is not None
    return (total / sum(weights)).to(low.dtype).clamp(low, high)
