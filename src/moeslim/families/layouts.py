"""How routed experts lie in files and in live models: one entry per layout; a family's page says which its files have.

Every matrix is thought of as gate and up (expert_size, hidden) and down (hidden, expert_size), with biases of
expert_size, expert_size and hidden where a layout has them, and without a gate where it has none; a layout says in
which tensors they are found. All that a cut does follows from the axes. Trunk and MTP block may differ, so a layout
belongs to a sub-tree and not to a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from moeslim.errors import CheckpointError
from moeslim.families.axes import names, size
from moeslim.families.shape import Shape
from moeslim.families.spec import Family, Tensor, tensors

Layouts = Mapping[str, str]  # "trunk" and "mtp" -> a key of EXPERT_LAYOUTS, or LIVE

LIVE = "live"
"""Stands for the layout in which the family's class holds its experts: that of `live_layout`."""

EXPERT_LAYOUTS: dict[str, tuple[Tensor, ...]] = {
    "per_expert": tensors("""
        experts  {e}.gate_proj.weight  expert_size, hidden  gate
        experts  {e}.up_proj.weight    expert_size, hidden  up
        experts  {e}.down_proj.weight  hidden, expert_size  down
    """),
    "per_expert_w": tensors("""
        experts  {e}.w1.weight  expert_size, hidden  gate
        experts  {e}.w3.weight  expert_size, hidden  up
        experts  {e}.w2.weight  hidden, expert_size  down
    """),
    "per_expert_ungated": tensors("""
        experts  {e}.up_proj.weight    expert_size, hidden  up
        experts  {e}.down_proj.weight  hidden, expert_size  down
    """),
    "stacked": tensors("""
        experts  gate_up_proj  experts, expert_size|expert_size, hidden  gate_up
        experts  down_proj     experts, hidden, expert_size              down
    """),
    "stacked_ungated": tensors("""
        experts  up_proj    experts, expert_size, hidden  up
        experts  down_proj  experts, hidden, expert_size  down
    """),
    "stacked_transposed": tensors("""
        experts  gate_up_proj  experts, hidden, expert_size|expert_size  gate_up
        experts  down_proj     experts, expert_size, hidden              down
    """),
    "stacked_interleaved": tensors("""
        experts  gate_up_proj       experts, hidden, expert_size*2  gate_up
        experts  down_proj          experts, expert_size, hidden    down
        experts  gate_up_proj_bias  experts, expert_size*2          gate_up_bias
        experts  down_proj_bias     experts, hidden                 down_bias
    """),
    "linear": tensors("""
        experts  input_linear.weight   experts, expert_size|expert_size, hidden  gate_up
        experts  output_linear.weight  experts, hidden, expert_size              down
    """),
}
"""A layout's first product comes first, then the second, then their biases, if any, in the same order."""

_LIVE = {
    "per_expert_ungated": "stacked_ungated",
    "stacked_ungated": "stacked_ungated",
    "stacked_interleaved": "stacked_interleaved",
}
"""How a class holds experts whose files have a layout, where that is not "stacked"."""


class Header(Protocol):
    """What a file says of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Piece:
    """Where one matrix or bias of one expert lies: the tensor, and the index on its first axis if stacked.

    `half`: gate and up are in one tensor, and it is the first (0) or the second of them, one behind the other along the
    neurons or, `interleaved`, in turns. `transposed`: the tensor's axes are the other way round.
    """

    name: str
    stack: int | None
    half: int | None
    interleaved: bool = False
    transposed: bool = False

    def lies_like(self, other: "Piece") -> bool:
        """Whether both are the same part, in the same order, of what their tensors hold of the expert."""
        return (self.half, self.interleaved, self.transposed) == (other.half, other.interleaved, other.transposed)

    def view(self, tensor: Any) -> Any:
        """The matrix (or bias) in its own orientation, as a view of the whole `tensor`."""
        return self.inside(tensor if self.stack is None else tensor[self.stack])

    def inside(self, own: Any) -> Any:
        """The same as a view of what the tensor holds of this expert."""
        own = own.T if self.transposed else own
        if self.half is None:
            return own
        if self.interleaved:
            return own[self.half :: 2]
        length = own.shape[0] // 2
        return own[self.half * length : (self.half + 1) * length]


def live_layout(family: Family) -> str:
    """The layout in which the family's class holds its experts; `model/experts.py` compares it with the class."""
    return _LIVE.get(family.layouts[0], "stacked")


def possible_layouts(family: Family) -> tuple[str, ...]:
    """The layouts that files of a family may have: its page's, and its class's, which a training's states have."""
    return tuple(dict.fromkeys((*family.layouts, live_layout(family))))


def layout_lines(family: Family, layout: str) -> tuple[Tensor, ...]:
    """The tensors of a layout, or of LIVE."""
    return EXPERT_LAYOUTS[live_layout(family) if layout == LIVE else layout]


def file_layouts(family: Family) -> dict[str, str]:
    """The layouts of files that are made anew: the first that the page names."""
    return dict.fromkeys(("trunk", "mtp"), family.layouts[0])


def detect(headers: Mapping[str, Header], shape: Shape) -> dict[str, str]:
    """The layout of each sub-tree that has routed experts, read from tensors' names, and from shapes where these agree.

    Only `possible_layouts` are candidates. Where no shape fits, or all shapes fit several of them, it is the first of
    them. (All shapes never fit two that differ in orientation alone: gate and up are square, or down is.) Raises
    CheckpointError when one sub-tree mixes layouts, or has experts in none of them.
    """
    found: dict[str, dict[str, frozenset[str]]] = {}
    family, marker, head = shape.family, f".{shape.family.expert_prefix}.", shape.prefix("mtp.0")
    others = {tensor.name for part in family.parts.values() for tensor in part}
    for name in headers if family.expert_prefix else ():
        tail = name.partition(marker)[2]
        if tail and f"{family.expert_prefix}.{tail}" not in others:
            subtree = "mtp" if head and name.startswith(head) else "trunk"
            found.setdefault(subtree, {})[name] = _layouts_with(family, name, tail=tail)
    layouts = {}
    for subtree, fitting in found.items():
        left = [layout for layout in possible_layouts(family) if all(layout in each for each in fitting.values())]
        if not left:
            mixed = {layout for each in fitting.values() for layout in each}
            raise CheckpointError(
                f"the {subtree}'s experts lie in more than one layout ({', '.join(sorted(mixed))}); "
                "a sub-tree must be in one: re-export the checkpoint"
            )
        own = {name: headers[name].shape for name in fitting}
        exact = [layout for layout in left if len(left) > 1 and _fits(own, layout, shape=shape)]
        layouts[subtree] = (exact or left)[0]
    return layouts


def _layouts_with(family: Family, name: str, *, tail: str) -> frozenset[str]:
    found = frozenset(layout for layout in possible_layouts(family) if _line(layout, tail) is not None)
    if not found:
        raise CheckpointError(
            f"{name}: no known layout of {family.model_type}'s experts has a tensor named like this; known are "
            f"{', '.join(possible_layouts(family))} (a new one is added in families/layouts.py and named on the page)"
        )
    return found


def _line(layout: str, tail: str) -> Tensor | None:
    """The line of a layout that a name behind the experts' prefix belongs to."""
    head, _, rest = tail.partition(".")
    return _by_name(layout).get("{e}." + rest if head.isdigit() else tail)


@cache
def _by_name(layout: str) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in EXPERT_LAYOUTS[layout]}


def _fits(found: Mapping[str, tuple[int, ...]], layout: str, *, shape: Shape) -> bool:
    """Whether tensors of a sub-tree, by name, have the shapes that the layout gives them."""
    marker = f".{shape.family.expert_prefix}."
    for name, lengths in found.items():
        line = _line(layout, name.partition(marker)[2])
        if line is None or tuple(size(axis, shape.sizes) for axis in line.axes) != lengths:
            return False
    return True


def pieces(layout: str, prefix: str, *, expert: int) -> dict[str, Piece]:
    """Where expert number `expert` has its "gate" (if any), "up" and "down", e.g. under `model.layers.3.mlp.experts`.

    And "gate_bias", "up_bias" and "down_bias" where the layout has biases.
    """
    found = {}
    for tensor in EXPERT_LAYOUTS[layout]:
        name = f"{prefix}.{tensor.name.replace('{e}', str(expert))}"
        stack = None if "{e}" in tensor.name else expert
        for matrix, half in _held(tensor):
            found[matrix] = Piece(name, stack, half, *_order(tensor))
    return found


@cache
def arrangement(layout: str) -> tuple[tuple[Tensor, Mapping[str, Piece]], ...]:
    """The lines of a stacked layout, each with the pieces of an expert that lie in it."""
    own = pieces(layout, "", expert=0)
    lines = EXPERT_LAYOUTS[layout]
    return tuple((line, {m: piece for m, piece in own.items() if piece.name == f".{line.name}"}) for line in lines)


def _held(tensor: Tensor) -> tuple[tuple[str, int | None], ...]:
    """The matrices (or biases) in a tensor of an expert, each with its half where there are two."""
    assert tensor.matrix is not None
    if tensor.matrix.startswith("gate_up"):
        kind = tensor.matrix.removeprefix("gate_up")
        return (f"gate{kind}", 0), (f"up{kind}", 1)
    return ((tensor.matrix, None),)


@cache
def _order(tensor: Tensor) -> tuple[bool, bool]:
    """Whether gate and up come in turns in a tensor, and whether it is transposed."""
    own = [axis for axis in tensor.axes if axis != "experts"]
    neurons = next((place for place, axis in enumerate(own) if "expert_size" in names(axis)), None)
    if neurons is None or tensor.matrix is None:  # the bias of the second product
        return False, False
    together = tensor.matrix.startswith("gate_up")
    return together and "|" not in own[neurons], len(own) > 1 and neurons != int(tensor.matrix == "down")
