"""Operations per token: by hand, and against what torch's own counter sees of the same models."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moeslim.families import forward_operations, training_operations
from moeslim.losses import LossWeights, Signal, coefficients, term_counts
from moeslim.model.student import Student
from tiny import tiny_config, tiny_shape

B, T = 2, 64
FULL: dict[str, Any] = {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}


def _student(mtp: bool = False, **changes: Any) -> Student:
    torch.manual_seed(0)
    shape = tiny_shape(**changes)
    shape = shape if mtp else shape.trunk
    return Student.from_config(tiny_config(**changes), shape=shape, attn="eager", experts="eager")


def _addmm(_into: object, left: torch.Size, right: torch.Size, **_rest: object) -> int:
    """In-place products (the head's gradient), which torch's counter does not know."""
    return 2 * left[0] * left[1] * right[1]


def _counted(run: Any) -> int:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm}) as counter:
        run()
    return counter.get_total_flops()


def test_by_hand() -> None:
    shape = tiny_shape(**FULL)
    found = forward_operations(shape, length=T)
    # d 16, 4 heads of 8, 2 kv heads: q with its gate 2*32 rows, k and v 16 each, o 32 columns, in two layers
    assert found.matrices["attention"] == 2 * 2 * 16 * (64 + 16 + 16 + 32)
    assert found.matrices["experts"] == 2 * 2 * (2 * 3 * 12 * 16)  # 2 of 8 experts of three 12 x 16
    assert found.matrices["router"] == 2 * 2 * 8 * 16
    assert found.matrices["shared"] == 2 * 2 * (3 * 10 * 16 + 16)
    assert found.mixing == 2 * 4 * 32 * 32.5  # 2 layers, scores and sum over values, (1 + ... + 64) / 64 positions
    trunk, head = found.total, 2 * 64 * 16
    whole = training_operations(shape, length=T)
    assert whole == 3 * trunk + 3 * head
    assert training_operations(shape, length=T, targets=0.25) == 3 * trunk + 0.75 * head
    block = forward_operations(shape, length=T - 1, subtree="mtp")
    assert block.matrices["mtp_fc"] == 2 * 16 * 32
    assert block.mixing == 4 * 32 * 32
    deep = training_operations(shape, length=T, depths=1)
    assert deep - whole == pytest.approx(3 * (block.total + head) * 63 / 64)
    teacher = tiny_shape(hidden_size=24, **FULL)
    taught = training_operations(shape, length=T, teacher=teacher)
    assert taught - whole == forward_operations(teacher, length=T).total + 2 * 64 * 24
    # what is not trained has no gradient of its weights; below the lowest trained part there is no gradient at all
    router = training_operations(shape, length=T, trained={"router"})
    assert whole - router == trunk - found.mixing - found.matrices["router"] + head
    only_mtp = training_operations(shape, length=T, depths=1, trained={"mtp"})
    assert only_mtp == pytest.approx(trunk + head + (3 * block.total + 2 * head) * 63 / 64)
    tied = training_operations(tiny_shape(tie_word_embeddings=True, **FULL), length=T, trained={"embedding"})
    assert tied == 2 * trunk + found.mixing + 3 * head


def test_forward_is_what_the_counter_sees_and_what_it_does_not() -> None:
    """Exactly: the counter takes attention whole, not its causal half, and the convolution's padding; of DeltaNet it
    sees the products in chunks of 64 and not the triangular systems, which it does not know."""
    shape = tiny_shape()
    student = _student()
    tokens = torch.randint(0, 64, (B, T))
    with torch.no_grad():
        seen = _counted(lambda: student.hidden(tokens))
    ours = forward_operations(shape, length=T)
    full_layers = delta_layers = 2
    attention = full_layers * 4 * 32 * (T + 1) / 2
    delta = delta_layers * 6 * 4 * 8 * 8
    assert ours.mixing == attention + delta
    # per value head and chunk C: k k^T and q k^T over dk, their sum over dv, and the three products with the state
    C, dk, dv = 64, 8, 8
    chunked = delta_layers * 4 * (2 * C * (2 * dk + dv) + 6 * dk * dv)
    channels, kernel = 2 * 16 + 32, 4
    padding = delta_layers * 2 * channels * kernel * (kernel - 1) * B
    wanted = B * T * (sum(ours.matrices.values()) + attention * 2 * T / (T + 1) + chunked)
    assert seen == wanted + padding


def test_a_training_step_is_what_the_counter_sees() -> None:
    """Attention, experts, MTP depths and the fused loss, forward and backward, with a teacher's head."""
    shape = tiny_shape(**FULL)
    student = _student(mtp=True, **FULL)
    rows, mask = torch.randint(0, 64, (B, T + 1)), torch.ones(B, T, dtype=torch.bool)
    depths = 2
    factors = coefficients(LossWeights(lam=0.5, beta=0.3), counts=term_counts(mask, depths), tokens=mask.numel())
    said = Signal(hidden=torch.randn(B, T, 24), head=torch.randn(64, 24))
    seen = _counted(lambda: student(rows, mask, coefficients=factors, teacher=said).loss.backward())
    ours = training_operations(shape, length=T, depths=depths)
    mixed = 3 * 2 * 4 * 32  # forward and twice backward, in two layers, per earlier position
    trunk_half = mixed * (T - (T + 1) / 2)
    for m in (1, 2):
        length = T - m
        trunk_half += 3 * 4 * 32 * (length - (length + 1) / 2) * length / T
    # a depth has no state for the first m targets of a row: the fused loss multiplies zeros there
    empty = sum(6 * 64 * 16 * m for m in (1, 2)) / T
    assert seen == pytest.approx(B * T * (ours + trunk_half + empty + 2 * 64 * 24), rel=1e-12)
