"""Which kind every layer is of: read from a config by the rules of a family's page, and written back after a cut."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from moeslim.errors import FamilyError
from moeslim.families.spec import Family, Ffn, PerLayer

MOST = 1 << 31
"""A number in a config must be below it."""


def integer(config: Mapping[str, Any], key: str, *, default: int | None = None, least: int = 1) -> int:
    """The whole number under `key`, `default` where there is none; FamilyError for anything else."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < MOST:
        found = "nothing" if value is None else repr(value)[:60]
        raise FamilyError(
            f"config.json: {key} must be a whole number of at least {least} and below {MOST:,}, found {found}"
        )
    return value


def listed(family: Family) -> frozenset[str]:
    """The config keys of sizes under which there may be a list, in all their spellings."""
    own = {key.name for key in family.sizes.values() if key.listed}
    return frozenset(own | {other for other, key in family.spellings.items() if key in own})


def levelled(config: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """The config with a number where it may have a list and has one; FamilyError where layers differ."""
    for key in sorted(listed(family)):
        given = config.get(key)
        if isinstance(given, list):
            if not given or any(type(entry) is not int or entry != given[0] for entry in given):
                raise FamilyError(
                    f"config.json: {key} is {str(given)[:60]}; only models that are alike in all layers can be worked "
                    "on, so it must be one number, or the same one for every layer"
                )
            config = {**config, key: given[0]}
    return config


def holds(config: Mapping[str, Any], condition: str) -> bool:
    """Whether `KEY`, `KEY=true` (true without the key) or `not KEY` holds: for true, a number above 0, or a section."""
    key, _, default = condition.removeprefix("not ").partition("=")
    value = config.get(key, default == "true")
    yes = value is True or (type(value) is int and value > 0) or (isinstance(value, dict) and bool(value))
    return yes != condition.startswith("not ")


def per_layer(config: Mapping[str, Any], key: str, *, rule: PerLayer | None, layers: int) -> tuple[Any, ...] | None:
    """The list under `key`, or the one that `rule` makes; None where there is neither.

    FamilyError for a list of another length, and where there must be one.
    """
    given = config.get(key)
    if given is not None:
        if not isinstance(given, list) or len(given) != layers:
            raise FamilyError(f"config.json: {key} must be a list of {layers} entries (num_hidden_layers)")
        return tuple(given)
    if rule is None:
        return None
    if rule.letters and config.get(rule.letters) is not None:
        return _spelled(config[rule.letters], rule, layers=layers)
    if rule.when is not None and not holds(config, rule.when):
        return (rule.most,) * layers
    if rule.every is not None:
        step = integer(config, rule.every[0], default=rule.every[1])
        first = integer(config, rule.offset[0], default=rule.offset[1], least=0)
        return tuple(rule.most if max(i + 1 - first, 0) % step else rule.other for i in range(layers))
    if rule.start is not None:
        first = integer(config, rule.start[0], default=rule.start[1], least=0)
        return tuple(rule.most if i < first else rule.other for i in range(layers))
    if rule.when is not None:
        raise FamilyError(f"config.json: {rule.when} is set, so {key} must say which layers it is for")
    return (rule.most,) * layers


def with_exceptions(config: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """The config with the sizes that it lists by layer under their keys; FamilyError unless the layers' are alike."""
    rule = family.exceptions
    listed = config.get(rule.key) if rule else None
    if rule is None or listed is None:
        return config
    entries: list[Any] = list(listed.values()) if isinstance(listed, dict) else [None]
    known = [isinstance(entry, dict) and entry.keys() <= rule.names.keys() for entry in entries]
    if not all(known) or any(entry != entries[0] for entry in entries):
        raise FamilyError(
            f"config.json: {rule.key} must give all {rule.mixer} layers the same {' and '.join(rule.names)}, and no "
            f"more, found {str(listed)[:60]}"
        )
    return {**config, **{rule.names[name]: size for entry in entries[:1] for name, size in entry.items()}}


def check_exceptions(config: Mapping[str, Any], family: Family, *, kinds: Sequence[str]) -> None:
    """FamilyError where the config lists sizes of layers with another mixer than the page says, or not of all."""
    rule = family.exceptions
    if rule is None or config.get(rule.key) is None:
        return
    own = [str(i) for i, word in enumerate(kinds) if word == rule.mixer]
    if sorted(config[rule.key]) != sorted(own):
        raise FamilyError(f"config.json: {rule.key} must list the {rule.mixer} layers {', '.join(own)}, and no others")


def write_exceptions(edited: dict[str, Any], family: Family, *, kinds: Sequence[str]) -> None:
    """List the sizes under the new numbers of their layers, if the config lists any."""
    rule = family.exceptions
    if rule is not None and (listed := edited.get(rule.key)):
        entry = next(iter(listed.values()))
        edited[rule.key] = {str(i): dict(entry) for i, word in enumerate(kinds) if word == rule.mixer}


def _spelled(given: Any, rule: PerLayer, *, layers: int) -> tuple[Any, ...]:
    words = {str(word)[0].upper(): word for word in (rule.most, rule.other)}
    if not isinstance(given, str) or len(given) != layers or not {*given} <= {*words}:
        raise FamilyError(
            f"config.json: {rule.letters} must be {layers} letters (num_hidden_layers) out of {', '.join(words)}, "
            f"found {str(given)[:60]}"
        )
    return tuple(words[letter] for letter in given)


def with_list(config: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """The config with the list of mixers that it may spell in letters, and the number of layers that a list says.

    FamilyError for a letter without a word, and where list and letters disagree.
    """
    listed = config.get(family.mixer_key)
    if family.letters is not None and config.get(family.letters[0]) is not None:
        key, text = family.letters[0], config[family.letters[0]]
        found = {letter: word for word, letter in reversed(list(family.letter_of.items()))}
        if not isinstance(text, str) or not set(text) <= set(found):
            raise FamilyError(
                f"config.json: {key} must have a letter out of {', '.join(sorted(found))} for every layer"
            )
        if listed is None:
            listed = [found[letter] for letter in text]
            config = {**config, family.mixer_key: listed}
        elif text != letters(listed, family):
            raise FamilyError(f"config.json: {key} and {family.mixer_key} disagree; remove the wrong one")
    if isinstance(listed, list) and "num_hidden_layers" not in config:
        config = {**config, "num_hidden_layers": len(listed)}
    return config


def letters(listed: Any, family: Family) -> str:
    """A list of mixers in letters; a word without one is a question mark."""
    return "".join(family.letter_of.get(str(word), "?") for word in listed) if isinstance(listed, list | tuple) else "?"


def mixers(config: Mapping[str, Any], family: Family, *, layers: int) -> tuple[str, ...]:
    """The token mixer of every layer; FamilyError for words that the page has no tensors of."""
    key = family.mixer_key
    allowed = (*family.mixers, *(("moe", "mlp") if family.ffn.rule == "mixer" else ()))
    given = config.get(key)
    wrong = given is not None and (
        not isinstance(given, list) or len(given) != layers or any(mixer not in allowed for mixer in given)
    )
    if wrong:
        raise FamilyError(
            f"config.json: {key} must list {layers} words (num_hidden_layers) out of {', '.join(allowed)}"
        )
    found = per_layer(config, key, rule=family.lists.get(key), layers=layers)
    if found is None and len(family.mixers) > 1:
        raise FamilyError(f"config.json: {key} is missing; it must list {layers} words out of {', '.join(allowed)}")
    return (family.mixers[0],) * layers if found is None else found


def dense(config: Mapping[str, Any], family: Family, *, kinds: Sequence[str]) -> frozenset[int]:
    """The numbers of the layers without routed experts, by the family's rule; `kinds` are their mixers."""
    ffn, layers = family.ffn, range(len(kinds))
    if ffn.rule == "all":
        return frozenset()
    if ffn.rule == "mixer":
        return frozenset(i for i, word in enumerate(kinds) if word != "moe")
    if ffn.rule == "first":
        return frozenset(layers[: integer(config, ffn.key, default=ffn.default, least=0)])
    if ffn.rule == "list":
        given = per_layer(config, ffn.key, rule=_first_dense(ffn), layers=len(kinds))
        assert given is not None
        return frozenset(i for i, word in enumerate(given) if word == "dense")
    if ffn.rule == "interval":
        first = integer(config, "moe_layer_start_index", default=1, least=0)
        last = integer(config, "moe_layer_end_index", default=-1, least=-1) % len(kinds)
        step = integer(config, "moe_layer_interval", default=1)
        return frozenset(i for i in layers if (i + 1) % step or not first <= i <= last)
    step = integer(config, "decoder_sparse_step", default=1)
    only = config.get("mlp_only_layers") or []
    if not isinstance(only, list) or any(type(i) is not int for i in only):
        raise FamilyError("config.json: mlp_only_layers must be a list of layer numbers")
    return frozenset(i for i in layers if i in only or (i + 1) % step)


def write_dense(edited: dict[str, Any], family: Family, *, numbers: Collection[int], layers: int) -> None:
    """Say in a config that the layers `numbers` of `layers` are dense, by the family's rule.

    ValueError where the rule has no words for that, with what it can say.
    """
    ffn, moe = family.ffn, [i for i in range(layers) if i not in numbers]
    if ffn.rule == "first":
        if set(numbers) != set(range(len(numbers))):
            raise ValueError(f"{ffn.key} can only say that the first layers are dense")
        edited[ffn.key] = len(numbers)
    elif ffn.rule == "list":
        words = ["dense" if i in numbers else "sparse" for i in range(layers)]
        write_list(edited, ffn.key, rule=_first_dense(ffn), entries=words)
    elif ffn.rule == "interval":
        for step in (edited.get("moe_layer_interval") or 1, *range(1, layers + 1)) if moe else ():
            said = {"moe_layer_interval": step, "moe_layer_start_index": moe[0], "moe_layer_end_index": moe[-1]}
            if dense(said, family, kinds=[""] * layers) == set(numbers):
                edited |= said
                return
        if not moe:
            edited |= {"moe_layer_interval": 1, "moe_layer_start_index": layers, "moe_layer_end_index": layers - 1}
            return
        raise ValueError("moe_layer_interval can only say that each n-th layer of a range has experts")
    elif ffn.rule == "steps":
        # a sparse step counts from layer 0, so after a cut the dense layers are listed by number instead
        edited["mlp_only_layers"] = sorted(numbers)
        if "decoder_sparse_step" in edited:
            edited["decoder_sparse_step"] = 1


def write_list(edited: dict[str, Any], key: str, *, rule: PerLayer | None, entries: Sequence[Any]) -> None:
    """Write a per-layer list into a config, and the number of its rule where the rule can still say it.

    Where it cannot the number goes, since an engine that reads it alone would build another model.
    """
    edited[key] = list(entries)
    if rule is not None and rule.letters in edited:
        edited[rule.letters] = "".join(str(word)[0].upper() for word in entries)
    if rule is None or (rule.when is not None and not holds(edited, rule.when)):
        return
    for where in (rule.every, rule.start):
        if where is None or not where[0]:
            continue
        bare = {name: value for name, value in edited.items() if name not in (key, rule.letters)}
        for number in (edited.get(where[0]) or where[1], *range(where is rule.every, len(entries) + 1)):
            if per_layer({**bare, where[0]: number}, key, rule=rule, layers=len(entries)) == tuple(entries):
                edited[where[0]] = number
                break
        else:
            edited.pop(where[0], None)


def _first_dense(ffn: Ffn) -> PerLayer:
    return PerLayer("dense", "sparse", start=(ffn.first, ffn.default))
