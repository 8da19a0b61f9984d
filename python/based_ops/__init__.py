"""BASED's token mixers as torch ops: hand-written CPU and CUDA kernels under one name each.

Tensors are (B, T, H, width): any stride on the leading dimensions, the last one contiguous;
float32, bfloat16, float16, and float64 on the CPU. `based_ops.reference` holds the same functions
in plain torch. Errors are RuntimeErrors that name op, argument, expected and got.
"""

import torch

try:
    from based_ops import _C
except ImportError as error:
    raise ImportError(
        f"based_ops: its compiled module did not load with torch {torch.__version__}: {error}. "
        "Reinstall beside this torch: pip install --no-build-isolation --no-deps ."
    ) from error

from based_ops import autograd as _autograd  # noqa: F401  (registers fakes and gradients)
from based_ops import reference
from based_ops.ops import (
    linear_attention,
    linear_attention_decode,
    linear_attention_decode_deferred,
    linear_attention_fold,
    short_conv,
    short_conv_decode,
    sliding_window_attention,
    sliding_window_decode,
    taylor_feature_map,
)
from based_ops.products import DecodeBlock, decode_block, decode_blocks, skinny_linear

__version__ = _C.build_info()["version"]
__all__ = [
    "DecodeBlock",
    "build_info",
    "decode_block",
    "decode_blocks",
    "linear_attention",
    "linear_attention_decode",
    "linear_attention_decode_deferred",
    "linear_attention_fold",
    "reference",
    "set_checks",
    "short_conv",
    "short_conv_decode",
    "skinny_linear",
    "sliding_window_attention",
    "sliding_window_decode",
    "taylor_feature_map",
]


def build_info() -> dict:
    """What this build contains: version, cpu_instruction_set in use, cuda (bool), cuda_ops (names
    of
    the ops with CUDA kernels) and cuda_architectures."""
    return _C.build_info()


def set_checks(enabled: bool) -> bool:
    """Whether CUDA calls check the values of their index tensors (`cu_seqlens`, `state_indices`,
    `positions`, `fill`) as CPU calls always do, and raise the error that names the bad entry.
    It synchronises, so no CUDA graph can be captured with it. Off by default, on from the start
    with BASED_CHECKS=1 in the environment: without it a bad row's output is NaN. Returns what was
    set before."""
    return _C.set_checks(enabled)
