"""One optimizer step of a preset, made by based_model.train with --compile --precision bf16."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from based_model import PRESETS
from based_model.settings import TrainConfig
from based_model.trainer import Trainer

# Of a Transformer: the first that takes the shape.
ATTENTIONS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
PEAK_FLOP_S = 989e12  # dense bf16 of an H100 or H200 SXM, from its data sheet


class Step:
    """The step of a cell of end_to_end.py, on random tokens. It has been compiled and run twice."""

    def __init__(self, cell):
        self.tokens = cell.batch * cell.length
        vocab_size, rng = PRESETS[cell.model].vocab_size, np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "tokens.bin"
            rng.integers(vocab_size, size=2 * self.tokens, dtype=np.uint16).tofile(data)
            config = TrainConfig(
                data=(data,),
                preset=cell.model,
                batch_size=cell.batch,
                seqlen=cell.length,
                lr=1e-4,
                precision="bf16",
                device="cuda",
                compile=True,
            )
            with torch.device("cuda"):  # random weights are made there, in less time
                self.trainer = Trainer(config)
        for _ in range(2):
            self()

    def __call__(self):
        with sdpa_kernel(ATTENTIONS, set_priority=True):
            self.trainer.training_step()

    def mfu(self, milliseconds: float) -> float:
        """By 6 FLOP a parameter and token."""
        flop = 6 * sum(p.numel() for p in self.trainer.model.parameters()) * self.tokens
        return flop / PEAK_FLOP_S / milliseconds * 1e3
