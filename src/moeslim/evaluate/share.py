"""Who measures what, where several processes evaluate: whole pieces of work, each done as one process would do it."""

from collections.abc import Sequence

from moeslim.machine import parallel


def owners(sizes: Sequence[int], processes: int) -> list[int]:
    """Per piece of work the process that does it: the largest piece first, to the process with least so far."""
    loads = [0] * processes
    found = [0] * len(sizes)
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        found[piece] = loads.index(min(loads))
        loads[found[piece]] += sizes[piece]
    return found


def own(sizes: Sequence[int]) -> list[int]:
    """The numbers, ascending, of the pieces that this process does; all of them where it is the only one."""
    world = parallel.world()
    return [piece for piece, owner in enumerate(owners(sizes, world.size)) if owner == world.rank]
