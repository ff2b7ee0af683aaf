"""What it costs to distill into a shape: operations, GPU-hours, and memory per GPU, from shapes alone.

Operations are those of families/operations.py; memory is the sum of docs/distillation.md (precision bfloat16,
activation checkpointing), with everything trained.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from moeslim.families import STACKED, Shape, count, table, training_operations

UTILISATION = 0.4
"""Share of the peak that a GPU is taken to reach: an assumption, not a measurement."""
_FILLED = 0.95
"""Share of a GPU's memory that training may take; the rest is for the allocator and the libraries."""


@dataclass(frozen=True)
class Gpus:
    """How many there are, each with `peak` bf16 operations per second and `memory` bytes."""

    number: int
    peak: float
    memory: float


@dataclass(frozen=True)
class TrainingPlan:
    """A training: per stage the student's shape and its tokens; the teacher; tokens of a row. MTP heads learn too."""

    stages: Sequence[tuple[Shape, float]]
    teacher: Shape
    length: int
    micro_rows: int = 1


@dataclass(frozen=True)
class TrainingCost:
    """Operations in all, hours of one GPU and of all, bytes on each, GPUs that share a copy, whether it fits."""

    operations: float
    gpu_hours: float
    hours: float
    bytes_per_gpu: float
    shard_over: int
    fits: bool


def price(course: TrainingPlan, gpus: Gpus) -> TrainingCost:
    """What the course costs on these GPUs.

    Weights and moments are shared out over 8 GPUs, a machine's, or over more, doubled until they fit or all share one.
    """
    operations = sum(
        tokens * training_operations(student, length=course.length, depths=1, teacher=course.teacher)
        for student, tokens in course.stages
    )
    seconds = operations / (gpus.peak * UTILISATION)
    shard = min(8, gpus.number)
    while largest_memory(course, gpus, shard=shard) > _FILLED * gpus.memory and gpus.number % (2 * shard) == 0:
        shard *= 2
    each = largest_memory(course, gpus, shard=shard)
    hours = seconds / 3600
    return TrainingCost(
        operations, hours, hours / gpus.number, each, shard_over=shard, fits=each <= _FILLED * gpus.memory
    )


def largest_memory(course: TrainingPlan, gpus: Gpus, *, shard: int) -> float:
    """Bytes on one GPU in the stage that takes most, `shard` of them sharing one copy of student and teacher.

    16 N / g + 2 N_t / g                    weights, gradients and two moments in fp32; the teacher in bf16
    16 V d + 4 V d_t + 10 largest layer     what is gathered: embedding, head and their gradients, layers
    2 B T d L                               the layers' inputs
    max(0.5 GB, memory / 32)                the loss's logits
    """
    teacher = course.teacher
    words = teacher["vocab"]
    said = 2 * _parameters(teacher) / shard + 4 * words * teacher["hidden"]

    def stage(student: Shape) -> float:
        inputs = 2 * course.micro_rows * course.length * student["hidden"] * student.layers
        outer = 16 * words * student["hidden"] + 10 * _largest_layer(student)
        return 16 * _parameters(student) / shard + outer + inputs

    return max(stage(student) for student, _ in course.stages) + said + max(0.5e9, gpus.memory / 32)


def _parameters(shape: Shape) -> int:
    found = count(shape)
    return found.total + found.mtp


def _largest_layer(shape: Shape) -> int:
    sums: Counter[str | None] = Counter()
    for row in table(shape.trunk, STACKED).values():
        sums[row.layer] += row.parameters if row.layer is not None else 0
    return max(sums.values())
