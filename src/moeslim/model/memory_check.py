"""Checks that a walk fits under a memory bound: what its largest layer takes, counted beforehand, and what is left.

Counted is anonymous memory, that of the process so far included; pages of mapped files are not, for the system may drop
them at any time. The count is meant to be an upper bound: what is left over, experts of a layer may stay in from batch
to batch. The result is the same bits whatever stays.
"""

from dataclasses import dataclass, replace

from moeslim.checkpoint.reader import TORCH_DTYPES, Reader
from moeslim.errors import ResourceError
from moeslim.families import Shape, arrangement, live_layout
from moeslim.log import logger
from moeslim.machine.bound import memory_used
from moeslim.machine.host import return_memory
from moeslim.model.walk import WalkSettings

_CHUNK = 64  # tokens that DeltaNet's reference kernel takes together
_SLACK, _WASTE = 64 << 20, 1.15
"""Memory that is not counted, and how much more a heap takes than what lies in it."""


@dataclass(frozen=True)
class BatchSize:
    """Size of what runs at once: `rows` of `length` tokens; `watched` bytes for statistics, `each` bytes per token.

    `settable`: whether the settings of a calibration decide its size.
    """

    rows: int
    length: int
    watched: int = 0
    each: int = 0
    settable: bool = True

    @property
    def tokens(self) -> int:
        """Tokens that run at once."""
        return self.rows * self.length


@dataclass(frozen=True)
class WalkMemoryNeed:
    """Bytes of a walk, by what they are for; `expert` is one expert, `stored` one as it is read."""

    process: int
    layer: int
    expert: int
    stored: int
    batch: int
    watched: int

    @property
    def least(self) -> int:
        """With one expert in memory, the one before it not yet gone, and the next one on its way."""
        passing = 2 * (self.expert + self.stored)
        return self.process + round(_WASTE * (self.layer + passing + self.batch + self.watched)) + _SLACK

    def experts(self, bound: int) -> int:
        """How many experts may be in memory under a bound; of a model without any 1 if it fits and 0 if not."""
        if not self.expert:
            return int(bound >= self.least)
        return 1 + int((bound - self.least) / (_WASTE * self.expert))


def needed(reader: Reader, settings: WalkSettings, *, batch: BatchSize) -> WalkMemoryNeed:
    """What the largest layer of a walk takes, on the device that computes and on the host together."""
    shape, width = reader.shape, settings.dtype.itemsize
    own: dict[str | None, int] = {}
    for row in reader.rows.values():
        if row.component not in ("experts", "embedding", "head"):
            own[row.layer] = own.get(row.layer, 0) + row.parameters * width
    expert = 3 * shape["expert_size"] * shape["hidden"]
    routed = (name for name, row in reader.rows.items() if row.component == "experts")
    stored = max((TORCH_DTYPES[reader.dtype(name)].itemsize for name in routed), default=0)
    values = max(_values(shape, key, attn=settings.attn, length=batch.length) for key in shape.layer_keys)
    return WalkMemoryNeed(
        process=memory_used(),
        layer=max(own.values()),
        expert=expert * width,
        stored=expert * stored,
        batch=batch.tokens * (4 * values + batch.each),
        watched=batch.watched,
    )


def fit_to_memory(reader: Reader, settings: WalkSettings, *, batch: BatchSize) -> WalkSettings:
    """The settings with as many experts in memory as the bound allows, at most `group`; logged.

    ResourceError where not even one expert fits, with the setting to lower.
    """
    bound = settings.max_memory
    if bound is None:
        return settings
    return_memory()
    need = needed(reader, settings, batch=batch)
    group = min(need.experts(bound), settings.group or max(1, reader.shape["experts"]))
    sizes = (
        f"the process {_gb(need.process)}, a layer without its experts {_gb(need.layer)}, "
        f"{batch.rows} x {batch.length} tokens {_gb(need.batch)}, statistics {_gb(need.watched)}, "
        f"each expert {need.expert / 1e6:.1f} MB"
    )
    if group < 1:
        raise ResourceError(
            f"max_memory is {_gb(bound)} and the walk needs at least {_gb(need.least)} ({sizes}). "
            f"{_remedy(need, bound, batch=batch)}"
        )
    most = need.least + round(_WASTE * (group - 1) * need.expert)
    logger.info("memory: up to %s of %s, %d experts of a layer in it (%s)", _gb(most), _gb(bound), group, sizes)
    return replace(settings, group=group)


def _remedy(need: WalkMemoryNeed, bound: int, *, batch: BatchSize) -> str:
    if not batch.settable:
        return f"Allow at least {_gb(need.least)}"
    left = bound - (need.least - round(_WASTE * need.batch))
    rows = int(left / (_WASTE * need.batch / batch.rows))
    if rows >= 1:
        return f"Set calibrate.rows_per_batch to {rows} (now {batch.rows}), or allow more"
    tokens = int(left / (_WASTE * need.batch / batch.tokens))
    if tokens >= 32:
        return f"Set calibrate.rows_per_batch to 1 and data.sequence_length to {tokens} or less, or allow more"
    return f"Shorter rows do not help: allow at least {_gb(need.least - need.batch + need.batch // batch.rows)}"


def _values(shape: Shape, key: str, *, attn: str, length: int) -> int:
    """Float32 values per token that are alive at once in a layer, the larger of its two halves, and the batch itself.

    DeltaNet's are those of transformers' reference kernel, which works in float32: per value head its chunks' q, k and
    v in the order of the heads, their products with beta and the decay, a chunk of scores, and its state per row.
    """
    d = shape["hidden"]
    eager = 4 if shape.family.eager_attention else 3 if attn == "eager" else 0  # 4: with a sink for each query
    kind, scores = shape.kind(key), eager * length
    mixer = 0
    if kind == "deltanet":
        keys, values = shape["key_heads"] * shape["key_dim"], shape["value_heads"] * shape["value_dim"]
        states = 3 * shape["key_dim"] * values // length + 3 * _CHUNK * shape["value_heads"]
        mixer = 4 * keys + 6 * shape["value_heads"] * shape["key_dim"] + 10 * values + states
    elif kind == "mamba":  # of the reference kernel: states of every head, and scores within a chunk
        inner, chunk = shape["mamba_heads"] * shape["mamba_dim"], shape.sizes.get("chunk", 256)
        mixer = 10 * inner + 4 * shape["mamba_heads"] * (shape["state"] + chunk)
    elif kind == "conv":
        mixer = 8 * d
    elif kind == "mla":
        sizes = 6 * (shape["nope_dim"] + shape["rope_dim"]) + 4 * shape["v_dim"]
        mixer = shape["heads"] * (sizes + scores) + 2 * shape["kv_lora"] + 2 * shape.sizes.get("q_lora", 0)
        if "index_top" in shape.sizes:  # what is chosen and masks of it; scores before and after their relu
            mixer += (8 + 3 * shape["index_heads"] * shape.has_indexer(key)) * length
    elif kind == "attention":
        heads, kv_heads, head_dim = shape.attention(key)
        mixer = (5 * heads + 2 * kv_heads) * head_dim + heads * scores
    if not shape.is_moe(key):
        return 6 * d + max(mixer, 3 * shape["dense_size"])
    # All tokens may go to the same expert: gathered, gate and up, their product, the output.
    one = 2 * d + (8 if _biased(shape) else 3) * shape["expert_size"]
    return 6 * d + max(mixer, one + 3 * shape.sizes.get("shared_size", 0) + 8 * shape["experts"])


def _biased(shape: Shape) -> bool:
    """Whether experts add a bias, and clamp what they have added: each time a tensor more."""
    return any("up_bias" in inside for _, inside in arrangement(live_layout(shape.family)))


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
