"""DeltaNet on a CPU where vLLM's own kernel does not go: fp32, and heads of other sizes than 64 and 128.

vLLM 0.32's CPU operator begins with `assert mixed_qkv.dtype == torch.bfloat16`, and its prefill kernel knows two head
sizes ("Unexpected head dim size, 32"). GPU kernels have neither limit. So that a small model can be checked all the
same, the least is replaced, and serve_check.py prints what: in bf16 the prefill kernel gets heads padded with zeros; in
fp32 one operator (convolution and recurrence) is computed here, step by step, by nothing but torch. Loading,
projections, norms, router, experts, attention, caches, scheduling and sampling stay vLLM's.

    S <- exp(g) S,  g = -exp(A_log) softplus(a + dt_bias);   S <- S + k (sigmoid(b) (v - S'k))';   o = S'q / sqrt(dk)
"""

from typing import Any

import torch
from torch.nn import functional as F

PREFILL_HEADS = (64, 128)


def pad_prefill(head: int) -> str:
    """Hand vLLM's bf16 prefill kernel heads of `head` padded with zeros to a size it knows; returns what was done.

    Exact in exact arithmetic: zero channels change no norm, no product and no state; only the kernel's
    1/sqrt(padded) must become 1/sqrt(head).
    """
    from vllm import _custom_ops

    kernel = _custom_ops.chunk_gated_delta_rule_cpu
    padded = next(size for size in PREFILL_HEADS if size >= head)

    def chunk_gated_delta_rule_cpu(*, initial_state: torch.Tensor, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        wide = {name: F.pad(given.pop(name), (0, padded - head)) for name in ("query", "key", "value")}
        state = F.pad(initial_state, (0, padded - head, 0, padded - head))
        out, after = kernel(initial_state=state, **wide, **given)
        rows = given["initial_state_indices"].long()
        initial_state[rows] = state[rows, :, :head, :head]  # the kernel updates its states in place
        return (out[..., :head].float() * (padded / head) ** 0.5).to(out.dtype), after

    _custom_ops.chunk_gated_delta_rule_cpu = chunk_gated_delta_rule_cpu
    return f"DeltaNet's prefill kernel gets heads of {head} padded with zeros to {padded}"


def compute_in_fp32() -> str:
    """Put `core` in the place of vLLM's operator, before it registers its own; returns what was done."""
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    core.__annotations__["layer_name"] = gdn_attention.LayerNameType  # the operator's schema is read off the signature
    gdn_attention.cpu_gdn_attention_core = core
    return "DeltaNet's core (convolution and recurrence) is plain torch, as vLLM's for CPUs is bf16 only"


def core(
    mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, core_attn_out: torch.Tensor, layer_name: Any
) -> None:
    """What vLLM's `cpu_gdn_attention_core` does without speculation: fills `core_attn_out` (tokens, nv, dv)."""
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention as engine

    context = get_forward_context()
    if context.attn_metadata is None:  # the engine's dry run, which measures memory
        return
    layer = context.no_compile_layers[engine._resolve_layer_name(layer_name)]
    batch: Any = context.attn_metadata[layer.prefix]
    starts = batch.non_spec_query_start_loc.tolist()
    slots = batch.non_spec_state_indices_tensor.tolist()
    conv, states = engine._conv_buffer_view(layer), engine._ssm_state_view(layer)
    for sequence in range(batch.num_decodes + batch.num_prefills):
        rows, slot = slice(starts[sequence], starts[sequence + 1]), slots[sequence]
        if sequence >= batch.num_decodes and not batch.has_initial_state[sequence]:
            conv[slot].zero_()
            states[slot].zero_()
        mixed = _convolve(mixed_qkv[rows], conv[slot], layer=layer)
        core_attn_out[rows] = _recur(mixed, a[rows], b=b[rows], state=states[slot], layer=layer)


def _convolve(x_TC: torch.Tensor, history_CK: torch.Tensor, *, layer: Any) -> torch.Tensor:
    """Causal depthwise convolution with SiLU; leaves the last inputs in `history_CK` (kernel - 1 of them)."""
    line = torch.cat([history_CK, x_TC.T.to(history_CK.dtype)], dim=1)
    history_CK.copy_(line[:, -history_CK.shape[1] :])
    weight = layer.conv1d.weight.view(line.shape[0], 1, -1)
    return F.silu(F.conv1d(line[None], weight, layer.conv1d.bias, groups=line.shape[0]))[0].T


def _recur(x_TC: torch.Tensor, a: torch.Tensor, *, b: torch.Tensor, state: torch.Tensor, layer: Any) -> torch.Tensor:
    """(T, nv, dv): the gated delta rule over one sequence; `state` (nv, dk, dv) is read and written in place."""
    query, key, value = (part[0].float() for part in layer.rearrange_mixed_qkv(x_TC))
    per_key_head = value.shape[1] // key.shape[1]
    query, key = (
        (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).repeat_interleave(per_key_head, dim=1)
        for part in (query, key)
    )
    keep = (-layer.A_log.float().exp() * F.softplus(a.float() + layer.dt_bias.float())).exp()
    write = b.float().sigmoid()
    outputs = []
    for t in range(len(value)):
        state.mul_(keep[t, :, None, None])
        seen = torch.einsum("hkv,hk->hv", state, key[t])
        state.add_(torch.einsum("hk,hv->hkv", key[t], write[t, :, None] * (value[t] - seen)))
        outputs.append(torch.einsum("hkv,hk->hv", state, query[t]) * key.shape[-1] ** -0.5)
    return torch.stack(outputs)
