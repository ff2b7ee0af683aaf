"""The settings of an evaluation, and what is checked before the first model is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from moeslim.checkpoint.structure import check_structure, read_structure
from moeslim.data.tokens import TokenDocument
from moeslim.errors import DataError, RecipeError
from moeslim.evaluate.drafting import DRAFTS
from moeslim.evaluate.engine import check_engine
from moeslim.machine.bound import memory_used
from moeslim.machine.memory import free_memory
from moeslim.machine.parallel import world
from moeslim.recipe import Evaluate

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """The section of a recipe that says how much is measured, and how it is done; all of it is kept in the record.

    Texts are cut to `document_tokens` and read in windows of `window`; `samples` go on for `sample_tokens`, drawn at
    `temperature`. A model that `through: auto` is asked of is walked layer by layer over its files where its weights do
    not fit into the memory that is free, or into `max_memory` bytes.
    """

    evaluate: Evaluate
    _: KW_ONLY
    window: int
    seed: int
    dtype: str
    device: str
    max_memory: int | None
    document_tokens: int = 1024
    sample_tokens: int = 96
    temperature: float = 0.7
    attn: str = "sdpa"

    @property
    def stride(self) -> int:
        """Tokens between two windows; they do not overlap where the section leaves it out."""
        return self.evaluate.stride or self.window

    def check(self) -> None:
        """Raise RecipeError for amounts that cannot work."""
        section = self.evaluate
        if self.stride > self.window:
            raise RecipeError(
                f"evaluate.stride is {self.stride}; with windows of {self.window} tokens it must be 1 to {self.window}"
            )
        if section.prompts and section.new_tokens <= DRAFTS:
            raise RecipeError(
                f"evaluate.new_tokens is {section.new_tokens}; a start is compared with {DRAFTS} tokens behind it, so "
                f"generate at least {DRAFTS + 1}"
            )
        if (section.prompts or section.samples) and section.prompt_tokens < 2:
            raise RecipeError(f"evaluate.prompt_tokens is {section.prompt_tokens}; an EOS and one token are the least")
        if section.engine != "none":
            if not section.speed_repeats:
                raise RecipeError(
                    "evaluate.engine is to be timed, and evaluate.speed_repeats is 0; set it to 3 or more"
                )
            check_engine(section.engine_python)
        if self.dtype not in DTYPES:
            raise RecipeError(f"evaluation in {self.dtype!r} is not possible; use one of {', '.join(DTYPES)}")

    def facts(self) -> dict[str, Any]:
        """Every setting by its name, as JSON can say it."""
        own = {name: value for name, value in vars(self).items() if name != "evaluate"}
        return self.evaluate.model_dump(mode="json") | own


def check_models(folders: Mapping[str, Path], documents: Sequence[TokenDocument]) -> None:
    """Raise CheckpointError or DataError unless every model is whole and all of them know the tokens of the text."""
    largest = max(int(document.tokens.max()) for document in documents)
    sizes = {}
    for label, folder in folders.items():
        structure = read_structure(folder)
        check_structure(structure)
        sizes[label] = structure.shape["vocab"]
        if largest >= sizes[label]:
            raise DataError(
                f"{label} ({folder}): the text has token {largest}, but the vocabulary has {sizes[label]} entries; "
                "evaluate with the model's own tokenizer"
            )
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{label} {size}" for label, size in sizes.items())
        raise DataError(f"the models' vocabularies differ ({listed}); only models with one vocabulary can be compared")


def walks(folder: Path, settings: Settings) -> bool:
    """Whether the model in `folder` is walked layer by layer over its files: as asked, or where it does not fit.

    A quarter of the memory is left to what a whole model holds beside its weights: states, caches, logits.
    """
    if settings.evaluate.through != "auto":
        return settings.evaluate.through == "walk"
    rows = read_structure(folder).rows.values()
    weights = sum(row.parameters for row in rows) * (4 if settings.dtype == "float32" else 2)
    limits = [free_memory(settings.device, processes=world().local_size)]
    if settings.max_memory is not None:
        limits.append(settings.max_memory - memory_used())
    return any(limit is not None and weights > 0.75 * limit for limit in limits)
