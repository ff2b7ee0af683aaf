"""What the command line can do, one function per verb with its arguments; each returns a record (a JSON-able dict).

`lines` in a record is what the command line prints. Whole runs are told in pipeline.py.
"""

from moeslim.describe import inspect, preview
from moeslim.forecast import preview_run
from moeslim.verbs.files import calibrate, cut, plan, probe, verify
from moeslim.verbs.measure import comparison, differences, evaluate, evaluate_tasks, report
from moeslim.verbs.training import cache_teacher, distill

__all__ = [
    "cache_teacher",
    "calibrate",
    "comparison",
    "cut",
    "differences",
    "distill",
    "evaluate",
    "evaluate_tasks",
    "inspect",
    "plan",
    "preview",
    "preview_run",
    "probe",
    "report",
    "verify",
]
