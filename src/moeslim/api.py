"""moeslim from Python: the command line's commands with its arguments, as functions; each returns a record.

    from moeslim import api

    api.prune("demo", "small", keep={"experts": "50%"})

What they take and return is in docs/python.md. Importing this loads neither torch nor transformers.
"""

from moeslim.commands.describe import inspect, preview
from moeslim.commands.files import calibrate, cut, plan, probe, verify
from moeslim.commands.forecast import preview_run
from moeslim.commands.measure import evaluate, evaluate_tasks, report
from moeslim.commands.propose import Machines, propose
from moeslim.commands.training import cache_teacher, distill
from moeslim.pipeline import prune, run
from moeslim.plan.budget import Budget
from moeslim.study.compare import compare
from moeslim.study.run import study

__all__ = [
    "Machines",
    "Budget",
    "cache_teacher",
    "calibrate",
    "compare",
    "cut",
    "distill",
    "evaluate",
    "evaluate_tasks",
    "inspect",
    "plan",
    "preview",
    "preview_run",
    "probe",
    "propose",
    "prune",
    "report",
    "run",
    "study",
    "verify",
]
