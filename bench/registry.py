"""The two things the bench is made of: a case (one op at one shape) and its implementations."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

OURS = "based_ops"

# Relative errors ||out - ref|| / ||ref|| that an output and a gradient must hold to be timed.
TOLERANCE = {
    torch.float32: (5e-6, 2e-5),
    torch.bfloat16: (4e-3, 8e-3),
    torch.float16: (1e-3, 2.5e-3),
}


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


@dataclass(frozen=True)
class Implementation:
    """One way to do the work. Only `run` is timed.

    prepare: the case's inputs -> the arguments of run (layout, own copy of a state).
    outputs: (arguments, result of run) -> what the case's `expected` returns, or its first few.
    same_function: False for a peer that computes something else (softmax attention next to linear
    attention), whose outputs cannot be compared.
    forward: what a backward's time is the rest of, given the same arguments.
    """

    name: str
    run: Callable
    prepare: Callable = lambda *inputs: inputs
    outputs: Callable = lambda args, result: as_tuple(result)
    same_function: bool = True
    forward: Callable | None = None


@dataclass(frozen=True)
class Case:
    """An op at one shape. The first implementation is ours.

    work: "forward", "decode", "forward+backward", or "backward": the latter's time less the
    forward's.
    inputs(generator) -> one set of random tensors; expected(*inputs) -> outputs in fp64, those that
    sample picks from what an implementation returns.
    bytes, flops: the least that any implementation has to move and compute.
    targets: baseline's name -> how many times as fast as it ours has to be.
    target_ms, target_floor: how fast ours has to be, and how much of its time the floor has to be.
    input_sets: how many the calls rotate over; None for as many as outgrow the last cache.
    steps: how many steps one call of run takes; bytes, flops and times are those of one.
    links: ops of the kind that follow one another in one call, each with its roundings.
    """

    op: str
    work: str
    shape: str
    dtype: torch.dtype
    inputs: Callable
    expected: Callable
    implementations: list[Implementation]
    bytes: int
    flops: int = 0
    targets: dict[str, float] = field(default_factory=dict)
    target_ms: float | None = None
    target_floor: float | None = None
    input_sets: int | None = None
    steps: int = 1
    links: int = 1
    sample: Callable = lambda tensor: tensor

    def __post_init__(self):
        unknown = self.targets.keys() - {i.name for i in self.implementations}
        if unknown:
            raise ValueError(f"{self.op}: targets name no implementation: {sorted(unknown)}")

    @property
    def name(self):
        return f"{self.op} {self.work} {self.shape} {dtype_name(self.dtype)}"

    @property
    def backward(self):
        return "backward" in self.work

    @property
    def ops(self):
        """The torch ops that ours calls."""
        return {self.op, f"{self.op}_backward"} if self.backward else {self.op}

    def tolerance(self, index):
        """Of the index-th output: in a backward case, every one after the first is a gradient."""
        forward, gradient = TOLERANCE[self.dtype]
        return self.links * (gradient if self.backward and index > 0 else forward)


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def exchange(*tensors):
    """(B, T, H, .) <-> (B, H, T, .) and (B, T, C) <-> (B, C, T); weights pass through."""
    return tuple(x.transpose(1, 2).contiguous() if x.ndim > 2 else x for x in tensors)


def exchanged(name, run, **options):
    """An implementation in whose layout dim 2 is the time; it is handed that layout, untimed."""
    return Implementation(
        name,
        run,
        prepare=exchange,
        outputs=lambda args, result: exchange(*as_tuple(result)),
        **options,
    )


def with_backward(implementation):
    """Inputs then end with dout; the work is run, then the gradients of all other inputs."""

    def prepare(*tensors):
        *inputs, dout = implementation.prepare(*tensors)
        return *(x.detach().requires_grad_() for x in inputs), dout

    def run(*args):
        *inputs, dout = args
        out = implementation.run(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, dout)

    return Implementation(
        implementation.name,
        run,
        prepare,
        implementation.outputs,
        implementation.same_function,
        forward=lambda *args: implementation.run(*args[:-1]),
    )
