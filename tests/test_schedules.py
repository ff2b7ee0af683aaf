"""Schedules against numbers worked out by hand."""

import math

import pytest

from moeslim.distill.schedules import constant, cosine, linear, rewarm, warmup_cosine
from moeslim.distill.settings import Stage, TrainSettings, learning_rate_at, num_steps, weights_at
from moeslim.errors import MoeslimError, RecipeError


def test_linear_is_lam_of_the_paper() -> None:
    assert [linear(p, start=1.0, end=0.75) for p in (0.0, 0.5, 1.0)] == [1.0, 0.875, 0.75]


def test_cosine_by_hand() -> None:
    # 0.1 + 0.2 * (1 + cos(pi p)) / 2; cos(pi/3) = 1/2 -> 0.1 + 0.2 * 0.75 = 0.25
    assert cosine(0.0, start=0.3, end=0.1) == pytest.approx(0.3)
    assert cosine(1 / 3, start=0.3, end=0.1) == pytest.approx(0.25)
    assert cosine(0.5, start=0.3, end=0.1) == pytest.approx(0.2)
    assert cosine(1.0, start=0.3, end=0.1) == pytest.approx(0.1)


def test_constant_ignores_progress() -> None:
    assert constant(0.7, start=0.3) == 0.3


def test_warmup_cosine_by_hand() -> None:
    # Peak 4, end 2, warm-up over a fifth. 0.1 -> half the peak; 0.6 -> half of the remaining 0.8 -> (4 + 2) / 2.
    values = [warmup_cosine(p, peak=4.0, end=2.0, warmup=0.2) for p in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert values == pytest.approx([0.0, 2.0, 4.0, 3.0, 2.0])
    assert warmup_cosine(0.0, peak=4.0, end=2.0, warmup=0.0) == 4.0


def test_rewarm_climbs_over_one_percent() -> None:
    assert [rewarm(step, 400) for step in (1, 2, 4, 5, 400)] == pytest.approx([0.25, 0.5, 1.0, 1.0, 1.0])
    assert rewarm(1, 7) == 1.0


def test_weights_run_over_all_stages() -> None:
    settings = TrainSettings(tokens=1000)
    second = Stage(fingerprint="x", start=0.1, end=1.0)
    halfway = weights_at(settings, second.progress(4 / 9))  # 0.1 + 0.9 * 4/9 = 0.5 of the run
    assert halfway.lam == pytest.approx(0.875)
    assert halfway.beta == pytest.approx(0.2)
    assert weights_at(TrainSettings(tokens=1000, lm_only=True), 0.5).lam == 0.0


def test_learning_rate_is_one_curve_cut_in_stages() -> None:
    settings = TrainSettings(tokens=1, learning_rate=1.0, min_learning_rate=0.0, warmup=0.05)
    whole = [learning_rate_at(settings, Stage("x"), step=step, steps=100) for step in range(1, 101)]
    first = [learning_rate_at(settings, Stage("x", 0.0, 0.1), step=step, steps=10) for step in range(1, 11)]
    second = [learning_rate_at(settings, Stage("x", 0.1, 1.0), step=step, steps=90) for step in range(1, 91)]
    assert first + second == pytest.approx(whole)
    assert whole[4] == pytest.approx(1.0)  # step 5 of 100: the end of the warm-up
    assert whole[-1] == pytest.approx(0.0)


def test_warmup_is_at_most_2000_steps() -> None:
    settings = TrainSettings(tokens=1, learning_rate=1.0, min_learning_rate=1.0, warmup=0.05)
    # 100 000 steps: 5 % would be 5000
    assert learning_rate_at(settings, Stage("x"), step=1000, steps=100_000) == pytest.approx(0.5)
    assert learning_rate_at(settings, Stage("x"), step=2000, steps=100_000) == pytest.approx(1.0)


def test_reset_stage_rewarms_over_one_percent_of_its_steps() -> None:
    settings = TrainSettings(tokens=1, learning_rate=1.0, min_learning_rate=1.0, warmup=0.0)
    stage = Stage("x", 0.5, 1.0, rewarm=True)
    rates = [learning_rate_at(settings, stage, step=step, steps=400) for step in (1, 2, 3, 4, 5, 400)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_number_of_steps() -> None:
    assert num_steps(TrainSettings(tokens=4096 * 10, rows_per_step=16), 256) == 10
    assert num_steps(TrainSettings(tokens=1), 256) == 1


@pytest.mark.parametrize(
    "changes", [{"rows_per_step": 6, "micro_rows": 4}, {"tokens": 0}, {"warmup": 1.5}, {"micro_rows": 0}]
)
def test_impossible_settings_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        TrainSettings(**{"tokens": 100, **changes}).check()  # the point of the test


def test_serving_form_says_that_it_is_not_built() -> None:
    with pytest.raises(MoeslimError, match="not built yet"):
        TrainSettings(tokens=1, mtp_train="serving").check()


def test_saving_more_often_is_the_same_training() -> None:
    assert TrainSettings(tokens=1, save_every=7).facts() == TrainSettings(tokens=1, save_every=9).facts()
    assert TrainSettings(tokens=1, alpha=0.1).facts() != TrainSettings(tokens=1).facts()
    assert math.isclose(TrainSettings(tokens=1).facts()["alpha"], 1e-3)
