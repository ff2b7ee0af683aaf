"""The text side of a recipe: YAML with the line of every key, `--set` overrides, and messages that say where.

Knows no section and no key: what is allowed comes with the pydantic model that is passed in.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from moeslim.errors import RecipeError

KeyPath = tuple[str | int, ...]
"""Keys and indices from the top of a recipe down to one value."""
Lines = Mapping[KeyPath, int]


_BYTES_LIMIT, _PLACES_LIMIT = 1_000_000, 100_000
"""Of a recipe: with aliases of aliases a page of YAML can spell more places than there are atoms."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 4e-4 is a number and 1e6 a whole one, as everybody expects."""


_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("!exponent", _EXPONENT, list("-+0123456789"))
_Loader.add_constructor("!exponent", lambda _, node: int(x) if (x := float(node.value)).is_integer() else x)


def read_yaml(path: Path | str) -> tuple[Any, Lines]:
    """What a YAML file holds and the line of everything in it; RecipeError where it cannot be read."""
    try:
        path = Path(path)
        size = path.stat().st_size
        if not path.is_file() or size > _BYTES_LIMIT:  # a pipe would be waited for
            raise RecipeError(f"no file, or one of {size:,} bytes; at most {_BYTES_LIMIT:,} are read")
        text = path.read_text(encoding="utf-8")
        lines: dict[KeyPath, int] = {}
        for number, (key_path, line) in enumerate(_lines(yaml.compose(text, Loader=_Loader), ())):
            if number == _PLACES_LIMIT:
                raise RecipeError(f"more than {_PLACES_LIMIT:,} places, with the aliases written out")
            lines[key_path] = line
        return yaml.load(text, Loader=_Loader), lines  # a SafeLoader
    except RecursionError:
        raise RecipeError(
            f"{path}: cannot be read as a YAML recipe: nested too deeply, or an alias of itself"
        ) from None
    except (OSError, ValueError, TypeError, yaml.YAMLError, RecipeError) as problem:
        raise RecipeError(f"{path}: cannot be read as a YAML recipe: {problem}") from None


def _lines(node: yaml.Node | None, key_path: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    """(path, line) of everything below `node`; RecipeError for a key that is given twice."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"line {line}: a key must be a word")
            if key.value in seen:
                raise RecipeError(f"line {line}: the key {key.value} stands in line {seen[key.value]} already")
            seen[key.value] = line
            yield (*key_path, key.value), line
            yield from _lines(value, (*key_path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*key_path, index), value.start_mark.line + 1
            yield from _lines(value, (*key_path, index))


def override(tree: dict[str, Any], text: str) -> KeyPath:
    """Put one "a.b=c" into `tree`; returns its path. RecipeError where there is no such place."""
    key, equals, written = text.partition("=")
    parts = key.strip().split(".")
    if not equals or "" in parts:
        raise RecipeError(f"--set {text}: write it like distill.tokens=1000000")
    path: list[str | int] = []
    here: Any = tree
    try:
        value = yaml.load(written, Loader=_Loader)  # a SafeLoader
        for depth, part in enumerate(parts):
            path.append(int(part) if isinstance(here, list) else part)
            if depth == len(parts) - 1:
                here[path[-1]] = value
            else:
                here = here.setdefault(part, {}) if isinstance(here, dict) else here[path[-1]]
    except (ValueError, LookupError, TypeError, RecursionError, yaml.YAMLError):
        raise RecipeError(f"--set {text}: there is no place of this name, or its value is not YAML") from None
    return tuple(path)


def explain(
    tree: dict[str, Any], error: ErrorDetails, *, model: type[BaseModel], lines: Lines, changed: list[KeyPath]
) -> str:
    """One of pydantic's findings as `line 7: distill.tokenz: ...`, with the nearest key for an unknown one."""
    path: list[str | int] = []
    here: Any = tree
    for part in error["loc"]:  # pydantic also names the branches of unions there; those are no keys
        if (isinstance(here, dict) and part in here) or (isinstance(here, list) and isinstance(part, int)):
            here = here[part]  # type: ignore[index]  # checked one line above for either kind
            path.append(part)
    if error["type"] == "missing":
        path.append(error["loc"][-1])
        text = "is missing"
    elif error["type"] == "extra_forbidden":
        text = "is no known key" + _suggestion(path, model)
    else:
        text = f"{error['msg'].removeprefix('Value error, ')}; found {json.dumps(here)[:80]}"
    above = [tuple(path[:length]) for length in range(len(path), 0, -1)]
    line = next((f"line {lines[key_path]}: " for key_path in above if key_path in lines), "")
    return f"{'--set ' if any(key in above for key in changed) else line}{'.'.join(map(str, path)) or 'recipe'}: {text}"


def _suggestion(path: list[str | int], model: type[BaseModel]) -> str:
    """What may have been meant by the unknown key at the end of `path`: a key beside it, or one of another section."""
    section = model
    for part in path[:-1]:
        if part in section.model_fields:
            section = (*_sections(section.model_fields[str(part)].annotation), section)[0]
    wanted = str(path[-1])
    if near := difflib.get_close_matches(wanted, section.model_fields, n=1):
        return f"; did you mean {near[0]}?"
    for name, field in model.model_fields.items():
        if any(wanted in inner.model_fields for inner in _sections(field.annotation)):
            return f"; did you mean {name}.{wanted}?"
    return f"; allowed are {', '.join(section.model_fields)}"


def _sections(annotation: Any) -> list[type[BaseModel]]:
    own = [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
    return own + [section for inner in get_args(annotation) for section in _sections(inner)]
