"""What a training is told: its own section of a recipe, checked, and its place in a run of several stages."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from moeslim.distill.schedules import SCHEDULES, learning_rate, rewarm
from moeslim.errors import RecipeError
from moeslim.losses import LossWeights
from moeslim.recipe import Distill, Part, PartSettings

FREE = (
    *("save_every", "keep_last", "keep_best", "async_save", "measure_every", "measure_rows", "watch", "spike"),
    *("micro_rows", "activation_checkpointing", "shard_over", "device"),
)
"""Settings that may change when a training goes on: how it runs and what is kept and told, but not what is learnt."""


@dataclass(frozen=True)
class TrainSettings:
    """One training's settings; `tokens` counts targets of this stage, rates and weights run over the whole run.

    What they mean is said in recipe.Distill. precision: "float32", or "bfloat16" = computing in bf16 over fp32 master
    weights and fp32 moments (weights kept in bf16 would lose updates smaller than 1/256 of themselves, which is most of
    them at the end of a cosine).
    """

    tokens: int
    rows_per_step: int = 16
    micro_rows: int = 16
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    learning_rate_schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: float = 0.05
    """Share of the whole run, at most 2000 steps."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    lam_start: float = 1.0
    lam_end: float = 0.75
    lam_schedule: Literal["linear", "cosine", "constant"] = "linear"
    beta_start: float = 0.3
    beta_end: float = 0.1
    beta_schedule: Literal["linear", "cosine", "constant"] = "cosine"
    alpha: float = 1e-3
    temperature: float = 1.0
    depths: int = 1
    detach_trunk: bool = False
    mtp_train: Literal["parallel", "serving"] = "parallel"
    train_only: tuple[Part, ...] = ()
    parts: Mapping[Part, PartSettings] = field(default_factory=dict)
    precision: Literal["float32", "bfloat16"] = "float32"
    lm_only: bool = False
    seed: int = 0
    activation_checkpointing: bool = False
    shard_over: int | None = None
    save_every: int = 200
    keep_last: int = 2
    async_save: bool | None = None
    measure_every: int = 0
    measure_rows: int = 32
    keep_best: int = 1
    final: Literal["last", "best"] = "last"
    watch: tuple[str, ...] = ()
    spike: float = 6.0
    device: str = "cpu"

    @classmethod
    def of(cls, section: Distill, *, tokens: int, **rest: Any) -> "TrainSettings":
        """A recipe's section for a stage of `tokens` targets; `rest` is seed, precision and device."""
        others = {"tokens", "optimizer_state", "teacher_cache"}
        values = {name: getattr(section, name) for name in Distill.model_fields if name not in others}
        return cls(tokens=tokens, **values, **rest)

    def check(self, *, ranks: int = 1) -> None:
        """Raise RecipeError before anything expensive begins; `ranks` processes train together."""
        if self.rows_per_step < 1 or self.micro_rows < 1 or self.rows_per_step % (ranks * self.micro_rows):
            processes = f" and there are {ranks} processes" if ranks > 1 else ""
            times = f"{ranks} x {self.micro_rows} = {ranks * self.micro_rows}" if ranks > 1 else "micro_rows"
            raise RecipeError(
                f"distill.rows_per_step is {self.rows_per_step}, micro_rows {self.micro_rows}{processes}; "
                f"rows_per_step must be a positive multiple of {times}"
            )
        if self.shard_over is not None and ranks % min(self.shard_over, ranks):
            raise RecipeError(
                f"distill.shard_over is {self.shard_over}, and {ranks} processes cannot be parted into groups of that "
                "size; give a divisor of their number, or leave it out for those of one machine"
            )
        if self.tokens < 1:
            raise RecipeError(f"distill.tokens is {self.tokens}; give at least one step's tokens")
        if not 0 <= self.warmup < 1:
            raise RecipeError(f"distill.warmup is {self.warmup}; it is a share of the run, 0 <= warmup < 1")

    def facts(self) -> dict[str, Any]:
        """What decides the result, as JSON can say it (for the fingerprint): all but what is FREE to change.

        The best state is the best on certain rows, so with `final: best` these are not free.
        """
        bound = {"measure_rows"} if self.final == "best" else set()
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in FREE or f.name in bound}
        values["parts"] = {part: own.model_dump() for part, own in self.parts.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed between two trainings' `facts`, as "learning_rate: 0.0004 -> 0.001"."""
    found = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{name}.{line}" for line in differences(old, new)]
        elif old != new:
            found.append(f"{name}: {_said(old)} -> {_said(new)}")
    return found


def _said(value: object) -> str:
    """A value as a recipe writes it."""
    if value is None:
        return "left out"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_said(own)}" for name, own in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_said, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


MAY_CHANGE = f"free to change are {', '.join(FREE[:-1])}, {FREE[-1]} and the number of processes"
"""Half a sentence for the message that refuses to go on with other settings."""


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
    return max(1, round(settings.tokens / (settings.rows_per_step * tokens_per_row)))


def weights_at(settings: TrainSettings, progress: float) -> LossWeights:
    """The loss weights at `progress` of the run, by their schedules; lam is 0 without a teacher."""
    lam = SCHEDULES[settings.lam_schedule](progress, start=settings.lam_start, end=settings.lam_end)
    beta = SCHEDULES[settings.beta_schedule](progress, start=settings.beta_start, end=settings.beta_end)
    lam = 0.0 if settings.lm_only else lam
    return LossWeights(lam=lam, beta=beta, alpha=settings.alpha, temperature=settings.temperature)


def learning_rate_at(settings: TrainSettings, stage: Stage, *, step: int, steps: int) -> float:
    """The rate of `step` (1..steps of the stage): one schedule over all stages, re-warmed if the stage says so.

    Its value at the step's end, so that the first step has a rate above 0 and the last one the schedule's last.
    """
    run_steps = steps / max(stage.end - stage.start, 1e-9)
    rate = learning_rate(
        stage.progress(step / steps),
        schedule=settings.learning_rate_schedule,
        peak=settings.learning_rate,
        end=settings.min_learning_rate,
        warmup=min(settings.warmup, 2000 / run_steps),
    )
    return rate * rewarm(step, steps) if stage.rewarm else rate
