"""What serving engines can load, and load fast, as warnings about a shape (vLLM 0.32, SGLang 0.5.23)."""

from moeslim.families import Shape
from moeslim.plan.schedule import axes_of

FAST_EXPERTS = frozenset({1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 192, 320, 384, 448, 576})
"""Expert counts that the fused top-k kernels are compiled for."""
REAL_HIDDEN = 1024
"""From this hidden size on a model is taken for one that is meant to run on GPU kernels."""


def engine_warnings(after: Shape, *, before: Shape | None = None) -> list[str]:
    """One sentence per fact about a model that makes an engine slow or keeps it from loading.

    With `before`, the shape that the model was cut from, only what the cut changed counts.
    """
    real = (before or after)["hidden"] >= REAL_HIDDEN
    found = [*_pattern(after), *_kernels(after, real=real)]
    if before is None:
        return found
    known = [*_pattern(before), *_kernels(before, real=real)]
    return [*(text for text in found if text not in known), *_parallel(before, after)]


def _pattern(shape: Shape) -> list[str]:
    kinds = [shape.kind(key) for key in shape.trunk_keys]
    attends = [kind in ("attention", "mla") for kind in kinds]
    if not any(attends):
        return ["no full-attention layer: engines do not serve such a model; keep at least one period of layers"]
    if "full_attention_interval" not in _intervals(shape):
        return _numbered(shape)
    interval = attends.index(True) + 1
    if all(attention == ((i + 1) % interval == 0) for i, attention in enumerate(attends)):
        return []
    return [
        "the layers' pattern is not one attention layer per full_attention_interval: transformers and vLLM load it by "
        "layer_types, SGLang does not; drop whole periods, or the last layers only"
    ]


def _numbered(shape: Shape) -> list[str]:
    """Kinds of layers that no key of the config counts: an engine may take a layer's kind from its number alone."""
    rule = shape.family.lists.get(shape.family.mixer_key)
    if rule is None or rule.every is None or rule.every[0]:
        return []
    step = rule.every[1]
    if all(word == (rule.most if (i + 1) % step else rule.other) for i, word in enumerate(shape.layer_types)):
        return []
    return [
        f"the layers' pattern is not {rule.most} with {rule.other} in each {step}th layer: transformers loads it by "
        f"{shape.family.mixer_key}, vLLM takes the kind from the layer's number and is wrong; drop {step} layers at a "
        "time, or the last ones only"
    ]


def _intervals(shape: Shape) -> set[str]:
    """The config keys that say of how many layers one is of another kind."""
    return {rule.every[0] for rule in shape.family.lists.values() if rule is not None and rule.every is not None}


def _parallel(before: Shape, after: Shape) -> list[str]:
    found = []
    for axis in ("expert_size", "shared_size", "dense_size"):
        if axis not in axes_of(after):
            continue
        key = after.family.key(axis)
        lost = [ways for ways in (2, 4, 8) if before[axis] % ways == 0 and after[axis] % ways]
        if lost:
            found.append(f"{key} {after[axis]} is not divisible by {lost[0]}: vLLM cannot split it over {lost[0]} GPUs")
    return found


def _kernels(shape: Shape, *, real: bool) -> list[str]:
    found = []
    if shape["experts"] and shape["experts"] not in FAST_EXPERTS:
        found.append(
            f"{shape['experts']} experts: the fast top-k kernels take powers of two up to 512, or 192, 320, 384, 448, "
            "576; other counts run on a slower path"
        )
    if real:
        for axis, unit in (("hidden", 128), ("expert_size", 64), ("dense_size", 64)):
            if axis in axes_of(shape) and shape[axis] % unit:
                found.append(
                    f"{shape.family.key(axis)} {shape[axis]} is no multiple of {unit}: GPU kernels pad it or refuse it"
                )
    return found
