"""Stages of a schedule: the shapes and token shares, by hand."""

from fractions import Fraction

import pytest

from moeslim.errors import PlanError
from moeslim.families import Shape
from moeslim.plan.schedule import NAMED, StageTarget, Target, Units, pattern_period, resolve, stages, units
from moeslim.recipe import Keep, Methods, Stage
from tiny import tiny_config

TENTH, TWENTIETH = Fraction(1, 10), Fraction(1, 20)


def real(layers: int, experts: int, top_k: int) -> Shape:
    return Shape.from_config(
        tiny_config(
            hidden_size=2048,
            num_hidden_layers=layers,
            full_attention_interval=4,
            num_experts=experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
        )
    )


A80, A23 = real(48, 512, 10), Target(layers=36, hidden=1536, experts=256, top_k=8)
B24, B6 = real(28, 256, 8), Target(layers=20, hidden=1280, experts=128)


def seen(found: list[StageTarget]) -> list[tuple[object, ...]]:
    assert all(stage.expert_size == 512 and stage.shared_size == 512 for stage in found)
    return [(s.layers, s.hidden, s.experts, s.top_k, s.token_share) for s in found]


# 48 -> 36 layers: half of 12 is 6; 2048 -> 1536 channels: half of 512 is 256
EXPECTED_80 = {
    "one_shot": [(36, 1536, 256, 8, 1)],
    "depth_first": [(42, 2048, 512, 10, TENTH), (36, 1536, 256, 8, 9 * TENTH)],
    "width_first": [(48, 1792, 512, 10, TENTH), (36, 1536, 256, 8, 9 * TENTH)],
    "joint": [(42, 1792, 512, 10, TENTH), (36, 1536, 256, 8, 9 * TENTH)],
    "depth_first_3": [
        (42, 2048, 512, 10, TWENTIETH),
        (36, 2048, 512, 10, TWENTIETH),
        (36, 1536, 256, 8, 9 * TENTH),
    ],
    "width_first_3": [
        (48, 1792, 512, 10, TWENTIETH),
        (48, 1536, 512, 10, TWENTIETH),
        (36, 1536, 256, 8, 9 * TENTH),
    ],
}
# 28 -> 20 layers: half of 8 is 4; 2048 -> 1280 channels: half of 768 is 384
EXPECTED_24 = {
    "one_shot": [(20, 1280, 128, 8, 1)],
    "depth_first": [(24, 2048, 256, 8, TENTH), (20, 1280, 128, 8, 9 * TENTH)],
    "width_first": [(28, 1664, 256, 8, TENTH), (20, 1280, 128, 8, 9 * TENTH)],
    "joint": [(24, 1664, 256, 8, TENTH), (20, 1280, 128, 8, 9 * TENTH)],
    "depth_first_3": [(24, 2048, 256, 8, TWENTIETH), (20, 2048, 256, 8, TWENTIETH), (20, 1280, 128, 8, 9 * TENTH)],
    "width_first_3": [(28, 1664, 256, 8, TWENTIETH), (28, 1280, 256, 8, TWENTIETH), (20, 1280, 128, 8, 9 * TENTH)],
}


@pytest.mark.parametrize("name", NAMED)
def test_named_schedules_of_the_paper(name: str) -> None:
    assert seen(stages(name, A80, target=A23, unit=Units())) == EXPECTED_80[name]
    assert seen(stages(name, B24, target=B6, unit=Units())) == EXPECTED_24[name]


def test_the_smaller_part_goes_first() -> None:
    # 7 -> 4 layers: 1 then 2. 2048 -> 1088 channels: half of 960 is 480, kept 1568 -> the next multiple of 64 is 1600
    found = stages("joint", real(7, 512, 10), target=Target(layers=4, hidden=1088), unit=Units())
    assert [(s.layers, s.hidden) for s in found] == [(6, 1600), (4, 1088)]
    # in whole periods of 4: half of 12 layers is 6, so 4 and then 8
    found = stages("depth_first", A80, target=A23, unit=Units(layers=4))
    assert [s.layers for s in found] == [44, 36]
    # 512 -> 257 experts in two halves, by a list: half of 255 is 127.5, kept 384.5 -> 385
    halves = [Stage(experts=0.5, tokens=0.5), Stage(experts=0.5, tokens=0.5)]
    assert [s.experts for s in stages(halves, A80, target=Target(experts=257), unit=Units())] == [385, 257]


def test_a_list_of_stages() -> None:
    given = [
        Stage(layers=1.0, expert_size=0.25, tokens=0.1),
        Stage(hidden=1.0, expert_size=0.75, experts=0.5, tokens=0.2),
        Stage(experts=0.5, tokens=0.7),
    ]
    target = Target(layers=36, hidden=1536, experts=256, expert_size=256, shared_size=256, top_k=8)
    found = stages(given, A80, target=target, unit=Units())
    # expert_size 512 -> 256: a quarter of 256 is 64. shared_size and top_k are in no stage, so they move in the last
    assert [(s.layers, s.hidden, s.experts, s.expert_size, s.shared_size, s.top_k) for s in found] == [
        (36, 2048, 512, 448, 512, 10),
        (36, 1536, 384, 256, 512, 10),
        (36, 1536, 256, 256, 256, 8),
    ]
    assert [s.token_share for s in found] == [Fraction(1, 10), Fraction(1, 5), Fraction(7, 10)]


def test_thirds_are_exact() -> None:
    # 0.1 + 0.2 + 0.7 is not 1 in floats; the shares are decimals and their sum is exact
    given = [Stage(layers=0.1, tokens=0.1), Stage(layers=0.2, tokens=0.2), Stage(layers=0.7, tokens=0.7)]
    found = stages(given, real(40, 512, 10), target=Target(layers=30), unit=Units())
    assert [s.layers for s in found] == [39, 37, 30]
    assert sum(s.token_share for s in found) == 1


def test_a_stage_without_a_change_gives_its_tokens_away() -> None:
    (only,) = stages("depth_first", A80, target=Target(hidden=1536), unit=Units())
    assert (only.hidden, only.token_share) == (1536, 1)
    (only,) = stages("joint", A80, target=Target(), unit=Units())
    assert (only.layers, only.hidden, only.token_share) == (48, 2048, 1)
    later = [Stage(layers=1.0, tokens=0.25), Stage(tokens=0.75)]
    (only,) = stages(later, A80, target=Target(layers=36), unit=Units())
    assert (only.layers, only.token_share) == (36, 1)


@pytest.mark.parametrize(
    ("schedule", "target", "message"),
    [
        ("both", A23, "schedule: 'both' is unknown; known are one_shot, depth_first"),
        ([], A23, "empty"),
        ([Stage(layers=0.5, tokens=1.0)], A23, "shares of layers add up to 0.5"),
        ([Stage(layers=1.0, tokens=0.5)], A23, "shares of tokens add up to 0.5"),
        ("one_shot", Target(experts=513), "keep.experts: 513 of 512; keep at least 1 and at most 512"),
    ],
)
def test_what_cannot_be_a_schedule(schedule: object, target: Target, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        stages(schedule, A80, target=target, unit=Units())


def test_percentages_in_counts() -> None:
    keep = Keep(layers="75%", hidden="62.5%", experts="50%", expert_size=300, top_k="80%")
    # 21 of 28 layers are 5.25 periods of 4 -> 20; 62.5 % of 2048 is 1280; a count is taken as it is; 0.8 * 8 = 6.4 -> 6
    found = resolve(B24, keep, methods=Methods())
    assert found == Target(layers=20, hidden=1280, experts=128, expert_size=300, shared_size=512, top_k=6)
    assert resolve(B24, keep, methods=Methods(allow_irregular=True)).layers == 21


def test_units_follow_the_depth_method() -> None:
    assert units(A80, Methods()) == Units(layers=1, hidden=64)
    assert units(A80, Methods(depth="mean_similarity", round_to=128)) == Units(layers=4, hidden=128)
    assert units(A80, Methods(depth="block_influence")) == Units(layers=4)
    assert units(A80, Methods(depth="block_influence", allow_irregular=True)) == Units(layers=1)


def test_period_of_a_pattern_with_a_ragged_end() -> None:
    assert pattern_period(["d", "d", "d", "a"] * 2 + ["d", "d"]) == 4
    assert pattern_period(["d"]) == 1
    assert pattern_period(["d", "d"]) == 1
    assert pattern_period(["d", "a", "a"]) == 3
