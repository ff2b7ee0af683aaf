"""Shapes that a model can be cut to and that meet a budget, ranked by what the cut takes away. Reads a config alone.

What is tried, what is left out, and how the rest is ranked are rules with reasons: docs/planner.md, and `RULES` here.
Statistics of a calibration, if there are any, take the place of plain counts in the ranking (`carried`).
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from moeslim.errors import PlanError, RecipeError
from moeslim.families import Shape
from moeslim.plan.engines import FAST_EXPERTS, engine_warnings
from moeslim.plan.footprint import CONTEXT, PRECISIONS, Footprint, Footprints
from moeslim.plan.groups import check_groups
from moeslim.plan.schedule import axes_of, pattern_period

FILLED = 0.9
"""Share of a memory that weights, cache and state may take; the rest is for activations and the engine itself."""
ROUGHLY = 0.03
"""Relative distance within which a number of parameters counts as met, however exactly it is written."""
RULES = (
    "target: met within half a unit of its last digit, or 3 % where that is more; never above the memory",
    "servable: whole periods of layers; channels in multiples of 128 (of an eighth of them in a small model); counts "
    "of experts that fused top-k kernels are compiled for; top-k its own or a power of two, at most a quarter of them; "
    "without experts neurons in twelve steps or more",
    "kept: heads, expert sizes (and dense ones beside experts) and vocabulary stay, unless an option gives another",
    "rank: first what engines do not object to, then the least sum over axes of weight x ln(there / kept)^2",
    "weight: how fast sqrt(total x active parameters) falls with the axis, so what costs the model more is spared more",
)
"""What the proposals were chosen and ranked by, as they are printed; reasons in docs/planner.md."""
Carried = Mapping[str, np.ndarray]
"""Axis -> share (0..1) of what all of it carries that is carried by the best n, at index n."""
_LEAST = 1e-6


@dataclass(frozen=True)
class ParameterTarget:
    """A number of parameters as it was asked for, and how far from it still counts as met."""

    value: float
    within: float

    @classmethod
    def parse(cls, digits: str, unit: str) -> "ParameterTarget":
        """From "6.5" and "B": half a unit of the last digit, or ROUGHLY of the value."""
        scale = {"B": 1e9, "M": 1e6}[unit.upper()]
        last = 10.0 ** -len(digits.partition(".")[2])
        return cls(float(digits) * scale, max(last / 2, ROUGHLY * float(digits)) * scale)

    def miss(self, parameters: float) -> float:
        """How far outside: 0 where it is met, else |ln(parameters / value)|."""
        return 0.0 if abs(parameters - self.value) <= self.within else abs(math.log(parameters / self.value))


@dataclass(frozen=True)
class Budget:
    """What a smaller model must meet; None: nothing is asked. `memory` in bytes, for weights in `precision`."""

    total: ParameterTarget | None = None
    active: ParameterTarget | None = None
    memory: float | None = None
    speedup: float | None = None
    precision: str = "bf16"

    @classmethod
    def parse(
        cls,
        *,
        target: str | None = None,
        memory: str | None = None,
        speedup: str | None = None,
        precision: str | None = None,
    ) -> "Budget":
        """From an option's words: "23B-A2B" or "23B", "24GB", "2x". RecipeError for other words."""
        if precision not in (None, *PRECISIONS):
            raise RecipeError(f"--precision: {precision!r} is not known; choose one of {', '.join(PRECISIONS)}")
        if precision is not None and memory is None:
            raise RecipeError(
                f"--precision: {precision} is that of weights which must fit; say into what with --memory"
            )
        number = r"(\d+(?:\.\d+)?)"
        total = active = room = faster = None
        if target is not None:
            form = rf"{number}([BM])(?:-A{number}([BM]))?"
            found = _parsed("--target", target, form=form, such="23B-A2B, 6.5B-A1.1B or 23B")
            total = ParameterTarget.parse(found[1], found[2])
            active = ParameterTarget.parse(found[3], found[4]) if found[3] else None
            if active is not None and active.value > total.value:
                raise RecipeError(f"--target: {target} has more active parameters than parameters; write TOTAL-ACTIVE")
        if memory is not None:
            found = _parsed("--memory", memory, form=rf"{number} ?([GM])(i?)B", such="24GB or 23.5GiB")
            power = {"G": 3, "M": 2}[found[2].upper()]
            room = float(found[1]) * (1024 if found[3] else 1000) ** power
        if speedup is not None:
            faster = float(_parsed("--speedup", speedup, form=rf"{number}x", such="2x or 1.5x")[1])
            if faster < 1:
                raise RecipeError(f"--speedup: {speedup} is slower than the model itself; ask for 1x at least")
        return cls(total, active, memory=room, speedup=faster, precision=precision or "bf16")

    @property
    def empty(self) -> bool:
        """Whether nothing is asked."""
        return not any((self.total, self.active, self.memory, self.speedup))

    def miss(self, found: Footprint, before: Footprint) -> float:
        """By how much a shape fails, in factors' logarithms added up; 0 where it meets everything."""
        missed = 0.0
        if self.total:
            missed += self.total.miss(found.parameters)
        if self.active:
            missed += self.active.miss(found.active)
        if self.memory:
            missed += max(0.0, math.log(held(found, self.precision) / (FILLED * self.memory)))
        if self.speedup:
            missed += max(0.0, math.log(self.speedup * found.operations / before.operations))
        return missed


@dataclass(frozen=True)
class Proposal:
    """A shape with what it weighs, the share of each axis that stays, the cost of the cut, what engines object to."""

    shape: Shape
    footprint: Footprint
    kept: Mapping[str, float]
    cost: float
    warnings: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """The counts by axis, as `keep` takes them."""
        return {axis: self.shape.count(axis) for axis in axes_of(self.shape)}


def held(found: Footprint, precision: str) -> float:
    """Bytes of weights, of the cache of CONTEXT tokens and of one sequence's state."""
    return found.bytes[precision] + CONTEXT * found.cache + found.state


def proposals(
    shape: Shape, budget: Budget, *, pinned: Mapping[str, int], carried: Carried | None = None
) -> list[Proposal]:
    """All shapes that meet the budget, best first; `pinned` axes have the size that they are given.

    With an empty budget the axes that are not pinned stay whole. PlanError where nothing meets it, with the nearest.
    """
    weigh = Footprints()
    before, weights = weigh.of(shape), axis_weights(shape)
    axes = axes_of(shape)
    fixed = {**{axis: shape.count(axis) for axis in axes}, **pinned} if budget.empty else pinned
    found: list[Proposal] = []
    nearest: tuple[float, float, Shape] | None = None
    for after in candidates(shape, fixed):
        kept = {axis: _share(shape, after, axis=axis, carried=carried or {}) for axis in axes}
        cost = sum(weights[axis] * math.log(1 / max(share, _LEAST)) ** 2 for axis, share in kept.items())
        footprint = weigh.of(after)
        missed = budget.miss(footprint, before)
        if missed == 0:
            found.append(Proposal(after, footprint, kept, cost, tuple(engine_warnings(after, before=shape))))
        elif nearest is None or (missed, cost) < nearest[:2]:
            nearest = (missed, cost, after)
    if not found:
        raise PlanError(_nothing(None if nearest is None else nearest[2], weigh, before=before, budget=budget))
    return sorted(found, key=lambda each: (len(each.warnings), each.cost, *(-n for n in each.counts.values())))


def axis_weights(shape: Shape) -> dict[str, float]:
    """How fast sqrt(total x active parameters) falls with each axis: ln(S / S_half) / ln(n / half), half = n // 2.

    The geometric mean of all and active parameters is a rule of thumb for the size of the dense model that a MoE model
    equals; only its ratios between axes matter here. 0 for an axis of one.
    """
    weigh = Footprints()

    def logarithm(sized: Shape) -> float:
        found = weigh.of(sized)
        return (math.log(found.parameters) + math.log(found.active)) / 2

    weights = {}
    for axis in axes_of(shape):
        there = shape.count(axis)
        half = there // 2
        changed = logarithm(shape) - logarithm(resized(shape, {axis: half})) if half else 0.0
        weights[axis] = changed / math.log(there / half) if half else 0.0
    return weights


def candidates(shape: Shape, pinned: Mapping[str, int]) -> Iterator[Shape]:
    """Every shape that the model can be cut to and that can be served well, the model itself among them."""
    axes = axes_of(shape)
    choices = [[pinned[axis]] if axis in pinned else _ladder(shape, axis) for axis in axes]
    dense = shape["top_k"] / max(1, shape["experts"])
    for counts in product(*choices):
        sizes = dict(zip(axes, counts, strict=True))
        after = resized(shape, sizes)
        routed = shape["experts"] > 0
        sparse = after["top_k"] <= max(1 / 4, dense) * after["experts"] or {"experts", "top_k"} <= pinned.keys()
        if not routed or (sparse and len(after.dense_layers) < after.layers and _reachable(after)):
            yield after


def resized(shape: Shape, counts: Mapping[str, int]) -> Shape:
    """The shape with other counts: the first `layers` and new sizes."""
    sizes = {axis: count for axis, count in counts.items() if axis != "layers"}
    return shape.resized(**sizes).keep_layers(range(counts.get("layers", shape.layers)))


def _ladder(shape: Shape, axis: str) -> list[int]:
    """The counts of an axis that are tried, its own first."""
    there = shape.count(axis)
    tried: Iterable[int] = ()
    if axis == "layers":
        tried = range(there, 0, -pattern_period(shape.layer_types))
    elif axis == "hidden":
        unit = min(128, _power(there // 8))
        unit = unit if shape["experts"] else max(unit, _power(there // 32))  # three axes of many steps are too many
        tried = [count for count in range(unit, there, unit) if shape.width_problem(count) is None]
    elif axis == "dense_size" and not shape["experts"]:
        unit = _power(there // 12)
        tried = range(unit, there, unit)
    elif axis == "experts":
        tried = [count for count in FAST_EXPERTS if count < there]
    elif axis == "top_k":
        tried = [2**power for power in range(there.bit_length()) if 2**power < there]
    return sorted({there, *tried}, reverse=True)


def _power(size: int) -> int:
    """The largest power of two up to `size`, 1 at least."""
    return 2 ** max(0, size.bit_length() - 1)


def _reachable(shape: Shape) -> bool:
    if shape["top_k"] > shape["experts"]:
        return False
    try:
        check_groups(shape, shape["experts"], top_k=shape["top_k"], where="every layer")
    except PlanError:
        return False
    return True


def _share(before: Shape, after: Shape, *, axis: str, carried: Carried) -> float:
    there, stays = before.count(axis), after.count(axis)
    return float(carried[axis][stays]) if axis in carried else stays / there


def read_number(option: str, text: str, *, such: str) -> float:
    """A number with B, M or K behind it, or a plain one; RecipeError for other words."""
    found = _parsed(option, text, form=r"(\d+(?:\.\d+)?(?:e\d+)?)([BMK]?)", such=such)
    return float(found[1]) * {"B": 1e9, "M": 1e6, "K": 1e3, "": 1.0}[found[2].upper()]


def _parsed(option: str, text: str, *, form: str, such: str) -> re.Match[str]:
    found = re.fullmatch(form, text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise RecipeError(f"{option}: {text!r} cannot be read; write it like {such}")
    return found


def _nothing(nearest: Shape | None, weigh: Footprints, *, before: Footprint, budget: Budget) -> str:
    """Why there is no proposal, with the nearest shape and what it has."""
    if nearest is None:
        return "no servable shape has these counts; give fewer of the options for counts"
    found = weigh.of(nearest)
    if budget.total and budget.total.value - budget.total.within > before.parameters:
        return f"the model has {before.parameters / 1e9:.3f} B parameters and a cut adds none; ask for fewer"
    has = [
        f"{found.parameters / 1e9:.3f} B parameters, {found.active / 1e9:.3f} B active",
        f"{held(found, budget.precision) / 1e9:.1f} GB in {budget.precision} with a cache of {CONTEXT:,} tokens "
        f"(at most {FILLED:.0%} of a memory)",
        f"{before.operations / found.operations:.2f}x fewer operations",
    ]
    axes = axes_of(nearest)
    sizes = ", ".join(f"{axis} {nearest.count(axis)}" for axis in axes)
    stay = [axis for axis in ("expert_size", "shared_size", "dense_size") if axis in axes and nearest["experts"]]
    options = " and ".join(f"--{axis.replace('_', '-')}" for axis in stay)
    more = f", or cut {options} too: kept whole unless given" if stay else ""
    return f"no servable shape meets all of that; the nearest is {sizes}: {', '.join(has)}. Ask for less{more}"
