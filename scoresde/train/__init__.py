"""Training a denoiser, or a classifier of noisy data, as an iterator of progress.

    run = fit(model, data, steps=3000, path="digits.safetensors")
    for progress in run:
        print(progress)
    run.ema  # the averaged denoiser

The run owns its randomness: the same seed gives the same run, and on the CPU a run that was interrupted,
saved and resumed gives the same bits as one that was not. Outside a call of `next` nothing differs from
before it: the global random state, the gradient mode and the training flags are as they were found.
"""

from scoresde.train.data import Batches, Data
from scoresde.train.fit import fit, fit_classifier
from scoresde.train.run import Progress, Run, Settings

__all__ = ["Batches", "Data", "Progress", "Run", "Settings", "fit", "fit_classifier"]
