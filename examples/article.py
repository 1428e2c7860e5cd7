"""The smallest demonstration: a shuffled order, and random numbers drawn in the loader's workers, go on exactly.

Cut the training at three steps, run it a second time without a cut, and compare what the two have seen::

    chainrun run examples/article.yaml --interrupt-at 5,13,21
    chainrun run examples/article.yaml name=whole
    cmp runs/article/metrics.jsonl runs/whole/metrics.jsonl

The two files are equal byte for byte. `chainrun logs runs/article` shows every batch in words.
"""

import random

import numpy as np
import torch

import chainrun


class Draws(torch.utils.data.Dataset):
    """Items that consist of nothing but chance: the index, and one random number from each library.

    The numbers are drawn where real data sets augment their data: in a worker process of the loader, from
    the global generators, whose state no other process knows.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, torch.tensor([random.random(), np.random.rand(), torch.rand(())])


def train(run: chainrun.Run, epochs: int = 2, size: int = 48, workers: int = 4) -> list[float]:
    """Fit a line to chance; return its coefficients."""
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = chainrun.DataLoader(Draws(size), batch_size=4, shuffle=True, num_workers=workers)

    run.register(model=model, optimizer=optimizer, loader=loader)
    for epoch in run.epochs(epochs):
        for indices, numbers in loader:
            loss = torch.nn.functional.mse_loss(model(numbers), indices[:, None] / size)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss=loss, indices=indices, numbers=numbers)
            print(f"epoch {epoch}, step {run.global_step}: {indices.tolist()}, drew {numbers[0].tolist()} …")
    return model.weight[0].tolist()
