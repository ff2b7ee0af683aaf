"""Everything that is proven of every family with a page, and its table in docs/families.md: `make families`.

make families    # or: .venv/bin/python tests/families.py [FAMILY ...] [--cells NAME,NAME] [--keep-docs]

By hand, some ten seconds per family. The last line is JSON: `families`, `exact` (cells that hold), `failed`. A cell
that cannot hold is listed in REASONS; one that fails without a reason, or holds in spite of one, counts as failed. The
table is written when all families and cells were asked for.
"""

import argparse
import json
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import cells  # noqa: E402, F401 - enters the cells
from case import CELLS, REASONS, TOKENS, Case, Figure, pages_without_models, with_pages  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
START, END = "<!-- what `make families` measured, written by it -->", "<!-- end -->"
Outcome = Figure | str | None
"""A cell's figure, why there is none, or None where the family has no such part."""


def ask(family: str, wanted: Sequence[str]) -> dict[str, Outcome]:
    """What the cells say of a family, printed line by line."""
    found: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as work:
        case = Case(family, Path(work))
        for name in wanted:
            start = time.perf_counter()
            try:
                found[name] = CELLS[name][0](case)
            except Exception as problem:  # whatever stops a cell is its outcome, and is counted
                found[name] = f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
            outcome, mark = found[name], "ok" if holds(found[name]) else "FAIL"
            if (family, name) in REASONS and mark == "FAIL":
                mark = f"cannot: {REASONS[family, name]};"
            shown = "-" if outcome is None else described(outcome)
            print(f"{family:18} {name:12} {mark} {shown} ({time.perf_counter() - start:.1f} s)", flush=True)
    return found


def holds(outcome: Outcome) -> bool:
    """Whether a cell proves something, or has nothing to prove."""
    return outcome is None or (isinstance(outcome, Figure) and outcome.good)


def described(outcome: Figure | str) -> str:
    """The figure with what it must not exceed, or the message."""
    if isinstance(outcome, str):
        return outcome
    apart = "" if outcome.wrong is None else f", a wrong cut {outcome.wrong:.1e}"
    return f"{outcome.value:.1e} (at most {outcome.bound:.0e}{apart})"


def failures(results: Mapping[str, Mapping[str, Outcome]]) -> list[str]:
    """Cells that do not hold and are not listed, and listed ones that hold."""
    pairs = [(family, name, outcome) for family, row in results.items() for name, outcome in row.items()]
    return [f"{family}: {name}" for family, name, outcome in pairs if holds(outcome) == ((family, name) in REASONS)]


def table(results: Mapping[str, Mapping[str, Outcome]], sizes: Mapping[str, int]) -> list[str]:
    """The lines for docs/families.md: what each cell is, the figures, and the reasons."""
    names = list(CELLS)
    numbers = {reason: number for number, reason in enumerate(dict.fromkeys(REASONS.values()), start=1)}

    def entry(family: str, name: str) -> str:
        outcome = results[family][name]
        if (family, name) in REASONS:
            return f"({numbers[REASONS[family, name]]})"
        return "-" if outcome is None else str(outcome) if holds(outcome) else "**fails**"

    legend = [line for name in names for line in _wrapped(f"- {name}: {CELLS[name][1]}", indent="  ")]
    head = [f"| | values | {' | '.join(names)} |", f"|---|{'---|' * (len(names) + 1)}"]
    rows = [f"| {f} | {sizes[f]:,} | {' | '.join(entry(f, name) for name in names)} |" for f in results]
    used = {REASONS[family, name] for family in results for name in names if (family, name) in REASONS}
    reasons = [line for r, n in numbers.items() if r in used for line in (*_wrapped(f"({n}) {r}."), "")]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    said = _wrapped(
        "`make families` builds a random model of each family with transformers' own class, saves it with "
        f"`save_pretrained` and asks ({versions}, one thread, rows of {TOKENS.shape[1]} tokens):"
    )
    behind = _wrapped(
        "A dash: the family has no such part. Cuts are compared in float64, on logits; a wrong cut differs by 100 "
        "times as much as is allowed, or the cell fails."
    )
    return [*said, "", *legend, "", *behind, "", *head, *rows, *(["", *reasons[:-1]] if reasons else [])]


def _wrapped(text: str, *, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def write(lines: Sequence[str]) -> None:
    """Put the lines between the marks of docs/families.md; what is written around them by hand stays."""
    text = PAGE.read_text(encoding="utf-8")
    before, mark, rest = text.partition(START)
    _, end, after = rest.partition(END)
    assert mark, f"{PAGE} has no line {START}"
    assert end, f"{PAGE} has no line {END}"
    PAGE.write_text("\n".join([before + START, "", *lines, "", END + after]), encoding="utf-8")


def values(family: str) -> int:
    """How many values the tiny model has on disk."""
    with tempfile.TemporaryDirectory() as work:
        tensors = load_file(Case(family, Path(work)).single / "model.safetensors")
    return sum(tensor.numel() for tensor in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("families", nargs="*", help="some of them; without, all that have a page")
    parser.add_argument("--cells", default=",".join(CELLS), help="some of them, by commas")
    parser.add_argument("--keep-docs", action="store_true", help="do not write docs/families.md")
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    wanted, there = asked.cells.split(","), with_pages()
    chosen = asked.families or there
    unknown = sorted({*chosen} - {*there}) + sorted({*wanted} - {*CELLS})
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: families are {', '.join(there)}; cells are {', '.join(CELLS)}")
    results = {family: ask(family, wanted) for family in chosen}
    failed = [*failures(results), *(f"{page}: no tiny model" for page in pages_without_models())]
    if (chosen, wanted) == (there, list(CELLS)) and not asked.keep_docs:
        write(table(results, {family: values(family) for family in chosen}))
    exact = sum(isinstance(outcome, Figure) and outcome.good for row in results.values() for outcome in row.values())
    print(json.dumps({"families": len(results), "exact": exact, "failed": failed}))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
