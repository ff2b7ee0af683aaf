"""Schedules against numbers worked out by hand."""

import json
import math
import pickle
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from moeslim.distill.schedules import constant, cosine, learning_rate, linear, rewarm
from moeslim.distill.settings import (
    ELSEWHERE,
    FREE,
    MAY_CHANGE,
    Stage,
    TrainSettings,
    differences,
    learning_rate_at,
    num_steps,
    weights_at,
)
from moeslim.errors import RecipeError
from moeslim.recipe import Distill, PartSettings
from tiny import changed, train_settings


def test_linear_is_lam_of_the_paper() -> None:
    assert [linear(p, start=1.0, end=0.75) for p in (0.0, 0.5, 1.0)] == [1.0, 0.875, 0.75]


def test_cosine_by_hand() -> None:
    # 0.1 + 0.2 * (1 + cos(pi p)) / 2; cos(pi/3) = 1/2 -> 0.1 + 0.2 * 0.75 = 0.25
    assert cosine(0.0, start=0.3, end=0.1) == pytest.approx(0.3)
    assert cosine(1 / 3, start=0.3, end=0.1) == pytest.approx(0.25)
    assert cosine(0.5, start=0.3, end=0.1) == pytest.approx(0.2)
    assert cosine(1.0, start=0.3, end=0.1) == pytest.approx(0.1)


def test_constant_ignores_progress() -> None:
    assert constant(0.7, start=0.3, end=0.1) == 0.3


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        # Peak 4, end 2, warm-up over a fifth: 0.1 -> half the peak; 0.6 -> half of the remaining 0.8. At 0.4 and 0.8 a
        # quarter and three quarters of it: (1 + cos(pi/4)) / 2 = 0.853553 of the way is left, and 0.146447.
        ("cosine", [0.0, 2.0, 4.0, 2 + 2 * 0.8535534, 3.0, 2 + 2 * 0.1464466, 2.0]),
        ("linear", [0.0, 2.0, 4.0, 3.5, 3.0, 2.5, 2.0]),
        ("constant", [0.0, 2.0, 4.0, 4.0, 4.0, 4.0, 4.0]),
        ("wsd", [0.0, 2.0, 4.0, 4.0, 4.0, 4.0, 2.0]),
    ],
)
def test_learning_rate_by_hand(schedule: str, wanted: list[float]) -> None:
    options = {"schedule": schedule, "peak": 4.0, "end": 2.0, "warmup": 0.2}
    assert [learning_rate(p, **options) for p in (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)] == pytest.approx(wanted)
    assert learning_rate(0.0, **{**options, "warmup": 0.0}) == 4.0


def test_wsd_falls_over_the_last_fifth_of_the_run() -> None:
    options = {"schedule": "wsd", "peak": 4.0, "end": 2.0}
    found = [learning_rate(p, warmup=0.05, **options) for p in (0.05, 0.5, 0.8, 0.85, 0.9, 0.95, 1.0)]
    assert found == pytest.approx([4.0, 4.0, 4.0, 3.5, 3.0, 2.5, 2.0])
    # A warm-up of 0.9 leaves a tenth: at 0.95 half of it is over.
    found = [learning_rate(p, warmup=0.9, **options) for p in (0.45, 0.9, 0.95, 1.0)]
    assert found == pytest.approx([2.0, 4.0, 3.0, 2.0])


def test_the_cosine_is_the_formula_bit_for_bit() -> None:
    """As trainings so far computed it, operation by operation: a resumed one must not see another rate."""
    settings = train_settings(1, learning_rate=2e-3, min_learning_rate=1e-4)
    for step in (3, 31, 77, 100):
        progress = 0.1 + (1.0 - 0.1) * (step / 100)
        rest = (progress - 0.05) / (1.0 - 0.05)
        wanted = 1e-4 + (2e-3 - 1e-4) * 0.5 * (1.0 + math.cos(math.pi * rest))
        assert learning_rate_at(settings, Stage("x", 0.1, 1.0), step=step, steps=100) == wanted


def test_rewarm_climbs_over_one_percent() -> None:
    assert [rewarm(step, 400) for step in (1, 2, 4, 5, 400)] == pytest.approx([0.25, 0.5, 1.0, 1.0, 1.0])
    assert rewarm(1, 7) == 1.0


def test_weights_run_over_all_stages() -> None:
    settings = train_settings(1000)
    second = Stage(fingerprint="x", start=0.1, end=1.0)
    halfway = weights_at(settings, second.progress(4 / 9))  # 0.1 + 0.9 * 4/9 = 0.5 of the run
    assert halfway.lam == pytest.approx(0.875)
    assert halfway.beta == pytest.approx(0.2)
    assert weights_at(train_settings(1000, lm_only=True), 0.5).lam == 0.0


def test_weights_follow_the_schedule_that_is_named() -> None:
    # A quarter of the run: linear 1 - 0.25 * 0.25 = 0.9375 and 0.3 - 0.25 * 0.2 = 0.25; of a cosine 0.8535534 is left.
    found = {}
    for name in ("linear", "cosine", "constant"):
        weights = weights_at(train_settings(1, lam_schedule=name, beta_schedule=name), 0.25)
        found[name] = (weights.lam, weights.beta)
    assert found["linear"] == pytest.approx((0.9375, 0.25))
    assert found["cosine"] == pytest.approx((0.75 + 0.25 * 0.8535534, 0.1 + 0.2 * 0.8535534))
    assert found["constant"] == (1.0, 0.3)


def test_learning_rate_is_one_curve_cut_in_stages() -> None:
    settings = train_settings(1, learning_rate=1.0, min_learning_rate=0.0, warmup=0.05)
    whole = [learning_rate_at(settings, Stage("x"), step=step, steps=100) for step in range(1, 101)]
    first = [learning_rate_at(settings, Stage("x", 0.0, 0.1), step=step, steps=10) for step in range(1, 11)]
    second = [learning_rate_at(settings, Stage("x", 0.1, 1.0), step=step, steps=90) for step in range(1, 91)]
    assert first + second == pytest.approx(whole)
    assert whole[4] == pytest.approx(1.0)  # step 5 of 100: the end of the warm-up
    assert whole[-1] == pytest.approx(0.0)


def test_warmup_is_at_most_2000_steps() -> None:
    settings = train_settings(1, learning_rate=1.0, min_learning_rate=1.0, warmup=0.05)
    # 100 000 steps: 5 % would be 5000
    assert learning_rate_at(settings, Stage("x"), step=1000, steps=100_000) == pytest.approx(0.5)
    assert learning_rate_at(settings, Stage("x"), step=2000, steps=100_000) == pytest.approx(1.0)


def test_reset_stage_rewarms_over_one_percent_of_its_steps() -> None:
    settings = train_settings(1, learning_rate=1.0, min_learning_rate=1.0, warmup=0.0)
    stage = Stage("x", 0.5, 1.0, rewarm=True)
    rates = [learning_rate_at(settings, stage, step=step, steps=400) for step in (1, 2, 3, 4, 5, 400)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_number_of_steps() -> None:
    assert num_steps(train_settings(4096 * 10, rows_per_step=16), 256) == 10
    assert num_steps(train_settings(1), 256) == 1


@pytest.mark.parametrize(
    "section", [{"rows_per_step": 6, "micro_rows": 4}, {"warmup": 1.5}, {"micro_rows": 0}, {"learning_rate": 1e-5}]
)
def test_impossible_settings_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        train_settings(100, **section)


def test_a_stage_without_a_token_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"distill\.tokens is 0"):
        train_settings(0).check()


def test_rows_are_shared_out_over_processes() -> None:
    settings = train_settings(1, rows_per_step=24, micro_rows=4)
    for ranks in (1, 2, 3, 6):
        settings.check(ranks=ranks)
    with pytest.raises(RecipeError, match=r"rows_per_step is 24, micro_rows 4 and there are 4 processes.* 4 x 4 = 16"):
        settings.check(ranks=4)


def test_copies_of_the_weights_are_of_one_size() -> None:
    settings = train_settings(1, rows_per_step=24, micro_rows=1, shard_over=4)
    for ranks in (1, 2, 4, 8):  # fewer processes than shard_over share one copy
        settings.check(ranks=ranks)
    with pytest.raises(RecipeError, match="shard_over is 4, and 6 processes cannot be parted"):
        settings.check(ranks=6)


SETTINGS = train_settings(1, train_only=("mtp", "router"), parts={"router": PartSettings(learning_rate=0.5)})
OTHERS = {
    **{"save_every": 7, "keep_last": 3, "keep_best": 2, "async_save": True, "measure_every": 5, "measure_rows": 4},
    **{"watch": ("wandb",), "spike": 0.0, "micro_rows": 2, "activation_checkpointing": True, "shard_over": 2},
    "device": "cuda:1",
}


def test_the_page_on_distillation_says_what_may_change() -> None:
    page = (Path(__file__).parents[1] / "docs" / "distillation.md").read_text(encoding="utf-8")
    (sentence,) = re.findall(r"These may change when a training resumes: (.+?)\.", page, re.DOTALL)
    assert set(re.findall("`(.+?)`", sentence)) == set(FREE)
    assert sentence.replace("\n", " ").endswith("and the number of processes")


def test_what_may_change_is_not_in_the_facts() -> None:
    assert set(OTHERS) == set(FREE)
    assert changed(SETTINGS, **OTHERS).facts() == SETTINGS.facts()
    asked = {*Distill.model_fields, *(f.name for f in fields(TrainSettings))} - {"distill", *FREE, *ELSEWHERE}
    assert set(SETTINGS.facts()) == asked
    best = changed(SETTINGS, final="best", measure_every=5)
    assert set(best.facts()) - set(SETTINGS.facts()) == {"measure_rows"}  # the best state is the best on these rows
    assert "watch, spike, micro_rows," in MAY_CHANGE
    assert MAY_CHANGE.endswith("device and the number of processes")


@pytest.mark.parametrize("name", sorted(train_settings(1).facts()))
def test_every_other_setting_is_a_fact_and_named_where_it_differs(name: str) -> None:
    before = train_settings(1, micro_rows=1, measure_every=5)
    value = before.facts()[name]
    others = {"precision": "bfloat16", "mtp_train": "serving", "train_only": ("mtp",), "final": "best"}
    others |= {key: "constant" for key in ("learning_rate_schedule", "lam_schedule", "beta_schedule")}
    others |= {"betas": (0.5, 0.5), "parts": {"mtp": PartSettings(weight_decay=0.5)}, "min_learning_rate": 0.0}
    other = others.get(name, not value if isinstance(value, bool) else 0.5 if isinstance(value, float) else 77)
    lines = differences(before.facts(), changed(before, **{name: other}).facts())
    assert [line.split(":")[0].split(".")[0] for line in lines if "measure_rows" not in line] == [name]
    assert all(" -> " in line for line in lines)


def test_differences_are_said_as_a_recipe_writes_them() -> None:
    changes = {"learning_rate": 4e-4, "lm_only": True, "train_only": ("router",), "tokens": 9}
    found = differences(SETTINGS.facts(), changed(SETTINGS, **changes, parts={"router": PartSettings()}).facts())
    assert found == [
        "tokens: 1 -> 9",
        "learning_rate: 0.001 -> 0.0004",
        "train_only: [mtp, router] -> [router]",
        "parts.router.learning_rate: 0.5 -> 1.0",
        "lm_only: false -> true",
    ]
    assert differences(SETTINGS.facts(), SETTINGS.facts()) == []
    assert differences({"old": 1}, {"new": [True, None]}) == ["old: 1 -> left out", "new: left out -> [true, left out]"]


def test_facts_and_settings_can_be_sent_and_stored() -> None:
    assert json.loads(json.dumps(SETTINGS.facts())) == SETTINGS.facts()
    assert pickle.loads(pickle.dumps(SETTINGS)) == SETTINGS


def test_the_facts_are_what_the_section_says() -> None:
    section = Distill(train_only=("router",), parts={"router": PartSettings(learning_rate=2.0)}, watch=("wandb",))
    facts = TrainSettings(section, tokens=5, seed=3, precision="bfloat16", device="cpu").facts()
    assert (facts.pop("tokens"), facts.pop("seed"), facts.pop("precision")) == (5, 3, "bfloat16")
    said = section.model_dump(mode="json")
    assert facts == {name: said[name] for name in facts}
