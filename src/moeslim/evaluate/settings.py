"""What an evaluation is told, and what is checked before the first model is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeslim.checkpoint.structure import check_structure, read_structure
from moeslim.data.tokens import TokenDocument
from moeslim.errors import DataError, RecipeError
from moeslim.evaluate.drafting import DRAFTS
from moeslim.evaluate.engine import check_engine
from moeslim.machine.bound import memory_used
from moeslim.machine.memory import free_memory
from moeslim.machine.parallel import world

DTYPES = ("float32", "bfloat16", "float16")
THROUGH = ("auto", "memory", "walk")


@dataclass(frozen=True)
class Settings:
    """How much is measured, and how; all of it is kept in the record. Counts of text are per domain.

    `stride` None means windows that do not overlap; `prompts`, `samples` or `speed_repeats` 0 leave that part out. The
    first `sampling_prompts` of the prompts are also continued by drawn text. `engine` is "none" or "vllm".
    `through` says whether a model is whole in memory or walked layer by layer over its files; auto is the latter where
    its weights do not fit into the memory that is free, or into `max_memory` bytes.
    """

    documents_per_domain: int = 20
    document_tokens: int = 1024
    window: int = 1024
    stride: int | None = None
    prompts: int = 32
    prompt_tokens: int = 64
    new_tokens: int = 64
    sampling_prompts: int = 16
    sampling_temperature: float = 1.0
    samples: int = 2
    sample_tokens: int = 96
    temperature: float = 0.7
    speed_prompt_tokens: int = 512
    speed_new_tokens: int = 64
    speed_repeats: int = 5
    engine: str = "none"
    engine_python: str | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    attn: str = "sdpa"
    through: str = "auto"
    max_memory: int | None = None

    def check(self) -> None:
        """Raise RecipeError for amounts that cannot work."""
        if not 1 <= (self.stride or self.window) <= self.window:
            raise RecipeError(
                f"evaluate.stride is {self.stride}; with windows of {self.window} tokens it must be 1 to {self.window}"
            )
        if self.prompts and self.new_tokens <= DRAFTS:
            raise RecipeError(
                f"evaluate.new_tokens is {self.new_tokens}; a start is compared with {DRAFTS} tokens behind it, so "
                f"generate at least {DRAFTS + 1}"
            )
        if (self.prompts or self.samples) and self.prompt_tokens < 2:
            raise RecipeError(f"evaluate.prompt_tokens is {self.prompt_tokens}; an EOS and one token are the least")
        if self.through not in THROUGH:
            raise RecipeError(f"evaluate.through is {self.through!r}; use one of {', '.join(THROUGH)}")
        if self.engine != "none":
            if not self.speed_repeats:
                raise RecipeError(
                    "evaluate.engine is to be timed, and evaluate.speed_repeats is 0; set it to 3 or more"
                )
            check_engine(self.engine_python)
        if self.dtype not in DTYPES:
            raise RecipeError(f"evaluation in {self.dtype!r} is not possible; use one of {', '.join(DTYPES)}")


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
        told = ", ".join(f"{label} {size}" for label, size in sizes.items())
        raise DataError(f"the models' vocabularies differ ({told}); only models with one vocabulary can be compared")


def walks(folder: Path, settings: Settings) -> bool:
    """Whether the model in `folder` is walked layer by layer over its files: as asked, or where it does not fit.

    A quarter of the memory is left to what a whole model holds beside its weights: states, caches, logits.
    """
    if settings.through != "auto":
        return settings.through == "walk"
    rows = read_structure(folder).rows.values()
    weights = sum(row.parameters for row in rows) * (4 if settings.dtype == "float32" else 2)
    rooms = [free_memory(settings.device, processes=world().local_size)]
    if settings.max_memory is not None:
        rooms.append(settings.max_memory - memory_used())
    return any(room is not None and weights > 0.75 * room for room in rooms)
