"""A raw config.json edited to another shape, never rebuilt: the inverse of `Shape.from_config`.

Loading and re-saving a config through transformers drops keys that serving engines read, so unknown keys stay as they
are and facts with two spellings are written in both.
"""

from collections.abc import Mapping
from typing import Any

from moeslim.errors import PlanError
from moeslim.families.registry import family_of, text_config, with_text_config
from moeslim.families.shape import Shape


def edit_config(config: Mapping[str, Any], after: Shape) -> dict[str, Any]:
    """A new config for a model cut to the shape `after`: every fact in both of its spellings.

    In a hybrid `layer_types` is always written, `full_attention_interval` only where the pattern is
    `(i + 1) % interval == 0`, since an engine that reads it alone would build another model. A size whose default
    follows from others (head_dim) is always written, and whether there is an MTP head as `with_mtp` does. Unknown keys
    and the order of keys stay. Raises PlanError as `check_first_layer`, FamilyError for a result that contradicts
    itself.
    """
    check_first_layer(after)
    before = Shape.from_config(config)
    edited = dict(text_config(config))
    for axis, where in before.family.sizes.items():
        key, follows = before.family.key(axis), isinstance(where, tuple) and isinstance(where[1], str)
        if axis in after.sizes and (key in edited or follows or after[axis] != before[axis]):
            edited[key] = after[axis]
    edited |= {
        other: edited.get(key, edited[other]) for other, key in before.family.spellings.items() if other in edited
    }
    _write_layers(edited, after, before=before)
    _write_ropes(edited, before.family.rope_defaults)
    whole = with_mtp(with_text_config(config, edited), bool(after.mtp_layers))
    Shape.from_config(whole)
    return whole


def check_first_layer(after: Shape) -> None:
    """PlanError where layer 0 of a cut model would be dense beside an MTP head that is built like it."""
    if after.mtp_layers and 0 in after.dense_layers and after.family.first_dense is None:
        raise PlanError(
            "mlp_only_layers of the cut model would hold 0, which makes the MTP head's block dense as well; "
            "keep a layer with experts as the first one"
        )


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
    """Depth, `layer_types`, the interval, and the dense layers by their new numbers."""
    types, family = list(after.layer_types), after.family
    edited["num_hidden_layers"] = len(types)
    if family.default_interval is not None or "layer_types" in edited:
        edited["layer_types"] = types
    if family.default_interval is not None:
        _write_interval(edited, types, given=edited.get("full_attention_interval") or family.default_interval)
    if family.first_dense is not None:
        if family.first_dense[0] in edited or after.dense_layers != before.dense_layers:
            edited[family.first_dense[0]] = len(after.dense_layers)
    elif (after.layers, after.dense_layers) != (before.layers, before.dense_layers):
        # a sparse step counts from layer 0, so after a cut the dense layers are listed by number instead
        edited["mlp_only_layers"] = sorted(after.dense_layers)
        if "decoder_sparse_step" in edited:
            edited["decoder_sparse_step"] = 1


def _write_interval(edited: dict[str, Any], types: list[str], *, given: int) -> None:
    for interval in (given, *range(1, len(types) + 1)):
        if types == ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(len(types))]:
            edited["full_attention_interval"] = interval
            return
    edited.pop("full_attention_interval", None)


def _write_ropes(edited: dict[str, Any], defaults: Mapping[str, float]) -> None:
    """Rope theta and partial factor at the top (engines) and inside `rope_parameters` (transformers 5).

    Where they disagree, transformers' order holds: `rope_scaling`, `rope_parameters`, the top, the family's default.
    """
    nested = dict(edited.get("rope_scaling") or edited.get("rope_parameters") or {})
    nested["rope_type"] = nested.get("rope_type") or nested.get("type") or "default"
    for key in ("rope_theta", "partial_rotary_factor"):
        value = nested.get(key, edited.get(key, defaults.get(key)))
        if value is not None:
            edited[key] = nested[key] = value
    edited["rope_parameters"] = nested
