"""From the text that a recipe names to documents by part: train, calibration, held-out."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moeslim.commands.inputs import BUNDLED, model_folder, options_recipe
from moeslim.data.corpus import Corpus, Document, check_disjoint, read_source
from moeslim.data.mix import Given, mix_lines, mixed
from moeslim.data.split import hold_out
from moeslim.errors import DataError, RecipeError
from moeslim.log import logger
from moeslim.machine.home import expands_home
from moeslim.recipe import Data, Source

_PARTS = ("train", "calibration", "heldout")


def text_parts(data: Data) -> dict[str, Corpus]:
    """train, calibration and held-out text; held-out text shares no document with the others.

    Where one heap of sources is given for training and calibration both read it, and an empty `heldout` is taken from
    it. Sources given apart must not overlap. DataError or RecipeError where that cannot be.
    """
    one_heap = data.calibration == data.train and "demo" not in data.train
    parts = {"train": part_text(data, "train")}
    if not one_heap:
        parts["calibration"] = part_text(data, "calibration")
    if data.heldout:
        parts["heldout"] = part_text(data, "heldout")
    elif one_heap:
        parts["train"], parts["heldout"] = hold_out(parts["train"])
    else:
        raise RecipeError("data.heldout is empty; it may be left empty only where train and calibration are the same")
    if one_heap:
        check_disjoint(parts)
        parts["calibration"] = replace(parts["train"], learnt=False)
    else:
        check_disjoint({name: parts[name] for name in ("train", "heldout")})
        check_disjoint(parts)
    return parts


def part_text(data: Data, part: str) -> Corpus:
    """All text that `data` names for train, calibration or heldout; nothing is held out of it.

    Of each source there are as many documents as its share allows; a text that two have is the first's.
    """
    sources: Sequence[Source | str] = getattr(data, part)
    seen: set[str] = set()
    given = []
    for source in sources:
        if isinstance(source, str):
            name, found, share = "demo", read_source(BUNDLED / "text" / f"{part}.jsonl.xz"), None
        else:
            name, found, share = source.path, _documents(source, data), source.share
        fresh = [document for document in found if document.digest not in seen]
        seen |= {document.digest for document in fresh}
        given.append(Given(name, fresh, share))
    mix = mixed(given)
    documents = [document for each in mix for document in each.documents]
    if not documents:
        raise DataError(f"data.{part} names no text; give at least one source or `demo`")
    if len(given) > 1:
        for line in mix_lines(f"data.{part}", mix):
            logger.info("%s", line)
    return Corpus(tuple(documents), learnt=part == "train")


def _documents(source: Source, data: Data) -> list[Document]:
    return read_source(
        source.path,
        domain=None if source.domain == "text" else source.domain,
        text_key=source.text_key or data.text_key,
        subset=source.subset,
        split=source.split,
        limit=source.documents,
    )


@expands_home
def preview(
    model: str, data: Sequence[str] | None, *, show: int = 3, part: str = "train", overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """What `model` will read: the documents of a part of the text by source and domain, and the first ones rendered.

    `documents` are those shown, each with its `pieces`: text, and whether a training learns it. RecipeError for an
    unknown part.
    """
    from moeslim.data.tokens import load_tokenizer, pieces_of

    if part not in _PARTS:
        raise RecipeError(f"--part is {part!r}; it must be one of {', '.join(_PARTS)}")
    recipe = options_recipe(model, keep={}, overrides=overrides, data=data)
    named = (
        recipe.data if not data or part != "heldout" else recipe.data.model_copy(update={"heldout": recipe.data.train})
    )
    text = part_text(named, part)
    tokenizer = load_tokenizer(model_folder(model, revision=recipe.revision, config_only=True))
    shown = []
    for document in text.documents[:show]:
        pieces, unplaced = pieces_of(document, tokenizer, learnt=text.learnt)
        facts = {"source": document.source, "domain": document.domain, "answers_not_learnt": unplaced}
        shown.append({**facts, "pieces": [{"text": own, "learnt": learnt and text.learnt} for own, learnt in pieces]})
    domains = {name: [each for each in text.documents if each.domain == name] for name in text.domains}
    lines = mix_lines(f"data.{part}", [Given(name, found, None) for name, found in domains.items()])
    lines.append(f"text {text.fingerprint}, {len(text.documents):,} documents")
    return {"part": part, "text": text.fingerprint, "documents": shown, "lines": [*lines, *advice(data)]}


def advice(data: Sequence[str] | None) -> list[str]:
    """Advice for a user who gave no text."""
    if data:
        return []
    return ["the text is the bundled mix (speeches, documentation, code); bring text like yours with --data"]
