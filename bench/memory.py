"""Memory of linear_attention.

On a CPU: peak over its inputs, B=1, fp32, each length in a process of its own (Linux). A process
reports how far its peak resident set rose above what the inputs had taken: the output, with
backward also the gradients, and whatever the op needed in between.
On a GPU: what forward and backward need beyond inputs, out, dout and gradients, at one shape.
"""

import subprocess
import sys
from pathlib import Path

SEQLENS = (8192, 16384, 32768, 65536)
NHEADS, FEATURE_DIM, HEAD_DIM = 16, 16, 64


def measure(device, threads):
    """[{work, seqlen, bytes, bytes_per_token}] for forward and for forward+backward, or on a GPU
    [{shape, share, target}], the share of the inputs' size."""
    if device == "cuda":
        return [cuda_workspace(4, 28, 8192, 64, target=0.25)]
    rows = []
    for work in ("forward", "forward+backward"):
        for seqlen in SEQLENS:
            command = [sys.executable, __file__, work, str(seqlen), str(threads)]
            grown = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            per_token = grown / seqlen
            rows.append(
                {"work": work, "seqlen": seqlen, "bytes": grown, "bytes_per_token": per_token}
            )
    return rows


def cuda_workspace(batch, nheads, seqlen, head_dim, target):
    import torch

    import based_ops

    def draw(width):
        return torch.randn(
            batch, seqlen, nheads, width, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )

    inputs = draw(FEATURE_DIM), draw(FEATURE_DIM), draw(head_dim)
    dout = draw(head_dim).detach()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = based_ops.linear_attention(*inputs)
    grads = torch.autograd.grad(out, inputs, dout)
    results = sum(x.nbytes for x in (out, *grads))
    extra = torch.cuda.max_memory_allocated() - before - results
    shape = f"B{batch} T{seqlen} H{nheads} D{FEATURE_DIM} V{head_dim} bfloat16"
    share = max(extra, 0) / sum(x.nbytes for x in inputs)
    return {"shape": shape, "share": share, "target": target}


def grown_bytes(work, seqlen, threads):
    import torch

    import based_ops

    def call(seqlen):
        backward = work == "forward+backward"
        widths = (FEATURE_DIM, FEATURE_DIM, HEAD_DIM, HEAD_DIM)
        *inputs, dout = (torch.randn(1, seqlen, NHEADS, width) for width in widths)
        before = resident("VmRSS")
        out = based_ops.linear_attention(*(x.requires_grad_(backward) for x in inputs))
        if backward:
            out.backward(dout)
        return resident("VmHWM") - before

    torch.set_num_threads(threads)
    call(256)  # threads and their buffers come to life
    return call(seqlen)


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


if __name__ == "__main__":
    print(grown_bytes(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
