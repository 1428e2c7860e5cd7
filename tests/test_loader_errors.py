"""Errors of a data set that the function catches: what follows is exact after a cut, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chain import cut, cut_everywhere, digest, marks, plain

from chainrun.errors import RegisterError


class Corrupt(torch.utils.data.Dataset[Any]):
    """Its items 6 and 13 cannot be read."""

    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> Any:
        draw = torch.rand(())
        if index in (6, 13):
            raise ValueError("corrupt")
        return index + draw


def skipping(**options: Any) -> Any:
    def train(run: Any, DataLoader: Any) -> str:
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        loader = DataLoader(Corrupt(), batch_size=2, **options)
        run.register(model=model, optimizer=optimizer, loader=loader)
        batches = iter(loader)
        for _ in run.steps(12):
            while True:
                try:
                    x = next(batches)
                    break
                except ValueError:
                    continue
            loss = model(x[:, None]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss=loss, **marks(x, model))
        return digest(model.state_dict())

    return train


def test_batches_that_are_skipped_for_their_errors_are_not_given_twice() -> None:
    """Without workers the indices of a batch that failed count as used."""
    cut_everywhere(skipping(), least=12)


def test_skipping_a_batch_that_failed_in_a_worker_is_refused_at_once() -> None:
    """The random state in which the error left the worker is not known."""
    train = skipping(num_workers=2)
    plain(train)
    with pytest.raises(RegisterError, match="goes on with the loader 'loader' after an error"):
        cut(train)
