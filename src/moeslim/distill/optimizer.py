"""AdamW over the parts of a student that are trained, with a rate and a weight decay for each."""

import torch

from moeslim.distill.parts import parts_of, trained_parts
from moeslim.distill.settings import TrainSettings
from moeslim.model.student import Student
from moeslim.recipe import PartSettings


def freeze(student: Student, settings: TrainSettings) -> None:
    """Let only the trained parts ask for gradients; RecipeError where the model has no such part.

    Nothing is built for the backward pass up to the first tensor that is trained: with `train_only: [mtp]` the trunk
    costs its forward pass alone. Before or after sharding, but before the first forward pass.
    """
    trained, parts = trained_parts(settings, student.shape), parts_of(student.shape)
    for name, tensor in student.disk_state().items():
        if isinstance(tensor, torch.nn.Parameter):  # a buffer, such as a router's correction bias, is not trained
            tensor.requires_grad_(parts[name] in trained)


def make_optimizer(student: Student, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over what asks for a gradient, one group for each rate factor (`group["factor"]`) and weight decay.

    Decay is on matrices only: two or more dimensions (stacked experts, convolutions, embeddings). Norm weights, A_log
    and dt_bias have one dimension and a meaning at a value other than 0: decay would pull them off. Stacked biases of
    experts have two, and are none.
    """
    parts = parts_of(student.shape)
    own = {str(part): found for part, found in settings.distill.parts.items()}
    groups: dict[tuple[float, float], list[torch.Tensor]] = {}
    for name, tensor in student.disk_state().items():
        if not tensor.requires_grad:
            continue
        part = own.get(parts[name], PartSettings())
        decay = settings.distill.weight_decay if part.weight_decay is None else part.weight_decay
        matrix = tensor.ndim >= 2 and not name.endswith("bias")
        groups.setdefault((part.learning_rate, decay if matrix else 0.0), []).append(tensor)
    return torch.optim.AdamW(
        [{"params": found, "factor": key[0], "weight_decay": key[1]} for key, found in groups.items()],
        lr=settings.distill.learning_rate,
        betas=settings.distill.betas,
        eps=settings.distill.eps,
        fused=True,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its factor of the scheduled `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
