"""A compact Based language model on top of based_ops: model, trainer, generator.

The way through the files: config (what is built) -> model (the network and its state) ->
data (text and batches) -> train (the loop) -> checkpoint (files on disk) -> generate (sampling).
"""

from based_model.config import PRESETS, ModelConfig
from based_model.model import Based, ModelState

__all__ = ["PRESETS", "Based", "ModelConfig", "ModelState"]
