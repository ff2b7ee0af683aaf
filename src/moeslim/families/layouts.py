"""How routed experts lie in files: one entry per layout, shared by all families.

Every matrix is thought of as gate and up (expert_size, hidden) and down (hidden, expert_size); a layout says in which
tensors they are found. Trunk and MTP block may differ, so a layout belongs to a sub-tree and not to a model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moeslim.errors import CheckpointError
from moeslim.families.shape import Shape
from moeslim.families.spec import Tensor, tensors

Layouts = Mapping[str, str]  # "trunk" and "mtp" -> a key of EXPERT_LAYOUTS


EXPERT_LAYOUTS: dict[str, tuple[Tensor, ...]] = {
    "per_expert": tensors("""
        experts  {e}.gate_proj.weight  expert_size, hidden  gate
        experts  {e}.up_proj.weight    expert_size, hidden  up
        experts  {e}.down_proj.weight  hidden, expert_size  down
    """),
    "stacked": tensors("""
        experts  gate_up_proj  experts, expert_size|expert_size, hidden  gate_up
        experts  down_proj     experts, hidden, expert_size              down
    """),
}


@dataclass(frozen=True)
class Piece:
    """Where one matrix of one expert lies: the tensor, the index on its first axis if stacked, the half of its rows."""

    name: str
    stack: int | None
    half: int | None


def detect(names: Iterable[str], shape: Shape) -> dict[str, str]:
    """The layout of each sub-tree that has routed experts, read from tensor names.

    Raises CheckpointError when one sub-tree mixes layouts, or has experts in none of them.
    """
    found: dict[str, set[str]] = {}
    marker, head = f".{shape.family.expert_prefix}.", shape.prefix("mtp.0")
    for name in names:
        if not shape.family.expert_prefix or marker not in name:
            continue
        subtree = "mtp" if head and name.startswith(head) else "trunk"
        found.setdefault(subtree, set()).add(_layout_of(name, name.split(marker, 1)[1]))
    for subtree, layouts in found.items():
        if len(layouts) > 1:
            raise CheckpointError(
                f"the {subtree}'s experts lie in more than one layout ({', '.join(sorted(layouts))}); "
                "a sub-tree must be in one: re-export the checkpoint"
            )
    return {subtree: next(iter(layouts)) for subtree, layouts in found.items()}


def _layout_of(full_name: str, tail: str) -> str:
    head, _, rest = tail.partition(".")
    pattern = "{e}." + rest if head.isdigit() else tail
    for layout, lines in EXPERT_LAYOUTS.items():
        if any(tensor.name == pattern for tensor in lines):
            return layout
    raise CheckpointError(
        f"{full_name}: no known layout of experts has a tensor named like this; known are "
        f"{', '.join(EXPERT_LAYOUTS)} (families/layouts.py is where a new one is added)"
    )


def pieces(layout: str, prefix: str, *, expert: int) -> dict[str, Piece]:
    """Where expert number `expert` has its gate, up and down matrix, e.g. under `model.layers.3.mlp.experts`."""
    found = {}
    for tensor in EXPERT_LAYOUTS[layout]:
        name = f"{prefix}.{tensor.name.replace('{e}', str(expert))}"
        stack = None if "{e}" in tensor.name else expert
        if tensor.matrix == "gate_up":
            found["gate"], found["up"] = Piece(name, stack, 0), Piece(name, stack, 1)
        else:
            assert tensor.matrix is not None
            found[tensor.matrix] = Piece(name, stack, None)
    return found
