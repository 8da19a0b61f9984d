"""One optimizer step of a preset, as based_model.train makes it with --compile --precision bf16."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from based_model import PRESETS, Based
from based_model.optim import build_optimizer

# Of a Transformer: the first that takes the shape.
ATTENTIONS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
PEAK_FLOP_S = 989e12  # dense bf16 of an H100 or H200 SXM, from its data sheet


class Step:
    """The step of a cell of end_to_end.py, compiled and run twice: the moments are there too."""

    def __init__(self, cell):
        torch._dynamo.config.recompile_limit = 64
        torch.manual_seed(0)
        with torch.device("cuda"):
            self.model = Based(PRESETS[cell.model])
            sizes = (2, cell.batch, cell.length)
            self.inputs, self.targets = torch.randint(self.model.config.vocab_size, sizes)
        self.model.compile_training()
        self.optimizer = build_optimizer(self.model, 0.1, (0.9, 0.95))
        for _ in range(2):
            self()

    def __call__(self):
        self.optimizer.zero_grad()
        with sdpa_kernel(ATTENTIONS, set_priority=True):
            with torch.autocast("cuda", torch.bfloat16):
                loss = self.model(self.inputs, targets=self.targets)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def mfu(self, milliseconds: float) -> float:
        """By 6 FLOP a parameter and token."""
        flop = 6 * sum(p.numel() for p in self.model.parameters()) * self.inputs.numel()
        return flop / PEAK_FLOP_S / milliseconds * 1e3
