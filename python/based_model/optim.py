"""AdamW as in the paper's recipe: its parameter groups, its schedule, its state by name."""

import math

import torch
from torch import Tensor, nn


def learning_rate(step: int, steps: int, warmup_steps: int, lr: float, min_lr: float) -> float:
    """Linear warm-up to lr, then a cosine to min_lr at the last step. step counts from 0."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step + 1 - warmup_steps) / max(1, steps - warmup_steps)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def build_optimizer(
    model: nn.Module, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: not on biases, norms and the embedding."""
    groups = {weight_decay: [], 0.0: []}
    for name, p in model.named_parameters():
        decays = p.ndim > 1 and name != "embedding.weight"
        groups[weight_decay if decays else 0.0].append(p)
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for decay, params in groups.items()],
        betas=betas,
        eps=1e-8,
        fused=True,
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments and step counts as '<parameter>/<name>' -> tensor."""
    return {
        f"{name}/{key}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state[p].items()
    }


def empty_optimizer_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What optimizer_tensors gives before the first step: all zero, spread as the parameters."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"{name}/step"] = torch.zeros((), device=p.device)
        tensors[f"{name}/exp_avg"] = torch.zeros_like(p, requires_grad=False)
        tensors[f"{name}/exp_avg_sq"] = torch.zeros_like(p, requires_grad=False)
    return tensors


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
):
    """The inverse of optimizer_tensors; KeyError if a parameter's state is missing."""
    for name, p in model.named_parameters():
        optimizer.state[p] = {
            key: tensors[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
        }
