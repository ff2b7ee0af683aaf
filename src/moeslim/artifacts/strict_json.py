"""Strict, bounded JSON for untrusted files: its value within a memory bound, or ValueError with the reason.

Python's reader takes what others refuse or read otherwise: NaN, a key given twice, UTF-16, halves of surrogate pairs
that no file can be written with. It also turns 100 MB into gigabytes of objects, and waits for ever on a named pipe.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

BYTES_LIMIT = 50_000_000
"""The largest tokenizer.json in use has 33 MB, the index of a model with 100k tensors 10 MB."""
ITEMS_LIMIT = 2_000_000
"""Commas and brackets. An item takes at most about 350 bytes (a key and its value), so the bound is 700 MB."""
_SURROGATE = re.compile(rb"\\u[dD][89abAB]")


def load(path: Path | str, *, repeated_keys: bool = False, infinities: bool = False) -> Any:
    """The value in a file; FileNotFoundError without one, ValueError for what is no plain file or no strict JSON.

    `infinities`: see `parse`.
    """
    return parse(read_plain(path), repeated_keys=repeated_keys, infinities=infinities)


def read_plain(path: Path | str, *, limit: int = BYTES_LIMIT) -> bytes:
    """The bytes of a file of at most `limit`. ValueError for a larger one and for folders, pipes and devices."""
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("it is a folder, pipe or device and no file")
    if size > limit:
        raise ValueError(f"{size:,} bytes, at most {limit:,} are read")
    return path.read_bytes()


def parse(raw: bytes, *, repeated_keys: bool = False, infinities: bool = False) -> Any:
    """The value that JSON in UTF-8 spells; ValueError where another reader may see another value, or too many.

    `infinities`: an Infinity, which some releases' config.json has, is `{"__float__": "Infinity"}`, as transformers 5
    writes it in JSON.
    """
    items = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if len(raw) > BYTES_LIMIT or items > ITEMS_LIMIT:
        raise ValueError(
            f"{len(raw):,} bytes with {items:,} items, at most {BYTES_LIMIT:,} with {ITEMS_LIMIT:,} are read"
        )
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=None if repeated_keys else _unique,
            parse_constant=_infinity if infinities else _no_number,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _SURROGATE.search(raw):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair, which is no character") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"{names.most_common(1)[0][0]!r} stands in it twice")
    return table


def _no_number(literal: str) -> Any:
    raise ValueError(f"{literal} is no number of JSON")


def _infinity(literal: str) -> dict[str, str]:
    return {"__float__": literal} if literal.endswith("Infinity") else _no_number(literal)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is beyond float64")
    return value
