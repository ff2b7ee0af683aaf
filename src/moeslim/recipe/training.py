"""The recipe's section on training."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moeslim.recipe.sections import Count, Fractional, HomePath, Section, Tokens

_Mixer = Literal["attention", "mla", "deltanet", "mamba", "conv"]
Part = Literal["embedding", "head", "norm", _Mixer, "router", "shared", "experts", "dense", "mtp"]
"""What a tensor belongs to: its kind in the trunk, or the MTP head with all that is in it. A tied head is embedding."""


class PartSettings(Section):
    """What the training of one part does otherwise than that of the rest."""

    learning_rate: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the scheduled learning rate; 0 freezes the part."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """AdamW's on the part's matrices; left out means `distill.weight_decay`."""


class Distill(Section):
    """Training after each cut: L = (1-lam) LM + lam KD + beta [(1-lam) MTP-LM + lam MTP-KD] + alpha balance."""

    tokens: Tokens = 10_000_000
    """Predicted tokens over all stages, such as 120B; 0 trains nothing."""
    rows_per_step: Count = 16
    """Rows per optimizer step, over all processes; a multiple of micro_rows times their number."""
    micro_rows: Count = 4
    """Rows per forward and backward of one process; a step's gradient is the sum over all of them."""
    learning_rate: Annotated[float, Field(gt=0)] = 4e-4
    """Peak, reached at the end of the warm-up."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 3e-5
    """The rate at the last step (not with `constant`)."""
    learning_rate_schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After the warm-up; wsd stays at the peak and falls linearly over the last 20 % of the run."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of all steps, over all stages, that the linear warm-up takes; at most 2000 steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """AdamW's, on matrices only."""
    betas: tuple[Fractional, Fractional] = (0.9, 0.95)
    """AdamW's."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest L2 norm of a step's gradient."""
    lam_start: Fractional = 1.0
    """Weight of the teacher at the first step."""
    lam_end: Fractional = 0.75
    """Weight of the teacher at the last step."""
    lam_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """From lam_start to lam_end over all stages; constant stays at lam_start."""
    beta_start: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the MTP terms at the first step."""
    beta_end: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the MTP terms at the last step."""
    beta_schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """From beta_start to beta_end over all stages; constant stays at beta_start."""
    alpha: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the balance term."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """tau of the distillation terms."""
    depths: Count = 1
    """MTP depths that are trained."""
    detach_trunk: bool = False
    """Keep the MTP terms' gradient out of trunk, embedding and head."""
    mtp_train: Literal["parallel", "serving"] = "parallel"
    """What the MTP block attends to from depth 2 on: states of its own depth, or what an engine sees while drafting."""
    train_only: tuple[Part, ...] = ()
    """Only these parts are trained and the others stay as they are, bit by bit; empty trains all."""
    parts: dict[Part, PartSettings] = {}
    """Learning rate and weight decay of single parts."""
    optimizer_state: Literal["slice", "reset"] = "slice"
    """What a cut does to the optimizer's moments; reset warms up again over 1 % of the stage."""
    activation_checkpointing: bool = False
    """Keep each layer's input only and compute the rest again in the backward pass: less memory, a third more work."""
    shard_over: Count | None = None
    """Processes that share one copy of weights, gradients and moments; left out means those of one machine."""
    save_every: Count = 200
    """Steps between saved states."""
    keep_last: Count = 2
    """Newest saved states that stay."""
    async_save: bool | None = None
    """Write a state while the training continues; left out means on a GPU."""
    measure_every: Annotated[int, Field(ge=0)] = 0
    """Steps between measurements of bits per byte on held-out text; 0 never measures."""
    measure_rows: Count = 32
    """Held-out rows that are measured each time."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """Saved states of fewest measured bits per byte that stay beside the newest."""
    final: Literal["last", "best"] = "last"
    """Which state becomes the model: the last, or the one of fewest bits per byte."""
    watch: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Trackers that get every step, beside curve.jsonl; each has to be installed."""
    spike: Annotated[float, Field(ge=0)] = 6.0
    """A loss this many standard deviations above the mean of the last 50 steps is reported; 0 never."""
    lm_only: bool = False
    """Train without a teacher (lam = 0; none is loaded)."""
    teacher_cache: HomePath | None = None
    """A folder from `moeslim cache-teacher`, whose probabilities replace a running teacher's."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.rows_per_step % self.micro_rows:
            raise ValueError(f"micro_rows {self.micro_rows} must divide rows_per_step {self.rows_per_step}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        if self.teacher_cache is not None and self.lm_only:
            raise ValueError("lm_only trains without a teacher, so it takes no teacher_cache; leave one of them out")
        if self.teacher_cache is not None and self.temperature != 1.0:
            raise ValueError(
                f"temperature {self.temperature:g} needs all of a teacher's probabilities, and a teacher_cache keeps "
                "the largest and the mass of the rest; set it to 1, or train with the teacher itself"
            )
        if self.final == "best" and not (self.measure_every and self.keep_best):
            raise ValueError(
                "final: best needs measure_every and keep_best of at least 1; set them, or leave final out"
            )
        if self.keep_best > 1 and not self.measure_every:
            raise ValueError(f"keep_best {self.keep_best} needs measurements; set measure_every, or leave it out")
        if self.train_only and (frozen := sorted(set(self.parts) - set(self.train_only))):
            raise ValueError(f"parts.{frozen[0]} is not among train_only, so it is not trained; leave one of them out")
        return self
