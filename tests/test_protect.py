"""Protected experts keep their protection when layers and experts before them are gone."""

from typing import Any

import pytest

from moeslim.errors import PlanError
from moeslim.families import Shape
from moeslim.plan.file import Plan, SourceShape
from moeslim.plan.protect import check_protected, check_protected_count, renumbered
from moeslim.plan.steps import CutExperts, CutHidden, DropLayers, SetTopK
from tiny import tiny_config

SOURCE = SourceShape(
    model_type="qwen3_next", layers=6, hidden=16, experts=8, expert_size=12, shared_size=10, top_k=2, mtp=True
)
PROTECT = {"1": (7, 0), "3": (2,), "5": (1, 6), "mtp.0": (5,)}


def after(*steps: Any) -> dict[str, tuple[int, ...]]:
    return renumbered(PROTECT, Plan(source=SOURCE, steps=steps))


def test_numbers_move_with_the_plan() -> None:
    assert after() == PROTECT
    assert after(CutHidden(kept=(0, 1)), SetTopK(top_k=1)) == PROTECT
    # layers 1, 4 and 5 become 0, 1 and 2; what layer 3 protected is gone with it; the MTP block is no layer of these
    drop = DropLayers(kept=(1, 4, 5))
    assert after(drop) == {"0": (7, 0), "2": (1, 6), "mtp.0": (5,)}
    kept = {"0": (0, 2, 4, 7), "1": (0, 1, 2, 3), "2": (1, 3, 5, 6), "mtp.0": (2, 3, 4, 5)}
    assert after(drop, CutExperts(kept=kept)) == {"0": (3, 0), "2": (0, 3), "mtp.0": (3,)}
    # a plan that was edited by hand may drop a protected expert: then there is nothing left to protect
    assert after(drop, CutExperts(kept={**kept, "2": (1, 2, 3, 4)}))["2"] == (0,)


def test_two_plans_compose() -> None:
    first = Plan(source=SOURCE, steps=(DropLayers(kept=(0, 1, 3, 5)),))
    second = Plan(source=SOURCE, steps=(DropLayers(kept=(1, 2)),))
    both = Plan(source=SOURCE, steps=(DropLayers(kept=(1, 3)),))
    assert renumbered(renumbered(PROTECT, first), second) == renumbered(PROTECT, both)


def test_what_cannot_be_protected_is_refused() -> None:
    shape = Shape.from_config(tiny_config())
    check_protected({"0": (0, 7), "mtp.0": (1,)}, shape)
    with pytest.raises(PlanError, match=r"methods.protect: '4' is no layer with experts; known are 0, 1, 2, 3$"):
        check_protected({"4": (0,)}, shape.trunk)
    with pytest.raises(PlanError, match=r"'mtp.0' is no layer with experts"):
        check_protected({"mtp.0": (0,)}, shape.trunk)
    with pytest.raises(PlanError, match=r"methods.protect.0: 8 is no expert; they are 0..7"):
        check_protected({"0": (8,)}, shape)
    check_protected_count(PROTECT, 2, shape=shape)
    with pytest.raises(PlanError, match=r"methods.protect.1: 2 experts are protected but only 1 are kept"):
        check_protected_count(PROTECT, 1, shape=shape)
