"""Axis expressions, a small language in which pages say what an axis of a tensor is made of.

`hidden` is a named axis, `4` a fixed number, `a|b` puts parts one behind the
other, `a*b` repeats b for every unit of a (a is the outer index), brackets group. So the rows of Qwen3-Next's query
projection, [query | gate] for every head, are `heads*(head_dim|head_dim)`, and keeping heads 0 and 2 keeps two whole
blocks. Cutting a named axis cuts it everywhere that its name appears; nothing else knows where a channel lives.
"""

import re
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from moeslim.errors import FamilyError

_TOKEN = re.compile(r"\s*([a-z_]+|\d+|[|*()])")


@lru_cache(maxsize=4096)
def parse(expression: str) -> tuple:
    """A tree of ("name", x), ("fixed", n), ("join", parts) and ("each", outer, inner) for an axis expression."""
    tokens = _TOKEN.findall(expression)
    if "".join(tokens) != expression.replace(" ", ""):
        raise ValueError(f"axis expression {expression!r} has a character outside a-z, _, digits and | * ( )")

    def joined() -> tuple:
        parts = [product()]
        while tokens and tokens[0] == "|":
            tokens.pop(0)
            parts.append(product())
        return parts[0] if len(parts) == 1 else ("join", tuple(parts))

    def product() -> tuple:
        left = factor()
        if tokens and tokens[0] == "*":
            tokens.pop(0)
            return ("each", left, product())
        return left

    def factor() -> tuple:
        token = tokens.pop(0)
        if token == "(":
            inside = joined()
            assert tokens.pop(0) == ")", expression
            return inside
        return ("fixed", int(token)) if token.isdigit() else ("name", token)

    tree = joined()
    assert not tokens, expression
    return tree


def size(expression: str, sizes: Mapping[str, int]) -> int:
    """How long the axis is, given the size of every named axis."""
    return _size(parse(expression), sizes)


def _size(tree: tuple, sizes: Mapping[str, int]) -> int:
    kind = tree[0]
    if kind == "fixed":
        return tree[1]
    if kind == "name":
        if tree[1] not in sizes:
            raise FamilyError(f"the config gives no size for the axis {tree[1]!r}")
        return sizes[tree[1]]
    if kind == "join":
        return sum(_size(part, sizes) for part in tree[1])
    return _size(tree[1], sizes) * _size(tree[2], sizes)


def positions(expression: str, sizes: Mapping[str, int], *, kept: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The flat positions along the axis that stay when the named axes keep `kept`; None when all of them stay.

    `sizes` are those before the cut; the order of `kept` is the order of the result.
    """
    tree = parse(expression)
    if not any(name in kept for name in _names(tree)):
        return None
    return _positions(tree, sizes, kept=kept)


def names(expression: str) -> frozenset[str]:
    """The named axes that an expression is made of."""
    return frozenset(_names(parse(expression)))


def _names(tree: tuple) -> list[str]:
    if tree[0] == "name":
        return [tree[1]]
    if tree[0] == "join":
        return [name for part in tree[1] for name in _names(part)]
    return [name for part in tree[1:] for name in _names(part)] if tree[0] == "each" else []


def _positions(tree: tuple, sizes: Mapping[str, int], *, kept: Mapping[str, np.ndarray]) -> np.ndarray:
    kind = tree[0]
    if kind == "fixed":
        return np.arange(tree[1])
    if kind == "name":
        return np.asarray(kept[tree[1]]) if tree[1] in kept else np.arange(_size(tree, sizes))
    if kind == "join":
        starts = np.cumsum([0] + [_size(part, sizes) for part in tree[1]])
        pieces = [start + _positions(part, sizes, kept=kept) for start, part in zip(starts[:-1], tree[1], strict=True)]
        return np.concatenate(pieces)
    outer, inner = _positions(tree[1], sizes, kept=kept), _positions(tree[2], sizes, kept=kept)
    return (outer[:, None] * _size(tree[2], sizes) + inner[None, :]).reshape(-1)
