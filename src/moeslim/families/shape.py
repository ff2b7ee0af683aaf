"""A model's shape, read from a raw config.json and checked."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moeslim.errors import FamilyError
from moeslim.families.registry import family_of, text_config
from moeslim.families.spec import Family

_ABSURD = 1 << 31
_MOST_LAYERS, _MOST_EXPERTS = 4096, 1 << 18
"""Of all layers together: ten times those of the largest models. Tables of names are made for each, in memory."""


@dataclass(frozen=True)
class Shape:
    """Sizes of all named axes and the kind of every layer; layers are keyed "0".."L-1", the MTP block "mtp.0".

    `mtp_layers` are those of the MTP head, 0 without one. A config alone does not say whether files have that head, so
    from one alone a family that may have it does: headers tell (`with_present`).
    `renormalise`: whether a router divides the scores of the chosen experts by their sum.
    Logits are `logit_scale` times the head's product z, then `cap tanh(z / cap)` where there is a `logit_cap`.
    `flags` are the conditions of the family's tensors that hold: config keys that are true, names of tensors found.
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

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Shape":
        """Read and check a raw config; FamilyError names the key that is missing, of a wrong type or impossible.

        A tensor that files may hold or not (`if present`) is not among the flags, and an MTP head that they may hold is
        taken to be there: see `with_present`.
        """
        family = family_of(config)
        tied = bool(config.get("tie_word_embeddings", False))
        config = _one_spelling(text_config(config), family)
        sizes, layers = _sizes(config, family), _integer(config, "num_hidden_layers")
        if layers > _MOST_LAYERS or layers * sizes["experts"] > _MOST_EXPERTS:
            raise FamilyError(
                f"config.json: {layers:,} layers (num_hidden_layers) of {sizes['experts']:,} experts; at most "
                f"{_MOST_LAYERS:,} layers and {_MOST_EXPERTS:,} experts in all of them can be worked on"
            )
        shape = cls(
            family=family,
            sizes=sizes,
            layer_types=_layer_types(config, family, layers=layers),
            dense_layers=_dense_layers(config, family, layers=layers),
            tied=tied,
            mtp_layers=int(family.mtp is not None),
            renormalise=_renormalise(config, family),
            flags=frozenset(condition for condition in family.conditions if _holds(config, condition)),
            **_logits(config, family),
        )
        shape._check()
        return shape

    @property
    def layers(self) -> int:
        """Decoder layers of the trunk."""
        return len(self.layer_types)

    def __getitem__(self, axis: str) -> int:
        return self.sizes[axis]

    def count(self, axis: str) -> int:
        """The size of a named axis, or the trunk's number of "layers"."""
        return self.layers if axis == "layers" else self.sizes[axis]

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
        )

    @property
    def trunk(self) -> "Shape":
        """The same model without its MTP head."""
        return replace(self, mtp_layers=0)

    def with_present(self, names: Collection[str]) -> "Shape":
        """The same shape, knowing by all tensors' `names` whether there is an MTP head, and what else may be or not."""
        found = {pattern for pattern in self.family.conditions if self.named(pattern) in names}
        head = self.family.mtp
        has_mtp = head is not None and any(name.startswith(self.named(head.prefix)) for name in names)
        return replace(self, flags=self.flags | found, mtp_layers=int(has_mtp))

    def is_untouched(self, name: str) -> bool:
        """Whether a tensor of a checkpoint is none of the text model's: copied as it is, and never run."""
        return name.startswith(self.family.untouched) if self.family.untouched else False

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

    def is_moe(self, key: str) -> bool:
        """Whether the layer has routed experts (the MTP block always does)."""
        return is_mtp(key) or int(key) not in self.dense_layers

    @property
    def period(self) -> int:
        """Layers per repetition of the mixer pattern; 1 when all layers are alike."""
        for length in range(1, self.layers + 1):
            if self.layers % length == 0 and self.layer_types == self.layer_types[:length] * (self.layers // length):
                return length
        return self.layers

    def _check(self) -> None:
        key = self.family.key
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
        if self["heads"] % self["kv_heads"]:
            raise FamilyError(
                f"config.json: {key('heads')} ({self['heads']}) must be a multiple of {key('kv_heads')} "
                f"({self['kv_heads']})"
            )


def is_mtp(key: str) -> bool:
    """Whether a layer's key is one of the MTP head's."""
    return key.startswith("mtp.")


def _one_spelling(config: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """The config with the keys of the family's page."""
    for other, key in family.spellings.items():
        if other in config and config.get(key, config[other]) != config[other]:
            raise FamilyError(
                f"config.json: {key} is {config[key]!r} and {other} is {config[other]!r}, two names of one size; "
                "remove the wrong one"
            )
        config = {**config, key: config[other]} if other in config else config
    return config


def _sizes(config: Mapping[str, Any], family: Family) -> dict[str, int]:
    """Every named axis, those that follow from others last."""
    sizes: dict[str, int] = {}
    for axis, where in family.sizes.items():
        key, default = where if isinstance(where, tuple) else (where, None)
        if key.endswith("?") and config.get(key := key.removesuffix("?")) is None:
            continue
        if isinstance(default, str):
            default = None if key in config else _rule(default, sizes)
        sizes[axis] = _integer(config, key if default is None else (key, default))
    return {**sizes, **_derived(family, sizes)}


def _derived(family: Family, sizes: Mapping[str, int]) -> dict[str, int]:
    return {axis: _rule(rule, sizes) for axis, rule in family.derived.items()}


def _logits(config: Mapping[str, Any], family: Family) -> dict[str, float]:
    """`logit_scale` or `logit_cap`; a key that is missing or null means neither."""
    how, key = family.logits or ("", "")
    value = config.get(key)
    if value is None:
        return {}
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _ABSURD:
        raise FamilyError(f"config.json: {key} must be a number above 0, found {str(value)[:60]}")
    return {"logit_cap": float(value)} if how == "cap" else {"logit_scale": value if how == "times" else 1 / value}


def _holds(config: Mapping[str, Any], condition: str) -> bool:
    """Whether `KEY` or `not KEY` holds: yes is true, or a number above 0."""
    value = config.get(condition.removeprefix("not "))
    yes = value is True or (type(value) is int and value > 0)
    return yes != condition.startswith("not ")


def _rule(rule: str, sizes: Mapping[str, int]) -> int:
    """The value of "a", of "a // b", which must be whole, or of "a * b"."""
    if " " not in rule:
        return sizes[rule]
    left, operation, right = rule.split()
    if operation == "*":
        return sizes[left] * sizes[right]
    if sizes[left] % sizes[right]:
        raise FamilyError(f"config.json: {left} per {right} must be whole, found {sizes[left]} and {sizes[right]}")
    return sizes[left] // sizes[right]


def _integer(config: Mapping[str, Any], where: str | tuple[str, int], *, least: int = 1) -> int:
    key, value = (where, config.get(where)) if isinstance(where, str) else (where[0], config.get(*where))
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _ABSURD:
        found = "nothing" if value is None else repr(value)[:60]
        raise FamilyError(
            f"config.json: {key} must be a whole number of at least {least} and below {_ABSURD:,}, found {found}"
        )
    return value


def _layer_types(config: Mapping[str, Any], family: Family, *, layers: int) -> tuple[str, ...]:
    given = config.get(family.mixer_key)
    if given is None:
        if family.default_interval is None:
            return ("full_attention",) * layers
        interval = _integer(config, ("full_attention_interval", family.default_interval))
        return tuple("full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers))
    allowed = family.mixers
    if not isinstance(given, list) or len(given) != layers or any(mixer not in allowed for mixer in given):
        raise FamilyError(
            f"config.json: layer_types must list {layers} words (num_hidden_layers) out of {', '.join(allowed)}"
        )
    return tuple(given)


def _renormalise(config: Mapping[str, Any], family: Family) -> bool:
    if isinstance(family.renormalise, bool):
        return family.renormalise
    return bool(config.get(*family.renormalise))


def _dense_layers(config: Mapping[str, Any], family: Family, *, layers: int) -> frozenset[int]:
    if family.first_dense is not None:
        return frozenset(range(min(layers, _integer(config, family.first_dense, least=0))))
    step = _integer(config, ("decoder_sparse_step", 1))
    only = config.get("mlp_only_layers") or []
    if not isinstance(only, list) or any(type(i) is not int for i in only):
        raise FamilyError("config.json: mlp_only_layers must be a list of layer numbers")
    return frozenset(i for i in range(layers) if i in only or (i + 1) % step)
