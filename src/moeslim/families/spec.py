"""What a family's page may say: tensors whose axes have names.

An axis expression is a small language. `hidden` is a named axis, `4` a fixed number, `a|b` puts parts one behind the
other, `a*b` repeats b for every unit of a (a is the outer index), brackets group. So the rows of Qwen3-Next's query
projection, [query | gate] for every head, are `heads*(head_dim|head_dim)`, and keeping heads 0 and 2 keeps two whole
blocks. Cutting a named axis cuts it everywhere that its name appears; nothing else knows where a channel lives.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from moeslim.errors import FamilyError

_TOKEN = re.compile(r"\s*([a-z_]+|\d+|[|*()])")


@dataclass(frozen=True)
class Tensor:
    """One kind of tensor: `name` relative to its block, with `{e}` for an expert's number; one expression per axis."""

    name: str
    axes: tuple[str, ...]
    component: str
    init: str = "normal"  # normal | zeros | ones | dt_bias | a_log | conv: how a random one begins
    norm: str | None = None  # zero_centred: the layer multiplies by 1 + w; plain: by w
    matrix: str | None = None  # of an expert: gate | up | gate_up | down
    role: str | None = None  # shared_gate | correction_bias | expert_scale: what live code asks for; see `Family`
    when: str | None = None  # only there where this is one of the shape's `flags`


_MARKS = {  # what the last column of a page may say, as (init, norm, matrix, role)
    "zero_centred": ("zeros", "zero_centred", None, None),
    "plain_norm": ("ones", "plain", None, None),
    "bias": ("zeros", None, None, None),
    "correction_bias": ("zeros", None, None, "correction_bias"),
    "expert_scale": ("ones", None, None, "expert_scale"),
    "conv": ("conv", None, None, None),
    "a_log": ("a_log", None, None, None),
    "dt_bias": ("dt_bias", None, None, None),
    "gate": ("normal", None, "gate", None),
    "up": ("normal", None, "up", None),
    "gate_up": ("normal", None, "gate_up", None),
    "down": ("normal", None, "down", None),
    "shared_gate": ("normal", None, None, "shared_gate"),
}


def tensors(text: str) -> tuple[Tensor, ...]:
    """The lines of a page: component, name, axes by commas, at most one of `_MARKS`; two spaces part columns.

    Behind them `if KEY`: a tensor of models whose config says true there, or a number above 0; `if not KEY`: of all
    others; `if present`: files may hold it or not.
    """
    found = []
    for line in text.strip().splitlines():
        component, name, axes, *marks = re.split(r"\s{2,}", line.strip())
        when = marks.pop().removeprefix("if ") if marks and marks[-1].startswith("if ") else None
        init, norm, matrix, role = _MARKS[marks[0]] if marks else ("normal", None, None, None)
        when = name if when == "present" else when
        found.append(Tensor(name, tuple(re.split(r",\s*", axes)), component, init, norm, matrix, role, when))
    return tuple(found)


def sections(text: str) -> dict[str, tuple[Tensor, ...]]:
    """The tensors of a page by part: a line that ends with a colon names the part of the lines below it."""
    found = re.split(r"^\s*(\w+):\s*$", text, flags=re.MULTILINE)[1:]
    return {part: tensors(lines) for part, lines in zip(found[::2], found[1::2], strict=True)}


def keys(text: str) -> dict[str, str | tuple[str, int | str]]:
    """Pairs of an axis and the config key of its size, `key=default` where the config may leave it out.

    A default is a number, another axis, or a rule like hidden//heads. `key?`: with no key or null there is no axis.
    """
    parts = text.split()
    pairs = zip(parts[::2], (part.partition("=") for part in parts[1::2]), strict=True)
    return {axis: (key, _default(text)) if text else key for axis, (key, _, text) in pairs}


def _default(text: str) -> int | str:
    return int(text) if text.isdigit() else text.replace("//", " // ")


@dataclass(frozen=True)
class Mtp:
    """The MTP head's modules by their names behind `prefix`: `norm(layer(fc([norm_embedding(e); norm_hidden(h)])))`.

    `prefix` and `layer` may hold `{L}`, the trunk's number of layers; `layer` is where the head's decoder layer stands.
    """

    prefix: str
    layer: str
    fc: str
    norm_embedding: str
    norm_hidden: str
    norm: str

    @property
    def layer_prefix(self) -> str:
        """What the names of the decoder layer's tensors begin with, the dot included."""
        return self.prefix + self.layer

    @property
    def roles(self) -> dict[str, str]:
        """Name in a live head -> name on disk, both behind the prefix, of every module but the decoder layer."""
        return {role: getattr(self, role) for role in ("fc", "norm_embedding", "norm_hidden", "norm")}


@dataclass(frozen=True)
class Wrapper:
    """How a checkpoint of a wrapper class (text and vision) differs from one of the text class alone.

    The sizes lie in the config's `text_config`, `tie_word_embeddings` on top. `prefixes`: what a name on the page
    begins with -> what it begins with in the wrapper's files. `untouched`: what the names of tensors begin with that
    are no text model's: they are copied, bit by bit, and never run.
    """

    prefixes: Mapping[str, str]
    untouched: tuple[str, ...] = ()

    def named(self, name: str) -> str:
        """A name of the page in the wrapper's files."""
        for ours, theirs in self.prefixes.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name


@dataclass(frozen=True)
class Family:
    """The facts of one architecture. `sizes` maps an axis to its config key, or to (key, default).

    A router that chooses groups of experts first has the sizes `groups` (n_group) and `topk_group`, default 1.

    `parts` holds the tensors by part: "outer" outside the layers; "every" in all layers, one entry per token mixer (the
    words of `layer_types`), "moe" and "dense"; "mtp" in the MTP head outside its layer. `expert_prefix` is where
    `layouts.py` puts the routed experts. `{L}` in a name of the MTP head is the trunk's number of layers.

    `router` is how a router makes scores of its logits: "softmax" over all experts, "sigmoid" or "sqrtsoftplus" of
    each, "softmax_topk" over the chosen ones (the same as "softmax" and renormalised), "sparsemixer"; or
    "probabilities", where the softmax is what it puts out. An `expert_scale` multiplies an expert's gate value. A
    `correction_bias` is added to the scores for choosing and not for weighing. `renormalise`: whether the chosen ones'
    are divided by their sum; or (key, default) of the config.
    """

    model_type: str
    sizes: Mapping[str, str | tuple[str, int | str]]
    layer_prefix: str
    parts: Mapping[str, tuple[Tensor, ...]]
    expert_prefix: str
    derived: Mapping[str, str] = field(default_factory=dict)  # axis -> "a // b" or "a * b" of two other axes
    default_interval: int | None = None  # of full attention in a hybrid; None: every layer is full attention
    first_dense: tuple[str, int] | None = None  # (key, default) of how many first layers are dense; None: by number
    router: str = "softmax"
    ranked_by: int = 2  # how many of its experts' best scores a group is chosen by: the sum of 2, or the largest
    renormalise: bool | tuple[str, bool] = True
    mtp: Mtp | None = None  # None: the family has no MTP head
    mtp_mixer: str = "full_attention"
    mtp_default: int = 0  # MTP layers that a config without num_nextn_predict_layers is taken to have
    rope_defaults: Mapping[str, float] = field(default_factory=dict)  # what a config without these keys means
    spellings: Mapping[str, str] = field(default_factory=dict)  # another name of a key -> the key of `sizes`
    more_types: tuple[str, ...] = ()  # other model_types that the page is of, a wrapper's text part among them
    wrapper: Wrapper | None = None  # None: no model of the family is wrapped
    untouched: tuple[str, ...] = ()  # see `Wrapper`
    logits: tuple[str, str] | None = None  # what a head's product goes through: ("cap" | "times" | "over", config key)
    carries: bool = False  # layers return a pair, whose second part the next layer gets (model/carry.py)
    mixer_key: str = "layer_types"
    mtp_key: str = "num_nextn_predict_layers"  # says how many layers the MTP head has

    @property
    def mixers(self) -> tuple[str, ...]:
        """The token mixers that `layer_types` may name."""
        return tuple(part for part in self.parts if part not in ("outer", "every", "moe", "dense", "mtp"))

    @property
    def conditions(self) -> frozenset[str]:
        """What the presence of tensors depends on: config keys, and names of tensors that files may hold or not."""
        return frozenset(tensor.when for part in self.parts.values() for tensor in part if tensor.when)

    @cached_property
    def wrapped(self) -> "Family":
        """The same page with the names that the wrapper's files have."""
        assert self.wrapper is not None, self.model_type
        named = self.wrapper.named
        outside = {part: tuple(map(self._renamed, self.parts[part])) for part in ("outer", "mtp") if part in self.parts}
        return replace(
            self,
            layer_prefix=named(self.layer_prefix),
            parts={**self.parts, **outside},
            mtp=self.mtp and replace(self.mtp, prefix=named(self.mtp.prefix)),
            untouched=self.wrapper.untouched,
        )

    def _renamed(self, tensor: Tensor) -> Tensor:
        assert self.wrapper is not None
        named = self.wrapper.named
        return replace(tensor, name=named(tensor.name), when=tensor.when and named(tensor.when))

    def key(self, axis: str) -> str:
        """The config key of an axis."""
        where = self.sizes[axis]
        return (where if isinstance(where, str) else where[0]).removesuffix("?")


@lru_cache(maxsize=4096)
def parse(expression: str) -> tuple:
    """A tree of ("name", x), ("fixed", n), ("join", parts) and ("each", outer, inner) for an axis expression."""
    tokens = _TOKEN.findall(expression)
    if "".join(tokens) != expression.replace(" ", ""):
        raise ValueError(f"axis expression {expression!r} has a character outside a-z, _, digits and | * ( )")

    def joined() -> tuple:
        parts = [product()]
        while tokens and tokens[0] == "|":
            tokens.pop(0)
            parts.append(product())
        return parts[0] if len(parts) == 1 else ("join", tuple(parts))

    def product() -> tuple:
        left = factor()
        if tokens and tokens[0] == "*":
            tokens.pop(0)
            return ("each", left, product())
        return left

    def factor() -> tuple:
        token = tokens.pop(0)
        if token == "(":
            inside = joined()
            assert tokens.pop(0) == ")", expression
            return inside
        return ("fixed", int(token)) if token.isdigit() else ("name", token)

    tree = joined()
    assert not tokens, expression
    return tree


def size(expression: str, sizes: Mapping[str, int]) -> int:
    """How long the axis is, given the size of every named axis."""
    return _size(parse(expression), sizes)


def _size(tree: tuple, sizes: Mapping[str, int]) -> int:
    kind = tree[0]
    if kind == "fixed":
        return tree[1]
    if kind == "name":
        if tree[1] not in sizes:
            raise FamilyError(f"the config gives no size for the axis {tree[1]!r}")
        return sizes[tree[1]]
    if kind == "join":
        return sum(_size(part, sizes) for part in tree[1])
    return _size(tree[1], sizes) * _size(tree[2], sizes)


def positions(expression: str, sizes: Mapping[str, int], *, kept: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The flat positions along the axis that stay when the named axes keep `kept`; None when all of them stay.

    `sizes` are those before the cut; the order of `kept` is the order of the result.
    """
    tree = parse(expression)
    if not any(name in kept for name in _names(tree)):
        return None
    return _positions(tree, sizes, kept=kept)


def names(expression: str) -> frozenset[str]:
    """The named axes that an expression is made of."""
    return frozenset(_names(parse(expression)))


def _names(tree: tuple) -> list[str]:
    if tree[0] == "name":
        return [tree[1]]
    if tree[0] == "join":
        return [name for part in tree[1] for name in _names(part)]
    return [name for part in tree[1:] for name in _names(part)] if tree[0] == "each" else []


def _positions(tree: tuple, sizes: Mapping[str, int], *, kept: Mapping[str, np.ndarray]) -> np.ndarray:
    kind = tree[0]
    if kind == "fixed":
        return np.arange(tree[1])
    if kind == "name":
        return np.asarray(kept[tree[1]]) if tree[1] in kept else np.arange(_size(tree, sizes))
    if kind == "join":
        starts = np.cumsum([0] + [_size(part, sizes) for part in tree[1]])
        pieces = [start + _positions(part, sizes, kept=kept) for start, part in zip(starts[:-1], tree[1], strict=True)]
        return np.concatenate(pieces)
    outer, inner = _positions(tree[1], sizes, kept=kept), _positions(tree[2], sizes, kept=kept)
    return (outer[:, None] * _size(tree[2], sizes) + inner[None, :]).reshape(-1)
