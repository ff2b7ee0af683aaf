"""A model's shape, read from a raw config.json and checked."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moeslim.errors import FamilyError
from moeslim.families.axes import names
from moeslim.families.layers import (
    MOST,
    check_exceptions,
    dense,
    holds,
    integer,
    levelled,
    mixers,
    per_layer,
    with_exceptions,
    with_list,
)
from moeslim.families.registry import family_of, text_config
from moeslim.families.spec import Family

_MOST_LAYERS, _MOST_EXPERTS = 4096, 1 << 18
"""Of all layers together: ten times those of the largest models. Tables of names are made for each, in memory."""
_LACKED = frozenset({"experts", "top_k", "expert_size", "dense_size"})
"""Axes that a family may lack: their size is 0 then."""
_OF_EXPERTS = ("experts", "expert_size", "top_k", "shared_size", "groups", "topk_group")
"""Axes of layers with experts."""


@dataclass(frozen=True)
class Shape:
    """Sizes of all named axes and the kind of every layer; layers are keyed "0".."L-1", the MTP block "mtp.0".

    `mtp_layers` are those of the MTP head, 0 without one. A config alone does not say whether files have that head, so
    from one alone a family that may have it does: headers tell (`with_present`).
    `renormalise`: whether a router divides the scores of the chosen experts by their sum.
    Logits are `logit_scale` times the head's product z, then `cap tanh(z / cap)` where there is a `logit_cap`.
    `flags` are the conditions of the family's tensors that hold: config keys that are true, names of tensors found.
    `dense_layers` are those without routed experts, `lists` the config's further lists with an entry per layer.
    """

    family: Family
    sizes: Mapping[str, int]
    layer_types: tuple[str, ...]
    dense_layers: frozenset[int]
    tied: bool
    mtp_layers: int
    renormalise: bool = True
    flags: frozenset[str] = frozenset()
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    lists: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Shape":
        """Read and check a raw config; FamilyError names the key that is missing, of a wrong type or impossible.

        A tensor that files may hold or not (`if present`) is not among the flags, and an MTP head that they may hold is
        taken to be there: see `with_present`.
        """
        family = family_of(config)
        tied = bool(_one_spelling(config, family).get("tie_word_embeddings", family.tied))
        config = with_exceptions(_one_spelling(levelled(text_config(config), family), family), family)
        for condition, meaning in family.refused.items():
            if holds(config, condition):
                raise FamilyError(f"config.json: {condition.partition('=')[0]}: {meaning}")
        sizes, layers = _sizes(config, family), integer(config, "num_hidden_layers")
        experts = sizes.get("experts", 0)
        if layers > _MOST_LAYERS or layers * experts > _MOST_EXPERTS:
            raise FamilyError(
                f"config.json: {layers:,} layers (num_hidden_layers) of {experts:,} experts; at most "
                f"{_MOST_LAYERS:,} layers and {_MOST_EXPERTS:,} experts in all of them can be worked on"
            )
        words = mixers(config, family, layers=layers)
        check_exceptions(config, family, kinds=words)
        sizes = _present(sizes, family, kinds=words)
        experts = sizes.get("experts", 0)
        named = {family.mixer_key, family.ffn.key}
        lists = {key: per_layer(config, key, rule=family.lists[key], layers=layers) for key in {*family.lists} - named}
        shape = cls(
            family=family,
            sizes=sizes,
            layer_types=words,
            dense_layers=dense(config, family, kinds=words) if experts else frozenset(range(layers)),
            tied=tied,
            mtp_layers=int(family.mtp is not None),
            renormalise=_renormalise(config, family),
            flags=frozenset(key for key in {*family.conditions, *family.fixed_width} if holds(config, key)),
            lists={key: entries for key, entries in sorted(lists.items()) if entries is not None},
            **_logits(config, family),
        )
        shape._check()
        return shape

    @property
    def layers(self) -> int:
        """Decoder layers of the trunk."""
        return len(self.layer_types)

    def __getitem__(self, axis: str) -> int:
        """The size of a named axis; 0 for experts, their size and the like where the model has none."""
        return self.sizes.get(axis, 0) if axis in _LACKED else self.sizes[axis]

    def count(self, axis: str) -> int:
        """The size of a named axis, or the trunk's number of "layers"."""
        return self.layers if axis == "layers" else self[axis]

    def resized(self, **sizes: int) -> "Shape":
        """The same model with other sizes of named axes, and of those that follow from them."""
        given = {**self.sizes, **sizes}
        return replace(self, sizes={**given, **_derived(self.family, given)})

    def keep_layers(self, kept: Sequence[int]) -> "Shape":
        """The same model with the trunk's layers `kept` alone, numbered anew in their order."""
        return replace(
            self,
            layer_types=tuple(self.layer_types[old] for old in kept),
            dense_layers=frozenset(new for new, old in enumerate(kept) if old in self.dense_layers),
            lists={key: tuple(entries[old] for old in kept) for key, entries in self.lists.items()},
        )

    @property
    def trunk(self) -> "Shape":
        """The same model without its MTP head."""
        return replace(self, mtp_layers=0)

    def width_problem(self, hidden: int) -> str | None:
        """Why the model cannot be cut to `hidden` channels; None where it can."""
        if hidden == self["hidden"]:
            return None
        for key, reason in self.family.fixed_width.items():
            if not key or key in self.flags:
                return f"{self.family.model_type} keeps all {self['hidden']} channels: {reason}"
        try:
            self.resized(hidden=hidden)
        except FamilyError as problem:
            reason = str(problem).removeprefix("config.json: ")
            return f"{self.family.model_type} cannot have {hidden} channels: {reason}"
        if hidden % self.hidden_multiple:
            unit, axis = self.hidden_multiple, self.family.hidden_multiple
            return (
                f"{hidden} channels are no multiple of {unit} ({axis}), and transformers' class needs one; "
                f"keep {max(unit, hidden // unit * unit)}"
            )
        return None

    @property
    def last_problem(self) -> str | None:
        """What is wrong with the last layer's mixer; None where nothing is."""
        wanted = self.family.last_mixer
        if wanted in ("", self.layer_types[-1]):
            return None
        return f"last layer has {self.layer_types[-1]}, and transformers' class would make it {wanted}"

    @property
    def hidden_multiple(self) -> int:
        """What the number of channels must be a multiple of; 1 where it need not."""
        return 1 if self.family.hidden_multiple is None else self[self.family.hidden_multiple]

    def with_present(self, names: Collection[str]) -> "Shape":
        """The same shape, knowing by all tensors' `names` whether there is an MTP head, and what else may be or not."""
        found = {pattern for pattern in self.family.conditions if self.named(pattern) in names}
        head = self.family.mtp
        has_mtp = head is not None and any(name.startswith(self.named(head.prefix)) for name in names)
        return replace(self, flags=self.flags | found, mtp_layers=int(has_mtp))

    def is_untouched(self, name: str) -> bool:
        """Whether a tensor of a checkpoint is none of the text model's: copied as it is, and never run."""
        return name.startswith(self.family.untouched) if self.family.untouched else False

    def join_axis(self, name: str) -> int | None:
        """The axis of an untouched tensor that is the text model's channels; None where it has no such axis."""
        return self.family.joins.get(re.sub(r"\.\d+\.", ".*.", name), self.family.joins.get(name))

    def named(self, pattern: str) -> str:
        """A tensor's full name outside the trunk's layers, from the page's: `{L}` becomes the number of layers."""
        return pattern.replace("{L}", str(self.layers))

    def outer(self, component: str) -> str:
        """The name on disk of the trunk's "embedding", "norm" or "head"; a tied head's is the embedding's."""
        wanted = "embedding" if component == "head" and self.tied else component
        return next(tensor.name for tensor in self.family.parts["outer"] if tensor.component == wanted)

    def prefix(self, key: str) -> str:
        """What the names of a layer's tensors begin with, the dot included."""
        if is_mtp(key):
            return "" if self.family.mtp is None else self.named(self.family.mtp.layer_prefix)
        return self.family.layer_prefix.replace("{l}", key)

    def halves(self, key: str) -> tuple[str, str] | None:
        """Where a layer's mixer and its experts stand behind its prefix, if they are layers of their own: see `Mtp`."""
        head = self.family.mtp
        return head.halves if head is not None and is_mtp(key) else None

    @property
    def trunk_keys(self) -> tuple[str, ...]:
        """ "0".."L-1": the trunk's layers."""
        return tuple(str(layer) for layer in range(self.layers))

    @property
    def mtp_keys(self) -> tuple[str, ...]:
        """The MTP head's layers: "mtp.0", or none."""
        return tuple(f"mtp.{layer}" for layer in range(self.mtp_layers))

    @property
    def layer_keys(self) -> tuple[str, ...]:
        """All layers, those of the MTP head last."""
        return (*self.trunk_keys, *self.mtp_keys)

    @property
    def moe_keys(self) -> tuple[str, ...]:
        """The layers with routed experts, those of the MTP head last."""
        return tuple(key for key in self.layer_keys if self.is_moe(key))

    @property
    def dense_keys(self) -> tuple[str, ...]:
        """The layers with a dense MLP whose size is an axis, those of the MTP head last."""
        return tuple(key for key in self.layer_keys if "dense_size" in self.sizes and self.ffn(key) == "dense")

    @property
    def keys(self) -> tuple[str, ...]:
        """What a walk visits, in order: the trunk's layers, its last norm ("norm"), the MTP head's layers."""
        return (*self.trunk_keys, "norm", *self.mtp_keys)

    @property
    def groups(self) -> int:
        """Groups of consecutive experts that the router chooses between first; 1 in a family without them."""
        return self.sizes.get("groups", 1)

    @property
    def topk_group(self) -> int:
        """How many of the groups are open to a token."""
        return self.sizes.get("topk_group", 1)

    def mixer(self, key: str) -> str:
        """The token mixer of a layer: a word of `layer_types`."""
        return self.family.mtp_mixer if is_mtp(key) else self.layer_types[int(key)]

    def kind(self, key: str) -> str:
        """What the layer's token mixer is: attention, mla, deltanet, mamba or conv; "" where it has none."""
        return self.family.kind(self.mixer(key))

    def window(self, key: str) -> int | None:
        """How many tokens a layer's attention meets at most; None where that is all of them.

        Sliding are the layers whose word says so, or all where the family has no such word.
        """
        words = [word for word in self.family.mixers if "sliding" in word]
        return self.sizes.get("window") if self.mixer(key) in words or not words else None

    def attention(self, key: str) -> tuple[int, int, int]:
        """Heads, heads of keys and values, and a head's size of a layer with attention."""
        own = "global_" if "global_head_dim" in self.sizes and self.window(key) is None else ""
        return self["heads"], self[f"{own}kv_heads"], self[f"{own}head_dim"]

    def has_indexer(self, key: str) -> bool:
        """Whether the layer chooses the tokens that it attends to; others that attend to chosen ones use its choice."""
        tensors = self.family.parts.get(self.mixer(key), ())
        return any("index_dim" in names(axis) for tensor in tensors for axis in tensor.axes)

    def is_moe(self, key: str) -> bool:
        """Whether the layer has routed experts; the MTP block of a model with any has them, or is said to be dense."""
        if is_mtp(key):
            return "experts" in self.sizes and not (self.family.mtp is not None and self.family.mtp.dense)
        return "experts" in self.sizes and int(key) not in self.dense_layers

    def ffn(self, key: str) -> str:
        """The layer's part of the page behind its mixer: moe, dense, or "" where a layer is a mixer alone."""
        if self.is_moe(key):
            return "moe"
        alone = self.family.ffn.rule == "mixer" and not is_mtp(key) and self.mixer(key) != "mlp"
        return "" if alone else "dense"

    @property
    def period(self) -> int:
        """Layers per repetition of the mixer pattern; 1 when all layers are alike."""
        for length in range(1, self.layers + 1):
            if self.layers % length == 0 and self.layer_types == self.layer_types[:length] * (self.layers // length):
                return length
        return self.layers

    def _check(self) -> None:
        key = self.family.key
        if self.layer_types[0] in self.family.follows:
            raise FamilyError(
                f"config.json: the first of {self.family.mixer_key} is {self.layer_types[0]!r}, which uses what a "
                "layer before it hands on"
            )
        if self["experts"] and not self["top_k"]:
            raise FamilyError(f"config.json: {key('top_k')} is missing; it says how many experts a token is sent to")
        if self["top_k"] > self["experts"]:
            raise FamilyError(
                f"config.json: {key('top_k')} is {self['top_k']} but there are {self['experts']} experts; "
                "a token cannot be sent to more experts than there are"
            )
        if self["experts"] % self.groups:
            raise FamilyError(
                f"config.json: {key('experts')} ({self['experts']}) must be a multiple of n_group ({self.groups})"
            )
        if "groups" in self.sizes and self["experts"] // self.groups < self.family.ranked_by:
            raise FamilyError(
                f"config.json: {key('experts')} ({self['experts']}) in n_group {self.groups} groups are "
                f"{self['experts'] // self.groups} in each, and the router ranks a group by its "
                f"{self.family.ranked_by} best; there must be at least {self.family.ranked_by * self.groups}"
            )
        if self.topk_group > self.groups or self["top_k"] > self.topk_group * (self["experts"] // self.groups):
            raise FamilyError(
                f"config.json: topk_group is {self.topk_group} of n_group {self.groups} groups of "
                f"{self['experts'] // self.groups} experts, which must hold the {self['top_k']} experts per token "
                f"({key('top_k')})"
            )
        for axis in ("kv_heads", "global_kv_heads"):
            if axis in self.sizes and self["heads"] % self[axis]:
                raise FamilyError(
                    f"config.json: {key('heads')} ({self['heads']}) must be a multiple of {key(axis)} ({self[axis]})"
                )
        if self.last_problem is not None:
            raise FamilyError(f"config.json: the {self.last_problem}; {self.family.mixer_key} must end with it")


def is_mtp(key: str) -> bool:
    """Whether a layer's key is one of the MTP head's."""
    return key.startswith("mtp.")


def _one_spelling(config: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """The config with the keys of the family's page, and its list of mixers as words."""
    for other, key in family.spellings.items():
        if other in config and config.get(key, config[other]) != config[other]:
            raise FamilyError(
                f"config.json: {key} is {config[key]!r} and {other} is {config[other]!r}, two names of one size; "
                "remove the wrong one"
            )
        config = {**config, key: config[other]} if other in config else config
    return with_list(config, family)


def _sizes(config: Mapping[str, Any], family: Family) -> dict[str, int]:
    """Every named axis that there is, those that follow from others last."""
    sizes: dict[str, int] = {}
    optional = {condition.partition("=")[0] for condition in family.conditions}
    for axis, (key, default, nullable, _) in family.sizes.items():
        if key in optional and config.get(key) == 0 and type(config[key]) is int:
            continue
        absent = config.get(key) is None if nullable else key not in config
        if nullable and (absent or not config[key]) and default is None:
            continue
        if absent and isinstance(default, str):
            sizes[axis] = _rule(default, sizes)
        else:
            given = {} if absent else {key: config[key]}
            sizes[axis] = integer(given, key, default=None if isinstance(default, str) else default)
    return sizes


def _present(sizes: Mapping[str, int], family: Family, *, kinds: Collection[str]) -> dict[str, int]:
    """The axes that a model with layers of these `kinds` has, and those that follow from them."""
    listed, every = family.ffn.rule == "mixer", family.ffn.rule == "all"
    moe = "experts" in sizes and (not listed or "moe" in kinds)
    plain = "mlp" in kinds if listed else not (moe and every)
    lacked = {*(() if moe else _OF_EXPERTS), *(() if plain else ("dense_size",))}
    sizes = {axis: size for axis, size in sizes.items() if axis not in lacked}
    return {**sizes, **_derived(family, sizes)}


def _derived(family: Family, sizes: Mapping[str, int]) -> dict[str, int]:
    """The axes that follow from others, of those that there are."""
    return {axis: _rule(rule, sizes) for axis, rule in family.derived.items() if {*rule.split()} <= {*sizes, "*", "//"}}


def _logits(config: Mapping[str, Any], family: Family) -> dict[str, float]:
    """`logit_scale` or `logit_cap`; a key that is missing or null means neither."""
    how, key = family.logits or ("", "")
    value = config.get(key)
    if value is None:
        return {}
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST:
        raise FamilyError(f"config.json: {key} must be a number above 0, found {str(value)[:60]}")
    return {"logit_cap": float(value)} if how == "cap" else {"logit_scale": value if how == "times" else 1 / value}


def _rule(rule: str, sizes: Mapping[str, int]) -> int:
    """The value of "a", or of "a * b // c" from left to right, where a division must be whole."""
    first, *rest = rule.split()
    value, said = sizes[first], first
    for operation, axis in zip(rest[::2], rest[1::2], strict=True):
        if operation == "//" and value % sizes[axis]:
            raise FamilyError(f"config.json: {said} per {axis} must be whole, found {value} and {sizes[axis]}")
        value = value // sizes[axis] if operation == "//" else value * sizes[axis]
        said = f"{said} {operation} {axis}"
    return value


def _renormalise(config: Mapping[str, Any], family: Family) -> bool:
    if isinstance(family.renormalise, bool):
        return family.renormalise
    return bool(config.get(*family.renormalise))
