"""From the text that a recipe names to documents by part: train, calibration, held-out."""

from collections.abc import Sequence
from pathlib import Path

from moeslim.commands.inputs import BUNDLED
from moeslim.data.corpus import Corpus, Document, check_disjoint, read_source
from moeslim.data.split import hold_out
from moeslim.errors import DataError, RecipeError
from moeslim.recipe import Data, Source


def text_parts(data: Data) -> dict[str, Corpus]:
    """train, calibration and held-out text; held-out text shares no document with the others.

    Where one heap of sources is given for training and calibration both read it, and an empty `heldout` is taken from
    it. Sources given apart must not overlap. DataError or RecipeError where that cannot be.
    """
    one_heap = data.calibration == data.train and "demo" not in data.train
    parts = {"train": _corpus(data.train, "train")}
    parts["calibration"] = parts["train"] if one_heap else _corpus(data.calibration, "calibration")
    if data.heldout:
        parts["heldout"] = _corpus(data.heldout, "heldout")
    elif one_heap:
        parts["train"], parts["heldout"] = hold_out(parts["train"])
        parts["calibration"] = parts["train"]
    else:
        raise RecipeError("data.heldout is empty; it may be left empty only where train and calibration are the same")
    check_disjoint({name: parts[name] for name in ("train", "heldout")})
    if not one_heap:
        check_disjoint(parts)
    return parts


def _corpus(sources: Sequence[Source | str], part: str) -> Corpus:
    documents: dict[str, Document] = {}
    for source in sources:
        if isinstance(source, str):
            found = read_source(BUNDLED / "text" / f"{part}.jsonl.xz")
        else:
            on_disk = Path(source.path).exists()
            name = source.path if on_disk or source.split == "train" else f"{source.path}:{source.split}"
            domain = None if source.domain == "text" else source.domain
            found = read_source(name, domain=domain, text_key=source.text_key)
        for document in found:
            documents.setdefault(document.digest, document)
    if not documents:
        raise DataError(f"data.{part} names no text; give at least one source or `demo`")
    return Corpus(tuple(documents.values()))


def advice(data: Sequence[str] | None) -> list[str]:
    """Advice for a user who gave no text."""
    if data:
        return []
    return ["the text is the bundled mix (speeches, documentation, code); bring text like yours with --data"]
