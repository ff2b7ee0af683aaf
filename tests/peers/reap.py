"""REAP's own observer beside our calibration, on one tiny model and the same rows; by hand, a minute.

    .venv/bin/python tests/peers/reap.py write FOLDER       # here: a tiny Qwen3-MoE, its rows, our scores
    OTHER/bin/python tests/peers/reap.py observe FOLDER     # where REAP is installed: its observer's scores
    .venv/bin/python tests/peers/reap.py compare FOLDER     # here: they must agree to 1e-5

OTHER is an environment of its own: REAP needs an older transformers, whose experts are modules that can be called one
by one. `pip install git+https://github.com/CerebrasResearch/reap torch transformers==4.55.0` makes it. The model
renormalises its router's scores and the observer is asked to, since it does not read that from the model.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SEED, ROWS, LENGTH, VOCAB = 0, 8, 24, 64
TOLERANCE = 1e-5
NAMES = ("reap", "weighted_ean_sum", "ean", "router_blind", "frequency")
THEIRS = {"ean": "ean_sum", "router_blind": "ean_mean"}
"""Our name of a score -> the observer's, where they differ; its frequency is a count."""
Scores = dict[str, dict[str, list[float]]]


def write(folder: Path) -> None:
    """FOLDER/model, FOLDER/rows.json and FOLDER/ours.json."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from moeslim.calibrate.run import calibrate
    from moeslim.model.walk import WalkSettings
    from moeslim.plan.importance import expert_importance
    from tiny import write_tiny

    model = write_tiny(folder / "model", family="qwen3_moe", norm_topk_prob=True)
    rows = np.random.default_rng(SEED).integers(0, VOCAB, (ROWS, LENGTH + 1))
    (folder / "rows.json").write_text(json.dumps(rows.tolist()))
    settings = WalkSettings(rows_per_batch=4, dtype=torch.float32)
    stats = calibrate(model, rows, out=folder / "stats", settings=settings)
    ours = {
        key: {name: expert_importance(layer, name).tolist() for name in NAMES} for key, layer in stats.layers.items()
    }
    (folder / "ours.json").write_text(json.dumps(ours))


def observe(folder: Path) -> None:
    """FOLDER/theirs.json: what REAP's observer says after the same rows, without the last token of each."""
    import torch
    from reap.observer import MoETransformerObserver, Qwen3MoEObserverHookConfig  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", torch_dtype=torch.float32).eval()
    wanted = Qwen3MoEObserverHookConfig(renormalize_router_weights=True, record_pruning_metrics_only=True)
    observer = MoETransformerObserver(model, hook_config=wanted)
    with torch.no_grad():
        for row in json.loads((folder / "rows.json").read_text()):
            model(torch.tensor([row[:-1]]), use_cache=False)
    theirs: Scores = {}
    for layer, found in observer.report_state().items():
        scores: dict[str, Any] = {name: found[THEIRS.get(name, name)] for name in NAMES if name != "frequency"}
        scores["frequency"] = found["expert_frequency"] / found["total_tokens"]
        theirs[str(layer)] = {name: values.double().tolist() for name, values in scores.items()}
    (folder / "theirs.json").write_text(json.dumps(theirs))


def compare(folder: Path) -> int:
    """How many scores disagree; each is printed, and the largest difference of every score."""
    ours, theirs = (json.loads((folder / f"{name}.json").read_text()) for name in ("ours", "theirs"))
    wrong = 0
    assert ours.keys() == theirs.keys(), (sorted(ours), sorted(theirs))
    for name in NAMES:
        worst = 0.0
        for layer in ours:
            one, other = np.array(ours[layer][name]), np.array(theirs[layer][name])
            apart = np.abs(one - other) / np.maximum(np.abs(other), 1e-30) * (one != other)
            worst = max(worst, float(apart.max()))
            for expert in np.flatnonzero(apart > TOLERANCE):
                wrong += 1
                print(f"layer {layer} expert {expert}: {name} {one[expert]:.9g}, REAP's {other[expert]:.9g}")
        print(f"{name}: {worst:.1e} apart at most, relative")
    return wrong


def main() -> None:
    _, what, folder = sys.argv
    if what == "compare":
        sys.exit(f"{wrong} scores differ" if (wrong := compare(Path(folder))) else 0)
    {"write": write, "observe": observe}[what](Path(folder))


if __name__ == "__main__":
    main()
