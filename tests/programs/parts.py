"""The data and the model of the SLURM tests. Never imports chainrun."""

from __future__ import annotations

import random

import numpy as np
import torch


class Noisy(torch.utils.data.Dataset):
    """Items with a draw from each of the three generators, made where the item is made: in the worker."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        draws = [random.random(), float(np.random.rand()), torch.rand(()).item()]
        return torch.tensor([index / self.length, *draws], dtype=torch.float64)


def model() -> torch.nn.Module:
    layers = torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(32, 1)
    return torch.nn.Sequential(*layers).double()
