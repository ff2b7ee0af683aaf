"""What a process of several does when another one has gone: notice it, say it, and end instead of waiting for it."""

import os
import signal
import sys
from typing import NoReturn

import torch.distributed as dist

from moeslim.errors import Interrupted, RunError

GONE = (
    "another process of this run has ended (what it said stands above, if it could say anything); what was saved "
    "stays, and the same command resumes from there"
)

SIGNS = ("closed by peer", "reset by peer", "broken pipe", "gloo/transport", "timed out waiting")
"""What gloo's errors say, which are plain RuntimeErrors, when a process at the other end of a socket has gone."""

OWN_SIGNS = ("remote process", "connect", "socket", "timed out", "timeout")
"""What else torch.distributed's own errors (nccl's and the store's) say then."""


def is_loss(problem: BaseException) -> bool:
    """Whether an exception out of a collective means that another process is gone."""
    if not isinstance(problem, RuntimeError):
        return False
    signs = SIGNS + OWN_SIGNS if isinstance(problem, dist.DistError) else SIGNS
    return any(sign in str(problem).lower() for sign in signs)


def gone(problem: BaseException) -> RunError:
    """The user's message for such an exception, with the exception's own text first."""
    first = str(problem).splitlines()[0].partition(". ")[0]
    return RunError(f"{GONE} ({first.rpartition('.cc:')[2].partition('] ')[2] or first})")


def terminated(_number: int, _frame: object) -> NoReturn:
    """Handle SIGTERM: torchrun ends all processes with it when one has died, as a scheduler does when time is up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted(
        "SIGTERM: stopped, because it was asked for or because another process of this run has ended; what is "
        "finished stays, and the same command resumes from there"
    )


def end_at_once(code: int) -> NoReturn:
    """End without the interpreter's farewell, in which a group that lost a process may wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
