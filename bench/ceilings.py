"""What this machine can do at best, measured in the process that measures the ops."""

import torch

from timing import take_turns

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}


def measure(timer, device, dtypes, seconds=1.0):
    """Bandwidths in GB/s (read + written) and matrix product rates in TFLOP/s.

    bandwidth: of a big copy on a GPU; on a CPU the faster of that and a big in-place update, as a
    copy also reads the lines that it is about to overwrite. new_tensor: the same copy into fresh
    memory, as every op that returns a tensor must do it: no ceiling, but it says how far one can
    get.
    """
    size = COPY_BYTES[torch.device(device).type]
    source = torch.ones(size // 4, device=device)
    target = torch.ones_like(source)

    def fastest(run, *args):
        """Best of `seconds` of calls: a ceiling must not suffer from a noisy moment."""
        times = take_turns(timer, {"": timer.bind(run, [args])}, seconds, max_rounds=10**9)
        return min(times[""])

    copy = fastest(target.copy_, source)
    update = fastest(target.mul_, 1.0) if device == "cpu" else copy
    rates = {}
    for dtype in dtypes:
        n = GEMM_SIZE[torch.device(device).type]
        a = torch.randn(n, n, device=device).to(dtype)
        rates[str(dtype)] = 2 * n**3 / fastest(torch.mm, a, a) / 1e9
    return {
        "bandwidth_gb_s": 2 * size / min(copy, update) / 1e6,
        "copy_gb_s": 2 * size / copy / 1e6,
        "new_tensor_gb_s": 2 * size / fastest(source.clone) / 1e6,
        "gemm_tflop_s": rates,
    }


def floor(case, ceilings):
    """(ms, "bytes" or "flops"): what the case takes at the ceilings, whichever binds."""
    by_bytes = case.bytes / ceilings["bandwidth_gb_s"] / 1e6
    by_flops = case.flops / ceilings["gemm_tflop_s"][str(case.dtype)] / 1e9
    return (by_bytes, "bytes") if by_bytes >= by_flops else (by_flops, "flops")
