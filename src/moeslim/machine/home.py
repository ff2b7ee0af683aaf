"""`~` at the start of paths that users give, for everything that has no shell before it."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def expand(value: Any) -> Any:
    """A path or text that begins with ~ with the home folder in its place, also inside lists; all else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(map(expand, value))
    if isinstance(value, str | Path) and str(value).startswith("~"):
        return type(value)(Path(value).expanduser())
    return value


def expands_home(command: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """The command, with ~ expanded in each of its arguments: models, text, and files to read or to write."""

    @wraps(command)
    def with_paths(*given: _Given.args, **named: _Given.kwargs) -> _Result:
        return command(*map(expand, given), **{key: expand(value) for key, value in named.items()})

    return with_paths
