"""Decisions as data: what stays, by which importance, in which stages; deterministic, and no weight is read."""

from moeslim.plan.check import check_plan, final_shape
from moeslim.plan.file import Plan, parse_plan, plan_text, read_plan, write_plan
from moeslim.plan.make import make_plan
from moeslim.plan.schedule import StageTarget, Target, resolve, stages, units

__all__ = [
    "Plan",
    "StageTarget",
    "Target",
    "check_plan",
    "final_shape",
    "make_plan",
    "parse_plan",
    "plan_text",
    "read_plan",
    "resolve",
    "stages",
    "units",
    "write_plan",
]
