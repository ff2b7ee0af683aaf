"""One family in its proof: tiny models that transformers built and saved, and what a cell says of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cuts import cut_by, some
from moeslim.checkpoint.structure import read_structure
from moeslim.errors import FamilyError, MoeslimError
from moeslim.families import FAMILIES as PAGES
from moeslim.families import Shape
from moeslim.families.registry import family_of
from moeslim.plan.steps import CutExperts, CutExpertSize, DropLayers, Step
from tiny import in_own_memory
from tiny_families import HIDDEN, STOCK, build_stock, stock_class, stock_config
from wide import Wide

TOKENS = torch.randint(0, 56, (2, 17), generator=torch.Generator().manual_seed(5))
GONE = (0, 6, 7, 13)
CHANNELS = tuple(c for c in range(HIDDEN) if c not in GONE)

_MEAN = "its LayerNorms subtract a mean, which is another one without some channels: no eps makes a cut of width exact"
REASONS: dict[tuple[str, str], str] = {
    ("phimoe", "hidden"): _MEAN,
    ("olmoe", "hidden"): "its norms of queries and keys have hidden_size values, whatever head_dim says",
    ("phimoe", "top k"): "its router takes two experts, whatever the config says",
}
"""(family, cell) -> why it does not hold."""


@dataclass(frozen=True)
class Figure:
    """What a cell measured: `value` must not exceed `bound`, and `wrong`, of a wrong cut, must be 100 times `bound`."""

    value: float
    bound: float = 0.0
    wrong: float | None = None

    @property
    def good(self) -> bool:
        """Whether it is proven; a NaN proves nothing."""
        told_apart = self.wrong is None or self.wrong >= 100 * max(self.bound, self.value)
        return self.value <= self.bound and told_apart

    def __str__(self) -> str:
        return f"{self.value:.0e}" if self.value else "0"


Cell = Callable[["Case"], Figure | None]
CELLS: dict[str, tuple[Cell, str, bool]] = {}
"""Name -> the cell, what it says in one sentence, and whether it is in the short form. In the order of the table."""


def cell(name: str, *, short: bool = False) -> Callable[[Cell], Cell]:
    """Enter a cell under a name; its docstring is what the table's legend says. None: the family has no such part."""

    def enter(function: Cell) -> Cell:
        CELLS[name] = (function, (function.__doc__ or "").strip(), short)
        return function

    return enter


class Case:
    """A family's models in `work`: `source` and `silent` (nothing writes to GONE) in float64, `single` in float32."""

    def __init__(self, family: str, work: Path) -> None:
        self.family, self.work = family, work

    @cached_property
    def source(self) -> Path:
        return build_stock(self.work / "source", self.family, dtype=torch.float64)

    @cached_property
    def silent(self) -> Path:
        return build_stock(self.work / "silent", self.family, dtype=torch.float64, silent=GONE)

    @cached_property
    def single(self) -> Path:
        return build_stock(self.work / "single", self.family)

    @cached_property
    def shape(self) -> Shape:
        return read_structure(self.single).shape

    @cached_property
    def small(self) -> Path:
        """`single` without a layer and with three of four experts, or eight neurons per dense layer."""
        steps: list[Step] = [self.fewer_layers]
        after = self.fewer_layers.after(self.shape)
        if after.moe_keys:
            steps.append(experts_step(after))
        elif getattr(after, "dense_keys", ()):
            steps.append(neurons_step(after, ("dense",)))
        return cut_by(self.single, self.work / "small", *steps)

    @cached_property
    def fewer_layers(self) -> DropLayers:
        """All layers but one, the first of the middle ones that the family can do without.

        An attention layer stays: transformers' cache generates with none without one.
        """
        layers = self.shape.layers
        problems = []
        for gone in (*range(2, layers), 1, 0):
            step = DropLayers(kept=tuple(i for i in range(layers) if i != gone))
            try:
                step.check(self.shape, top_k=self.shape.sizes.get("top_k", 0))
                after = step.after(self.shape)
                if any(after.kind(key) in ("attention", "mla") for key in after.trunk_keys):
                    return step
            except MoeslimError as problem:
                problems.append(problem)
        raise problems[0]

    @property
    def logits_factor(self) -> float:
        """What the class multiplies the head's product with; our states behind the last norm have it in them."""
        return 1 / getattr(stock_config(self.family).get_text_config(), "logits_scaling", 1.0)

    def out(self, name: str) -> Path:
        """A new folder."""
        number = sum(1 for _ in self.work.iterdir())
        return self.work / f"{number}-{name.replace(' ', '-')}"

    def stock(self, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
        """transformers' own float32 model of a folder in aligned memory, and what it says about loading."""
        cls: Any = stock_class(stock_config(self.family))
        more = {"dtype": torch.float32, "output_loading_info": True, **options}
        model, info = cls.from_pretrained(folder, **more)
        return in_own_memory(model).eval(), info


def with_pages() -> list[str]:
    """The families of tiny_families.py that have a page, or are served by one."""

    def served(family: str) -> bool:
        try:
            return bool(family_of(stock_config(family).to_dict()))
        except FamilyError:
            return False

    return [family for family in STOCK if served(family)]


def pages_without_models() -> set[str]:
    """Pages that no entry of tiny_families.py reaches: nothing is proven of them."""
    return set(PAGES) - {family_of(stock_config(family).to_dict()).model_type for family in with_pages()}


def experts_step(shape: Shape) -> CutExperts:
    """3 of each 4 experts, others in every layer: the same number in each of two groups."""
    pairs = {key: (some(4, 3, key), some(4, 3, (key, "second"))) for key in shape.moe_keys}
    return CutExperts(kept={key: (*low, *(4 + e for e in high)) for key, (low, high) in pairs.items()})


def neurons_step(shape: Shape, parts: tuple[str, ...]) -> CutExpertSize:
    """Two thirds of the neurons of `parts` (experts, shared, dense), others in every layer and expert."""

    def third(axis: str, seed: object) -> tuple[int, ...]:
        return some(shape[axis], shape[axis] * 2 // 3, seed)

    found: dict[str, Any] = {}
    if "experts" in parts:
        lists = {key: tuple(third("expert_size", (key, e)) for e in range(shape["experts"])) for key in shape.moe_keys}
        found["experts"] = lists
    if "shared" in parts:
        found["shared"] = {key: third("shared_size", key) for key in shape.moe_keys}
    if "dense" in parts:
        found["dense"] = {key: third("dense_size", key) for key in getattr(shape, "dense_keys", ())}
    return CutExpertSize(**found)


def mask_neurons(oracle: Wide, step: CutExpertSize, shape: Shape) -> None:
    """Switch off in the oracle what the step drops."""
    for key, lists in step.experts.items():
        for expert, kept in enumerate(lists):
            oracle.mask_neurons(key, expert, kept)
    for key, kept in step.shared.items():
        oracle.mask_plain_neurons(key, shape["shared_size"], kept)
    for key, kept in getattr(step, "dense", {}).items():
        oracle.mask_plain_neurons(key, shape["dense_size"], kept)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two tensors of one shape."""
    assert one.shape == other.shape, f"{tuple(one.shape)} and {tuple(other.shape)}"
    return float((one - other).abs().max())
