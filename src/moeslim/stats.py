"""The table that calibration learns: sums over calibration tokens, in float64, that merge.

Nothing here is a mean or a score: importance, similarity and rescale are ratios of these sums, made where a plan is
made, so two calibrations over different text add up to the calibration over both. Legend: d hidden size, E routed
experts, I their size, S the shared expert's size, X_e the tokens routed to expert e, g_e the gate value as the experts
receive it.

Adding commutes exactly and associates to float64 rounding. On disk: `stats.json`, `layer-<key>.safetensors` per
decoder layer and `norms.safetensors`.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from moeslim import __version__
from moeslim.artifacts.commit import disk_errors, read_json
from moeslim.errors import RunError

SCHEMA = 2
Array = np.ndarray
ENOUGH_TOKENS = 200
"""Tokens from which on an expert's mean counts as known.

A mean over n tokens is off by its coefficient of variation over sqrt(n). That of g_e ||E_e(x)|| is 1.5 in the middle
and 1.0 to 2.2 for nine experts in ten (the bundled teacher on 16 k tokens), so 200 tokens leave 11 % and 7 to 16 %.
"""
_LINES, _NAMED = 8, 4


def _nothing() -> Array:
    return np.zeros(0)


@dataclass(eq=False)
class _Sums:
    """Scalars and float64 arrays that add, field by field; those in `constant` are the weights' and must agree."""

    constant: ClassVar[frozenset[str]] = frozenset()
    axes: ClassVar[Mapping[str, str]] = {}
    """Field -> its axes, a letter of the legend each; a field that is not named is a scalar."""

    def add(self, other: Self) -> None:
        """Add the other's sums to these. ValueError if the shapes or the weights differ."""
        for name in self._names():
            mine, theirs = getattr(self, name), getattr(other, name)
            if np.shape(mine) != np.shape(theirs):
                raise ValueError(f"{name}: sums of shape {np.shape(mine)} and {np.shape(theirs)} are of two models")
            if name not in self.constant:
                setattr(self, name, mine + theirs)
            elif not np.array_equal(mine, theirs):
                raise ValueError(f"{name}: the weights differ, so these are sums of two models")

    def merge(self, other: Self) -> Self:
        """New sums over the tokens of both."""
        merged = type(self)(**{name: getattr(self, name) for name in self._names()})
        merged.add(other)
        return merged

    def state(self) -> dict[str, Array]:
        """Field name -> float64 array (0-dimensional for scalars; empty arrays are left out)."""
        arrays = {name: np.asarray(getattr(self, name), dtype=np.float64) for name in self._names()}
        return {name: array.copy(order="C") for name, array in arrays.items() if array.size}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        """The inverse of `state`. ValueError on a field that is not known, or of another shape."""
        unknown = set(state) - set(cls._names())
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        lengths: dict[str, int] = {}
        for name, array in state.items():
            own = zip(cls.axes.get(name, ""), array.shape, strict=False)
            if array.ndim != len(cls.axes.get(name, "")) or any(lengths.setdefault(a, n) != n for a, n in own):
                raise ValueError(f"{name} has shape {array.shape}, which fits none of the others")
        return cls(**{name: float(array) if array.ndim == 0 else array for name, array in state.items()})

    @classmethod
    def _names(cls) -> tuple[str, ...]:
        return tuple(item.name for item in fields(cls))


@dataclass(eq=False)
class LayerStats(_Sums):
    """One decoder layer. x is its input, y its output; the experts' fields are empty in a layer without.

    Divide by `tokens` for means over all tokens, by `routed` for means over X_e, by `sample_tokens` for mean outputs.
    """

    tokens: float = 0.0
    x_sum: Array = field(default_factory=_nothing)  # (d)
    y_sum: Array = field(default_factory=_nothing)  # (d)
    cos_sum: float = 0.0  # sum of cos(x_t, y_t)
    routed: Array = field(default_factory=_nothing)  # (E) |X_e|
    gate_sum: Array = field(default_factory=_nothing)  # (E) sum over all tokens of g_e / sum of the token's k gates
    gate_norm_sum: Array = field(default_factory=_nothing)  # (E) sum over X_e of g_e(x) ||E_e(x)||
    norm_sum: Array = field(default_factory=_nothing)  # (E) sum over X_e of ||E_e(x)||
    softmax_norm_sum: Array = field(default_factory=_nothing)  # (E) sum over X_e of p_e(x) ||E_e(x)||, p: shares
    removal_sum: Array = field(default_factory=_nothing)  # (E) sum over X_e of the output's change without e, if asked
    logit_gram: Array = field(default_factory=_nothing)  # (E, E) sum of z z^T, z the raw uncentred router logits
    router_gram: Array = field(default_factory=_nothing)  # (E, E) W W^T of the router's rows
    mean_output_sum: Array = field(default_factory=_nothing)  # (E, d) sum of E_e(x) over the shared sample
    softmax_output_sum: Array = field(default_factory=_nothing)  # (E, d) sum of p_e(x) E_e(x) over the shared sample
    sample_tokens: float = 0.0
    neuron_sum: Array = field(default_factory=_nothing)  # (E, I) sum over X_e of g_e(x) |h_i(x)|
    neuron_shared_sum: Array = field(default_factory=_nothing)  # (S) sum over all tokens of sigmoid gate * |h_i|
    down_norm: Array = field(default_factory=_nothing)  # (E, I) ||W_down[:, i]||
    down_norm_shared: Array = field(default_factory=_nothing)  # (S)
    neuron_dense_sum: Array = field(default_factory=_nothing)  # (F) sum over all tokens of |h_i|, what down gets
    down_norm_dense: Array = field(default_factory=_nothing)  # (F) ||W_down[:, i]|| of the dense MLP

    constant: ClassVar[frozenset[str]] = frozenset({"router_gram", "down_norm", "down_norm_shared", "down_norm_dense"})
    axes: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("x_sum", "y_sum"), "d"),
        **dict.fromkeys(("routed", "gate_sum", "gate_norm_sum", "norm_sum", "softmax_norm_sum", "removal_sum"), "E"),
        **dict.fromkeys(("logit_gram", "router_gram"), "EE"),
        **dict.fromkeys(("mean_output_sum", "softmax_output_sum"), "Ed"),
        **dict.fromkeys(("neuron_sum", "down_norm"), "EI"),
        **dict.fromkeys(("neuron_shared_sum", "down_norm_shared"), "S"),
        **dict.fromkeys(("neuron_dense_sum", "down_norm_dense"), "F"),
    }

    @property
    def is_moe(self) -> bool:
        """Whether the layer has routed experts."""
        return self.routed.size > 0

    @property
    def unreached(self) -> list[int]:
        """Experts that no calibration token was routed to."""
        return [int(expert) for expert in np.flatnonzero(self.routed == 0)]

    def starved(self, minimum: int = ENOUGH_TOKENS) -> list["Starved"]:
        """Experts with fewer than `minimum` routed tokens, the one that lacks most first.

        n of T tokens were routed to it, so `minimum` of them take `T (minimum - n) / n` further tokens. With n = 0 the
        rate is below 3 / T at 95 % (the rule of three), so it takes at least `T minimum / 3`.
        """
        found = []
        for expert in np.flatnonzero(self.routed < minimum).tolist():
            n = float(self.routed[expert])
            more = self.tokens * (minimum - n) / n if n else self.tokens * minimum / 3
            found.append(Starved(expert, routed=int(n), more=math.ceil(more)))
        return sorted(found, key=lambda item: (item.routed, item.expert))


@dataclass(frozen=True)
class Starved:
    """An expert that too few calibration tokens were routed to; `more`: how many it takes, at least, if none was."""

    expert: int
    routed: int
    more: int


@dataclass(eq=False)
class NormStats(_Sums):
    """One d-sized norm: n = what it puts out (weight included), x = what it gets, both (sequence, token, channel)."""

    abs_sum: Array = field(default_factory=_nothing)  # (d) sum of |n|
    abs_row_sq_sum: Array = field(default_factory=_nothing)  # (d) sum over sequences of (mean over tokens of |n|)^2
    share_sum: Array = field(default_factory=_nothing)  # (d) sum over tokens of x_c^2 / sum_c' x_c'^2
    tokens: float = 0.0
    sequences: float = 0.0

    axes: ClassVar[Mapping[str, str]] = dict.fromkeys(("abs_sum", "abs_row_sq_sum", "share_sum"), "d")


@dataclass(eq=False)
class Stats:
    """All layers (by key, "mtp.0" for the MTP block) and all d-sized norms (by full tensor name) of one model.

    `model` is its fingerprint, `token_sets` those of the token rows that were run, `settings` what else decides the
    last bits (dtype, attention back end, rows per batch).
    """

    model: str
    token_sets: tuple[str, ...]
    tokens: int
    sequences: int
    layers: dict[str, LayerStats] = field(default_factory=dict)
    norms: dict[str, NormStats] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Layer key -> what a search decided at the live layer (a `LayerCut` of plan/steps.py, dumped)."""

    def merge(self, other: "Stats") -> "Stats":
        """Statistics over the tokens of both; RunError if the models differ or a token set would count twice."""
        if self.model != other.model or self.layers.keys() != other.layers.keys():
            raise RunError(
                f"statistics of model {self.model} and of model {other.model} cannot be merged; "
                "calibrate the same checkpoint with both token sets"
            )
        twice = sorted(set(self.token_sets) & set(other.token_sets))
        if twice:
            raise RunError(f"token set {twice[0]} is in both statistics and would count twice; merge different ones")
        return Stats(
            model=self.model,
            token_sets=tuple(sorted(self.token_sets + other.token_sets)),
            tokens=self.tokens + other.tokens,
            sequences=self.sequences + other.sequences,
            layers={key: layer.merge(other.layers[key]) for key, layer in self.layers.items()},
            norms={name: norm.merge(other.norms[name]) for name, norm in self.norms.items()},
            settings={k: v for k, v in self.settings.items() if other.settings.get(k) == v},
        )

    def unreached(self) -> dict[str, list[int]]:
        """Layer key -> experts that no token was routed to, only where there are any."""
        found = {key: layer.unreached for key, layer in self.layers.items()}
        return {key: experts for key, experts in found.items() if experts}

    def coverage(self, minimum: int = ENOUGH_TOKENS) -> dict[str, list["Starved"]]:
        """Layer key -> experts with fewer than `minimum` routed tokens, only where there are any."""
        found = {key: layer.starved(minimum) for key, layer in self.layers.items() if layer.is_moe}
        return {key: experts for key, experts in found.items() if experts}

    def save(self, folder: Path | str) -> None:
        """Write the folder's files, `stats.json` last, as they are: `committed_folder` makes them appear at once."""
        folder = Path(folder)
        for key, layer in self.layers.items():
            _write(folder / f"layer-{key}.safetensors", save(layer.state()))
        norms = {f"{name}/{part}": array for name, norm in self.norms.items() for part, array in norm.state().items()}
        _write(folder / "norms.safetensors", save(norms))  # not `save_file`, which tells a full disk as no OSError
        facts = {
            "schema": SCHEMA,
            "moeslim": __version__,
            "model": self.model,
            "token_sets": list(self.token_sets),
            "tokens": self.tokens,
            "sequences": self.sequences,
            "settings": self.settings,
            "layers": list(self.layers),
            "norms": list(self.norms),
            "found": self.found,
            "unreached_experts": self.unreached(),
            "starved_experts": {key: [asdict(item) for item in items] for key, items in self.coverage().items()},
        }
        _write(folder / "stats.json", json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False).encode())

    @classmethod
    def load(cls, folder: Path | str) -> "Stats":
        """Read what `save` wrote; RunError where a file is missing, broken or of another schema."""
        folder = Path(folder)
        if not (folder / "stats.json").is_file():
            raise RunError(
                f"{folder}: no statistics there (no stats.json); give a folder that `moeslim calibrate` wrote"
            )
        facts = read_json(folder / "stats.json")
        if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
            raise RunError(f"{folder}/stats.json: not statistics of schema {SCHEMA}; calibrate again with this version")
        try:
            if type(facts["tokens"]) is not int or type(facts["sequences"]) is not int or facts["tokens"] < 1:
                raise ValueError(f"{facts['tokens']!r} tokens in {facts['sequences']!r} sequences")
            if not all(isinstance(facts[table], dict) for table in ("settings", "found")):
                raise ValueError("settings and found must be objects")
            stats = cls(
                model=facts["model"],
                token_sets=tuple(facts["token_sets"]),
                tokens=facts["tokens"],
                sequences=facts["sequences"],
                settings=facts["settings"],
                found=facts["found"],
            )
            for key in facts["layers"]:
                stats.layers[key] = LayerStats.from_state(_read(folder / f"layer-{key}.safetensors"))
            stats.norms = _norms(facts["norms"], _read(folder / "norms.safetensors"))
        except (KeyError, TypeError, ValueError) as problem:
            raise RunError(f"{folder}: broken statistics ({problem}); remove the folder and calibrate again") from None
        return stats


def coverage_lines(coverage: Mapping[str, Sequence[Starved]], minimum: int = ENOUGH_TOKENS) -> list[str]:
    """What `Stats.coverage` found, a line per layer, the one that lacks most first, and no more than nine lines."""
    layers = sorted(coverage.items(), key=lambda item: -max(expert.more for expert in item[1]))
    lines = []
    for key, starved in layers[:_LINES]:
        named = ", ".join(f"{item.expert} ({item.routed})" for item in starved[:_NAMED])
        rest = f" and {len(starved) - _NAMED} more" if len(starved) > _NAMED else ""
        least = "at least" if starved[0].routed == 0 else "about"
        more = max(item.more for item in starved)
        lines.append(
            f"layer {key}: fewer than {minimum} tokens reached experts {named}{rest}; "
            f"it takes {least} {more:,} more calibration tokens"
        )
    if len(layers) > _LINES:
        lines.append(f"{len(layers) - _LINES} further layers lack tokens too; see `starved_experts` in stats.json")
    return lines


def join(parts: Iterable[Stats]) -> Stats:
    """One `Stats` from parts that hold different layers and norms over the same tokens of the same model."""
    first, *rest = parts
    whole = Stats(first.model, first.token_sets, first.tokens, first.sequences, settings=first.settings)
    for part in (first, *rest):
        assert (part.model, part.token_sets, part.tokens) == (whole.model, whole.token_sets, whole.tokens)
        assert not whole.layers.keys() & part.layers.keys()
        assert not whole.norms.keys() & part.norms.keys()
        whole.layers.update(part.layers)
        whole.norms.update(part.norms)
        whole.found.update(part.found)
    return whole


def pool(parts: Iterable[Stats]) -> Stats:
    """One `Stats` from parts that hold the same layers and norms over different rows of one token set."""
    first, *rest = parts
    for part in rest:
        assert (part.model, part.token_sets, part.settings) == (first.model, first.token_sets, first.settings)
        assert (part.layers.keys(), part.norms.keys()) == (first.layers.keys(), first.norms.keys())
        first.tokens += part.tokens
        first.sequences += part.sequences
        for key, layer in part.layers.items():
            first.layers[key].add(layer)
        for name, norm in part.norms.items():
            first.norms[name].add(norm)
    return first


def _norms(names: Iterable[str], arrays: Mapping[str, Array]) -> dict[str, NormStats]:
    states: dict[str, dict[str, Array]] = {name: {} for name in names}
    for full, array in arrays.items():
        name, _, part = full.rpartition("/")
        states[name][part] = array
    return {name: NormStats.from_state(state) for name, state in states.items()}


def _write(path: Path, content: bytes) -> None:
    with disk_errors(path):
        path.write_bytes(content)


def _read(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise RunError(f"{path}: there is no such file; the statistics are not whole, calibrate again")
    try:
        arrays = load_file(path)
    except SafetensorError as problem:
        raise ValueError(f"{path.name}: {problem}") from None
    for name, array in arrays.items():
        if array.dtype != np.float64 or not np.isfinite(array).all():
            raise ValueError(f"{path.name}: {name} holds {array.dtype} that is not finite float64 throughout")
    return arrays
