"""A raw config.json edited to another shape, never rebuilt: the inverse of `Shape.from_config`.

Loading and re-saving a config through transformers drops keys that serving engines read, so unknown keys stay as they
are and facts with two spellings are written in both.
"""

from collections.abc import Mapping
from typing import Any

from moeslim.errors import PlanError
from moeslim.families.layers import letters, listed, write_dense, write_exceptions, write_list
from moeslim.families.registry import family_of, text_config, with_text_config
from moeslim.families.shape import Shape


def edit_config(config: Mapping[str, Any], after: Shape) -> dict[str, Any]:
    """A new config for a model cut to the shape `after`: every fact in both of its spellings.

    The lists per layer that a page names are always written, an interval such as `full_attention_interval` only where
    it says the same. A size whose default follows from others (head_dim) is always written, and whether there is an MTP
    head as `with_mtp` does. Unknown keys and the order of keys stay. Raises PlanError as `check_layers`, FamilyError
    for a result that contradicts itself.
    """
    check_layers(after)
    before = Shape.from_config(config)
    edited = dict(text_config(config))
    for axis, (key, default, _, _) in before.family.sizes.items():
        if axis in after.sizes and (key in edited or isinstance(default, str) or after[axis] != before[axis]):
            edited[key] = after[axis]
    edited |= {
        other: edited.get(key, edited[other]) for other, key in before.family.spellings.items() if other in edited
    }
    were_lists = [key for key in listed(before.family) if isinstance(text_config(config).get(key), list)]
    edited |= {key: [edited[key]] * after.layers for key in were_lists}
    _write_layers(edited, after, before=before)
    _write_ropes(edited, before.family.rope_defaults)
    whole = with_mtp(with_text_config(config, edited), bool(after.mtp_layers))
    _write_width(whole, after["hidden"], before=before)
    Shape.from_config(whole)
    return whole


def check_layers(after: Shape) -> None:
    """PlanError where the first layer would need one before it, and where the family's config cannot say which layers
    are dense, or says it of the MTP head as well.
    """
    if after.layer_types[0] in after.family.follows:
        raise PlanError(
            f"the first layer of the cut model would be {after.layer_types[0]!r} ({after.family.mixer_key}), which "
            "uses what a layer before it hands on; keep that one too"
        )
    if after.family.ffn.rule == "steps" and after.mtp_layers and 0 in after.dense_layers and after["experts"]:
        raise PlanError(
            "mlp_only_layers of the cut model would hold 0, which makes the MTP head's block dense as well; "
            "keep a layer with experts as the first one"
        )
    if after.last_problem is not None:
        raise PlanError(f"the cut model's {after.last_problem}; keep other layers")
    try:
        if after["experts"]:
            write_dense({}, after.family, numbers=after.dense_layers, layers=after.layers)
    except ValueError as problem:
        found = ", ".join(map(str, sorted(after.dense_layers)))
        raise PlanError(
            f"the layers {found} of the cut model would be dense, and config.json of {after.family.model_type} cannot "
            f"say that: {problem}; keep other layers"
        ) from None


def with_mtp(config: Mapping[str, Any], mtp: bool) -> dict[str, Any]:
    """The config that says whether there is an MTP head; without one the key is only there where silence means one."""
    family = family_of(config)
    key = family.mtp_key
    said = {key: 1} if mtp and family.mtp is not None else {key: 0} if family.mtp_default else {}
    kept = {name: value for name, value in text_config(config).items() if name != key or key in said}
    return with_text_config(config, {**kept, **said})


def has_mtp(config: Mapping[str, Any]) -> bool:
    """Whether a raw config says that there is an MTP head."""
    family = family_of(config)
    return bool(text_config(config).get(family.mtp_key, family.mtp_default))


def _write_layers(edited: dict[str, Any], after: Shape, *, before: Shape) -> None:
    """Depth, the lists with an entry per layer, and the dense layers by their new numbers."""
    family = after.family
    edited["num_hidden_layers"] = after.layers
    lists = {family.mixer_key: after.layer_types, **after.lists}
    if family.letters is not None and family.letters[0] in edited:
        edited[family.letters[0]] = letters(after.layer_types, family)
        if family.mixer_key not in edited:  # a class that reads letters may not take the list as well
            del lists[family.mixer_key]
    for key, entries in lists.items():
        if key in family.lists or key in edited:
            write_list(edited, key, rule=family.lists.get(key), entries=entries)
    write_exceptions(edited, family, kinds=after.layer_types)
    changed = (after.layers, after.dense_layers) != (before.layers, before.dense_layers)
    if after["experts"] and (changed or family.ffn.key in edited):
        write_dense(edited, family, numbers=after.dense_layers, layers=after.layers)


def _write_width(whole: dict[str, Any], hidden: int, *, before: Shape) -> None:
    """The number of channels wherever a wrapper's config repeats it."""
    wrapper = before.family.wrapper
    for section, _, key in (place.partition(".") for place in (wrapper.width_keys if wrapper is not None else ())):
        found = whole.get(section)
        if isinstance(found, Mapping) and found.get(key) == before["hidden"]:
            whole[section] = {**found, key: hidden}


def _write_ropes(edited: dict[str, Any], defaults: Mapping[str, float]) -> None:
    """Rope theta and partial factor at the top (engines) and inside `rope_parameters` (transformers 5), if a page has
    `defaults`.

    Where they disagree, transformers' order holds: `rope_scaling`, `rope_parameters`, the top, the family's default.
    """
    if not defaults:
        return
    nested = dict(edited.get("rope_scaling") or edited.get("rope_parameters") or {})
    nested["rope_type"] = nested.get("rope_type") or nested.get("type") or "default"
    for key in ("rope_theta", "partial_rotary_factor"):
        value = nested.get(key, edited.get(key, defaults.get(key)))
        if value is not None:
            edited[key] = nested[key] = value
    edited["rope_parameters"] = nested
