"""Makes benchmarks/digits.safetensors: the network of `scoresde quickstart`, trained longer.

    python -m benchmarks.digits_checkpoint                  (about ten minutes on two idle CPU cores)
    python -m benchmarks.digits_checkpoint --device cuda

The file holds the averaged (EMA) weights only, in half precision.
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro

from scoresde import checkpoint, digits

PATH = Path(__file__).with_name("digits.safetensors")
LARGEST = 2_000_000  # bytes


def main(steps: int = 2000, seed: int = 0, device: str = "cpu", out: Path = PATH) -> None:
    """Train, write what there is every 250 steps, and in the end measure what was written."""
    data = digits.load()
    model = digits.denoiser(seed).to(device)
    run = digits.training(model, data.train, steps=steps, seed=seed, ema_decay=0.999, cosine=True, every=250)
    for progress in run:
        print(progress, flush=True)
        metadata = {
            "data": "digits",
            "shape": list(digits.SHAPE),
            "step": run.step,
            "steps": steps,
            "seed": seed,
        }
        checkpoint.save(out, run.ema, dtype=torch.float16, metadata=metadata)
    if out.stat().st_size > LARGEST:
        raise ValueError(
            f"expected at most {LARGEST} bytes, found {out.stat().st_size}: take a smaller network"
        )
    rows, _ = digits.compare(checkpoint.load(out, device=device), data, n=256, seed=seed)
    print(f"{out}: {out.stat().st_size} bytes\n\n{digits.table(rows)}\n\n{digits.verdict(rows)}")


if __name__ == "__main__":
    tyro.cli(main)
