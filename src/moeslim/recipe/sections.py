"""Sections of a recipe, but for training's (training.py): text, calibration, what is kept and how, what is measured."""

import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from moeslim.errors import RecipeError


def _checked_kept(value: object) -> object:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?%", value) and 0 < Decimal(value[:-1]) <= 100:
        return value
    share = _meant_share(value)
    hint = f'; for a share write "{share:g}%"' if share is not None and 0 < share <= 100 else ""
    raise ValueError(f'a kept count is a whole number above 0, or a percentage above 0 and up to "100%"{hint}')


def _meant_share(value: object) -> float | None:
    """The percentage that somebody means who writes 0.5, 1/2 or 50 %; None for other values."""
    found = re.fullmatch(r"\s*([0-9.]+)(?:\s*/\s*([0-9]+))?\s*(%?)\s*", str(value))
    try:
        number = Fraction(found[1]) / Fraction(found[2] or 1) if found else None
    except (ValueError, ZeroDivisionError):
        return None
    return None if found is None or number is None else float(number * (1 if found[3] else 100))


def _checked_memory(value: object) -> object:
    if value is not None:
        try:
            parse_memory(value)
        except RecipeError as problem:
            raise ValueError(str(problem)) from None
    return value


def _checked_tokens(value: object) -> object:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([BMK])", value) if isinstance(value, str) else None
    number = Decimal(found[1]) * {"B": 10**9, "M": 10**6, "K": 10**3}[found[2]] if found else None
    return int(number) if number is not None and number == int(number) else value


HomePath = Annotated[str, BeforeValidator(lambda value: str(Path(value).expanduser()) if _at_home(value) else value)]
"""A path; ~ at its start is the home folder."""


def _at_home(value: object) -> bool:
    return isinstance(value, str) and value.startswith("~")


Kept = Annotated[int | str | None, BeforeValidator(_checked_kept)]
Memory = Annotated[str | None, BeforeValidator(_checked_memory)]
Fractional = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Tokens = Annotated[int, BeforeValidator(_checked_tokens), Field(ge=0)]
"""A whole number, or one like 120B, 400M or 64K."""
_kind = Discriminator(lambda value: "word" if isinstance(value, str) else "given")
Rho = Annotated[Annotated[Literal["auto"], Tag("word")] | Annotated[Fractional, Tag("given")], _kind]
OWN_IMPORTANCE = {
    "m_smoe": "frequency",
    "hc_smoe": "frequency",
    "ream": "ream_saliency",
    "ream_code": "reap_squared",
}
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


def parse_memory(value: object) -> int:
    """Bytes of an amount such as 4GB, 3.5GiB or 800MB; RecipeError for what is none."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([GM])(i?)B", value) if isinstance(value, str) else None
    if not found or not float(found[1]):
        raise RecipeError(f"an amount of memory is written like 4GB, 3.5GiB or 800MB, found {value!r}")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** {"G": 3, "M": 2}[found[2]])


class Section(BaseModel):
    """Frozen and strict: no key but its own, nothing converted."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)


class Source(Section):
    """Documents of one domain. In a recipe and behind --data it may be one text: `path`, `name[subset]:4096`, or
    `code.jsonl=0.3`."""

    path: HomePath
    """Folder or file (.txt .md .rst .py .jsonl .json .csv .parquet ...), or the name of a `datasets` dataset."""
    domain: str = "text"
    """What figures are reported by."""
    text_key: str | None = None
    """The column or JSON key that holds the text; left out means that of `data.text_key`."""
    split: str = "train"
    """Which split of a `datasets` dataset."""
    subset: str | None = None
    """Which subset of a `datasets` dataset that has several."""
    documents: Annotated[int, Field(ge=1)] | None = None
    """Only the first ones, so many."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Its share of all bytes of text; then every source of the part has one, and they add up to 1."""


def parse_source(text: str) -> dict[str, object]:
    """The keys of a source out of one text: a path that exists as it is, else `path[subset]:what=share`.

    `what` is how many documents, or a split's name. RecipeError where the number is none.
    """
    if Path(text).expanduser().exists():
        return {"path": text}
    found = re.fullmatch(r"(.+?)(?:\[([^\[\]]+)\])?(?::([\w.-]+))?(?:=([0-9.]+%?))?", text)
    if found is None:
        raise RecipeError(f"{text!r}: text is named like PATH, NAME[SUBSET]:4096 or PATH=0.3")
    path, subset, what, share = found.groups()
    source: dict[str, object] = {"path": path}
    if subset is not None:
        source["subset"] = subset
    if what is not None:
        source |= {"documents": int(what)} if what.isdecimal() else {"split": what}
    if share is not None:
        source["share"] = _share(share, text)
    return source


def _share(text: str, whole: str) -> float:
    try:
        return float(Fraction(text.removesuffix("%")) / (100 if text.endswith("%") else 1))
    except ValueError:
        raise RecipeError(f"{whole!r}: {text} is no share; write it like 0.3 or 30%") from None


def _named_source(value: object) -> object:
    try:
        return parse_source(value) if isinstance(value, str) and value != "demo" else value
    except RecipeError as problem:
        raise ValueError(str(problem)) from None


def _several(value: object) -> object:
    """One source stands for a list of one; a list that a validator has seen is a tuple for pydantic."""
    if isinstance(value, str | dict):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


DataSource = Annotated[
    Annotated[Literal["demo"], Tag("word")] | Annotated[Source, Tag("given")],
    _kind,
    BeforeValidator(_named_source),
]
DataSources = Annotated[tuple[DataSource, ...], BeforeValidator(_several)]


class Data(Section):
    """Text for training, calibration and measuring; the three never share a document."""

    train: DataSources = ("demo",)
    """What distillation reads."""
    calibration: DataSources = ("demo",)
    """What the statistics are taken from."""
    heldout: DataSources = ("demo",)
    """What everything is measured on."""
    text_key: str = "text"
    """The column or JSON key that holds the text (`messages` is rendered by the model's chat template)."""
    sequence_length: Count = 2048
    """Tokens per row that are predicted (T); a row holds T+1."""


class Calibrate(Section):
    """How much of the calibration text is observed."""

    sequences: Count = 1024
    """Rows of `data.sequence_length` tokens."""
    rows_per_batch: Count = 4
    """Rows that go through a layer at once; memory, not results beyond rounding."""
    removal: bool = False
    """Also learn what each expert's removal changes; on by itself where `methods.experts` is removal."""


class Keep(Section):
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
    dense_size: Kept = None
    """Neurons of each dense layer."""
    top_k: Kept = None
    """Experts that each token is sent to."""


class Methods(Section):
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
    experts: Literal[
        "frequency",
        "soft_logits",
        "reap",
        "reap_squared",
        "ean",
        "weighted_ean_sum",
        "router_blind",
        "removal",
        "random",
    ] = "reap"
    """Importance of a routed expert (high = keep); m_smoe, hc_smoe and ream have one of their own."""
    expert_op: Literal["drop", "merge", "partial", "partial_pairs", "m_smoe", "hc_smoe", "ream", "ream_code"] = "drop"
    """What happens to the experts that are not kept: dropped, or merged into kept ones."""
    similarity: Literal["auto", "logits", "router", "outputs"] = "auto"
    """Which kept expert a merged one joins: router logits, router rows, mean outputs; auto is the operation's own."""
    rho: Rho = 0.5
    """partial: share of the kept experts that take none in, exactly as written; auto tries some on held-out rows."""
    align: Literal["auto", "none", "weights", "activations", "both"] = "auto"
    """Whether neurons are matched before experts are averaged, and by what; auto is the operation's own."""
    sequential: bool | None = None
    """Calibrate each layer behind the layers that are cut already; left out means for ream and ream_code only."""
    calibrate_router: bool = False
    """Train the kept router rows of each cut layer to give the uncut layer's output; kept where they do better."""
    protect: dict[str, tuple[int, ...]] = {}
    """Layer key ("0", "mtp.0") -> expert ids that stay in any case."""
    keep_super: bool = True
    """Keep experts whose outputs make the massive activations of the residual stream, if a model has such."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        op = self.expert_op
        if op == "drop" and (self.similarity, self.align) not in {("auto", "auto"), ("auto", "none")}:
            raise ValueError("drop merges nothing, so it takes no similarity and no align; leave them out, or merge")
        if op in ("hc_smoe", "ream", "ream_code") and self.similarity != "auto":
            raise ValueError(f"{op} has a similarity of its own; leave similarity out")
        if op not in ("partial", "partial_pairs") and self.rho != 0.5:
            raise ValueError(f"{op} has no rho; leave it out, or use partial or partial_pairs")
        if op in OWN_IMPORTANCE and self.experts not in {"reap", OWN_IMPORTANCE[op]}:
            raise ValueError(f"{op} has an importance of its own ({OWN_IMPORTANCE[op]}); leave experts out")
        return self


class Stage(Section):
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
    dense_size: Fractional = 0.0
    """Share of the dense layers' neurons to go."""
    top_k: Fractional = 0.0
    """Share of the change of top-k."""
    tokens: Fractional
    """Share of `distill.tokens`."""


ScheduleName = Literal["one_shot", "depth_first", "width_first", "joint", "depth_first_3", "width_first_3"]
_Stages = Annotated[tuple[Stage, ...], Tag("given")]
Schedule = Annotated[Annotated[ScheduleName, Tag("word")] | _Stages, _kind]


class Evaluate(Section):
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
    """Tokens generated after each prompt."""
    sampling_prompts: Annotated[int, Field(ge=0)] = 16
    """Of these prompts, how many are continued by drawn text too: acceptance under sampling; 0 leaves it out."""
    sampling_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the drawn text."""
    samples: Annotated[int, Field(ge=0)] = 3
    """Prompts per domain whose continuations are shown side by side."""
    speed_prompt_tokens: Count = 512
    """Tokens of the timed prefill."""
    speed_new_tokens: Count = 64
    """Tokens of the timed decoding."""
    speed_repeats: Annotated[int, Field(ge=0)] = 5
    """Timed repetitions, after one that is not counted; 0 times nothing."""
    engine: Literal["none", "vllm"] = "none"
    """Also time an engine, without drafts and with two a round; it must be installed."""
    engine_python: HomePath | None = None
    """The Python of the environment that has the engine; left out means this one."""
    through: Literal["auto", "memory", "walk"] = "auto"
    """Whole in memory, or walked layer by layer (text alone is measured then); auto walks what does not fit."""
