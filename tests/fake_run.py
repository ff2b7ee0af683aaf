"""A run folder of made-up numbers with everything the report reads; no model is touched."""

import json
import math
import random
from pathlib import Path
from typing import Any

import moeslim.demo

LABELS = ("teacher", "cut", "distilled", "random-init")
DOMAINS = ("speeches", "python")
_SIZES = {"teacher": (4_312_064, 2_310_000, 431_000), "cut": (1_652_992, 1_101_000, 231_000)}
_LEVEL = {"teacher": 0.0, "cut": 0.62, "distilled": 0.17, "random-init": 0.71}


def figure(value: float, se: float | None = None, n: int | None = None, *, unit: str = "") -> dict[str, Any]:
    return {"value": value, "se": se, "n": n, "unit": unit}


def record(label: str) -> dict[str, Any]:
    total, active, mtp = _SIZES.get(label, _SIZES["cut"])
    worse = _LEVEL[label]
    figures: dict[str, Any] = {
        "parameters": {"": figure(total, 0.0, 1, unit="parameters")},
        "active_parameters": {"": figure(active, 0.0, 1, unit="parameters")},
        "mtp_parameters": {"": figure(mtp, 0.0, 1, unit="parameters")},
        "bytes": {"": figure(4 * (total + mtp), 0.0, 1, unit="bytes")},
        "bits_per_byte": {},
        "kl": {},
        "top1": {},
        "prefill": {"": figure(9000 * (1 + (label != "teacher") * 0.9), 210, 5, unit="tokens/s")},
        "decode": {"": figure(61.2 * (1 + (label != "teacher") * 0.41), 1.3, 5, unit="tokens/s")},
    }
    for i, domain in enumerate(DOMAINS):
        figures["bits_per_byte"][domain] = figure(1.2134 + 0.08 * i + worse, 0.0123 + 0.004 * i, 64, unit="bits/byte")
        if label != "teacher":
            figures["kl"][domain] = figure(0.02 + 1.4 * worse, 0.011, 64, unit="nats")
            figures["top1"][domain] = figure(0.92 - 0.7 * worse, 0.006, 64, unit="share")
        for j in range(5):
            share = (0.66 - 0.5 * worse) * 0.52**j
            entry = figure(share, 0.5 * math.sqrt(share * (1 - share) / 48), 48, unit="share")
            figures.setdefault(f"acc_{j}", {})[domain] = entry
        figures.setdefault("conditional_1", {})[domain] = figure(0.52, 0.03, 48, unit="share")
        figures.setdefault("accepted_length", {})[domain] = figure(2.1 - worse, 0.04, 48, unit="tokens")
    draw = random.Random(label)
    layers, experts = (8, 32) if label == "teacher" else (6, 16)
    keys = [*map(str, range(layers)), "mtp.0"]
    load = {key: [round(1000 * draw.lognormvariate(0, 0.45)) for _ in range(experts)] for key in keys}
    load = {key: [value * len(values) / sum(values) for value in values] for key, values in load.items()}
    return {
        "schema": 1, "label": label, "inputs": "ab" * 8, "model": f"{draw.getrandbits(64):016x}",
        "teacher": None if label == "teacher" else "0123456789abcdef", "data": "fedcba9876543210", "settings": {},
        "environment": {"moeslim": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "threads": 2, "device": "cpu"},
        "figures": figures, "load": load, "documents": {}, "samples": [],
    }  # fmt: skip


def plans() -> list[dict[str, Any]]:
    draw = random.Random(0)
    source = {
        "model_type": "qwen3_next", "layers": 8, "hidden": 128, "experts": 32,
        "expert_size": 32, "shared_size": 32, "top_k": 4, "mtp": True,
    }  # fmt: skip
    keys = [*map(str, range(6)), "mtp.0"]
    kept = {key: sorted(draw.sample(range(32), 16)) for key in keys}
    first = [{"step": "drop_layers", "kept": [0, 1, 2, 3, 4, 5, 6], "method": "last"}]
    second = [
        {"step": "drop_layers", "kept": [0, 1, 2, 3, 4, 5], "method": "last"},
        {"step": "cut_hidden", "kept": sorted(draw.sample(range(128), 96)), "scale": {}, "rescale": "measured"},
        {"step": "cut_experts", "kept": kept, "importance": "reap"},
        {"step": "set_top_k", "top_k": 3},
    ]
    return [
        {"schema_version": 1, "source": source, "steps": first},
        {"schema_version": 1, "source": {**source, "layers": 7}, "steps": second},
    ]


def config(*, layers: int, hidden: int, experts: int, top_k: int) -> dict[str, Any]:
    """The bundled teacher's config, cut."""
    value: dict[str, Any] = json.loads((moeslim.demo.teacher_path() / "config.json").read_text(encoding="utf-8"))
    changed = {"num_hidden_layers": layers, "layer_types": value["layer_types"][:layers], "hidden_size": hidden}
    return {**value, **changed, "num_experts": experts, "num_experts_per_tok": top_k}


def write_stages(folder: Path) -> None:
    """What a run's stages leave beside plans and logs: statistics, config and receipt of the cut models."""
    shapes = [dict(layers=7, hidden=128, experts=32, top_k=4), dict(layers=6, hidden=96, experts=16, top_k=3)]
    for number, shape in enumerate(shapes, start=1):
        stage, seen = folder / f"stage-{number}", record("teacher")["model"]
        facts = {"schema": 2, "model": seen if number == 1 else "b7" * 8, "tokens": 24_576 * number, "sequences": 96}
        write_json(stage / "stats" / "stats.json", facts)
        write_json(stage / "cut" / "config.json", config(**shape))
        files = {"model.safetensors": {"bytes": 8_841_000 // number}, "config.json": {"bytes": 1441}}
        write_json(stage / "cut" / "receipt.json", {"schema": 1, "kind": "cut", "parents": {}, "files": files})


def write_tasks(folder: Path) -> None:
    """Scores of two models on two tasks, one with a chance level, and what is kept of the teacher's."""
    right = {"arc_easy": {"teacher": 142, "distilled": 120}, "lambada": {"teacher": 90, "distilled": 61}}
    sizes = {"arc_easy": 200, "lambada": 120}
    told: dict[str, Any] = {"teacher": "teacher", "models": list(right["arc_easy"]), "tasks": {}}
    scores: dict[str, dict[str, Any]] = {label: {} for label in told["models"]}
    for task, n in sizes.items():
        known = task == "arc_easy"
        row: dict[str, Any] = {"metric": "acc,none", "n": n, "chance": 0.25 if known else None, "scores": {}}
        for label, count in right[task].items():
            items, share = [1.0] * count + [0.0] * (n - count), count / n
            scores[label][task] = {
                "task": task, "inputs": "i", "questions": f"of {task}", "output_type": "multiple_choice", "fewshot": 0,
                "version": "1", "n": n, "main": "acc,none", "metrics": {"acc,none": {"value": share, "stderr": 0.0341}},
                "items": items, "chance": [0.25] * n if known else None,
            }  # fmt: skip
            row["scores"][label] = {**figure(share, 0.0341, n, unit="share"), "per": "question"}
        row["against"] = {"distilled": _kept(n, known=known)}
        told["tasks"][task] = row
    mean = {label: {**figure(value, 0.0211, 320, unit="share"), "per": "question"}
            for label, value in (("teacher", 0.7312), ("distilled", 0.5543))}  # fmt: skip
    kept = {key: value for key, value in _kept(320, known=True).items() if key != "paired"}
    told["mean"] = {"tasks": list(sizes), "tasks_with_chance": ["arc_easy"], "against": {"distilled": kept}}
    told["mean"]["scores"] = mean
    for label in scores:
        value = {"schema": 1, "label": label, "model": "ab" * 8, "environment": {}, "tasks": scores[label]}
        write_json(folder / f"{label}.json", value)
    write_json(folder / "retention" / "teacher.json", told)


def _kept(n: int, *, known: bool) -> dict[str, Any]:
    """What a retention record says of one model and task."""
    facts: dict[str, Any] = {
        "retention": {**figure(0.8123 + n / 1e4, 0.0278, n, unit="share"), "per": "question"},
        "difference": {**figure(-0.1321 - n / 1e4, 0.0296, n, unit="share"), "per": "question"},
        "paired": {"better": 13, "worse": 35 + n // 100, "p": 0.0021},
    }
    if known:
        facts["above_chance"] = {**figure(0.7214 + n / 1e4, 0.0415, n, unit="share"), "per": "question"}
    return facts


def curve(*, steps: int, start: float, end: float, before: int = 0) -> list[dict[str, float]]:
    draw = random.Random(steps)
    lines = []
    for step in range(1, steps + 1):
        done = (before + step) / 450
        lm = end + (start - end) * math.exp(-4.5 * step / steps) + draw.gauss(0, 0.03)
        lines.append({
            "step": step, "tokens": step * 4096, "total": lm, "lm": lm, "kd": max(0.02, lm - 2.1),
            "mtp_lm": lm + 1.0, "mtp_kd": max(0.1, lm - 1.4), "balance": 1.02 + draw.gauss(0, 0.004),
            "learning_rate": 1e-3 * min(1.0, done * 20) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))),
            "lam": 1 - 0.25 * done, "beta": 0.1 + 0.1 * (1 + math.cos(math.pi * done)),
            "seconds": 1.28 + draw.gauss(0, 0.05),
        })  # fmt: skip
    return lines


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, lines: list[dict[str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def fake_run(folder: Path, *, log_every: int = 1) -> Path:
    """Write the whole run folder and return it; `log_every` (a divisor of 45) thins the training logs."""
    for label in LABELS:
        write_json(folder / "records" / f"{label}.json", record(label))
    for number, plan in enumerate(plans(), start=1):
        write_json(folder / f"stage-{number}" / "plan.json", plan)
    write_lines(folder / "stage-1" / "curve.jsonl", curve(steps=45, start=3.4, end=2.3)[log_every - 1 :: log_every])
    write_lines(
        folder / "stage-2" / "curve.jsonl", curve(steps=405, start=4.4, end=2.4, before=45)[log_every - 1 :: log_every]
    )
    write_lines(
        folder / "random-init" / "curve.jsonl", curve(steps=450, start=7.6, end=3.3)[log_every - 1 :: log_every]
    )
    write_stages(folder)
    texts = {label: f"and the people of the {label} Union, who have <script>alert(1)</script> been" for label in LABELS}
    code = {label: f"        if self.{label.replace('-', '_')} is None:\n            return None\n" for label in LABELS}
    write_json(folder / "samples.json", {"samples": [
        {"domain": "speeches", "prompt": "Fellow citizens of the Senate and of the House", "texts": texts},
        {"domain": "python", "prompt": "class Reader:\n    def close(self):\n", "texts": code},
    ]})  # fmt: skip
    write_json(folder / "run.json", {"schema": 1, "moeslim": "0.1.0"})
    for name in ("tokens", "calibrate-1", "plan-1", "cut-1", "distill-1", "calibrate-2", "cut-2", "evaluate"):
        write_json(folder / "stages" / f"{name}.json", {
            "schema": 1, "stage": name, "moeslim": "0.1.0", "inputs": {}, "inputs_fingerprint": "0f3a5c7e9b1d2468",
            "outputs": {f"out/{name}": "8d2a6c4e0b1f3579"},
        })  # fmt: skip
    (folder / "recipe.yaml").write_text("model: teacher\nkeep:\n  experts: 50%\n  layers: 75%\nseed: 0\n", "utf-8")
    return folder
