"""What the public functions do to their arguments before the op sees them."""

import torch
from torch import Tensor


def autocast(first: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """Inside an autocast region, floating-point tensors become its dtype (float64 stays)."""
    tensors = [first, *others]
    if not torch._C._is_any_autocast_enabled():
        return tensors
    device = first.device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


def default_scale(q: Tensor) -> float:
    """width ** -0.5; an empty width is left to the op's own check."""
    shape = q.shape
    return shape[-1] ** -0.5 if shape and shape[-1] > 0 else 1.0


def forbid_grad(op: str, **tensors: Tensor | None) -> None:
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{op}: {name}: expected a tensor that does not require grad (a decode step "
                    "has no gradient; use torch.no_grad()), "
                    "got requires_grad=True"
                )


def is_silu(op: str, activation: str | None) -> bool:
    if activation not in (None, "silu"):
        raise RuntimeError(f'{op}: activation: expected None or "silu", got {activation!r}')
    return activation == "silu"


def state_tensors(op: str, state, size: int, layout: str):
    """The tensors of a tuple-valued initial state, Nones without one."""
    if state is None:
        return (None,) * size
    if not isinstance(state, (tuple, list)) or len(state) != size:
        got = f"{len(state)} items" if isinstance(state, (tuple, list)) else type(state).__name__
        raise RuntimeError(f"{op}: initial_state: expected {layout}, got {got}")
    return tuple(state)
