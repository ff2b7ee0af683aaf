"""Steps that only leave things out: each takes a view of the source and a step, and gives the smaller view.

A step's numbers count in the model as it finds it; here they become numbers of the source by looking them up in what
the view still holds.
"""

from dataclasses import replace

from moeslim.families import layer_prefix
from moeslim.plan.steps import CutExpertSize, CutHidden, DropLayers, SetTopK
from moeslim.surgery.view import Expert, View, among


def drop_layers(view: View, step: DropLayers) -> View:
    """The layers listed, in their order. What was kept inside a dropped layer is forgotten when nobody asks for it."""
    return view.changed(layers=tuple(view.layers[i] for i in step.kept))


def cut_hidden(view: View, step: CutHidden) -> View:
    """The channels listed; scales multiply those of an earlier cut."""
    scale = dict(view.scale)
    for name, factor in step.scale.items():
        old = _source_name(view, name)
        scale[old] = scale.get(old, 1.0) * factor
    return view.changed(hidden=among(view.hidden, step.kept), scale=scale)


def cut_expert_size(view: View, step: CutExpertSize) -> View:
    """The neurons listed, a list of its own for each expert that is left; of a merged one, places of the mean."""
    experts = dict(view.experts)
    for key, lists in step.experts.items():
        old = view.source_key(key)
        experts[old] = tuple(_narrow(e, ids) for e, ids in zip(view.experts_of(old), lists, strict=True))
    shared = dict(view.shared)
    for key, ids in step.shared.items():
        old = view.source_key(key)
        shared[old] = among(view.shared.get(old), ids)
    return view.changed(experts=experts, shared=shared)


def set_top_k(view: View, step: SetTopK) -> View:
    """Only config.json changes."""
    return view.changed(top_k=step.top_k)


def _narrow(expert: Expert, ids: tuple[int, ...]) -> Expert:
    return replace(expert, parts=tuple(replace(part, neurons=among(part.neurons, ids)) for part in expert.parts))


def _source_name(view: View, name: str) -> str:
    """The source's name of a tensor of a layer, or of an outer one, after the layers dropped so far."""
    here = view.here
    for new in here.layer_keys:
        prefix = layer_prefix(here, new)
        if prefix and name.startswith(prefix):
            return layer_prefix(view.shape, view.source_key(new)) + name.removeprefix(prefix)
    return name
