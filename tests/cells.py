"""What is proven of every family that has a page: a registry of cells, each one figure of one family.

What a cell compares with is transformers' own model, or the oracle of wide.py: neither imports moeslim.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from case import CHANNELS, REASONS, TOKENS, Case, Figure, cell, difference, experts_step, mask_neurons, neurons_step
from command import MEASURE, SMALL, TOKENIZER, TRAIN, write_text
from cuts import cut_by, same, tensors
from moeslim import api
from moeslim.calibrate.observe import Observe
from moeslim.calibrate.run import calibrate
from moeslim.checkpoint.reader import Reader
from moeslim.checkpoint.structure import read_structure
from moeslim.checkpoint.verify import verify
from moeslim.errors import CheckpointError
from moeslim.evaluate.generate import generate
from moeslim.model.init import write_random
from moeslim.model.load import load_student
from moeslim.model.save import save_student
from moeslim.model.walk import WalkSettings, walk
from moeslim.plan.steps import CutHidden, SetTopK
from moeslim.plan.steps.hidden import hidden_norms
from moeslim.stats import LayerStats
from tiny_families import HIDDEN, build_stock
from wide import Wide, experts_in

EXACT = 1e-10
FLOAT32 = 1e-4
"""Where live routers, norms and rotary run in float32 and the other side in float64."""


@cell("files", short=True)
def files(case: Case) -> Figure:
    """Names and shapes of what transformers saves are those of the page: how many are not."""
    structure = read_structure(case.single)
    moe = Wide(case.single).moe_keys
    return Figure(len(structure.problems()) + len({*moe} ^ {*structure.shape.moe_keys}))


@cell("walk", short=True)
def walked(case: Case) -> Figure:
    """Run one layer at a time from files, the last states are the whole model's, bit by bit (largest difference)."""
    model, _ = case.stock(case.single, experts_implementation="eager")
    with torch.no_grad():
        expected = model.get_decoder()(input_ids=TOKENS, use_cache=False).last_hidden_state
    rows = torch.cat([TOKENS, TOKENS[:, :1]], dim=1).numpy()
    visits = walk(Reader(case.single), rows, workdir=case.out("walk"), settings=WalkSettings(rows_per_batch=len(rows)))
    for visit in visits:
        found = torch.cat([batch.y for batch in visit.batches()])
        if visit.key == "norm":
            return Figure(difference(found, expected))
    raise AssertionError("the walk has no last norm")


@cell("resume")
def resumed(case: Case) -> Figure:
    """A walk that was stopped in its third layer, gone on with three experts in memory at a time, has the same bits."""
    rows = torch.cat([TOKENS, TOKENS[:, :1]], dim=1).numpy()

    def states(folder: Path, *, stop_at: str, group: int | None) -> torch.Tensor:
        settings = WalkSettings(rows_per_batch=1, group=group)
        for visit in walk(Reader(case.single), rows, workdir=folder, settings=settings):
            batches = visit.batches()
            if visit.key == stop_at:
                return next(batches).y  # half of its rows
            found = torch.cat([batch.y for batch in batches])
            if visit.key == "norm":
                return found
        raise AssertionError("the walk has no last norm")

    expected, work = states(case.out("walk"), stop_at="", group=None), case.out("walk")
    states(work, stop_at="2", group=3)
    assert json.loads((work / "walk.json").read_text())["done"] == ["0", "1"]
    return Figure(difference(states(work, stop_at="", group=3), expected))


@cell("keep all", short=True)
def keep_all(case: Case) -> Figure:
    """A plan without steps copies every tensor bit by bit."""
    return Figure(int(not same(tensors(cut_by(case.single, case.out("same"))), tensors(case.single))))


@cell("save", short=True)
def saved(case: Case) -> Figure:
    """A model that is loaded to train and saved again has the same bits."""
    out = case.out("saved")
    save_student(load_student(case.single), case.single, out=out, kind="distilled")
    return Figure(int(not same(tensors(out), tensors(case.single))))


@cell("opens", short=True)
def opens(case: Case) -> Figure:
    """transformers misses no tensor of a cut model, and what it does not expect is the MTP head's: how many differ."""
    out = case.small
    assert verify(out).ok
    _, info = case.stock(out)
    shape = read_structure(out).shape
    unexpected = info["unexpected_keys"]
    if shape.family.mtp is not None and shape.mtp_layers:
        head = shape.named(shape.family.mtp.prefix)  # listed under its name in memory, so without what is before layers
        own = head[head.find("layers.") :] if "layers." in head else head
        unexpected = [name for name in unexpected if own not in name]
    return Figure(len(info["missing_keys"]) + len(info["mismatched_keys"]) + len(unexpected))


@cell("live")
def live(case: Case) -> Figure:
    """The states of a loaded model are those of the oracle."""
    student = load_student(case.source, dtype=torch.float64, experts="eager").eval()
    with torch.no_grad():
        return Figure(difference(student.hidden(TOKENS), Wide(case.source).hidden(TOKENS)), FLOAT32)


@cell("MTP")
def heads(case: Case) -> Figure | None:
    """The MTP head's logits are those of the oracle's head, whose layer transformers builds."""
    if not case.shape.mtp_layers:
        return None
    oracle = Wide(case.source)
    assert oracle.head is not None, "wide.py knows no MTP head with these names"
    student = load_student(case.source, dtype=torch.float64, experts="eager").eval()
    with torch.no_grad():
        states = student.mtp_states(student.hidden(TOKENS), torch.cat([TOKENS, TOKENS[:, :1]], dim=1), depths=1)
        found = states[0] @ student.head.T
    return Figure(difference(found, oracle.run(TOKENS)[:, TOKENS.shape[1] :]), FLOAT32)


@cell("experts", short=True)
def experts(case: Case) -> Figure | None:
    """6 of 8 experts, others in every layer; the oracle's others lose every choice."""
    if not case.shape.moe_keys:
        return None
    step, oracle, wrong = experts_step(case.shape), Wide(case.source), Wide(case.source)
    oracle.mask_experts(step.kept)
    wrong.mask_experts({key: [(e + 1) % 8 for e in kept] for key, kept in step.kept.items()})
    expected = oracle.run(TOKENS)
    found = Wide(cut_by(case.source, case.out("experts"), step)).run(TOKENS)
    return Figure(difference(found, expected), EXACT, wrong=difference(wrong.run(TOKENS), expected))


@cell("top k")
def top_k(case: Case) -> Figure | None:
    """One expert per token instead of two."""
    if not case.shape.moe_keys:
        return None
    expected = Wide(case.source, top_k=1).run(TOKENS)
    found = Wide(cut_by(case.source, case.out("top k"), SetTopK(top_k=1))).run(TOKENS)
    return Figure(difference(found, expected), EXACT, wrong=difference(Wide(case.source).run(TOKENS), expected))


def _neurons(case: Case, *parts: str) -> Figure:
    step, oracle = neurons_step(case.shape, parts), Wide(case.source)
    mask_neurons(oracle, step, case.shape)
    expected = oracle.run(TOKENS)
    found = Wide(cut_by(case.source, case.out("neurons"), step)).run(TOKENS)
    return Figure(difference(found, expected), EXACT, wrong=difference(Wide(case.source).run(TOKENS), expected))


@cell("expert size")
def expert_size(case: Case) -> Figure | None:
    """8 of 12 neurons, others in every expert, and those of a shared expert whose size follows; the others give 0."""
    if not case.shape.moe_keys:
        return None
    follows = "shared_size" in case.shape.family.derived
    return _neurons(case, "experts", *(["shared"] if follows else []))


@cell("shared size")
def shared_size(case: Case) -> Figure | None:
    """Two thirds of the shared expert's neurons."""
    own = "shared_size" in case.shape.sizes and "shared_size" not in case.shape.family.derived
    return _neurons(case, "shared") if own and case.shape.moe_keys else None


@cell("dense size")
def dense_size(case: Case) -> Figure | None:
    """16 of 24 neurons of every dense layer."""
    return _neurons(case, "dense") if getattr(case.shape, "dense_keys", ()) else None


@cell("layers")
def layers(case: Case) -> Figure:
    """One layer fewer; the oracle's hands its input on."""
    step, oracle = case.fewer_layers, Wide(case.source)
    oracle.mask_layers(step.kept)
    expected = oracle.run(TOKENS)
    found = Wide(cut_by(case.source, case.out("layers"), step)).run(TOKENS)
    return Figure(difference(found, expected), EXACT, wrong=difference(Wide(case.source).run(TOKENS), expected))


@cell("hidden")
def hidden(case: Case) -> Figure:
    """12 of 16 channels; nothing writes to the others, and 16/12 times the eps makes norms equal."""
    scale = {row.name: math.sqrt(HIDDEN / len(CHANNELS)) for row in hidden_norms(case.shape)}
    step = CutHidden(kept=CHANNELS, scale=scale, rescale="assume_zero")
    expected = Wide(case.silent).run(TOKENS)
    oracle = Wide(cut_by(case.silent, case.out("hidden"), step))
    wrong = difference(oracle.run(TOKENS), expected)
    oracle.scale_hidden_eps(HIDDEN / len(CHANNELS), TOKENS)
    return Figure(difference(oracle.run(TOKENS), expected), EXACT, wrong=wrong)


@cell("tower")
def tower(case: Case) -> Figure | None:
    """After the cut of width, tensors beside the text model that still make 16 channels for it."""
    model, _ = case.stock(case.silent)
    text = next(name for name, module in model.named_modules() if module is model.get_decoder())
    beside = {
        n: p for n, p in model.named_parameters() if not n.startswith((f"{text}.", "lm_head.")) and HIDDEN in p.shape
    }
    if not beside:
        return None
    step = CutHidden(kept=CHANNELS)
    cut, _ = case.stock(cut_by(case.silent, case.out("tower"), step))
    return Figure(sum(HIDDEN in cut.get_parameter(name).shape for name in beside))


@cell("stacked")
def stacked(case: Case) -> Figure | None:
    """The experts' cut of files in which transformers wrote a layer's experts as one tensor, if the page reads it."""
    if not case.shape.moe_keys:
        return None
    source = build_stock(case.out("stacked"), case.family, dtype=torch.float64, stacked=True)
    try:
        if read_structure(source).problems():
            return None
    except CheckpointError:
        return None
    step, oracle = experts_step(case.shape), Wide(source)
    oracle.mask_experts(step.kept)
    found = Wide(cut_by(source, case.out("experts"), step)).run(TOKENS)
    return Figure(difference(found, oracle.run(TOKENS)), EXACT)


@cell("compose")
def compose(case: Case) -> Figure:
    """Two cuts one after the other write the bits of both at once."""
    steps = [case.fewer_layers]
    first = cut_by(case.single, case.out("first"), *steps)
    after = read_structure(first).shape
    second: Any = experts_step(after) if after.moe_keys else neurons_step(after, ("dense",))
    at_once = cut_by(case.single, case.out("at once"), *steps, second)
    return Figure(int(not same(tensors(cut_by(first, case.out("after"), second)), tensors(at_once))))


@cell("statistics")
def statistics(case: Case) -> Figure:
    """What importances are made of, counted by hooks on the oracle's modules (largest relative difference)."""
    rows = torch.cat([TOKENS, TOKENS[:, :1]], dim=1).numpy()
    settings = WalkSettings(rows_per_batch=2, dtype=torch.float64)
    stats = calibrate(case.source, rows, out=case.out("stats"), settings=settings, observe=Observe())
    worst = 0.0
    for key, expected in _direct(case).items():
        for name, value in expected.items():
            found = getattr(stats.layers[key], name)
            assert found.shape == value.shape, f"layer {key}, {name}: {found.shape} and {value.shape}"
            worst = max(worst, float(np.abs(found - value).max() / np.abs(value).max()))
    return Figure(worst, FLOAT32)


def _direct(case: Case) -> dict[str, dict[str, np.ndarray]]:
    """Sums over TOKENS by layer and name, from the oracle; an MTP head's in a run with the token behind them."""
    oracle, shape = Wide(case.source), case.shape
    seen: dict[str, Any] = {}
    plain = {("shared", key): "shared_size" for key in shape.moe_keys if "shared_size" in shape.sizes}
    if hasattr(LayerStats(), "neuron_dense_sum"):
        plain |= {("dense", key): "dense_size" for key in getattr(shape, "dense_keys", ())}
    for key in oracle.moe_keys:
        experts_in(oracle.layer(key)).register_forward_hook(lambda _m, i, _o, key=key: seen.update({key: i}))
    for (part, key), axis in plain.items():
        down = oracle.plain_down(key, shape[axis])
        down.register_forward_hook(lambda _m, i, _o, at=(part, key): seen.update({at: i[0].flatten(0, -2)}))
    oracle.run(torch.cat([TOKENS, TOKENS[:, :1]], dim=1))
    behind = {at: value for at, value in seen.items() if "mtp.0" in at}
    oracle.run(TOKENS)
    seen |= behind
    sums = {key: _expert_sums(experts_in(oracle.layer(key)), *seen[key]) for key in oracle.moe_keys}
    gated = any(t.role == "shared_gate" for t in shape.family.parts.get("moe", ()))
    for part, key in plain:
        if part == "dense" or not gated:  # what a gate makes of a shared expert is in its own tests
            sums.setdefault(key, {})[f"neuron_{part}_sum"] = seen[part, key].abs().sum(0).numpy()
    assert sums, "nothing was counted"
    return sums


def _expert_sums(module: Any, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> dict[str, np.ndarray]:
    """Of one layer's experts E_e(x) = act(x W (+b)) V (+c), as the module itself lays them out."""
    names = ("routed", "norm_sum", "gate_norm_sum", "neuron_sum")
    found: dict[str, list[Any]] = {name: [] for name in names}
    first = module.gate_up_proj if module.has_gate else module.up_proj
    for expert in range(module.down_proj.shape[0]):
        token, slot = torch.where(ids == expert)
        up, down = first[expert], module.down_proj[expert]
        z = x[token] @ (up if module.is_transposed else up.T)
        if module.has_bias:
            z = z + (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias)[expert]
        h = module._apply_gate(z) if module.has_gate else module.act_fn(z)
        out = h @ (down if module.is_transposed else down.T)
        out = out + module.down_proj_bias[expert] if module.has_bias else out
        weight = gates[token, slot]
        values = (len(token), out.norm(dim=-1).sum(), (weight * out.norm(dim=-1)).sum(), weight @ h.abs())
        for name, value in zip(names, values, strict=True):
            found[name].append(torch.as_tensor(value).detach().numpy())
    return {name: np.array(values, float) for name, values in found.items()}


@cell("generate")
def generated(case: Case) -> Figure:
    """A cut model's greedy continuation through its cache is that of the whole text read anew: wrong tokens."""
    model, _ = case.stock(case.small)
    found = generate(load_student(case.small).eval(), TOKENS[:, :9], new_tokens=6).tokens
    with torch.no_grad():
        expected = model(input_ids=found[:, :-1], use_cache=False).logits[:, 8:].argmax(-1)
    return Figure(int((found[:, 9:] != expected).sum()))


@cell("random")
def random_init(case: Case) -> Figure:
    """A random model of the same config opens in transformers: text tensors that are missing or of another shape."""
    out = case.out("random")
    config = json.loads((case.single / "config.json").read_text())
    write_random(out, config, seed=0, dtype="float32")
    model, info = case.stock(out)
    text = next(name for name, module in model.named_modules() if module is model.get_decoder())
    missing = [name for name in info["missing_keys"] if name.startswith((f"{text}.", "lm_head."))]
    return Figure(len(missing) + len(info["mismatched_keys"]))


@cell("commands")
def commands(case: Case) -> Figure:
    """inspect, probe, prune, distill, evaluate with drafts, under --max-memory: what verify refuses."""
    model = build_stock(case.out("model"), case.family, vocab_size=2048)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, model)
    text = [write_text(case.work / "text.jsonl")]
    assert api.inspect(str(model))["layers"] == case.shape.layers
    axes: dict[str, Any] = {"experts": 4} if case.shape.moe_keys else {"dense_size": 16}
    if (case.family, "hidden") not in REASONS:
        axes["hidden"] = 12
    keys = [*SMALL, "max_memory=4GB"]
    data = [str(path) for path in text]
    if case.shape.moe_keys:
        api.probe(str(model), case.out("probe"), data=data, overrides=[*keys, "calibrate.sequences=16"])
    cut, out = case.out("cut"), case.out("trained")
    api.prune(str(model), cut, keep=axes, data=data, overrides=[*keys, *MEASURE])
    training = [*keys, *TRAIN, "distill.micro_rows=1"]
    api.distill(str(cut), out, teacher=str(model), data=data, overrides=training)
    asked = [*keys, *MEASURE, "evaluate.prompts=2", "evaluate.samples=0"]
    api.evaluate([str(out)], case.out("records"), teacher=str(model), data=data, overrides=asked)
    moved = [name for name, t in tensors(cut).items() if not torch.equal(t, tensors(out)[name])]
    assert moved, "nothing was trained"
    return Figure(sum(not verify(folder).ok for folder in (cut, out)))
