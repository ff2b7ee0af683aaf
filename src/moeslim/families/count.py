"""How many parameters a shape has, in all and per token, from the tensor table alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from moeslim.families.shape import Shape
from moeslim.families.table import STACKED, table


@dataclass(frozen=True)
class Count:
    """Parameters of the trunk by component, of the trunk in all and active per token, and of the MTP head."""

    components: Mapping[str, int]
    total: int
    active: int
    mtp: int
    mtp_active: int


def count(shape: Shape) -> Count:
    """Parameters of a shape. Active ones count embedding and head whole and k of E routed experts (method section 7).

    The size of the MTP head is counted apart, since a config does not say whether files have one.
    """
    components: dict[str, int] = {}
    sums = {"trunk": [0, 0], "mtp": [0, 0]}
    for row in table(shape, STACKED).values():
        active = row.parameters
        if row.component == "experts":
            active = row.parameters // shape["experts"] * shape["top_k"]
        sums[row.subtree][0] += row.parameters
        sums[row.subtree][1] += active
        if row.subtree == "trunk":
            components[row.component] = components.get(row.component, 0) + row.parameters
    return Count(components, sums["trunk"][0], sums["trunk"][1], sums["mtp"][0], sums["mtp"][1])
