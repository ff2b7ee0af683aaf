"""What every kind of step has, and the checks that several of them share."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt

from moeslim.errors import PlanError
from moeslim.families import Shape
from moeslim.plan.view import View


def _ascending(ids: tuple[int, ...]) -> tuple[int, ...]:
    if not ids:
        raise ValueError("keeps nothing; at least one must stay")
    for before, after in zip(ids, ids[1:], strict=False):
        if after == before:
            raise ValueError(f"names {after} twice; list each number once")
        if after < before:
            raise ValueError(f"has {after} after {before}; list the kept numbers in ascending order")
    return ids


Ids = Annotated[tuple[NonNegativeInt, ...], AfterValidator(_ascending)]


class Strict(BaseModel):
    """A part of a plan: frozen, no key but its own, nothing converted."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class PlanStep(Strict):
    """One step of a plan: its keys in the file, and what it does, all by the numbers of the model as it finds it.

    `sets_routers`: it replaces router rows, and a step that `changes_routers` (layers, channels or experts) may not
    follow.
    """

    sets_routers: ClassVar[bool] = False
    changes_routers: ClassVar[bool] = False

    step: str

    @abstractmethod
    def check(self, shape: Shape, *, top_k: int) -> None:
        """PlanError unless it can work on a model of `shape`; `top_k` is what the plan ends with."""

    @abstractmethod
    def after(self, shape: Shape) -> Shape:
        """The shape that it leaves of `shape`, once checked."""

    @abstractmethod
    def apply(self, view: View) -> View:
        """What it leaves of the source, of which earlier steps have left `view`."""

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The cut model's config.json with what no shape says; the sizes stand in it already."""
        return dict(config)

    def for_moments(self) -> Self | None:
        """The step for tensors that lie like weights and are none; None where it has nothing to do with them."""
        return self


def in_range(ids: Sequence[int], there: int, *, where: str, what: str) -> None:
    """PlanError unless the ascending `ids` are below `there`."""
    if ids[-1] >= there:
        raise PlanError(f"{where}: {ids[-1]} is out of range; the model has {there} {what} here (0..{there - 1})")


def same_layers(given: Iterable[str], wanted: Sequence[str], *, where: str, what: str = "layer with experts") -> None:
    """PlanError unless the layer keys `given` are those `wanted`, which are all of a kind."""
    given = list(given)
    unknown = [key for key in given if key not in wanted]
    if unknown:
        raise PlanError(f"{where}: {unknown[0]!r} is no {what} here; they are {span(wanted)}")
    missing = [key for key in wanted if key not in given]
    if missing:
        raise PlanError(f"{where}: layer {missing[0]} is not listed; every {what} must be, the MTP block too")


def same_count(counts: Mapping[str, int], what: str) -> None:
    """PlanError unless every layer keeps the same number."""
    (first, count), *others = counts.items()
    for key, other in others:
        if other != count:
            raise PlanError(
                f"layer {key} keeps {other} {what} and layer {first} keeps {count}; config.json has one number for all "
                "layers and the MTP block, so keep the same number everywhere"
            )


def span(values: Sequence[str]) -> str:
    """The values in words, only the first and the last of many."""
    return ", ".join(values if len(values) <= 6 else [*values[:3], "...", *values[-2:]])
