"""One optimizer step of a preset, as based_model.train makes it with --compile --precision bf16,
and with the output layer and the loss compiled too."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from based_model import PRESETS, Based
from based_model.optim import build_optimizer

# Of a Transformer: the first that takes the shape.
ATTENTIONS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
PEAK_FLOP_S = 989e12  # dense bf16 of an H100 or H200 SXM, from its data sheet


@torch.compile(dynamic=False)
def mean_loss(model, x, targets):
    """Cross-entropy of what hidden() gave: the output layer is compiled too."""
    return F.cross_entropy(model.logits(x).flatten(0, 1).float(), targets.flatten())


def measure(cell, timed) -> dict:
    """A cell of end_to_end.py: tokens per ms, and MFU by 6 FLOP a parameter and token.

    timed(step, steps, tokens) times it, or profiles it.
    """
    torch._dynamo.config.recompile_limit = 64
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Based(PRESETS[cell.model])
        inputs, targets = torch.randint(model.config.vocab_size, (2, cell.batch, cell.length))
    for layer in model.layers:
        layer.compile(fullgraph=True, dynamic=False)
    optimizer = build_optimizer(model, 0.1, (0.9, 0.95))

    def step():
        optimizer.zero_grad()
        with sdpa_kernel(ATTENTIONS, set_priority=True):
            with torch.autocast("cuda", torch.bfloat16):
                loss = mean_loss(model, model.hidden(inputs)[0], targets)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    for _ in range(2):  # compiles; the optimizer's moments
        step()
    tokens = cell.batch * cell.length
    figures = timed(step, 1, tokens)
    flop = 6 * sum(p.numel() for p in model.parameters()) * tokens
    return {**figures, "mfu": flop / PEAK_FLOP_S / figures["median_ms"] * 1e3}
