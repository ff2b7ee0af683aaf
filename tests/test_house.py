"""The rules of CONTRIBUTING.md that a machine can check: direction of imports, sizes, who prints, what loads what."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "moeslim"
FLOORS = [
    {"errors", "log", "figures"},
    {"artifacts", "recipe", "machine"},
    {"losses", "families", "stats"},
    {"checkpoint", "data"},
    {"model", "plan"},
    {"evaluate", "distill", "calibrate", "surgery"},
    {"report", "search"},
    {"commands"},
    {"demo", "pipeline", "study"},
    {"cli", "api"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_POSITIONAL = 400, 60, 6, 2
ENTRANCES = {
    "lm_eval": {"evaluate/harness.py"},
    "vllm": {"evaluate/engine_process.py"},
    "huggingface_hub": {"checkpoint/source.py"},
    "matplotlib": {"report/page.py"},
    "datasets": {"data/formats.py"},
    "tensorboard": {"distill/trackers.py"},
    "trackio": {"distill/trackers.py"},
    "wandb": {"distill/trackers.py"},
}
"""Heavy packages and the one file through which each may enter."""

_PROBS, _REPORT = "probs (a teacher's), tokens or text", "format_*, report_*, or what it holds"
_EXISTS, _SPLIT, _ROOM = "exists, existing or is_current", "split (of rows) or threads", "memory, buffer or disk_space"
BANNED = {
    **{"word": _PROBS, "words": _PROBS, "hear": "log_probs", "heard": "log_probs", "listen": "open or evaluate"},
    **dict.fromkeys(["tell", "tells", "told", "say", "says", "said"], _REPORT),
    **{"stands": _EXISTS, "standing": _EXISTS, "lane": _SPLIT, "lanes": _SPLIT, "room": _ROOM, "rooms": _ROOM},
    **{"pull": "coefficients", "pulled": "coefficients", "mould": "layer", "moulds": "layers", "twin": "clone"},
    **{"master": "teacher", "story": "state", "material": "inputs", "ask": "settings"},
    **{"carry_out": "run_on_rank0 or run_*", "help_out": "serve"},
}
"""What nobody looks for, as part of a name that is defined, and the standard word in its place."""

FILES = sorted(SOURCE.rglob("*.py"))
CALLED_BY_OTHERS = {"__call__", "__exit__", "__setitem__", "forward", "backward"}
"""Names whose callers are not ours to change: Python and torch pass by position."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def named(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


per_file = pytest.mark.parametrize("path", FILES, ids=named)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(path: Path) -> str:
    """`plan` for plan/steps.py, `api` for api.py, `` for the package's own __init__.py and __main__.py."""
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "" if first in ("__init__", "__main__") else first


def imported(tree: ast.Module, *, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in `tree`; relative ones are resolved against `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            # `from moeslim import plan` names a room in the list, `from moeslim.plan import x` in the module
            if module == "moeslim":
                yield from ((node.lineno, f"moeslim.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def upward(tree: ast.Module, *, room: str, package: str) -> list[str]:
    """What `room` imports from its own floor or from above."""
    found = []
    for line, name in imported(tree, package=package):
        parts = name.split(".")
        if parts[0] != "moeslim" or len(parts) < 2 or parts[1] in ("__version__", room):
            continue
        if parts[1] not in LEVEL:
            found.append(f"line {line}: {name} is no room of the house")
        elif LEVEL[parts[1]] >= LEVEL[room]:
            found.append(f"line {line}: {room} (floor {LEVEL[room]}) imports {parts[1]} (floor {LEVEL[parts[1]]})")
    return found


def functions(tree: ast.Module) -> Iterator[tuple[Function, bool]]:
    """Every function, with whether its first parameter is bound (a method's self or cls)."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in child.decorator_list)
                yield child, isinstance(node, ast.ClassDef) and not static


def is_command(function: Function) -> bool:
    """Whether a decorator such as `@app.command()` makes this function a verb, whose parameters are its options."""
    return any(
        isinstance(part, ast.Attribute) and part.attr in ("command", "callback")
        for decorator in function.decorator_list
        for part in ast.walk(decorator)
    )


def handed_over(tree: ast.Module) -> set[str]:
    """Names used as values and not called: callbacks and table entries, which their caller calls by position."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    values = (node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute) and id(node) not in called)
    return {node.id if isinstance(node, ast.Name) else node.attr for node in values if isinstance(node.ctx, ast.Load)}


BITS = re.compile(r"torch\.equal\(|array_equal\(|\.tobytes\(\)")
"""How a test compares bits."""
TESTS = sorted(Path(__file__).parent.glob("test_*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_a_test_that_compares_bits_says_why(path: Path) -> None:
    """`make test-cpus` runs what is marked; a comparison that it does not know fails first on somebody's machine."""
    text = path.read_text(encoding="utf-8")
    if path.name != Path(__file__).name and BITS.search(text):
        assert "pytest.mark.bits(" in text, 'compare to a tolerance, or add pytestmark = pytest.mark.bits("why")'


def crowded(tree: ast.Module) -> list[str]:
    """Functions that are too long or take too many parameters."""
    found = []
    called_by_others = CALLED_BY_OTHERS | handed_over(tree)
    for function, bound in functions(tree):
        at = f"line {function.lineno}: {function.name}"
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            found.append(f"{at} has {length} lines")
        if is_command(function):
            continue
        positional = len(function.args.posonlyargs) + len(function.args.args) - bound
        if positional + len(function.args.kwonlyargs) > MAX_PARAMETERS:
            found.append(f"{at} takes {positional + len(function.args.kwonlyargs)} parameters")
        if positional > MAX_POSITIONAL and function.name not in called_by_others:
            found.append(f"{at} takes {positional} parameters by position; keyword-only after {MAX_POSITIONAL}")
    return found


def chatty(tree: ast.Module) -> list[str]:
    """Calls of print and imports of rich: output that a library must not make."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    found = [f"line {call.lineno}: print" for call in calls if call.func.id == "print"]
    names = imported(tree, package="moeslim")
    return found + [f"line {line}: imports {name}" for line, name in names if name.split(".")[0] == "rich"]


def catches_all(tree: ast.Module) -> list[str]:
    """`except:` and `except Exception` (BaseException is for cleaning up, and must raise again)."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = {part.id for part in ast.walk(node.type or ast.Name("Exception")) if isinstance(part, ast.Name)}
            if "Exception" in caught:
                found.append(f"line {node.lineno}: catches everything")
            if "BaseException" in caught and not (isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None):
                found.append(f"line {node.lineno}: catches BaseException without raising it again")
    return found


def parts_of(name: str) -> list[str]:
    """Every word of a name, and every two of them in a row: `check_room` is check, room, check_room."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_").split("_")
    return words + ["_".join(pair) for pair in pairwise(words)]


def riddles(tree: ast.Module, *, module: str) -> list[str]:
    """Names of the module, its functions, classes and arguments that have a banned word in them."""
    defined = [(1, module)]
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef):
            defined.append((node.lineno, node.name))
        elif isinstance(node, ast.arg):
            defined.append((node.lineno, node.arg))
    return [
        f"line {line}: {name}: say {BANNED[part]} instead of {part}; see the glossary in CONTRIBUTING.md"
        for line, name in defined
        for part in parts_of(name)
        if part in BANNED
    ]


@per_file
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    if room == "":
        return
    assert room in LEVEL, f"{named(path)} stands outside the house; its rooms are in CONTRIBUTING.md"
    package = ".".join(["moeslim", *path.relative_to(SOURCE).parts[:-1]])
    assert upward(parsed(path), room=room, package=package) == []


@per_file
def test_sizes(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{named(path)} has {lines} lines"
    assert crowded(parsed(path)) == []


@per_file
def test_only_the_command_line_prints_and_catches_all(path: Path) -> None:
    if named(path) not in ("cli/main.py", "cli/display.py"):
        assert chatty(parsed(path)) == []
    if named(path) != "cli/main.py":
        assert catches_all(parsed(path)) == []


@per_file
def test_names_and_docstrings(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
    assert ast.get_docstring(parsed(path)), f"{named(path)} does not say what it is"


@per_file
def test_names_are_those_of_the_glossary(path: Path) -> None:
    assert riddles(parsed(path), module=path.stem) == []


@per_file
def test_heavy_packages_enter_through_one_file(path: Path) -> None:
    found = [
        f"line {line}: {name}"
        for line, name in imported(parsed(path), package="moeslim")
        if named(path) not in ENTRANCES.get(name.split(".")[0], {named(path)})
    ]
    assert found == []


def test_files_are_small_on_the_whole() -> None:
    lengths = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES)
    assert lengths[len(lengths) // 2] <= 150


LIGHT = [
    "",
    ".errors",
    ".log",
    ".recipe",
    ".artifacts.run",
    ".families",
    ".plan",
    ".plan.steps",
    ".checkpoint",
    ".commands",
    ".pipeline",
    ".api",
    ".cli.main",
]


@pytest.mark.parametrize("module", LIGHT, ids=lambda name: f"moeslim{name}")
def test_light_imports(module: str) -> None:
    assert heavy_after(f"import moeslim{module}") == set()


def test_help_is_light() -> None:
    code = "import sys; sys.argv = ['moeslim', '--help']; from moeslim.cli.main import main; run(main)"
    assert heavy_after(code) == set()


def heavy_after(code: str) -> set[str]:
    """Which packages that take seconds are loaded after `code`, in a fresh process.

    Which modules are loaded decides how long `--help` takes, and unlike a stopwatch it is the same on every machine.
    """
    program = (
        "import io, contextlib\n"
        "def run(main):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main()\n"
        f"{code}\n"
        "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "moeslim" in loaded
    return loaded & {"torch", "transformers", "datasets", "pyarrow", "pandas", "scipy", "huggingface_hub", "lm_eval"}


# The rules themselves must be able to fail.


def test_upward_sees_local_relative_and_neighbouring_imports() -> None:
    tree = ast.parse("def f():\n    from moeslim.model import load\nfrom moeslim.artifacts import run\n")
    assert upward(tree, room="plan", package="moeslim.plan") == [
        f"line 2: plan (floor {LEVEL['plan']}) imports model (floor {LEVEL['plan']})"
    ]
    assert len(upward(ast.parse("from ..cli import main"), room="plan", package="moeslim.plan")) == 1
    assert len(upward(ast.parse("from moeslim import cli"), room="plan", package="moeslim.plan")) == 1
    assert len(upward(ast.parse("import moeslim.attic"), room="plan", package="moeslim.plan")) == 1
    assert upward(ast.parse("from .steps import Plan"), room="plan", package="moeslim.plan") == []


def test_crowded_counts() -> None:
    assert crowded(ast.parse("def f(a, b, *, c, d, e, g): pass")) == []
    assert len(crowded(ast.parse("def f(a, b, *, c, d, e, g, h): pass"))) == 1
    assert len(crowded(ast.parse("def f(a, b, c): pass"))) == 1
    assert crowded(ast.parse("class A:\n    def f(self, a, b): pass")) == []
    assert crowded(ast.parse("def f(a, b, c): pass\nhook(f)")) == []
    assert len(crowded(ast.parse("def f(a, b, c): pass\nf(1, 2, 3)"))) == 1
    assert crowded(ast.parse("@app.command()\ndef f(a, b, c, d, e, g, h, i): pass")) == []
    assert crowded(ast.parse("def f():\n" + "    x = 1\n" * 59)) == []
    assert len(crowded(ast.parse("def f():\n" + "    x = 1\n" * 60))) == 1


def test_chatty_and_catches_all_see() -> None:
    assert len(chatty(ast.parse("print(1)\nfrom rich.table import Table\nimport rich"))) == 3
    assert chatty(ast.parse("import richness\nlog.print(1)")) == []
    assert len(catches_all(ast.parse("try: f()\nexcept (ValueError, Exception): pass"))) == 1
    assert len(catches_all(ast.parse("try: f()\nexcept: raise"))) == 1
    assert len(catches_all(ast.parse("try: f()\nexcept BaseException: pass"))) == 1
    assert catches_all(ast.parse("try: f()\nexcept BaseException:\n    g()\n    raise")) == []


def test_riddles_are_seen_in_every_kind_of_name() -> None:
    assert riddles(ast.parse("def hear(logits): pass"), module="rows") == [
        "line 1: hear: say log_probs instead of hear; see the glossary in CONTRIBUTING.md"
    ]
    assert len(riddles(ast.parse("class TeacherWord: pass"), module="rows")) == 1
    assert len(riddles(ast.parse("def f(a, *, pull): return lambda told: told"), module="rows")) == 2
    assert len(riddles(ast.parse("def _carry_out(): pass"), module="rows")) == 1
    assert len(riddles(ast.parse(""), module="lanes")) == 1
    assert riddles(ast.parse("def planes(keyword, classroom, sayings): carry = out = 1"), module="airplanes") == []
