"""Functions on several ranks at once: processes that talk over gloo on the CPU, as torchrun would start them.

The processes are started once and stay for the tests to come.
"""

import atexit
import multiprocessing as mp
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from micro import PRELOAD

TIMEOUT_SECONDS = 300


def run(function: Callable[..., Any], *args: Any, world: int = 2, **kwargs: Any) -> list[Any]:
    """What every rank's call of `function` returned, in rank order. `together` is a plain call inside.

    The function must lie in a module under tests/ or src/; arguments and values are pickled. An exception of rank 0 is
    raised here, another rank's as an AssertionError with its traceback.
    """
    return _lead(_everywhere, (function, args, kwargs), {}, world=world)


def lead(function: Callable[..., Any], *args: Any, world: int = 2, **kwargs: Any) -> Any:
    """What `function` returns on rank 0, which alone calls it; the others serve it, as under the command line."""
    return _lead(function, args, kwargs, world=world)


def _everywhere(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    from moeslim.machine import parallel

    return parallel.together(_gathered, function, args, kwargs)


def _gathered(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    from moeslim.machine import parallel

    return parallel.gather(function(*args, **kwargs))


class _Process:
    """One of the processes, which does what comes through its pipe."""

    def __init__(self) -> None:
        # forked off one process that has imported what all need: that is what starting takes
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        with patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):  # read once, when the server starts
            self.process.start()
        theirs.close()

    def answer(self) -> tuple[str, Any]:
        """("value", what the function returned), ("raised", the exception), or the process is gone ("died", why)."""
        try:
            if not self.pipe.poll(TIMEOUT_SECONDS):
                return "died", f"no answer after {TIMEOUT_SECONDS} s"
            return pickle.loads(self.pipe.recv_bytes())
        except EOFError:
            self.process.join()
            return "died", f"ended with exit code {self.process.exitcode}"


_processes: list[_Process] = []


def stop() -> None:
    """End all processes; the next call starts new ones."""
    for one in _processes:
        one.process.kill()
        one.process.join()
    _processes.clear()


atexit.register(stop)


def _lead(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, world: int) -> Any:
    while len(_processes) < world:
        _processes.append(_Process())
    # the parent has the store's server, as torchrun has: nobody has to guess a free port
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(world)}
    place |= {"LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for rank, one in enumerate(_processes[:world]):
        job = (place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, function, args, kwargs)
        one.pipe.send_bytes(pickle.dumps(job))
    answers = [one.answer() for one in _processes[:world]]
    failed = {rank: found for rank, (kind, found) in enumerate(answers) if kind != "value"}
    if not failed:
        return answers[0][1]
    if any(kind == "died" for kind, _ in answers):
        stop()
    others = "\n".join(f"rank {rank}: {found}" for rank, found in failed.items())
    if isinstance(failed.get(0), BaseException):
        failed[0].add_note(others)
        raise failed[0]
    raise AssertionError(others)


def _work(pipe: Connection) -> None:
    """What a process does until its parent goes: one job after another, each in a world of its own."""
    from moeslim.machine import parallel

    torch.set_num_threads(1)
    while True:
        try:
            environment, function, args, kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        os.environ.update(environment)
        answer: tuple[str, Any]
        try:
            parallel.join()
            answer = ("value", parallel.serve() if parallel.world().rank else function(*args, **kwargs))
        except BaseException as problem:
            problem.add_note(traceback.format_exc())
            answer = ("raised", problem)
        if answer[0] == "raised" and (parallel.world().rank or parallel._run is None or parallel._run.broken):
            answer = ("died", answer[1])
        parallel.disconnect()
        try:
            message = pickle.dumps(answer)
        except (pickle.PicklingError, TypeError, AttributeError):
            message = pickle.dumps((answer[0], AssertionError(repr(answer[1]))))
        pipe.send_bytes(message)
        if answer[0] == "died":  # the others' collectives must fail, not wait
            os._exit(1)
