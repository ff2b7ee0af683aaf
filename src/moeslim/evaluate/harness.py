"""Tasks of EleutherAI's lm-evaluation-harness, run on checkpoints; the only file that knows the package.

A model is opened by transformers' own class, as lm-eval's `hf` model does, and answers through that same model with its
default seeds, so the scores are lm-eval's own. The MTP block plays no part: transformers leaves it out.
"""

import difflib
import importlib.util
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moeslim.artifacts.fingerprint import fingerprint, folder_fingerprint
from moeslim.data.tokens import load_tokenizer
from moeslim.errors import CheckpointError, DataError, RecipeError
from moeslim.evaluate.task_record import SCHEMA, TaskRecord, TaskScore
from moeslim.log import logger

_PICKED = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
"""Metrics that ask which choice is likeliest, so that guessing among k choices scores 1/k."""
_FEWSHOT_SEED = 1234  # lm-eval's own


@dataclass(frozen=True)
class Running:
    """How models are run: all of it but the batch is part of what a score depends on.

    `batch` questions go through at once; another batch gives the same scores to rounding. `limit` asks only the first
    questions of each task.
    """

    dtype: str
    device: str
    batch: int
    limit: int | None = None


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks by name, and the manager that they came from."""

    manager: Any
    tasks: Mapping[str, Any]


def load_tasks(wanted: Sequence[str]) -> Tasks:
    """The tasks that `wanted` names: of lm-eval (a task, group or tag), or YAML task files (paths ending in .yaml).

    Paths inside a task file are relative to it. Each task's data are read and its first question is built, so what is
    wrong with it is reported here. Names are looked up only where there are any: lm-eval reads all its 15 thousand.
    RecipeError for what is unknown or cannot work, DataError for data that cannot be had.
    """
    if not wanted:
        raise RecipeError("no task is named; give names of lm-eval such as arc_easy, or YAML task files, with commas")
    for package in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise RecipeError(
                f"tasks are run by lm-eval, and the package {package} is not installed: pip install 'moeslim[eval]'"
            )
    from lm_eval.tasks import TaskManager

    files = {name: Path(name).expanduser() for name in wanted if name.endswith((".yaml", ".yml"))}
    for path in files.values():
        if not path.is_file():
            raise RecipeError(f"{path}: there is no such task file; give its path, or the name of a task of lm-eval")
    manager = TaskManager(include_defaults=len(files) < len(wanted))
    found: dict[str, Any] = {}
    for name in wanted:
        for task, loaded in _load(manager, name, path=files.get(name)).items():
            if task in found:
                raise RecipeError(f"{name}: the task {task} is asked for twice; name it once")
            found[task] = loaded
    return Tasks(manager, found)


def evaluate_tasks(
    models: Mapping[str, Path], tasks: Tasks, *, running: Running, out: Path | str
) -> dict[str, TaskRecord]:
    """What every model scores on every task, also written as `out/<label>.json` after each task.

    Scores that exist there with the same model, questions and way of running are read, not made again; a model with
    nothing left to do is not loaded.
    """
    asked = {name: _asked(task, running.limit) for name, task in tasks.tasks.items()}
    records = {}
    for label, folder in models.items():
        path, model = Path(out) / f"{label}.json", folder_fingerprint(folder)
        record = TaskRecord.read(path) if path.is_file() else TaskRecord(label, model, {})
        if record.model != model:
            record = TaskRecord(label, model, {})
        inputs = {name: fingerprint([SCHEMA, model, facts, _settings(running)]) for name, facts in asked.items()}
        missing = [name for name in inputs if name not in record.tasks or record.tasks[name].inputs != inputs[name]]
        if not missing:
            logger.info("evaluate %s: its task scores exist already, skipped", label)
        lm = _language_model(folder, running) if missing else None
        for name in missing:
            logger.info("evaluate %s: %s", label, name)
            score = replace(_run(lm, tasks, name=name, running=running), inputs=inputs[name])
            record = replace(record, environment=_environment(running), tasks={**record.tasks, name: score})
            record.write(path)
        records[label], lm = record, None  # before the next one is loaded
    return records


def _load(manager: Any, name: str, *, path: Path | None) -> dict[str, Any]:
    """Leaf tasks by name, each with its first question built."""
    from lm_eval.api import task as lm_task

    if path is None and name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=5)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise RecipeError(f"{name}: not a task, group or tag of lm-eval{hint}. `lm-eval ls tasks` lists all")
    try:
        with chdir(path.absolute().parent) if path else nullcontext():
            loaded: dict[str, Any] = manager.load([path.name if path else name])["tasks"]
        for task in loaded.values():
            if task.config.num_fewshot is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(_FEWSHOT_SEED)
            task.build_all_requests(limit=1)
    except (OSError, lm_task.datasets.exceptions.DatasetsError) as problem:
        raise DataError(
            f"{name}: its questions cannot be had ({_reason(problem)}); check the connection, or write a task file "
            "over local files (docs/evaluation.md shows one)"
        ) from None
    except _broken_task() as problem:
        raise RecipeError(f"{name}: lm-eval cannot use this task ({_reason(problem)}); correct the task file") from None
    for task_name, task in loaded.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise RecipeError(f"{task_name}: runs code that the model writes; run it with lm-eval itself, in a sandbox")
    return loaded


def _language_model(folder: Path, running: Running) -> Any:
    """lm-eval's `hf` model around the model in `folder`; CheckpointError unless every weight is in the files."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=getattr(torch, running.dtype),
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,  # left out, it asks on the terminal whether code of the folder may run
            use_safetensors=True,  # a pickle can run code
        )
    except (OSError, ValueError, RuntimeError, KeyError) as problem:
        raise CheckpointError(f"{folder}: transformers cannot open it ({_reason(problem)})") from None
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise CheckpointError(
            f"{folder}: {len(info['missing_keys'])} tensors are not in the files ({some}); "
            "transformers would answer with random ones"
        )
    with _quiet("lm_eval.models.huggingface"):  # it warns of every model that it did not open itself
        return HFLM(pretrained=model.to(running.device).eval(), tokenizer=tokenizer, batch_size=running.batch)


def _run(lm: Any, tasks: Tasks, *, name: str, running: Running) -> TaskScore:
    from lm_eval import simple_evaluate

    task = tasks.tasks[name]
    results = simple_evaluate(model=lm, tasks=[task], task_manager=tasks.manager, limit=running.limit)
    metrics = _metrics(results["results"][name])
    if not metrics:
        raise DataError(f"{name}: lm-eval gave no metric that is a number; look at its metric_list")
    main = _main(list(metrics))
    measure, _, kind = main.partition(",")
    samples = sorted(
        (sample for sample in results["samples"][name] if sample["filter"] == kind), key=lambda sample: sample["doc_id"]
    )
    ascending = results["higher_is_better"][name].get(measure, False)
    items = _items([sample.get(measure) for sample in samples], metrics[main]["value"]) if ascending else None
    guessed = items is not None and task.OUTPUT_TYPE == "multiple_choice" and measure in _PICKED
    return TaskScore(
        task=name,
        inputs="",
        questions=fingerprint([[sample[part] for part in ("doc_hash", "prompt_hash")] for sample in samples]),
        output_type=str(task.OUTPUT_TYPE),
        fewshot=int(results["n-shot"][name]),
        version=str(results["versions"][name]),
        n=len(samples),
        main=main,
        metrics=metrics,
        items=items,
        chance=[_chance(task, sample) for sample in samples] if guessed else None,
    )


def _metrics(results: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """`metric,filter` -> value and standard error, of lm-eval's flat dictionary of results."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in results.items():
        measure, comma, kind = key.partition(",")
        if comma and not measure.endswith("_stderr") and _number(value) is not None:
            found[key] = {"value": _number(value), "stderr": _number(results.get(f"{measure}_stderr,{kind}"))}
    return found


def _main(metrics: Sequence[str]) -> str:
    """What is compared: accuracy by likelihood per character where there is one, else plain, else the first metric."""
    by_name = {metric.partition(",")[0]: metric for metric in reversed(metrics)}
    return next((by_name[name] for name in ("acc_norm", "acc") if name in by_name), metrics[0])


def _items(values: Sequence[Any], whole: float | None) -> list[float] | None:
    """The scores per question, where they are numbers whose mean is lm-eval's value."""
    numbers = [_number(value) for value in values]
    scores = [number for number in numbers if number is not None]
    if not scores or len(scores) < len(numbers) or whole is None:
        return None
    return scores if math.isclose(math.fsum(scores) / len(scores), whole, rel_tol=1e-9, abs_tol=1e-12) else None


def _chance(task: Any, sample: Mapping[str, Any]) -> float:
    """What a guess scores on one question: right choices over choices."""
    target, choices = sample["target"], len(task.doc_to_choice(sample["doc"]))
    return (len(set(target)) if isinstance(target, list) else 1) / choices


def _number(value: Any) -> float | None:
    try:
        number = float(value) if not isinstance(value, str) else math.nan
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _asked(task: Any, limit: int | None) -> dict[str, Any]:
    """Names what a task asks: its config, questions, examples and how many of them."""
    config = {key: value for key, value in task.dump_config().items() if key not in ("metadata", "dataset_kwargs")}
    docs = [doc for _, doc in task.doc_iterator(limit=limit)]
    shown = list(task.fewshot_docs() or []) if task.config.num_fewshot else []
    return {"config": _name(config), "docs": _name(docs), "shown": _name(shown), "version": str(task.VERSION)}


def _name(value: Any) -> str:
    def spelt(other: Any) -> str:
        return getattr(other, "__qualname__", None) or str(other)  # a function's str() is its place in memory

    return fingerprint(json.dumps(value, sort_keys=True, default=spelt))


def _settings(running: Running) -> dict[str, Any]:
    import importlib.metadata

    facts = {key: value for key, value in asdict(running).items() if key != "batch"}
    return {**facts, "lm_eval": importlib.metadata.version("lm_eval")}


def _environment(running: Running) -> dict[str, Any]:
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {**_settings(running), **versions, "batch": running.batch, "threads": torch.get_num_threads()}


def _broken_task() -> tuple[type[Exception], ...]:
    """What lm-eval raises at a task file that says something impossible."""
    import jinja2
    import yaml

    return (KeyError, TypeError, ValueError, AttributeError, ImportError, jinja2.TemplateError, yaml.YAMLError)


def _reason(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {(str(problem).strip().splitlines() or ['no reason told'])[0]}"


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Only errors of one logger inside the block."""
    other = logging.getLogger(name)
    before = other.level
    other.setLevel(logging.ERROR)
    try:
        yield
    finally:
        other.setLevel(before)
