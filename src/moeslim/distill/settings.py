"""The settings of a training: its own section of a recipe, checked, and its place in a run of several stages."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

from moeslim.distill.schedules import SCHEDULES, learning_rate, rewarm
from moeslim.errors import RecipeError
from moeslim.losses import LossWeights
from moeslim.recipe import Distill

FREE = (
    *("save_every", "keep_last", "keep_best", "async_save", "measure_every", "measure_rows", "watch", "spike"),
    *("micro_rows", "activation_checkpointing", "shard_over", "device"),
)
"""Settings that may change when a training resumes: how it runs and what is kept and logged, but not what is learnt."""
ELSEWHERE = ("optimizer_state", "teacher_cache")
"""Settings of the section that decide which moments and which teacher a training is given, whose fingerprints count."""

_LAST = ("precision", "lm_only", "seed", "measure_rows", "final")
"""What the facts end with; a state's fingerprint is of its bytes, so their order is part of it."""


@dataclass(frozen=True)
class TrainSettings:
    """One training: its section of a recipe, and what its place in a run adds.

    `tokens` counts targets of this stage (`distill.tokens` those of all); rates and weights run over the whole run.
    precision: "float32", or "bfloat16" = computing in bf16 over fp32 master weights and fp32 moments (weights kept in
    bf16 would lose updates smaller than 1/256 of themselves, which is most of them at the end of a cosine).
    """

    distill: Distill
    _: KW_ONLY
    tokens: int
    seed: int
    precision: Literal["float32", "bfloat16"]
    device: str

    def check(self, *, ranks: int = 1) -> None:
        """Raise RecipeError before anything expensive begins; `ranks` processes train together."""
        rows, micro_rows, shard_over = self.distill.rows_per_step, self.distill.micro_rows, self.distill.shard_over
        if rows % (ranks * micro_rows):  # of one process the section has seen to it
            raise RecipeError(
                f"distill.rows_per_step is {rows}, micro_rows {micro_rows} and there are {ranks} processes; "
                f"rows_per_step must be a positive multiple of {ranks} x {micro_rows} = {ranks * micro_rows}"
            )
        if shard_over is not None and ranks % min(shard_over, ranks):
            raise RecipeError(
                f"distill.shard_over is {shard_over}, and {ranks} processes cannot be parted into groups of that "
                "size; give a divisor of their number, or leave it out for those of one machine"
            )
        if self.tokens < 1:
            raise RecipeError(f"distill.tokens is {self.tokens}; give at least one step's tokens")

    def facts(self) -> dict[str, Any]:
        """What decides the result, as JSON can say it (for the fingerprint): all but what is FREE to change.

        The best state is the best on certain rows, so with `final: best` these are not free.
        """
        free = {*FREE, *ELSEWHERE} - ({"measure_rows"} if self.distill.final == "best" else set())
        facts = self.distill.model_dump(mode="json", exclude=free)
        facts |= {"tokens": self.tokens, "precision": self.precision, "seed": self.seed}
        return dict(sorted(facts.items(), key=lambda fact: _LAST.index(fact[0]) if fact[0] in _LAST else -1))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed between two trainings' `facts`, as "learning_rate: 0.0004 -> 0.001"."""
    found = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{name}.{line}" for line in differences(old, new)]
        elif old != new:
            found.append(f"{name}: {_format_value(old)} -> {_format_value(new)}")
    return found


def _format_value(value: object) -> str:
    """A value as a recipe writes it."""
    if value is None:
        return "left out"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_format_value(own)}" for name, own in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_format_value, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


MAY_CHANGE = f"free to change are {', '.join(FREE[:-1])}, {FREE[-1]} and the number of processes"
"""Half a sentence for the message that refuses to resume with other settings."""


@dataclass(frozen=True)
class Stage:
    """One training's place in a run: the shares of the run's tokens at its start and end, and what it starts from."""

    fingerprint: str
    start: float = 0.0
    end: float = 1.0
    moments: Path | None = None
    """A state folder whose moments fit the student (sliced by the stage's plan); None: empty moments."""
    rewarm: bool = False
    """Climb to the scheduled learning rate over the first 1 % of the stage (empty moments in mid-run)."""

    def progress(self, share_done: float) -> float:
        """Progress of the whole run when `share_done` of this stage is done."""
        return self.start + (self.end - self.start) * share_done


def num_steps(settings: TrainSettings, tokens_per_row: int) -> int:
    """Whole steps in the stage's token budget, at least one."""
    return max(1, round(settings.tokens / (settings.distill.rows_per_step * tokens_per_row)))


def weights_at(settings: TrainSettings, progress: float) -> LossWeights:
    """The loss weights at `progress` of the run, by their schedules; lam is 0 without a teacher."""
    section = settings.distill
    lam = SCHEDULES[section.lam_schedule](progress, start=section.lam_start, end=section.lam_end)
    beta = SCHEDULES[section.beta_schedule](progress, start=section.beta_start, end=section.beta_end)
    lam = 0.0 if section.lm_only else lam
    return LossWeights(lam=lam, beta=beta, alpha=section.alpha, temperature=section.temperature)


def learning_rate_at(settings: TrainSettings, stage: Stage, *, step: int, steps: int) -> float:
    """The rate of `step` (1..steps of the stage): one schedule over all stages, re-warmed if the stage says so.

    Its value at the step's end, so that the first step has a rate above 0 and the last one the schedule's last.
    """
    section, run_steps = settings.distill, steps / max(stage.end - stage.start, 1e-9)
    rate = learning_rate(
        stage.progress(step / steps),
        schedule=section.learning_rate_schedule,
        peak=section.learning_rate,
        end=section.min_learning_rate,
        warmup=min(section.warmup, 2000 / run_steps),
    )
    return rate * rewarm(step, steps) if stage.rewarm else rate
