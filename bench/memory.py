"""Peak memory of linear_attention over its inputs, each length in a process of its own (Linux).

B=1, fp32. A process reports how far its peak resident set rose above what the inputs had taken:
the output, with backward also the gradients, and whatever the op needed in between.
"""

import subprocess
import sys
from pathlib import Path

SEQLENS = (8192, 16384, 32768, 65536)
NHEADS, FEATURE_DIM, HEAD_DIM = 16, 16, 64


def measure(threads):
    """[{work, seqlen, bytes, bytes_per_token}] for forward and for forward+backward."""
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
