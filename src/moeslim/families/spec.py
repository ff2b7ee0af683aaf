"""What a family's page may say: tensors whose axes have names (axes.py), config keys, rules for layers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple


@dataclass(frozen=True)
class Tensor:
    """One kind of tensor: `name` relative to its block, with `{e}` for an expert's number; one expression per axis."""

    name: str
    axes: tuple[str, ...]
    component: str
    init: str = "normal"  # normal | zeros | ones | dt_bias | a_log | conv: how a random one begins
    norm: str | None = None  # zero_centred: the layer multiplies by 1 + w; plain: by w
    matrix: str | None = None  # of an expert: gate | up | gate_up | down, or a bias of these: gate_up_bias, ...
    role: str | None = None  # shared_gate | correction_bias | expert_scale: what live code asks for; see `Family`
    when: str | None = None  # only there where this is one of the shape's `flags`
    power: float = 0.0  # the class multiplies what it gives with this power of the number of channels


_MARKS = {  # what the last column of a page may say, as (init, norm, matrix, role)
    "zero_centred": ("zeros", "zero_centred", None, None),
    "plain_norm": ("ones", "plain", None, None),
    "bias": ("zeros", None, None, None),
    "ones": ("ones", None, None, None),
    "correction_bias": ("zeros", None, None, "correction_bias"),
    "expert_scale": ("ones", None, None, "expert_scale"),
    "conv": ("conv", None, None, None),
    "a_log": ("a_log", None, None, None),
    "dt_bias": ("dt_bias", None, None, None),
    "gate": ("normal", None, "gate", None),
    "up": ("normal", None, "up", None),
    "gate_up": ("normal", None, "gate_up", None),
    "down": ("normal", None, "down", None),
    "gate_up_bias": ("zeros", None, "gate_up_bias", None),
    "down_bias": ("zeros", None, "down_bias", None),
    "shared_gate": ("normal", None, None, "shared_gate"),
    "times_sqrt_hidden": ("normal", None, None, None),
    "over_sqrt_hidden": ("normal", None, None, None),
    "norm_over_sqrt_hidden": ("ones", "plain", None, None),
}
_BRACES = re.compile(r"\{(\w[^{}]*,[^{}]*)\}")
_POWERS = {"times_sqrt_hidden": 0.5, "over_sqrt_hidden": -0.5, "norm_over_sqrt_hidden": -0.5}


def tensors(text: str) -> tuple[Tensor, ...]:
    """The lines of a page: component, name, axes by commas, at most one of `_MARKS`; two spaces part columns.

    `{a,b}` stands for two lines, one with a and one with b, in all columns that have braces.

    Behind them `if KEY`: a tensor of models whose config says true there, or a number above 0; `if not KEY`: of all
    others; `if KEY=true`: a config without the key says true. `if present`: files may hold it or not.
    """
    found = []
    for line in chain.from_iterable(map(_lines_of, text.strip().splitlines())):
        component, name, axes, *marks = re.split(r"\s{2,}", line.strip())
        when = marks.pop().removeprefix("if ") if marks and marks[-1].startswith("if ") else None
        init, norm, matrix, role = _MARKS[marks[0]] if marks else ("normal", None, None, None)
        when = name if when == "present" else when
        power = _POWERS.get(marks[0], 0.0) if marks else 0.0
        found.append(Tensor(name, tuple(re.split(r",\s*", axes)), component, init, norm, matrix, role, when, power))
    return tuple(found)


def _lines_of(line: str) -> list[str]:
    """A line for each word in braces, taken from all braces at once; the line itself where it has none."""
    texts = _BRACES.split(line)
    choices = zip(*(words.split(",") for words in texts[1::2]), strict=True)
    return ["".join(map("".join, zip(texts[::2], (*words, ""), strict=True))) for words in choices] or [line]


def sections(text: str) -> dict[str, tuple[Tensor, ...]]:
    """The tensors of a page by part: a line that ends with a colon names the parts that the lines below it are.

    Several names, parted by commas, are token mixers with the same tensors; a part that is named twice has both lines.
    """
    found = re.split(r"^\s*(\w+(?:, \w+)*):\s*$", text, flags=re.MULTILINE)[1:]
    pairs = zip(found[::2], (tensors(lines) for lines in found[1::2]), strict=True)
    joined: dict[str, tuple[Tensor, ...]] = {}
    for parts, lines in pairs:
        for part in parts.split(", "):
            joined[part] = joined.get(part, ()) + lines
    return joined


class Key(NamedTuple):
    """Where the config has an axis' size: the key `name`, and what it is without one (None: there must be one).

    `nullable`: null, and with no default 0 too, is like no key; with no default there is then no such axis.
    `listed`: the config may have a list of the same number for every layer.
    """

    name: str
    default: int | str | None = None
    nullable: bool = False
    listed: bool = False


def keys(text: str) -> dict[str, Key]:
    """Pairs of an axis and the config key of its size, `key=default` where the config may leave it out.

    A default is a number, another axis, or a rule like hidden//heads. `key?=default`: null is like no key; `key?`: with
    no key, null or 0 there is no such axis. `key[]`: a list with the same number for every layer is that number.
    Where tensors are there `if KEY` of a size alone, it may be 0, and there is no such axis either.
    """
    parts = text.split()
    pairs = zip(parts[::2], (part.partition("=") for part in parts[1::2]), strict=True)
    return {
        axis: Key(key.rstrip("?[]"), _default(text) if text else None, "?" in key, "[]" in key)
        for axis, (key, _, text) in pairs
    }


def _default(text: str) -> int | str:
    return int(text) if text.isdigit() else text.replace("//", " // ")


@dataclass(frozen=True)
class Ffn:
    """Which layers have routed experts and which a dense MLP.

    `rule`: "all": every layer has experts; "steps": every `decoder_sparse_step`-th but those of `mlp_only_layers`;
    "first": the first ones are dense, as many as `key` says; "list": `key` has a word per layer, dense or another, and
    without it the first ones are dense, as many as `first` says; "interval": each n-th of a range has experts
    (`moe_layer_interval`, `moe_layer_start_index`, `moe_layer_end_index`); "mixer": the words of `Family.mixer_key` say
    it: "moe", "mlp" (dense), or a mixer's, and such a layer has neither. A model without experts is dense in any case.
    """

    rule: str = "steps"
    key: str = ""
    default: int = 0  # of the number of first dense layers
    first: str = ""


@dataclass(frozen=True)
class PerLayer:
    """A list in the config with an entry per layer, and what it is where a config has none: `most` in every layer, but
    `other` in each n-th (n by `every`) or from layer n on (n by `start`), both (key, default), "" for a fixed n.

    `offset`: the n-th are counted from this layer on, and the layers before it are `other`. `letters`: a key under
    which the words may be written as one string of their first letters, in capitals.
    `when`: a key that must say yes for `other`; a config that says so must have the list if no rule is given here.
    """

    most: str | int
    other: str | int | None = None
    every: tuple[str, int] | None = None
    start: tuple[str, int] | None = None
    when: str | None = None
    offset: tuple[str, int] = ("", 0)
    letters: str = ""


@dataclass(frozen=True)
class Exceptions:
    """Sizes that the layers with one `mixer` have for themselves, as newer configs list them: under `key`, by the
    layer's number, by names that `names` gives the keys of `sizes` for."""

    key: str
    mixer: str
    names: Mapping[str, str]


@dataclass(frozen=True)
class Mtp:
    """The MTP head's modules by their names behind `prefix`: `norm(layer(fc([norm_embedding(e); norm_hidden(h)])))`.

    `prefix` and `layer` may hold `{L}`, the trunk's number of layers; `layer` is where the head's decoder layer stands.
    `norm` "": there is no norm behind the layer. `dense`: the layer has a dense MLP where the trunk's have experts.
    `halves`: in a family whose layers are a mixer or experts alone, where the layer of each stands behind that.
    """

    prefix: str
    layer: str
    fc: str
    norm_embedding: str
    norm_hidden: str
    norm: str = ""
    dense: bool = False
    halves: tuple[str, str] | None = None

    @property
    def layer_prefix(self) -> str:
        """What the names of the decoder layer's tensors begin with, the dot included."""
        return self.prefix + self.layer

    @property
    def roles(self) -> dict[str, str]:
        """Name in a live head -> name on disk, both behind the prefix, of every module but the decoder layer."""
        roles = ("fc", "norm_embedding", "norm_hidden", *(["norm"] if self.norm else []))
        return {role: getattr(self, role) for role in roles}


@dataclass(frozen=True)
class Wrapper:
    """How a checkpoint of a wrapper class (text and vision) differs from one of the text class alone.

    The sizes lie in the config's `text_config`, `tie_word_embeddings` on top. `prefixes`: what a name on the page
    begins with -> what it begins with in the wrapper's files. `untouched`: what the names of tensors begin with that
    are no text model's: they are copied, bit by bit, and never run. But `joins` names those of them that give the text
    model its channels, `*` being a number, and the axis of these, which a cut of width cuts too; `width_keys` are keys
    of the config (`section.key`) that repeat their number. `fixed_width`: why channels cannot be cut in a wrapper.
    """

    prefixes: Mapping[str, str]
    untouched: tuple[str, ...] = ()
    joins: Mapping[str, int] = field(default_factory=dict)
    width_keys: tuple[str, ...] = ()
    fixed_width: str = ""

    def named(self, name: str) -> str:
        """A name of the page in the wrapper's files."""
        for ours, theirs in self.prefixes.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name


@dataclass(frozen=True)
class Family:
    """The facts of one architecture. `sizes` maps an axis to its config key.

    A router that chooses groups of experts first has the sizes `groups` (n_group) and `topk_group`, default 1. A family
    without the sizes `experts`, `expert_size` and `top_k` is dense.

    What mixing tokens costs is computed from sizes of these names: `heads`, `kv_heads`, `head_dim` and perhaps `window`
    of attention, `global_kv_heads` and `global_head_dim` where layers without a window have others; `heads`,
    `nope_dim`, `rope_dim`, `v_dim`, `kv_lora`, perhaps `q_lora` of mla, with `index_heads`, `index_dim` and `index_top`
    where an indexer chooses the tokens; `mamba_heads`, `mamba_dim`, `mamba_groups`, `state`, `kernel` of mamba;
    `kernel` of conv. Which of these a mixer is, the component of its tensors says.

    `parts` holds the tensors by part: "outer" outside the layers; "every" in all layers, one entry per token mixer (the
    words of `layer_types`), "moe" and "dense"; "mtp" in the MTP head outside its layer. `expert_prefix` is where
    `layouts.py` puts the routed experts, `layouts` are its keys that files of this family may have, first that of new
    files. `{L}` in a name of the MTP head is the trunk's number of layers.

    `letters`: a key whose text is `mixer_key` with a letter per layer, and the letters, each with its words.
    `lists` are the config's lists with an entry per layer, which a cut of depth cuts too; None: no rule makes one.

    `fixed_width` says why channels cannot be cut, by the config key with which that is so, "" for always. The number of
    channels must be a multiple of the size of the axis `hidden_multiple`, if any.

    `router` is how a router makes scores of its logits: "softmax" over all experts, "sigmoid" or "sqrtsoftplus" of
    each, "softmax_topk" over the chosen ones (the same as "softmax" and renormalised), "sparsemixer"; or
    "probabilities", where the softmax is what it puts out. An `expert_scale` multiplies an expert's gate value. A
    `correction_bias` is added to the scores for choosing and not for weighing. `renormalise`: whether the chosen ones'
    are divided by their sum; or (key, default) of the config.
    """

    model_type: str
    sizes: Mapping[str, Key]
    layer_prefix: str
    parts: Mapping[str, tuple[Tensor, ...]]
    expert_prefix: str = ""
    layouts: tuple[str, ...] = ("per_expert", "stacked")
    derived: Mapping[str, str] = field(default_factory=dict)  # axis -> a rule like "a * b // c" of other axes
    ffn: Ffn = field(default_factory=Ffn)
    lists: Mapping[str, PerLayer | None] = field(default_factory=dict)
    mixer_key: str = "layer_types"
    last_mixer: str = ""  # what the class makes of the last layer, whatever the config says
    exceptions: Exceptions | None = None
    refused: Mapping[str, str] = field(default_factory=dict)  # condition as behind `if` -> what it means for a user
    letters: tuple[str, str] | None = None
    fixed_width: Mapping[str, str] = field(default_factory=dict)
    hidden_multiple: str | None = None
    tied: bool = False  # whether a config without tie_word_embeddings means one matrix
    router: str = "softmax"
    ranked_by: int = 2  # how many of its experts' best scores a group is chosen by: the sum of 2, or the largest
    renormalise: bool | tuple[str, bool] = True
    eager_attention: bool = False  # the class has no "sdpa" attention, so all scores are in memory
    mtp: Mtp | None = None  # None: the family has no MTP head
    mtp_mixer: str = "full_attention"
    mtp_default: int = 0  # MTP layers that a config without num_nextn_predict_layers is taken to have
    rope_defaults: Mapping[str, float] = field(default_factory=dict)  # what no key means; {}: ropes stay as they are
    spellings: Mapping[str, str] = field(default_factory=dict)  # another name of a key -> the key of `sizes`
    more_types: tuple[str, ...] = ()  # other model_types that the page is of, a wrapper's text part among them
    wrapper: Wrapper | None = None  # None: no model of the family is wrapped
    untouched: tuple[str, ...] = ()  # see `Wrapper`
    joins: Mapping[str, int] = field(default_factory=dict)
    logits: tuple[str, str] | None = None  # what a head's product goes through: ("cap" | "times" | "over", config key)
    carries: bool = False  # layers return a pair, whose second part the next layer gets (model/carry.py)
    follows: tuple[str, ...] = ()  # mixers that use what a layer before them hands on, so none can be the first
    mtp_key: str = "num_nextn_predict_layers"  # says how many layers the MTP head has

    @property
    def mixers(self) -> tuple[str, ...]:
        """The token mixers that `layer_types` may name."""
        return tuple(part for part in self.parts if part not in ("outer", "every", "moe", "dense", "mtp"))

    def kind(self, mixer: str) -> str:
        """What a token mixer is by its tensors: attention, mla, deltanet, mamba or conv; "" where it has none."""
        return next((tensor.component for tensor in self.parts.get(mixer, ())), "")

    @property
    def letter_of(self) -> Mapping[str, str]:
        """The letter of every word, where the config may spell the list of mixers as a text (see `letters`)."""
        found, letter = {}, ""
        for word in () if self.letters is None else self.letters[1].split():
            if len(word) == 1:
                letter = word
            else:
                found[word] = letter
        return found

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
            fixed_width={**self.fixed_width, **({"": self.wrapper.fixed_width} if self.wrapper.fixed_width else {})},
            untouched=self.wrapper.untouched,
            joins=self.wrapper.joins,
        )

    def _renamed(self, tensor: Tensor) -> Tensor:
        assert self.wrapper is not None
        named = self.wrapper.named
        return replace(tensor, name=named(tensor.name), when=tensor.when and named(tensor.when))

    def key(self, axis: str) -> str:
        """The config key of an axis."""
        return self.sizes[axis].name
