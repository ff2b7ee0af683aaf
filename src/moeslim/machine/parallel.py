"""Several processes at one job, as torchrun starts them: rank 0 runs the command, the other ranks serve it.

Files, locks, plans and reports are rank 0's alone, and their code knows of no other process. What all do together
(training, calibrating, evaluating) rank 0 starts with `together`; the other ranks wait in `serve` and run it too.
In one process every function here does little or nothing.
"""

import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from moeslim.errors import Interrupted, MoeslimError, RunError, TrainingError
from moeslim.machine.host import tune_cpu
from moeslim.machine.rank_failure import end_at_once, gone, is_loss, terminated

T = TypeVar("T")

STEP_TIMEOUT = timedelta(minutes=30)
"""Longest wait for the others inside a step, where all arrive within moments of each other."""

WAIT_TIMEOUT = timedelta(days=30)
"""Longest wait for a message: rank 0 packs text for hours. That a process has died shows in its closed sockets."""

PATIENCE_SECONDS = 5.0
"""How long a process that failed waits to see whether the others failed too."""

ALIKE = (Interrupted, TrainingError)
"""Errors that all ranks raise after the same collective, so that only rank 0 has to report them."""


@dataclass(frozen=True)
class World:
    """This process among those of the run: `local_size` are on its machine; `device` is where its model belongs."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    local_size: int = 1


class _Run:
    """What `join` set up: the group of all control messages, the store for signs of failure, the calls so far."""

    def __init__(self, control: dist.ProcessGroup, store: dist.Store) -> None:
        self.control, self.store = control, store
        self.calls = 0
        self.inside = False
        self.broken = False


_world: World | None = None
_run: _Run | None = None


def world() -> World:
    """This process's place. Without `join` it is alone, on a GPU where there is one."""
    return _world or World(device="cuda" if torch.cuda.is_available() else "cpu")


def join() -> None:
    """Meet the other processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE).

    Tensors travel by gloo between CPUs and by nccl between GPUs. One process joins no group. Raises RunError where
    torchrun's settings are not whole, or a machine has more processes than GPUs.
    """
    global _world, _run
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise RunError(
            f"WORLD_SIZE is {size}, and {', '.join(missing)} is not set; start several processes with torchrun, or "
            "unset WORLD_SIZE for one"
        )
    local, on_machine = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = torch.cuda.is_available()
    if on_gpu and on_machine > torch.cuda.device_count():
        raise RunError(
            f"{on_machine} processes on this machine, which has {torch.cuda.device_count()} GPUs for them; start at "
            "most one for each (--nproc-per-node), or hide the GPUs (CUDA_VISIBLE_DEVICES=) to work on the CPU"
        )
    if on_gpu:
        torch.cuda.set_device(local)
    met, _, _ = next(rendezvous("env://", rank, size, timeout=STEP_TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    store = dist.PrefixStore("ranks", met)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT)
    # A group of its own: a message may be waited for without end, a step's collective may not.
    control = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    assert control is not None
    _run = _Run(control, dist.PrefixStore("calls", met))
    _world = World(rank, size, f"cuda:{local}" if on_gpu else "cpu", on_machine)


def disconnect() -> None:
    """Rank 0 tells the other ranks to exit; process groups are destroyed. Does nothing alone or when a rank is lost."""
    global _world, _run
    run, _run, _world = _run, None, None
    if run is None or run.broken:
        return
    try:
        if dist.get_rank() == 0:
            dist.broadcast_object_list([None], src=0, group=run.control)
        dist.destroy_process_group()
    except RuntimeError as problem:
        if not is_loss(problem):
            raise


def run_on_rank0(lead: Callable[[], int], *, follow: Callable[[], int]) -> int:
    """The exit code of one process of a run: rank 0 executes `lead`, the others `follow`, which calls `serve`."""
    join()
    run = _run
    if run is None:
        return lead()
    code = 1
    try:
        if world().rank:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all; rank 0 decides
            code = follow()
        else:
            signal.signal(signal.SIGTERM, terminated)
            code = lead()
    except BaseException:
        if run.broken:
            traceback.print_exc()
            end_at_once(code)
        raise
    finally:
        disconnect()
    if run.broken:
        end_at_once(code)
    return code


def together(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a module's function on all ranks with the same (pickled) arguments; rank 0's result.

    Rank 0 calls this; inside such a call, where all ranks are, and in one process it is a plain call. An exception of
    rank 0 is raised here; that another process has ended, as RunError.
    """
    run = _run
    if run is None or run.inside:
        return function(*args, **kwargs)
    assert world().rank == 0, "rank 0 leads; the others wait in serve()"
    message = pickle.dumps((function, args, kwargs))
    run.calls, run.inside = run.calls + 1, True
    try:
        dist.broadcast_object_list([message], src=0, group=run.control)
        return function(*args, **kwargs)
    except BaseException as problem:
        if lost := is_loss(problem):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which must not cut the message short
        run.broken = not _report_failure(run, others=0 if lost else world().size - 1) or lost
        if lost:
            raise gone(problem) from problem
        raise
    finally:
        run.inside = False


def serve() -> int:
    """Run what rank 0 starts with `together` until it disconnects; the exit code. For ranks above 0.

    Where this rank alone fails, the process has to end, for the others' collectives to fail instead of waiting: the
    error is raised. An error that rank 0 reports is not reported again.
    """
    run = _run
    assert run is not None, "join() comes first"
    tune_cpu()  # as rank 0 does before it runs a model
    while True:
        box: list[Any] = [None]
        try:
            dist.broadcast_object_list(box, src=0, group=run.control)
        except RuntimeError as problem:
            run.broken = True
            if is_loss(problem):
                return 1  # rank 0 has died without a message; torchrun says how
            raise
        if box[0] is None:
            return 0
        run.calls, run.inside = run.calls + 1, True
        sign = f"failed/{run.calls}"
        try:
            function, args, kwargs = pickle.loads(box[0])
            function(*args, **kwargs)
        except (MoeslimError, RuntimeError) as problem:
            lost = is_loss(problem)
            patience = 0.0 if lost else PATIENCE_SECONDS  # others may learn of a loss through this one
            reported = isinstance(problem, ALIKE) or _soon(partial(run.store.check, [sign]), seconds=patience)
            run.broken = lost or not reported
            if lost and reported:
                return 1
            if lost:
                raise gone(problem) from problem
            if not reported:
                raise
        except BaseException:
            run.broken = True
            raise
        finally:
            run.inside = False
        run.store.add(f"back/{run.calls}", 1)


def _report_failure(run: _Run, *, others: int) -> bool:
    """Record that rank 0 has failed in this call; whether so many other ranks have returned from it, or soon do.

    If not, they still wait in it, and end when this process does.
    """
    try:
        run.store.set(f"failed/{run.calls}", "yes")
    except RuntimeError:  # even the store is gone
        return False
    return _soon(lambda: run.store.add(f"back/{run.calls}", 0) >= others)


def _soon(happened: Callable[[], bool], *, seconds: float = PATIENCE_SECONDS) -> bool:
    """Whether it happens within a moment; False where even the store is gone."""
    until = time.monotonic() + seconds
    try:
        while not happened():
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
    except RuntimeError:
        return False
    return True


def gather(value: T) -> list[T]:
    """Every rank's value in rank order, on all ranks; anything that can be pickled."""
    if _run is None:
        return [value]
    found: list[Any] = [None] * world().size
    dist.all_gather_object(found, value, group=_run.control)
    return found


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, on all ranks; the tensor itself in one process."""
    if _run is None:
        return tensor
    summed = tensor.clone()
    dist.all_reduce(summed)
    return summed


def barrier() -> None:
    """Wait until all ranks are here, however long that takes."""
    gather(None)
