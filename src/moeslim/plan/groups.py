"""Routers that choose groups of experts first: what such a router still can do with fewer experts.

`n_group` groups of E / n_group consecutive experts each; per token only `topk_group` of them are open, ranked by the
sum of the two best experts of each (DeepSeek-V3), or by the best (DeepSeek-V2). A router without groups is one group.
"""

from collections.abc import Sequence

from moeslim.errors import PlanError
from moeslim.families.shape import Shape


def check_groups(shape: Shape, experts: int, *, top_k: int, where: str) -> None:
    """PlanError unless `experts` split evenly, leave enough to rank each group, and `top_k` of them can be reached."""
    groups, opened = shape.groups, shape.topk_group
    if "groups" not in shape.sizes:
        return
    share = f"{where}: {experts} experts in the router's {groups} groups (n_group)"
    if experts % groups:
        below = experts // groups * groups
        allowed = f"{below} or {below + groups}" if below else str(groups)
        raise PlanError(f"{share} are not the same number in each; keep a multiple of {groups}, so {allowed}")
    best = shape.family.ranked_by
    if experts // groups < best:
        raise PlanError(
            f"{share} are {experts // groups} in each, and a group is ranked by its {best} best experts; "
            f"keep at least {best * groups}"
        )
    reach = opened * experts // groups
    if reach < top_k:
        raise PlanError(
            f"{share}, {opened} of them open to a token (topk_group), are {reach} to choose from, but the router "
            f"selects {top_k} (num_experts_per_tok); keep at least {-(-top_k // opened) * groups} experts or a top_k "
            f"of at most {reach}"
        )


def check_equal_cuts(kept: Sequence[int], experts: int, *, groups: int, where: str) -> None:
    """PlanError unless the `kept` ones of `experts` are equally many in each of `groups`."""
    size = experts // groups
    counts = [sum(size * group <= expert < size * (group + 1) for expert in kept) for group in range(groups)]
    for group, count in enumerate(counts):
        if count != counts[0]:
            raise PlanError(
                f"{where}: {count} experts stay in group {group} (experts {size * group}..{size * (group + 1) - 1}) "
                f"and {counts[0]} in group 0; the router has {groups} groups (n_group) of one size, so keep the same "
                "number in each"
            )
