"""A compact Based language model on top of based_ops: model, trainer, generator.

The way through the files: config (what is built) -> model (the network and its state) ->
text and data (tokens and batches) -> trainer and train (steps, and the loop around them) ->
checkpoint (files on disk) -> sampling, engine and generate (what a trained model is for).
"""

import os

# GNU OpenMP's threads spin for milliseconds where they wait for each other. With another program on
# one of two cores a training step then took 4 s, and takes 0.5 s with short spins. It has to be set
# before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from based_model.config import PRESETS, ModelConfig  # noqa: E402
from based_model.engine import Engine, Request  # noqa: E402
from based_model.model import Based, ModelState  # noqa: E402
from based_model.sampling import Sampling  # noqa: E402

__all__ = ["PRESETS", "Based", "Engine", "ModelConfig", "ModelState", "Request", "Sampling"]
