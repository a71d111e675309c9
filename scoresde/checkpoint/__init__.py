"""Checkpoints: one safetensors file that holds weights and a JSON description which rebuilds the denoiser.

    groups of tensors   model.*, ema.*, schedule.* (of a learned schedule), training.* (what
                        resuming needs: optimiser, generators)
    metadata            "scoresde": the description as JSON; "sha256": of the whole file, taken with 64 zeros
                        in its own place

Loading reads numbers and names, never code. A file is written beside its final place and moved there when it
is complete and on the disk, so a crash leaves the previous one. Any changed byte is found at loading. Every
fault is a `CheckpointError`.
"""

from scoresde.checkpoint.files import CheckpointError
from scoresde.checkpoint.store import Training, Weights, describe, load, restore, save

__all__ = ["CheckpointError", "Training", "Weights", "describe", "load", "restore", "save"]
