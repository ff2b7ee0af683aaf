"""REAP's own observer beside our calibration, on tiny models of three families and the same rows; by hand, a minute.

    .venv/bin/python tests/peers/reap.py write FOLDER       # here: the models, their rows, our scores
    OTHER/bin/python tests/peers/reap.py observe FOLDER     # where REAP can be imported: its observer's scores
    .venv/bin/python tests/peers/reap.py compare FOLDER     # here: they must agree to 1e-5

OTHER is an environment of its own: REAP needs an older transformers, whose experts are modules that can be called one
by one: `pip install torch transformers==4.55.0`, and a clone of github.com/CerebrasResearch/reap with its `src` on
PYTHONPATH. The models renormalise their router's scores and the observer is asked to, since it does not read that from
the model. On GLM-4.5 it weighs by a softmax of the logits, where the model's router uses sigmoids, a bias and groups:
there both rankings are shown and only ours is held against a direct computation (tests/test_live_families.py).
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SEED, ROWS, LENGTH, VOCAB = 0, 8, 24, 64
FAMILIES: dict[str, dict[str, Any]] = {"qwen3_moe": {"norm_topk_prob": True}, "mixtral": {}, "glm4_moe": {}}
UNLIKE = ("glm4_moe",)
"""Families whose routers the observer does not follow."""
TOLERANCE = 1e-5
NAMES = ("reap", "weighted_ean_sum", "ean", "router_blind", "frequency")
THEIRS = {"ean": "ean_sum", "router_blind": "ean_mean"}
"""Our name of a score -> the observer's, where they differ; its frequency is a count."""
Scores = dict[str, dict[str, list[float]]]


def write(folder: Path) -> None:
    """FOLDER/FAMILY/model, rows.json and ours.json of every family."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from moeslim.calibrate.run import calibrate
    from moeslim.model.walk import WalkSettings
    from moeslim.plan.importance import expert_importance
    from tiny import write_tiny

    settings = WalkSettings(rows_per_batch=4, dtype=torch.float32)
    rows = np.random.default_rng(SEED).integers(0, VOCAB, (ROWS, LENGTH + 1))
    for family, changes in FAMILIES.items():
        home = folder / family
        model = write_tiny(home / "model", family=family, form={"mtp": False}, **changes)
        (home / "rows.json").write_text(json.dumps(rows.tolist()))
        layers = calibrate(model, rows, out=home / "stats", settings=settings).layers
        ours = {
            key: {name: expert_importance(layer, name).tolist() for name in NAMES}
            for key, layer in layers.items()
            if layer.is_moe
        }
        (home / "ours.json").write_text(json.dumps(ours))


def observe(folder: Path) -> None:
    """FOLDER/FAMILY/theirs.json: what REAP's observer says after the same rows, without the last token of each."""
    import torch
    from reap.observer import OBSERVER_CONFIG_REGISTRY, MoETransformerObserver  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    for family in FAMILIES:
        model = AutoModelForCausalLM.from_pretrained(folder / family / "model", torch_dtype=torch.float32).eval()
        config = OBSERVER_CONFIG_REGISTRY[type(model).__name__]
        bare = [module for module in model.modules() if type(module).__name__ == "Glm4MoeMoE"]
        for block in bare:  # REAP's own copy of this class gives its logits too
            block.register_forward_hook(lambda m, i, y: (y, i[0].flatten(0, 1) @ m.gate.weight.T))
        wanted = config(renormalize_router_weights=True, record_pruning_metrics_only=True)
        observer = MoETransformerObserver(model, hook_config=wanted)
        for block in bare:
            block.register_forward_hook(lambda m, i, y: y[0])
        with torch.no_grad():
            for row in json.loads((folder / family / "rows.json").read_text()):
                model(torch.tensor([row[:-1]]), use_cache=False)
        theirs: Scores = {}
        for layer, found in observer.report_state().items():
            scores: dict[str, Any] = {name: found[THEIRS.get(name, name)] for name in NAMES if name != "frequency"}
            scores["frequency"] = found["expert_frequency"] / found["total_tokens"]
            theirs[str(layer)] = {name: values.double().tolist() for name, values in scores.items()}
        (folder / family / "theirs.json").write_text(json.dumps(theirs))


def compare(folder: Path) -> int:
    """How many scores disagree; each is printed, and the largest difference of every score."""
    wrong = 0
    for family in FAMILIES:
        ours, theirs = (json.loads((folder / family / f"{name}.json").read_text()) for name in ("ours", "theirs"))
        assert ours.keys() == theirs.keys(), (family, sorted(ours), sorted(theirs))
        if family in UNLIKE:
            for layer in ours:
                ranks = (np.argsort(scores[layer]["reap"])[::-1].tolist() for scores in (ours, theirs))
                print(f"{family} layer {layer}, experts by reap: ours {next(ranks)}, REAP's {next(ranks)}")
        else:
            wrong += sum(_differences(family, name, ours, theirs=theirs) for name in NAMES)
    return wrong


def _differences(family: str, name: str, ours: Scores, *, theirs: Scores) -> int:
    worst, wrong = 0.0, 0
    for layer in ours:
        one, other = np.array(ours[layer][name]), np.array(theirs[layer][name])
        apart = np.abs(one - other) / np.maximum(np.abs(other), 1e-30) * (one != other)
        worst = max(worst, float(apart.max()))
        for expert in np.flatnonzero(apart > TOLERANCE):
            wrong += 1
            print(f"{family} layer {layer} expert {expert}: {name} {one[expert]:.9g}, REAP's {other[expert]:.9g}")
    print(f"{family} {name}: {worst:.1e} apart at most, relative")
    return wrong


def main() -> None:
    _, what, folder = sys.argv
    if what == "compare":
        sys.exit(f"{wrong} scores differ" if (wrong := compare(Path(folder))) else 0)
    {"write": write, "observe": observe}[what](Path(folder))


if __name__ == "__main__":
    main()
