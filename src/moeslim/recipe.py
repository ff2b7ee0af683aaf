"""A whole run as data: frozen, strict, checked before anything is read; the words of the YAML files in recipes/.

An unknown key, a doubled key or an impossible value raises RecipeError with its path, its line and what is allowed.
Percentages and counts always say what is **kept**. Paths are relative to the folder where the command is run.
"""

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from moeslim.errors import RecipeError
from moeslim.recipe_text import Lines, explain, override, read_yaml


def _checked_kept(value: object) -> object:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?%", value) and 0 < Decimal(value[:-1]) <= 100:
        return value
    share = f'; for a share write "{value * 100:g}%"' if isinstance(value, float) and 0 < value < 1 else ""
    raise ValueError(f'a kept count is a whole number above 0, or a percentage above 0 and up to "100%"{share}')


Kept = Annotated[int | str | None, BeforeValidator(_checked_kept)]
Fractional = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
_kind = Discriminator(lambda value: "word" if isinstance(value, str) else "given")
Rho = Annotated[Annotated[Literal["auto"], Tag("word")] | Annotated[Fractional, Tag("given")], _kind]
OWN_IMPORTANCE = {"m_smoe": "frequency", "hc_smoe": "frequency", "ream": "ream_saliency"}
"""Operations whose paper decides by which importance they choose and weigh."""


def parse_kept(value: int | str | None, of: int, *, multiple_of: int = 1) -> int:
    """How many of `of` stay: exactly the count given, or the multiple nearest to the percentage (ties keep more).

    `None` keeps all. Computed with fractions, so 29.7% of 1000 is 297 and not 296.99. At least one multiple stays.
    Raises RecipeError for what is no kept count, or for more than there is.
    """
    try:
        _checked_kept(value)
    except ValueError as problem:
        raise RecipeError(f"{value!r}: {problem}") from None
    if value is None:
        return of
    if isinstance(value, int):
        if value > of:
            raise RecipeError(f"keep {value} of {of}: there are only {of}; keep at most {of}")
        return value
    exact = Fraction(value[:-1]) / 100 * of
    nearest = (exact / multiple_of + Fraction(1, 2)) // 1 * multiple_of
    return of if exact == of else min(of, max(multiple_of, nearest))


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)


class Source(_Section):
    """Documents of one domain."""

    path: str
    """Folder or file (.txt .md .rst .py .jsonl .parquet), or the name of a `datasets` dataset."""
    domain: str = "text"
    """What figures are reported by."""
    text_key: str = "text"
    """The column or JSON key that holds the text (`messages` is rendered by the model's chat template)."""
    split: str = "train"
    """Which split of a `datasets` dataset."""


DataSource = Annotated[Annotated[Literal["demo"], Tag("word")] | Annotated[Source, Tag("given")], _kind]


class Data(_Section):
    """Text for training, calibration and measuring; the three never share a document."""

    train: tuple[DataSource, ...] = ("demo",)
    """What distillation reads."""
    calibration: tuple[DataSource, ...] = ("demo",)
    """What the statistics are taken from."""
    heldout: tuple[DataSource, ...] = ("demo",)
    """What everything is measured on."""
    sequence_length: Count = 2048
    """Tokens per row that are predicted (T); a row holds T+1."""


class Calibrate(_Section):
    """How much of the calibration text is observed."""

    sequences: Count = 1024
    """Rows of `data.sequence_length` tokens."""
    rows_per_batch: Count = 4
    """Rows that go through a layer at once; memory, not results beyond rounding."""
    removal: bool = False
    """Also learn what each expert's removal changes; on by itself where `methods.experts` is removal."""


class Keep(_Section):
    """What the final model has: "75%" or a count of what is kept; left out means all."""

    layers: Kept = None
    """Decoder layers."""
    hidden: Kept = None
    """Channels of the residual stream (hidden_size)."""
    experts: Kept = None
    """Routed experts per layer, the MTP block included."""
    expert_size: Kept = None
    """Neurons of each routed expert."""
    shared_size: Kept = None
    """Neurons of the shared expert."""
    top_k: Kept = None
    """Experts that each token is sent to."""


class Methods(_Section):
    """How it is decided what stays."""

    depth: Literal["last", "mean_similarity", "block_influence"] = "last"
    """Which layers go: the last ones; the most similar contiguous ones; those of least block influence."""
    allow_irregular: bool = False
    """Let the hybrid pattern of attention and DeltaNet layers break (SGLang cannot load that)."""
    width: Literal["mean_abs", "minitron"] = "mean_abs"
    """Score of a hidden channel: mean |normed activation|, or the mean over tokens and L2 over sequences."""
    rescale: Literal["measured", "assume_zero", "none"] = "measured"
    """Correction of the norms for the channels that are gone."""
    round_to: Count = 64
    """Percentages of hidden channels and neurons are rounded to a multiple of this."""
    experts: Literal["frequency", "soft_logits", "reap", "ean", "router_blind", "removal", "random"] = "reap"
    """Importance of a routed expert (high = keep); m_smoe, hc_smoe and ream have one of their own."""
    expert_op: Literal["drop", "merge", "partial", "partial_pairs", "m_smoe", "hc_smoe", "ream"] = "drop"
    """What happens to the experts that are not kept: dropped, or merged into kept ones."""
    similarity: Literal["auto", "logits", "router", "outputs"] = "auto"
    """Which kept expert a merged one joins: router logits, router rows, mean outputs; auto is the operation's own."""
    rho: Rho = 0.5
    """partial: share of the kept experts that take none in, exactly as written; auto tries some on held-out rows."""
    align: Literal["auto", "none", "weights", "activations"] = "auto"
    """Whether neurons are matched before experts are averaged, and by what; auto is the operation's own."""
    sequential: bool | None = None
    """Calibrate each layer behind the layers that are cut already; left out means for ream only."""
    calibrate_router: bool = False
    """Train the kept router rows of each cut layer to give the uncut layer's output; kept where they do better."""
    protect: dict[str, tuple[int, ...]] = {}
    """Layer key ("0", "mtp.0") -> expert ids that stay in any case."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        op = self.expert_op
        if op == "drop" and (self.similarity, self.align) not in {("auto", "auto"), ("auto", "none")}:
            raise ValueError("drop merges nothing, so it takes no similarity and no align; leave them out, or merge")
        if op in ("hc_smoe", "ream") and self.similarity != "auto":
            raise ValueError(f"{op} has a similarity of its own; leave similarity out")
        if op not in ("partial", "partial_pairs") and self.rho != 0.5:
            raise ValueError(f"{op} has no rho; leave it out, or use partial or partial_pairs")
        if op in OWN_IMPORTANCE and self.experts not in {"reap", OWN_IMPORTANCE[op]}:
            raise ValueError(f"{op} has an importance of its own ({OWN_IMPORTANCE[op]}); leave experts out")
        return self


class Stage(_Section):
    """One stage of a schedule: which share of each axis' total change it makes, and its share of the tokens."""

    layers: Fractional = 0.0
    """Share of the layers to go."""
    hidden: Fractional = 0.0
    """Share of the hidden channels to go."""
    experts: Fractional = 0.0
    """Share of the routed experts to go."""
    expert_size: Fractional = 0.0
    """Share of the routed experts' neurons to go."""
    shared_size: Fractional = 0.0
    """Share of the shared expert's neurons to go."""
    top_k: Fractional = 0.0
    """Share of the change of top-k."""
    tokens: Fractional
    """Share of `distill.tokens`."""


ScheduleName = Literal["one_shot", "depth_first", "width_first", "joint", "depth_first_3", "width_first_3"]
_Stages = Annotated[tuple[Stage, ...], Tag("given")]
Schedule = Annotated[Annotated[ScheduleName, Tag("word")] | _Stages, _kind]


Part = Literal["embedding", "head", "norm", "attention", "deltanet", "router", "shared", "experts", "dense", "mtp"]
"""What a tensor belongs to: its kind in the trunk, or the MTP head with all that is in it. A tied head is embedding."""


class PartSettings(_Section):
    """What the training of one part does otherwise than that of the rest."""

    learning_rate: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the scheduled learning rate; 0 freezes the part."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """AdamW's on the part's matrices; left out means `distill.weight_decay`."""


class Distill(_Section):
    """Training after each cut: L = (1-lam) LM + lam KD + beta [(1-lam) MTP-LM + lam MTP-KD] + alpha balance."""

    tokens: Annotated[int, Field(ge=0)] = 10_000_000
    """Predicted tokens over all stages; 0 trains nothing."""
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
    """Attention of the MTP block in training: states of one depth, or what an engine sees while drafting."""
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
    """Write a state while the training goes on; left out means on a GPU."""
    measure_every: Annotated[int, Field(ge=0)] = 0
    """Steps between measurements of bits per byte on held-out text; 0 never measures."""
    measure_rows: Count = 32
    """Held-out rows that are measured each time."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """Saved states of fewest measured bits per byte that stay beside the newest."""
    final: Literal["last", "best"] = "last"
    """Which state becomes the model: the last, or the one of fewest bits per byte."""
    watch: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Trackers that are told every step, beside curve.jsonl; each has to be installed."""
    spike: Annotated[float, Field(ge=0)] = 6.0
    """A loss this many standard deviations above the mean of the last 50 steps is reported; 0 never."""
    lm_only: bool = False
    """Train without a teacher (lam = 0; none is loaded)."""
    teacher_cache: str | None = None
    """A folder from `moeslim cache-teacher`, whose word takes the place of a running teacher's."""

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


class Evaluate(_Section):
    """How much is measured; standard errors shrink with it."""

    documents_per_domain: Count = 64
    """Held-out documents for bits per byte, KL and top-1 agreement."""
    stride: Count | None = None
    """Tokens between windows of `data.sequence_length`; left out means windows that do not overlap."""
    prompts: Annotated[int, Field(ge=0)] = 64
    """Held-out prompts per domain for the drafting acceptance; 0 leaves it out."""
    prompt_tokens: Count = 64
    """Tokens of each prompt."""
    new_tokens: Count = 64
    """Tokens generated greedily after each prompt."""
    samples: Annotated[int, Field(ge=0)] = 3
    """Prompts per domain whose continuations are shown side by side."""
    speed_prompt_tokens: Count = 512
    """Tokens of the timed prefill."""
    speed_new_tokens: Count = 64
    """Tokens of the timed decoding."""
    speed_repeats: Annotated[int, Field(ge=0)] = 5
    """Timed repetitions, after one that is not counted; 0 times nothing."""


class Recipe(_Section):
    """A run: which model, on which text, to which size, by which methods, trained and measured how."""

    model: str
    """Folder or hub name of the model to make smaller; `demo` is the bundled one."""
    revision: str | None = None
    """Hub commit, tag or branch of `model`."""
    teacher: str | None = None
    """Folder or hub name of the teacher; left out means `model`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Which calibration rows are seen, the order of training, random importance and init; not what is measured."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of training and calibration; sums and moments are never below float32."""
    device: str = "auto"
    """`auto` takes a GPU where there is one; else a torch device."""
    data: Data = Data()
    calibrate: Calibrate = Calibrate()
    keep: Keep = Keep()
    methods: Methods = Methods()
    schedule: Schedule = "one_shot"
    """In which stages the cut is made: a name, or a list of stages."""
    distill: Distill = Distill()
    evaluate: Evaluate = Evaluate()
    compare_random_init: bool = False
    """Also train a random-init model of the final shape with the same losses on the same tokens."""

    @model_validator(mode="after")
    def _shares_add_up(self) -> Self:
        if isinstance(self.schedule, str):
            return self
        for axis in ("tokens", *Keep.model_fields):
            total = sum((Fraction(str(getattr(stage, axis))) for stage in self.schedule), Fraction(0))
            if total != 1 and (axis == "tokens" or total):
                raise ValueError(f"the stages' shares of {axis} add up to {float(total):g}; they must add up to 1")
        return self

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> Self:
        """The recipe in a YAML file after `overrides` ("distill.tokens=1000", "data.train.0.path=x"), checked."""
        values, lines = read_yaml(path)
        return cls.parse(values, overrides, where=str(path), lines=lines)

    @classmethod
    def parse(
        cls, values: object, overrides: Sequence[str] = (), *, where: str = "recipe", lines: Lines | None = None
    ) -> Self:
        """The recipe in a nested dictionary (left untouched) after `overrides`; `lines` places keys in messages."""
        if not isinstance(values, dict):
            raise RecipeError(f"{where}: a recipe is a mapping that has at least `model: ...`")
        tree = json.loads(json.dumps(values, default=str))  # a copy, with the keys as text
        changed = [override(tree, text) for text in overrides]
        try:
            return cls.model_validate_json(json.dumps(tree))
        except ValidationError as problem:
            errors = problem.errors()
            found = [explain(tree, error, model=cls, lines=lines or {}, changed=changed) for error in errors]
            raise RecipeError("\n".join(f"{where}: {message}" for message in found)) from None

    def dump(self) -> dict[str, Any]:
        """Every key with its value, as JSON can say it; `Recipe.parse` of it gives an equal recipe."""
        return self.model_dump(mode="json")
