"""A model's shape, read from a raw config.json and checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeslim.errors import FamilyError
from moeslim.families.registry import family_of
from moeslim.families.spec import Family


@dataclass(frozen=True)
class Shape:
    """Sizes of all named axes and the kind of every layer; layers are keyed "0".."L-1", the MTP block "mtp.0"."""

    family: Family
    sizes: Mapping[str, int]
    layer_types: tuple[str, ...]
    dense_layers: frozenset[int]
    tied: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Shape":
        """Read and check a raw config; FamilyError names the key that is missing, of a wrong type or impossible."""
        family = family_of(config)
        sizes = {axis: _integer(config, where) for axis, where in family.sizes.items()}
        for axis, rule in family.derived.items():
            numerator, denominator = (sizes[name] for name in rule.split(" // "))
            if numerator % denominator:
                raise FamilyError(
                    f"config.json: {rule.replace(' // ', ' per ')} must be whole, found {numerator} and {denominator}"
                )
            sizes[axis] = numerator // denominator
        layers = _integer(config, "num_hidden_layers")
        shape = cls(
            family=family,
            sizes=sizes,
            layer_types=_layer_types(config, family, layers=layers),
            dense_layers=_dense_layers(config, layers),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
        shape._check()
        return shape

    @property
    def layers(self) -> int:
        """Decoder layers of the trunk."""
        return len(self.layer_types)

    def __getitem__(self, axis: str) -> int:
        return self.sizes[axis]

    @property
    def layer_keys(self) -> tuple[str, ...]:
        """ "0".."L-1", without the MTP block."""
        return tuple(str(layer) for layer in range(self.layers))

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
        return self.family.mtp_mixer if key.startswith("mtp.") else self.layer_types[int(key)]

    def is_moe(self, key: str) -> bool:
        """Whether the layer has routed experts (the MTP block always does)."""
        return key.startswith("mtp.") or int(key) not in self.dense_layers

    @property
    def period(self) -> int:
        """Layers per repetition of the mixer pattern; 1 when all layers are alike."""
        for length in range(1, self.layers + 1):
            if self.layers % length == 0 and self.layer_types == self.layer_types[:length] * (self.layers // length):
                return length
        return self.layers

    def _check(self) -> None:
        if self["top_k"] > self["experts"]:
            raise FamilyError(
                f"config.json: num_experts_per_tok is {self['top_k']} but there are {self['experts']} experts; "
                "a token cannot be sent to more experts than there are"
            )
        if self["experts"] % self.groups:
            raise FamilyError(
                f"config.json: num_experts ({self['experts']}) must be a multiple of n_group ({self.groups})"
            )
        if self.topk_group > self.groups or self["top_k"] > self.topk_group * (self["experts"] // self.groups):
            raise FamilyError(
                f"config.json: topk_group is {self.topk_group} of n_group {self.groups} groups of "
                f"{self['experts'] // self.groups} experts, which must hold the {self['top_k']} experts per token "
                "(num_experts_per_tok)"
            )
        if self["heads"] % self["kv_heads"]:
            raise FamilyError(
                f"config.json: num_attention_heads ({self['heads']}) must be a multiple of num_key_value_heads "
                f"({self['kv_heads']})"
            )


def _integer(config: Mapping[str, Any], where: str | tuple[str, int]) -> int:
    key, value = (where, config.get(where)) if isinstance(where, str) else (where[0], config.get(*where))
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        found = "nothing" if value is None else repr(value)
        raise FamilyError(f"config.json: {key} must be a whole number of at least 1, found {found}")
    return value


def _layer_types(config: Mapping[str, Any], family: Family, *, layers: int) -> tuple[str, ...]:
    given = config.get("layer_types")
    if given is None:
        interval = _integer(config, ("full_attention_interval", family.default_interval))
        return tuple("full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers))
    allowed = family.mixers
    if not isinstance(given, list) or len(given) != layers or any(word not in allowed for word in given):
        raise FamilyError(
            f"config.json: layer_types must list {layers} words (num_hidden_layers) out of {', '.join(allowed)}"
        )
    return tuple(given)


def _dense_layers(config: Mapping[str, Any], layers: int) -> frozenset[int]:
    step = _integer(config, ("decoder_sparse_step", 1))
    only = config.get("mlp_only_layers") or []
    if not isinstance(only, list) or any(not isinstance(i, int) for i in only):
        raise FamilyError("config.json: mlp_only_layers must be a list of layer numbers")
    return frozenset(i for i in range(layers) if i in only or (i + 1) % step)
