"""moeslim makes a mixture-of-experts language model smaller and keeps what made it good.

`moeslim.inspect`, `calibrate`, `plan`, `cut`, `run` and the others below are the command line's verbs with its
arguments; each returns a record (docs/python.md). Importing the package loads nothing heavy: a verb's code is read when
the verb is first asked for.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_VERBS = {
    **dict.fromkeys(("inspect", "probe", "calibrate", "plan", "cut", "verify"), "moeslim.verbs"),
    **dict.fromkeys(("cache_teacher", "distill", "evaluate", "evaluate_tasks", "report"), "moeslim.verbs"),
    **dict.fromkeys(("preview", "preview_run"), "moeslim.verbs"),  # --dry-run of prune and of run
    **dict.fromkeys(("prune", "run"), "moeslim.pipeline"),
    "propose": "moeslim.propose",
    "study": "moeslim.study.run",
    "compare": "moeslim.study.compare",
}
"""Verb -> the module that has it."""
_ROOMS = ("calibrate", "plan", "distill", "evaluate", "report", "propose", "study")
"""Verbs that are also rooms: `moeslim.plan` is the package with the planning code, and calling it runs the verb."""

__all__ = ["__version__", *_VERBS]


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'moeslim' has no attribute {name!r}")
    if name in _ROOMS:
        return importlib.import_module(f"moeslim.{name}")
    return getattr(importlib.import_module(_VERBS[name]), name)


class _VerbRoom(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module(_VERBS[name]), name)(*arguments, **options)


class _Package(ModuleType):
    """The import system binds every imported room here; the rooms that share a verb's name become callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ROOMS and type(value) is ModuleType:
            value.__class__ = _VerbRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
