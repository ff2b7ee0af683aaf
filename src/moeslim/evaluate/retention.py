"""What a smaller model keeps of a larger one's scores on the same questions, with errors and a paired test.

Scores are per question (1 right, 0 wrong, or a share), one list per task. Questions are independent, tasks are fixed:
another draw would be other questions of the same tasks, so what is summed over tasks is stratified by task. Both
models answer the same questions, which makes every error here one of paired differences.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm

from moeslim.errors import DataError
from moeslim.evaluate.task_record import TaskRecord, TaskScore
from moeslim.figures import Figure, mean

Scores = Sequence[Sequence[float]]
"""Per task the score of every question."""
_LEVEL = 0.05
_SURE = float(norm.ppf(1 - _LEVEL / 2))


@dataclass(frozen=True)
class Paired:
    """Questions that the student answers better or worse than the teacher; `p`: two-sided sign test.

    The exact two-sided sign test over the questions whose scores differ; for right and wrong it is McNemar's exact
    test. p = 1 where no question differs.
    """

    better: int
    worse: int
    p: float


def sign_test(student: Sequence[float], teacher: Sequence[float]) -> Paired:
    """The paired test of one task's questions."""
    better = sum(s > t for s, t in zip(student, teacher, strict=True))
    worse = sum(s < t for s, t in zip(student, teacher, strict=True))
    differ = better + worse
    return Paired(better, worse, float(binomtest(better, differ, 0.5).pvalue) if differ else 1.0)


def mean_score(scores: Scores) -> Figure:
    """The mean of the tasks' mean scores, every task with the same weight: `sum_k mean_k / K`.

    Standard error: `sqrt(sum_k v_k / n_k) / K`, v_k the sample variance over the n_k questions of task k.
    """
    value = math.fsum(_mean(task) for task in scores) / len(scores)
    error = _error(scores)
    return Figure(value, None if error is None else error / len(scores), _count(scores), "share", "question")


def mean_difference(student: Scores, teacher: Scores) -> Figure:
    """`mean_score(student) - mean_score(teacher)`, its error from the questions' own differences."""
    return mean_score(_minus(student, teacher))


def retention(student: Scores, teacher: Scores, *, chance: Scores | None = None) -> Figure | None:
    """The share r = sum_k s_k / sum_k t_k of the teacher's mean scores t_k that the student's, s_k, come to.

    With `chance`, a guesser's expected score per question, it is taken off both: (s - c) / (t - c), 1 where nothing is
    lost and 0 where the student guesses. Standard error by the delta method: the ratio is linear around its value in
    the questions' residuals e_i = s_i - r t_i, so `sqrt(sum_k var_k(e) / n_k) / sum_k t_k`.

    None where the denominator is not above 0 by 1.96 of its own standard errors: there the ratio's confidence set is
    not bounded (Fieller 1954), and any figure would be noise over noise.
    """
    if chance is not None:
        student, teacher = _minus(student, chance), _minus(teacher, chance)
    top, bottom = (math.fsum(_mean(task) for task in scores) for scores in (student, teacher))
    spread = _error(teacher)
    if bottom <= 0 or (spread is not None and bottom < _SURE * spread):
        return None
    ratio = top / bottom
    error = _error(_minus(student, [[ratio * t for t in task] for task in teacher]))
    return Figure(ratio, None if error is None else error / bottom, _count(student), "share", "question")


def compare(student: TaskScore, teacher: TaskScore) -> dict[str, Any]:
    """One task of two models: retention (None where it says nothing), `above_chance` if known, difference and test.

    DataError unless both answered the same questions under the same name.
    """
    if student.questions != teacher.questions or student.main != teacher.main:
        raise DataError(
            f"{student.task}: the two models were asked different questions or scored by different measures; "
            "evaluate both with one command"
        )
    own, other = student.items, teacher.items
    if own is None or other is None:  # a perplexity, a corpus score: there is nothing to pair
        return {}
    facts = {
        "retention": _figure_facts(retention([own], [other])),
        "difference": _figure_facts(mean_difference([own], [other])),
        "paired": asdict(sign_test(own, other)),
    }
    if student.chance is not None:
        facts["above_chance"] = _figure_facts(retention([own], [other], chance=[student.chance]))
    return facts


def retention_table(records: Mapping[str, TaskRecord], *, teacher: str | None, tasks: Sequence[str]) -> dict[str, Any]:
    """All of `tasks` for all models, and their mean: JSON-able, what `report.tasks` shows.

    The mean is over the tasks that have a score per question, `mean.above_chance` over those with a known chance level.
    """
    first = next(iter(records.values()))
    table: dict[str, Any] = {"teacher": teacher, "models": list(records), "tasks": {}}
    for task in tasks:
        score = first.tasks[task]
        row = {"metric": score.main, "n": score.n, "chance": None if score.chance is None else _mean(score.chance)}
        row["scores"] = {label: asdict(record.tasks[task].figure) for label, record in records.items()}
        row["against"] = {
            label: compare(record.tasks[task], records[teacher].tasks[task])
            for label, record in records.items()
            if teacher is not None and label != teacher
        }
        table["tasks"][task] = row
    whole = [task for task in tasks if all(record.tasks[task].items is not None for record in records.values())]
    if len(whole) > 1:
        table["mean"] = _mean_row(records, teacher, tasks=whole)
    return table


def _mean_row(records: Mapping[str, TaskRecord], teacher: str | None, *, tasks: Sequence[str]) -> dict[str, Any]:
    known = [task for task in tasks if next(iter(records.values())).tasks[task].chance is not None]

    def scores(label: str, names: Sequence[str]) -> Scores:
        return [records[label].tasks[task].items or [] for task in names]

    row: dict[str, Any] = {"tasks": list(tasks), "tasks_with_chance": known, "against": {}}
    row["scores"] = {label: asdict(mean_score(scores(label, tasks))) for label in records}
    for label in records:
        if teacher is None or label == teacher:
            continue
        own, other = (scores(name, tasks) for name in (label, teacher))
        facts = {
            "retention": _figure_facts(retention(own, other)),
            "difference": _figure_facts(mean_difference(own, other)),
        }
        if known:
            chance = [records[label].tasks[task].chance or [] for task in known]
            above = retention(scores(label, known), scores(teacher, known), chance=chance)
            facts["above_chance"] = _figure_facts(above)
        row["against"][label] = facts
    return row


def _minus(a: Scores, b: Scores) -> list[list[float]]:
    return [[x - y for x, y in zip(one, other, strict=True)] for one, other in zip(a, b, strict=True)]


def _error(scores: Scores) -> float | None:
    """The standard error of the sum of the tasks' means; None where a task has a single question."""
    if any(len(task) < 2 for task in scores):
        return None
    return math.sqrt(math.fsum(float(np.var(task, ddof=1)) / len(task) for task in scores))


def _mean(values: Sequence[float]) -> float:
    return mean(values, unit="share", per="question").value


def _count(scores: Scores) -> int:
    return sum(len(task) for task in scores)


def _figure_facts(figure: Figure | None) -> dict[str, Any] | None:
    return None if figure is None else asdict(figure)
