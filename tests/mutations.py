"""Ways to corrupt a good file, drawn from a seeded generator. Each says what an honest program may make of the result.

`refuse`: whatever is done with it must fail. `same`: it may work if what comes out is what the good input gives.
`any`: it may be another valid input (a changed number that is still possible), and then nothing can be compared.
"""

import io
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

Random = random.Random
BIG = 105_000_000
"""Bytes of the files that are too large to be parsed."""
TEXTS = (".json", ".jsonl", ".yaml", ".jinja")
ODD = (
    None, True, False, -1, 0, 1, 3, 4.0, -0.5, 2**31, 10**15, 10**30, 1e308, 1e-320, "7", "", "\u0660", "x" * 300,
    "\x00", "\ud800", "\x1b[2J[/red]", "../../x", "/etc/passwd", "NaN", [], {}, [[]], [None], {"": None}, [1, 2],
    "\u202e\u0000",
)  # fmt: skip


def spoil(path: Path, draw: Random) -> tuple[str, str]:
    """Corrupt one file in place; returns the name of what was done and what may come of it."""
    if draw.random() < 0.22:
        return draw.choice(ANY_FILE)(path, draw)
    if path.name == ".metadata" or path.suffix == ".distcp":
        return draw.choice((flip, truncate, pickle_of_code))(path, draw)
    if path.suffix == ".safetensors":
        return draw.choice((header, header, header, flip_header, flip_data, lie_of_length, huge_header))(path, draw)
    if path.suffix in (".json", ".jsonl"):
        return draw.choice(JSON_FILE)(path, draw)
    if path.suffix == ".yaml":
        return draw.choice(YAML_FILE)(path, draw)
    if path.suffix == ".npy":
        return draw.choice((flip, flip_start, truncate, array_of_objects, other_array))(path, draw)
    return draw.choice((flip, truncate, flip_start))(path, draw)


# Any file


def truncate(path: Path, draw: Random) -> tuple[str, str]:
    content = path.read_bytes()
    path.write_bytes(content[: draw.choice([0, 1, 7, len(content) // 2, max(0, len(content) - 1)])])
    return "truncate", "any" if path.suffix in TEXTS else "refuse"


def flip(path: Path, draw: Random) -> tuple[str, str]:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 8])):
        place = draw.randrange(len(content))
        content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return "flip", "any"


def flip_start(path: Path, draw: Random) -> tuple[str, str]:
    content = bytearray(path.read_bytes())
    content[draw.randrange(min(len(content), 64))] = draw.randrange(256)
    path.write_bytes(content)
    return "flip at the start", "any"


def gone(path: Path, draw: Random) -> tuple[str, str]:
    path.unlink()
    return "gone", "any"


def folder(path: Path, draw: Random) -> tuple[str, str]:
    path.unlink()
    path.mkdir()
    return "a folder", "any"


def pipe(path: Path, draw: Random) -> tuple[str, str]:
    path.unlink()
    os.mkfifo(path)
    return "a named pipe", "any"


def link_out(path: Path, draw: Random) -> tuple[str, str]:
    outside = path.parent.parent / f"beyond-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)
    return "a link out of the folder", "same"


def link_round(path: Path, draw: Random) -> tuple[str, str]:
    path.unlink()
    path.symlink_to(path.name)
    return "a link to itself", "any"


def device(path: Path, draw: Random) -> tuple[str, str]:
    path.unlink()
    path.symlink_to("/dev/zero")
    return "a link to /dev/zero", "any"


def noise(path: Path, draw: Random) -> tuple[str, str]:
    path.write_bytes(draw.randbytes(draw.choice([1, 9, 300, 5000])))
    return "noise", "any"


def sparse(path: Path, draw: Random) -> tuple[str, str]:
    with path.open("ab") as file:
        file.truncate(3 << 30)
    return "3 GB of zeros behind it", "any"


REPLACED = ("gone", "a folder", "a named pipe", "a link to itself", "a link to /dev/zero", "noise", "truncate",
            "3 GB of zeros behind it", "a link out of the folder")  # fmt: skip
"""After these a weight file is none."""
ANY_FILE = (truncate, flip, gone, folder, pipe, link_out, link_round, device, noise, sparse)


# JSON


def _text(path: Path, make: Callable[[str], str | bytes]) -> None:
    made = make(path.read_text(encoding="utf-8"))
    path.write_bytes(made if isinstance(made, bytes) else made.encode("utf-8", "surrogatepass"))


def _raw(name: str, make: Callable[[str], str | bytes], expected: str) -> Callable[[Path, Random], tuple[str, str]]:
    def change(path: Path, draw: Random) -> tuple[str, str]:
        _text(path, make)
        return name, expected

    return change


def _deep(text: str) -> str:
    return '{"a":' * 50_000 + "1" + "}" * 50_000


def _first_key(text: str, value: str) -> str:
    return text.replace("{", '{"zz": ' + value + ", ", 1)


def _doubled(text: str) -> str:
    return text.replace("{", '{"model_type": 1, "model_type": 2, ', 1)


RAW = (
    _raw("not UTF-8", lambda text: text.encode()[:20] + b"\xff\xfe" + text.encode()[20:], "any"),
    _raw("UTF-16", lambda text: text.encode("utf-16"), "any"),
    _raw("a byte order mark", lambda text: "\ufeff" + text, "any"),
    _raw("nested 50,000 deep", _deep, "any"),
    _raw("a value nested deep", lambda text: _first_key(text, "[" * 20_000 + "]" * 20_000), "any"),
    _raw("a whole number of 10,000 digits", lambda text: _first_key(text, "9" * 10_000), "any"),
    _raw("a NaN", lambda text: _first_key(text, "NaN"), "any"),
    _raw("an infinity", lambda text: _first_key(text, "1e999"), "any"),
    _raw("half a surrogate pair", lambda text: _first_key(text, '"\\ud800"'), "any"),
    _raw("a key twice", _doubled, "any"),
    _raw("words behind the end", lambda text: text + "}", "any"),
    _raw("105 MB of spaces", lambda text: text + " " * BIG, "any"),
    _raw("105 MB of lists", lambda text: _first_key(text, "[" + "[]," * (BIG // 3) + "1]"), "any"),
    _raw("40 MB of names", lambda text: _first_key(text, json.dumps({f"{n:x}": n for n in range(2_200_000)})), "any"),
    _raw("an object less", lambda text: "[]", "any"),
    _raw("null", lambda text: "null", "any"),
    _raw("spaces", lambda text: " " + text.replace(": ", ":  "), "any"),
)


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(one for key, below in inner for one in _places(below, (*place, key)))]


def tree(path: Path, draw: Random) -> tuple[str, str]:
    """One value anywhere in the tree becomes another one, goes, or gets another name."""
    line = None
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        line = draw.randrange(len(lines))
        text = lines[line]
    value, done = change_tree(json.loads(text), draw)
    made = json.dumps(value)
    if line is not None:
        lines[line] = made
        made = "\n".join(lines) + "\n"
    path.write_text(made)
    return done, "any"


def change_tree(value: Any, draw: Random) -> tuple[Any, str]:
    """The value with one change, and the change in words."""
    place = draw.choice([*_places(value)[1:], ()])
    if not place:
        return draw.choice(ODD), "the whole is odd"
    here = value
    for key in place[:-1]:
        here = here[key]
    key, what = place[-1], draw.choice(["odd", "odd", "odd", "odd", "delete", "rename", "text", "negative", "list"])
    if what == "delete":
        del here[key]
    elif what == "rename" and isinstance(here, dict):
        here[draw.choice(["", "x", "../" + str(key), str(key) + "\ud800"])] = here.pop(key)
    elif what == "text":
        here[key] = str(here[key])
    elif what == "negative" and isinstance(here[key], int | float):
        here[key] = -here[key]
    elif what == "list":
        here[key] = [here[key]]
    else:
        what, here[key] = "odd", draw.choice(ODD)
    return value, f"{what} at {'.'.join(map(str, place))[:60]}"


JSON_FILE = (tree, tree, tree, tree, tree, *RAW)


# YAML


def _yaml(name: str, more: str) -> Callable[[Path, Random], tuple[str, str]]:
    return _raw(name, lambda text: text + "\n" + more + "\n", "refuse")


_LAUGHS = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
YAML_FILE = (
    lambda path, draw: _tree_of_yaml(path, draw),
    lambda path, draw: _tree_of_yaml(path, draw),
    lambda path, draw: _tree_of_yaml(path, draw),
    lambda path, draw: _tree_of_yaml(path, draw),
    _yaml("aliases of aliases", "a0: &a0 lol\n" + _LAUGHS),
    _yaml("an alias of itself", "zz: &a [*a]"),
    _yaml("a Python object", "zz: !!python/object/apply:os.system ['touch /tmp/fuzz-ran-code']"),
    _yaml("nested 20,000 deep", "zz: " + "[" * 20_000 + "]" * 20_000),
    _yaml("a whole number of 10,000 digits", "seed: " + "9" * 10_000),
    _yaml("a tab", "\tzz: 1"),
    _yaml("a key that is a list", "? [a, b]\n: c"),
    _yaml("a key that is a date", "2024-01-01: 3"),
    _yaml("binary", "zz: !!binary aGVsbG8="),
    _yaml("2 MB", "zz: " + "x" * 2_000_000),
    _raw("not UTF-8", lambda text: text.encode() + b"\nzz: \xff\xfe\n", "refuse"),
    flip, truncate,
)  # fmt: skip


def _tree_of_yaml(path: Path, draw: Random) -> tuple[str, str]:
    import yaml

    value, done = change_tree(yaml.safe_load(path.read_text()), draw)
    path.write_text(json.dumps(value))  # YAML reads JSON
    return done, "any"


# safetensors


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(path: Path, header: Any, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def told(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    """Name -> dtype and shape as the safetensors library reads them, None where it refuses: the oracle for headers."""
    try:
        with safe_open(path, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dictionary
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError):
        return None


def _judged(path: Path, before: dict[str, Any] | None, name: str) -> tuple[str, str]:
    after = told(path)
    return name, "refuse" if after != before else "any"


def header(path: Path, draw: Random) -> tuple[str, str]:
    facts, data = _split(path)
    name, other = draw.sample([key for key in facts if key != "__metadata__"], 2)
    mine, yours = facts[name], facts[other]
    start, end = mine["data_offsets"]
    changes: dict[str, Callable[[], Any]] = {
        "offsets outside the file": lambda: mine.update(data_offsets=[start + 10**9, end + 10**9]),
        "offsets beyond 64 bits": lambda: mine.update(data_offsets=[start + 2**70, end + 2**70]),
        "negative offsets": lambda: mine.update(data_offsets=[start - end - 8, -8]),
        "overlapping tensors": lambda: mine.update(data_offsets=yours["data_offsets"], shape=yours["shape"]),
        "offsets swapped": lambda: mine.update(data_offsets=[end, start]),
        "a shape that wraps around": lambda: mine.update(shape=[2**32, 2**32, 2**32]),
        "a shape of 300,000 axes": lambda: mine.update(shape=[10**9] * 300_000),
        "another shape": lambda: mine.update(shape=[*reversed(mine["shape"]), 1]),
        "another dtype": lambda: mine.update(dtype=draw.choice(["I32", "F64", "F8_E4M3", "Q4", "", None, 7])),
        "a name changed": lambda: facts.update({draw.choice(["", "x", "../x", name + "\u200b"]): facts.pop(name)}),
        "a tensor less": lambda: facts.pop(name),
        "metadata of numbers": lambda: facts.update({"__metadata__": {"format": 7}}),
        "offsets as text": lambda: mine.update(data_offsets=[str(start), str(end)]),
        "a float among the offsets": lambda: mine.update(data_offsets=[float(start), end]),
        "an axis too many": lambda: mine.update(data_offsets=[start, end, end]),
    }
    what = draw.choice([*changes, "a name twice", "another tensor's name"])
    if what == "a name twice":
        raw = json.dumps(facts)
        _joined(path, ("{" + f'"{name}": {json.dumps(mine)}, ' + raw[1:]).encode(), data)
        return what, "refuse"
    if what == "another tensor's name":
        mine["data_offsets"], yours["data_offsets"] = yours["data_offsets"], mine["data_offsets"]
        _joined(path, facts, data)
        return what, "any" if mine["shape"] == yours["shape"] and mine["dtype"] == yours["dtype"] else "refuse"
    changes[what]()
    _joined(path, facts, data)
    return what, "refuse"


def flip_header(path: Path, draw: Random) -> tuple[str, str]:
    before = told(path)
    content = bytearray(path.read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    content[draw.randrange(8 + length)] = draw.randrange(256)
    path.write_bytes(content)
    return _judged(path, before, "flip in the header")


def flip_data(path: Path, draw: Random) -> tuple[str, str]:
    content = bytearray(path.read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    place = draw.randrange(8 + length, len(content) - 8) & ~7
    what = draw.choice(["nan", "flip"])
    if what == "nan":
        content[place : place + 8] = b"\xff" * 8
    else:
        content[place] ^= 1
    path.write_bytes(content)
    return ("NaN in the data", "refuse") if what == "nan" else ("flip in the data", "any")


def lie_of_length(path: Path, draw: Random) -> tuple[str, str]:
    content = path.read_bytes()
    length = draw.choice([0, 1, 2, 2**63, 2**64 - 1, len(content), len(content) - 8, len(content) - 9, 10**8])
    path.write_bytes(struct.pack("<Q", length) + content[8:])
    return "a length that lies", "refuse"


def huge_header(path: Path, draw: Random) -> tuple[str, str]:
    facts, data = _split(path)
    raw = json.dumps(facts).encode()
    pad = draw.choice([b" " * BIG, b',"zz":' + b"[" + b"[]," * (BIG // 3) + b"1]"])
    _joined(path, raw[:-1] + pad + b"}", data)
    return "105 MB of header", "refuse"


# arrays and pickles


def array_of_objects(path: Path, draw: Random) -> tuple[str, str]:
    np.save(path, np.array([_Runs()], dtype=object), allow_pickle=True)
    return "an array of objects", "refuse"


def other_array(path: Path, draw: Random) -> tuple[str, str]:
    array = np.load(path)
    made = draw.choice(
        [array[:-1], array.astype(np.float64), array.reshape(-1), array[:0], np.full_like(array, 1 << 14)]
    )
    unchanged = made.shape == array.shape and made.dtype == array.dtype and np.array_equal(made, array)
    np.save(path, made)
    return "another array", "same" if unchanged else "refuse"


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/fuzz-ran-code",)


def pickle_of_code(path: Path, draw: Random) -> tuple[str, str]:
    import pickle

    buffer = io.BytesIO()
    pickle.dump(_Runs(), buffer)
    path.write_bytes(buffer.getvalue())
    return "a pickle that runs code", "refuse"
