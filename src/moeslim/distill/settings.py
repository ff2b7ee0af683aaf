"""What a training is told: its own section of a recipe, checked, and its place in a run of several stages."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moeslim.distill.schedules import cosine, linear, rewarm, warmup_cosine
from moeslim.errors import MoeslimError, RecipeError
from moeslim.losses import LossWeights
from moeslim.recipe import Distill


@dataclass(frozen=True)
class TrainSettings:
    """One training's settings; `tokens` counts targets of this stage, rates and weights run over the whole run.

    precision: "float32", or "bfloat16" = autocast over fp32 master weights and fp32 moments (weights kept in bf16
    would lose updates smaller than 1/256 of themselves, which is most of them at the end of a cosine).
    """

    tokens: int
    rows_per_step: int = 16
    micro_rows: int = 16
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup: float = 0.05
    """Share of the whole run, at most 2000 steps."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    lam_start: float = 1.0
    lam_end: float = 0.75
    beta_start: float = 0.3
    beta_end: float = 0.1
    alpha: float = 1e-3
    temperature: float = 1.0
    depths: int = 1
    detach_trunk: bool = False
    mtp_train: Literal["parallel", "serving"] = "parallel"
    precision: Literal["float32", "bfloat16"] = "float32"
    lm_only: bool = False
    seed: int = 0
    save_every: int = 200
    keep_last: int = 2
    device: str = "cpu"

    @classmethod
    def of(cls, section: Distill, *, tokens: int, **rest: Any) -> "TrainSettings":
        """A recipe's section for a stage of `tokens` targets; `rest` is seed, precision and device."""
        values = section.model_dump(exclude={"tokens", "optimizer_state", "teacher_cache"})
        return cls(tokens=tokens, **values, **rest)

    def check(self) -> None:
        """Raise RecipeError (MoeslimError for what is not built) before anything expensive begins."""
        if self.mtp_train == "serving":
            raise MoeslimError('mtp_train: "serving" is not built yet; use "parallel"')
        if self.rows_per_step < 1 or self.micro_rows < 1 or self.rows_per_step % self.micro_rows:
            raise RecipeError(
                f"distill.rows_per_step is {self.rows_per_step}, micro_rows {self.micro_rows}; "
                "rows_per_step must be a positive multiple of micro_rows"
            )
        if self.tokens < 1:
            raise RecipeError(f"distill.tokens is {self.tokens}; give at least one step's tokens")
        if not 0 <= self.warmup < 1:
            raise RecipeError(f"distill.warmup is {self.warmup}; it is a share of the run, 0 <= warmup < 1")

    def facts(self) -> dict[str, Any]:
        """What decides the result (for the fingerprint): all but the frequency of saving and the device."""
        return {k: v for k, v in asdict(self).items() if k not in ("save_every", "keep_last", "device")}


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
    """The loss weights at `progress` of the run: lam linear, beta cosine; lam 0 without a teacher."""
    lam = 0.0 if settings.lm_only else linear(progress, start=settings.lam_start, end=settings.lam_end)
    beta = cosine(progress, start=settings.beta_start, end=settings.beta_end)
    return LossWeights(lam=lam, beta=beta, alpha=settings.alpha, temperature=settings.temperature)


def learning_rate_at(settings: TrainSettings, stage: Stage, *, step: int, steps: int) -> float:
    """The rate of `step` (1..steps of the stage): warm-up, cosine over all stages, re-warmed if the stage says so."""
    run_steps = steps / max(stage.end - stage.start, 1e-9)
    warmup = min(settings.warmup, 2000 / run_steps)
    progress = stage.progress(step / steps)
    peak, end = settings.learning_rate, settings.min_learning_rate
    rate = warmup_cosine(progress, peak=peak, end=end, warmup=warmup)
    return rate * rewarm(step, steps) if stage.rewarm else rate
