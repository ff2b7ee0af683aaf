"""Memory checks of a training: refused beforehand where it cannot fit, and explained where memory runs out.

What is counted beforehand is a lower bound, so that nothing which would have worked is refused; a training that runs
out in spite of it is explained by `explain_out_of_memory`. (Linux often kills a process that takes too much memory;
then the check beforehand is the only message.)
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from moeslim.distill.parts import parts_of, trained_parts
from moeslim.distill.settings import TrainSettings
from moeslim.errors import ResourceError
from moeslim.families import STACKED, Shape, table
from moeslim.losses.fused import CHUNK_BYTES, LARGEST_CHUNK
from moeslim.machine.memory import free_memory
from moeslim.machine.parallel import world
from moeslim.model.chain import SCORE_BYTES


@dataclass(frozen=True)
class MemoryCase:
    """A student's shape, that of a teacher beside it, the tokens of a row."""

    shape: Shape
    teacher: Shape | None
    length: int


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that one process holds at least, by what they are for."""

    weights: int
    gradients: int
    moments: int
    teacher: int
    activations: int
    together: bool
    """Whether gradients and activations are there at once: from a step's second micro-batch on."""

    @property
    def total(self) -> int:
        """The largest of what is held at one time: activations go while gradients come."""
        passing = (self.gradients, self.activations)
        return self.weights + self.moments + self.teacher + (sum(passing) if self.together else max(passing))


def needed(case: MemoryCase, settings: TrainSettings, *, ranks: int = 1, shard: int = 1) -> MemoryNeed:
    """What each of `ranks` processes holds at least, where `shard` of them share one copy of student and teacher.

    Weights, gradients and two moments in fp32, the last two of what is trained alone; the teacher in the precision of
    the training; `activations` of a micro-batch.
    """
    learning = trained_parts(settings, case.shape)
    part = parts_of(case.shape)
    sizes = {name: row.parameters for name, row in table(case.shape, STACKED).items()}
    trained = sum(number for name, number in sizes.items() if part[name] in learning)
    width = 2 if settings.precision == "bfloat16" else 4
    teacher = 0
    if case.teacher is not None:
        teacher = width * sum(row.parameters for row in table(case.teacher.trunk, STACKED).values())
    return MemoryNeed(
        weights=4 * sum(sizes.values()) // shard,
        gradients=4 * trained // shard,
        moments=8 * trained // shard,
        teacher=teacher // shard,
        activations=activations(case, settings, whole=learning == set(part.values())),
        together=settings.distill.rows_per_step > ranks * settings.distill.micro_rows,
    )


def activations(case: MemoryCase, settings: TrainSettings, *, whole: bool) -> int:
    """Bytes that a micro-batch surely keeps for its backward pass, and those of a chunk of the loss's logits.

    Per layer and token: with checkpointing, or where not all parts are trained, the layer's input (where only the MTP
    head is trained, not even that); else what enters its matrix products and its activation functions. Norms and
    DeltaNet's states come on top. In the serving form, the scores of one further depth, or of a part of them.
    """
    shape = case.shape
    tokens = settings.distill.micro_rows * case.length
    width = 2 if settings.precision == "bfloat16" else 4
    depths = settings.distill.depths if shape.mtp_layers else 0
    keys = (*shape.trunk_keys, *shape.mtp_keys * depths)
    if set(settings.distill.train_only) == {"mtp"}:
        kept = 0
    elif settings.distill.activation_checkpointing or not whole:
        kept = shape["hidden"] * len(keys)
    else:
        kept = sum(_kept(shape, key) for key in keys)
    logits = min(tokens, LARGEST_CHUNK) * shape["vocab"] * 4 * (1 + depths + (case.teacher is not None))
    scores = 0
    if settings.distill.mtp_train == "serving" and depths > 1:
        scores = min(SCORE_BYTES, 4 * tokens * case.length * shape["heads"])
    return tokens * width * kept + min(CHUNK_BYTES, logits) + scores


def _kept(shape: Shape, key: str) -> int:
    """Values per token of a layer: the normed input of both halves; of attention its queries, keys, values and result
    before and after the gate, of DeltaNet, Mamba and convolutions what the convolution, the gate and the output
    projection get; of the MLP what the down projections get, and gate and up before them."""
    kind, mixer = shape.kind(key), 0
    if kind == "deltanet":
        mixer = 2 * shape["key_heads"] * shape["key_dim"] + 3 * shape["value_heads"] * shape["value_dim"]
    elif kind == "mamba":
        mixer = 3 * shape["mamba_heads"] * shape["mamba_dim"] + 2 * shape["mamba_groups"] * shape["state"]
    elif kind == "conv":
        mixer = 4 * shape["hidden"]
    elif kind == "mla":
        mixer = 2 * shape["heads"] * (shape["nope_dim"] + shape["rope_dim"] + shape["v_dim"])
        mixer += shape["kv_lora"] + shape.sizes.get("q_lora", 0)
    elif kind == "attention":
        heads, kv_heads, head_dim = shape.attention(key)
        mixer = (3 * heads + 2 * kv_heads) * head_dim
    if shape.is_moe(key):
        mlp = shape["top_k"] * (shape["hidden"] + 3 * shape["expert_size"]) + 3 * shape.sizes.get("shared_size", 0)
    else:
        mlp = 3 * shape["dense_size"]
    return 2 * shape["hidden"] + mixer + mlp


def check_memory(shape: Shape, settings: TrainSettings, *, length: int, teacher: Shape | None = None) -> None:
    """Raise ResourceError, with the sum and the setting to lower, where memory surely does not suffice.

    `shape` is the student's, `teacher` that of a teacher that is to be loaded too, `length` the tokens of a row.
    Processes on one machine share its memory; a GPU is a process's own.
    """
    here, case = world(), MemoryCase(shape, teacher, length=length)
    free = free_memory(settings.device, processes=here.local_size)
    if free is None:
        return
    shard = min(settings.distill.shard_over or here.local_size, here.size)
    need = needed(case, settings, ranks=here.size, shard=shard)
    if need.total <= free:
        return
    rows = f"activations of {settings.distill.micro_rows} x {length} tokens"
    parts = {"weights": need.weights, "gradients": need.gradients, "moments": need.moments}
    parts |= {"the teacher": need.teacher, rows: need.activations}
    each = " for each process" if here.size > 1 else ""
    sizes = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size)
    raise ResourceError(
        f"training needs at least {_gb(need.total)} of memory{each} and {_gb(free)} are free on {settings.device}: "
        f"{sizes}. {_remedy(case, settings, free=free)}"
    )


def _remedy(case: MemoryCase, settings: TrainSettings, *, free: int) -> str:
    """The mildest change of settings that frees enough memory, as a sentence."""
    here = world()
    shard = min(settings.distill.shard_over or here.local_size, here.size)
    now = (settings.distill.micro_rows, settings.distill.activation_checkpointing)
    fewer = [rows for rows in range(now[0] - 1, 0, -1) if now[0] % rows == 0]
    tried = [(rows, now[1]) for rows in fewer]
    tried += [] if now[1] else [(rows, True) for rows in (now[0], *fewer)]
    for rows, checkpointing in tried:
        changed = _at(settings, rows, checkpointing=checkpointing)
        if needed(case, changed, ranks=here.size, shard=shard).total <= free:
            changes = [f"distill.micro_rows to {rows} (now {now[0]})"] if rows != now[0] else []
            changes += ["distill.activation_checkpointing to true"] if checkpointing != now[1] else []
            return f"Set {' and '.join(changes)}"
    least = _at(settings, 1, checkpointing=True)
    alone = needed(replace(case, teacher=None), least, ranks=here.size, shard=shard)
    if case.teacher is not None and alone.total <= free:
        return "A teacher_cache (`moeslim cache-teacher`) takes the teacher out of the memory"
    for more in (2**power for power in range(1, 11)):
        if more > shard and needed(case, least, ranks=more, shard=more).total <= free:
            return (
                f"Start {more} processes with as much memory each (torchrun; distill.shard_over: {more}), with "
                "distill.micro_rows: 1 and distill.activation_checkpointing: true"
            )
    return "No setting makes room for it here: train a smaller student, on shorter rows, or on a larger machine"


def _at(settings: TrainSettings, micro_rows: int, *, checkpointing: bool) -> TrainSettings:
    """The same settings for another amount of memory."""
    changes = {"micro_rows": micro_rows, "activation_checkpointing": checkpointing}
    return replace(settings, distill=settings.distill.model_copy(update=changes))


_FULL = re.compile(r"can.?t allocate memory|cannot allocate memory|out of memory|alloc_failed|bad_alloc", re.IGNORECASE)


@contextmanager
def explain_out_of_memory(settings: TrainSettings, step: int) -> Iterator[None]:
    """Turn running out of memory inside the block, on a GPU or a CPU, into a ResourceError that names what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as problem:
        full = isinstance(problem, MemoryError | torch.OutOfMemoryError) or _FULL.search(str(problem))
        if not full:
            raise
        asked = re.search(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", str(problem), re.IGNORECASE)
        found = f" ({_requested(asked)} more were asked for)" if asked else ""
        raise ResourceError(
            f"step {step}: out of memory on {settings.device}{found}. {_lower(settings)}. What was saved stays, and "
            "the same command resumes with these settings changed"
        ) from None


def _requested(found: re.Match[str]) -> str:
    return _gb(int(found[1])) if found[2].lower() == "bytes" else f"{found[1]} {found[2]}"


def _lower(settings: TrainSettings) -> str:
    """What takes less memory than these settings, the mildest first."""
    rows, here = settings.distill.micro_rows, world()
    shard = min(settings.distill.shard_over or here.local_size, here.size)
    remedies = []
    if rows > 1:
        half = max(r for r in range(1, rows // 2 + 1) if rows % r == 0)
        remedies.append(f"set distill.micro_rows to {half} (now {rows}): the same step in smaller parts")
    if not settings.distill.activation_checkpointing:
        remedies.append("set distill.activation_checkpointing to true: a third more computing")
    if shard < here.size:
        remedies.append(
            f"set distill.shard_over to {here.size} (now {shard}): more processes share one copy of weights"
        )
    else:
        remedies.append(f"start more than {here.size} (torchrun --nproc-per-node): they share one copy of the weights")
    if rows == 1 and settings.distill.activation_checkpointing:
        remedies.append("or take shorter rows (data.sequence_length)")
    text = "; ".join(remedies)
    return text[0].upper() + text[1:]


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 5e7 else f"{size / 1e6:,.1f} MB"
