"""The shortest way from a public function to its torch op.

torch.library.register_autograd sends every call through Python once more, and one that wants
gradients through a good deal of it (about 5 us and 60 us of host time). Outside of torch.compile
and export, which see the registered ops, the same rules are to be had for less: a call that records
no graph goes below autograd, one that does goes through a plain torch.autograd.Function.
"""

import torch
from torch import Tensor
from torch.compiler import is_compiling


def _below_autograd(op, inputs):
    guard = torch._C._AutoDispatchBelowAutograd()
    try:
        return op(*inputs)
    finally:
        del guard


def without_graph(op, *inputs):
    """op(*inputs), for an op that has no gradient: autograd says so when one is wanted."""
    if torch.is_grad_enabled() or is_compiling():
        return op(*inputs)
    return _below_autograd(op, inputs)


def differentiable(op, setup, backward):
    """op as a function, with the setup and backward of register_autograd.

    An op that returns several tensors takes output_final_state as its last argument; without it the
    function returns the first tensor alone.
    """
    arguments = op._schema.arguments
    tensors = sum("Tensor" in str(argument.type) for argument in arguments)  # they come first
    stateful = arguments[-1].name == "output_final_state"

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = _below_autograd(op, inputs)
            setup(ctx, inputs, output)
            return output[0] if stateful and not inputs[-1] else output

    Eager.backward = staticmethod(backward)
    apply = super(torch.autograd.Function, Eager).apply  # Eager.apply less its care for functorch

    def call(*inputs):
        if is_compiling():
            output = op(*inputs)
        else:
            if torch.is_grad_enabled():
                for x in inputs[:tensors]:
                    if isinstance(x, Tensor) and x.requires_grad:
                        functorch = torch._C._are_functorch_transforms_active()
                        return (Eager.apply if functorch else apply)(*inputs)
            output = _below_autograd(op, inputs)
        return output[0] if stateful and not inputs[-1] else output

    return call
