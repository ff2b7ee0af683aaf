"""The load-balancing loss, layer by layer. Shapes: E experts, N tokens."""

from collections.abc import Sequence

import torch


def layer_balance(assigned_E: torch.Tensor, probability_E: torch.Tensor) -> torch.Tensor:
    """`E sum_e f_e p_e` of one MoE layer: 1 when balanced, E when everything goes to one expert.

    `assigned_E` counts assignments (any scale; f is its share and gets no gradient), `probability_E` is the mean
    router probability over the local tokens.
    """
    share_E = (assigned_E / assigned_E.sum()).detach().to(probability_E.dtype)
    return assigned_E.shape[0] * (share_E * probability_E).sum()


def balance(assigned: Sequence[torch.Tensor], probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of `layer_balance` over the layers.

    transformers' `load_balancing_loss_func` pools all layers first, so that layers which collapsed on different
    experts look balanced together; here each layer answers for itself.
    """
    pairs = zip(assigned, probabilities, strict=True)
    return torch.stack([layer_balance(f_E, p_E) for f_E, p_E in pairs]).mean()
