"""What exact resume costs a loader: chainrun.DataLoader beside torch's, in turns, in one process.

    python benchmarks/loader.py [--rounds 9] [--batches 40] [--workers 2]

Each round draws the same epoch of augmented images (random crop, flip and noise of 3 x 224 x 224, batches of
32) from both loaders, the first one by turns; the time is that from the first batch to the last, the processor
time that of the process and of its workers from their start to their end. Prints the batches per second and
the processor time a batch of each, and the median of the rounds' ratios; above 1 chainrun costs more.
"""

from __future__ import annotations

import argparse
import gc
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

import chainrun


class Images(torch.utils.data.Dataset[torch.Tensor]):
    """Augmented images; each draws from the three global generators."""

    def __init__(self, length: int, kind: str) -> None:
        self._length, self._kind = length, kind
        self._source = torch.randint(256, (16, 3, 256, 256), dtype=torch.uint8)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._kind == "tiny":
            return torch.full((4,), random.random())
        top, left = random.randrange(33), int(np.random.randint(33))
        image = self._source[index % 16, :, top : top + 224, left : left + 224].float().div_(255)
        if random.random() < 0.5:
            image = image.flip(-1)
        return image + torch.randn(3, 1, 1) * 0.1


def measured(loader: Iterable[torch.Tensor], run: chainrun.Run | None) -> tuple[float, float]:
    """Go through an epoch; return the time from the first batch to the last, and the processor time of it all."""
    before, began = _processor(), 0.0
    for batch in loader:
        began = began or time.perf_counter()
        batch.sum()
        if run is not None:
            run.step()
    took = time.perf_counter() - began
    gc.collect()  # the workers end with the iterator, and count when they have ended
    return took, _processor() - before


def _processor() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in spent)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--items", choices=("images", "tiny"), default="images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = Images(32 * options.batches, options.items)
    arguments: dict[str, Any] = {"batch_size": 32, "shuffle": True, "num_workers": options.workers}
    plain = torch.utils.data.DataLoader(images, **arguments)
    ours = chainrun.DataLoader(images, **arguments)
    times: dict[str, list[tuple[float, float]]] = {"torch": [], "chainrun": []}
    with tempfile.TemporaryDirectory() as folder:
        run = chainrun.Run(folder)
        run.register(loader=ours)
        for turn in run.epochs(options.rounds + 1):
            order = ["torch", "chainrun"] if turn % 2 else ["chainrun", "torch"]
            for name in order:
                took = measured(plain, None) if name == "torch" else measured(ours, run)
                if turn:  # the first round warms up
                    times[name].append(took)
    for name, rounds in times.items():
        wall, processor = (statistics.median(each) for each in zip(*rounds, strict=True))
        print(
            f"{name:9} {(options.batches - 1) / wall:8.1f} batches/s, {processor / options.batches * 1e3:6.2f} ms of "
            f"processor time a batch (medians of {len(rounds)})"
        )
    for place, what in enumerate(("time", "processor time")):
        ratios = sorted(a[place] / b[place] for a, b in zip(times["chainrun"], times["torch"], strict=True))
        print(
            f"chainrun / torch, {what}: {statistics.median(ratios):.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


if __name__ == "__main__":
    main()
