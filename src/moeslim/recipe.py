"""A whole run as data: frozen, strict, checked before anything is read; the words of the YAML files in recipes/.

An unknown key, a doubled key or an impossible value raises RecipeError with its path, its line and what is allowed.
Percentages and counts always say what is **kept**. Paths are relative to the folder where the command is run.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import ErrorDetails

from moeslim.errors import RecipeError

_Path = tuple[str | int, ...]
_Lines = Mapping[_Path, int]


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


_kind = Discriminator(lambda value: "word" if isinstance(value, str) else "given")
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
    experts: Literal["frequency", "soft_logits", "reap", "ean", "router_blind", "random"] = "reap"
    """Importance of a routed expert (high = keep)."""
    expert_op: Literal["drop"] = "drop"
    """What happens to the experts that are not kept."""
    protect: dict[str, tuple[int, ...]] = {}
    """Layer key ("0", "mtp.0") -> expert ids that stay in any case."""


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


class Distill(_Section):
    """Training after each cut: L = (1-lam) LM + lam KD + beta [(1-lam) MTP-LM + lam MTP-KD] + alpha balance."""

    tokens: Annotated[int, Field(ge=0)] = 10_000_000
    """Predicted tokens over all stages; 0 trains nothing."""
    rows_per_step: Count = 16
    """Rows per optimizer step, over all devices."""
    micro_rows: Count = 4
    """Rows per forward and backward; the gradient of a step is the sum of rows_per_step / micro_rows of them."""
    learning_rate: Annotated[float, Field(gt=0)] = 4e-4
    """Peak of the cosine."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 3e-5
    """End of the cosine."""
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
    """Weight of the teacher at the last step; linear between."""
    beta_start: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the MTP terms at the first step."""
    beta_end: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the MTP terms at the last step; a cosine between."""
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
    optimizer_state: Literal["slice", "reset"] = "slice"
    """What a cut does to the optimizer's moments; reset warms up again over 1 % of the stage."""
    save_every: Count = 200
    """Steps between saved states."""
    keep_last: Count = 2
    """Saved states that stay."""
    lm_only: bool = False
    """Train without a teacher (lam = 0; none is loaded)."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.rows_per_step % self.micro_rows:
            raise ValueError(f"micro_rows {self.micro_rows} must divide rows_per_step {self.rows_per_step}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
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
    """Of everything random: order of the data, random importance, random init."""
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
        lines: dict[_Path, int] = {}
        try:
            text = Path(path).read_text(encoding="utf-8")
            lines.update(_lines(yaml.compose(text, Loader=_Loader), ()))
            values = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecipeError) as problem:
            raise RecipeError(f"{path}: cannot be read as a YAML recipe: {problem}") from None
        return cls.parse(values, overrides, where=str(path), lines=lines)

    @classmethod
    def parse(
        cls, values: object, overrides: Sequence[str] = (), *, where: str = "recipe", lines: _Lines | None = None
    ) -> Self:
        """The recipe in a nested dictionary (left untouched) after `overrides`; `lines` places keys in messages."""
        if not isinstance(values, dict):
            raise RecipeError(f"{where}: a recipe is a mapping that has at least `model: ...`")
        tree = json.loads(json.dumps(values, default=str))  # a copy, with the keys as text
        changed = [_override(tree, override) for override in overrides]
        try:
            return cls.model_validate_json(json.dumps(tree))
        except ValidationError as problem:
            found = [_message(tree, error, lines=lines or {}, changed=changed) for error in problem.errors()]
            raise RecipeError("\n".join(f"{where}: {message}" for message in found)) from None

    def dump(self) -> dict[str, Any]:
        """Every key with its value, as JSON can say it; `Recipe.parse` of it gives an equal recipe."""
        return self.model_dump(mode="json")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 4e-4 is a number and 1e6 a whole one, as everybody expects."""


_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("!exponent", _EXPONENT, list("-+0123456789"))
_Loader.add_constructor("!exponent", lambda _, node: int(x) if (x := float(node.value)).is_integer() else x)


def _lines(node: yaml.Node | None, place: _Path) -> Iterator[tuple[_Path, int]]:
    """(path, line) of everything below `node`; RecipeError for a key that is given twice."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise RecipeError(f"line {line}: the key {key.value} stands in line {seen[key.value]} already")
            seen[key.value] = line
            yield (*place, key.value), line
            yield from _lines(value, (*place, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*place, index), value.start_mark.line + 1
            yield from _lines(value, (*place, index))


def _override(tree: dict[str, Any], override: str) -> _Path:
    """Put one "a.b=c" into `tree`; returns its path."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or "" in parts:
        raise RecipeError(f"--set {override}: write it like distill.tokens=1000000")
    path: list[str | int] = []
    here: Any = tree
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
        for depth, part in enumerate(parts):
            path.append(int(part) if isinstance(here, list) else part)
            if depth == len(parts) - 1:
                here[path[-1]] = value
            else:
                here = here.setdefault(part, {}) if isinstance(here, dict) else here[path[-1]]
    except (ValueError, IndexError, TypeError, yaml.YAMLError):
        raise RecipeError(f"--set {override}: there is no place of this name, or its value is not YAML") from None
    return tuple(path)


def _message(tree: dict[str, Any], error: ErrorDetails, *, lines: _Lines, changed: list[_Path]) -> str:
    """One of pydantic's findings as `line 7: distill.tokenz: ...`, with the nearest key for an unknown one."""
    path: list[str | int] = []
    here: Any = tree
    for part in error["loc"]:  # pydantic also names the branches of unions there; those are no keys
        if (isinstance(here, dict) and part in here) or (isinstance(here, list) and isinstance(part, int)):
            here = here[part]  # type: ignore[index]  # checked one line above for either kind
            path.append(part)
    if error["type"] == "missing":
        path.append(error["loc"][-1])
        text = "is missing"
    elif error["type"] == "extra_forbidden":
        text = "is no known key" + _suggestion(path)
    else:
        text = f"{error['msg'].removeprefix('Value error, ')}; found {json.dumps(here)[:80]}"
    above = [tuple(path[:length]) for length in range(len(path), 0, -1)]
    line = next((f"line {lines[place]}: " for place in above if place in lines), "")
    return f"{'--set ' if any(key in above for key in changed) else line}{'.'.join(map(str, path)) or 'recipe'}: {text}"


def _suggestion(path: list[str | int]) -> str:
    """What may have been meant by the unknown key at the end of `path`: a key beside it, or one of another section."""
    section: type[_Section] = Recipe
    for part in path[:-1]:
        if part in section.model_fields:
            section = (*_sections(section.model_fields[str(part)].annotation), section)[0]
    wanted = str(path[-1])
    if near := difflib.get_close_matches(wanted, section.model_fields, n=1):
        return f"; did you mean {near[0]}?"
    for name, field in Recipe.model_fields.items():
        if any(wanted in inner.model_fields for inner in _sections(field.annotation)):
            return f"; did you mean {name}.{wanted}?"
    return f"; allowed are {', '.join(section.model_fields)}"


def _sections(annotation: Any) -> list[type[_Section]]:
    own = [annotation] if isinstance(annotation, type) and issubclass(annotation, _Section) else []
    return own + [section for inner in get_args(annotation) for section in _sections(inner)]
