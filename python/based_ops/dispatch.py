"""The shortest way from a public function to its torch op.

torch.library.register_autograd sends every call through Python once more, and one that wants
gradients through a good deal of it (about 5 us and 60 us of host time). Outside of torch.compile
and export, which see the registered ops, the same rules are to be had for less: a call that records
no graph goes below autograd, one that does goes through a plain torch.autograd.Function.
"""

import torch
from torch import Tensor
from torch.compiler import is_compiling


def without_graph(op, *inputs):
    """op(*inputs), for an op that has no gradient: autograd says so when one is wanted."""
    if torch.is_grad_enabled() or is_compiling():
        return op(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


def differentiable(op, setup, backward):
    """op as a function, with the setup and backward of register_autograd.

    An op that returns several tensors takes output_final_state as its last argument; without it the
    function returns the first tensor alone.
    """

    def below_autograd(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    def wanted(output, inputs):
        return output if isinstance(output, Tensor) or inputs[-1] else output[0]

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = below_autograd(*inputs)
            setup(ctx, inputs, output)
            return wanted(output, inputs)

    Eager.backward = staticmethod(backward)

    def call(*inputs):
        if is_compiling():
            return wanted(op(*inputs), inputs)
        if torch.is_grad_enabled():
            for x in inputs:
                if isinstance(x, Tensor) and x.requires_grad:
                    return Eager.apply(*inputs)
        return wanted(below_autograd(*inputs), inputs)

    return call
