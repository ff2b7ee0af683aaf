"""The bundled teacher, its tokenizer and its text; where each lies in the package."""

from pathlib import Path

_FOLDER = Path(__file__).parent
TEXT_PARTS = ("train", "calibration", "heldout")


def text_path(part: str) -> Path:
    """The bundled text of `train`, `calibration` or `heldout`: JSON lines with `text`, `domain`, `source`."""
    if part not in TEXT_PARTS:
        raise ValueError(f"demo text has the parts {', '.join(TEXT_PARTS)}, not {part}")
    return _FOLDER / "text" / f"{part}.jsonl.xz"


def tokenizer_path() -> Path:
    """The folder of the demo's tokenizer (2048 tokens)."""
    return _FOLDER / "tokenizer"


def teacher_path() -> Path:
    """The folder of the bundled teacher: a checkpoint with its MTP head."""
    return _FOLDER / "teacher"


def recipe_path() -> Path:
    """The demo's recipe."""
    return _FOLDER / "recipe.yaml"
