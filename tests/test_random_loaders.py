"""Loaders with random arguments, cut at random steps: equal to torch's loader, or refused."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from chain import cut, plain
from everywhere import also_on_ranks
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from test_iterable import Buffered, Cursors, Flagged, Own, Shards, Stateful, collate
from test_iterable import training as iterable_training
from test_loader import (
    AtOnce,
    Counting,
    Eager,
    Lazy,
    Made,
    Noisy,
    Pairs,
    Shuffling,
    drawing_collate,
    training,
)
from test_loader import Own as OwnItems
from torch.utils import data

from chainrun.errors import RegisterError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

EXAMPLES = int(os.environ.get("CHAINRUN_EXAMPLES", "25"))
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="CHAINRUN_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)

WORKERS = st.fixed_dictionaries(
    {"num_workers": st.integers(1, 3)},
    optional={"prefetch_factor": st.integers(1, 3), "persistent_workers": st.booleans()},
) | st.just({})
ORDERS = st.sampled_from(
    [
        {},
        {"shuffle": True},
        {"shuffle": True, "generator": Made(lambda d: torch.Generator().manual_seed(9))},
        {"sampler": Made(lambda d: data.RandomSampler(d, replacement=True))},
        {"sampler": Made(lambda d: data.WeightedRandomSampler(torch.arange(10) + 1.0, 10))},
        {"sampler": Made(lambda d: data.DistributedSampler(d, num_replicas=2, rank=1, seed=3))},
        *({"sampler": Made(lambda d, kind=kind: kind(10))} for kind in (Lazy, Eager, Shuffling)),
        {"batch_size": 1, "batch_sampler": Made(lambda d: Pairs(10))},
    ]
)
BATCHES = st.fixed_dictionaries({}, optional={"batch_size": st.integers(1, 4), "drop_last": st.booleans()})
CUTS = st.lists(st.integers(1, 30), max_size=6, unique=True)


def compare(train: Any, cuts: list[int]) -> None:
    def check() -> None:
        difference = plain(train).difference(cut(train, cuts))
        assert difference is None, difference

    try:
        check()
    except RegisterError:
        event("refused")
        return
    event("exact")
    also_on_ranks(check)


@SETTINGS
@given(
    items=st.sampled_from([Noisy, AtOnce, OwnItems, Counting]),
    order=ORDERS,
    batches=BATCHES,
    workers=WORKERS,
    draws=st.booleans(),
    most=st.none() | st.integers(1, 5),
    cuts=CUTS,
)
def test_any_map_style_loader_is_exact_at_any_cuts(
    items: Any, order: dict, batches: dict, workers: dict, draws: bool, most: int | None, cuts: list[int]
) -> None:
    """Data set, order, batches, workers, passes left early."""
    options = {**batches, **order, **workers, **({"collate_fn": drawing_collate} if draws else {})}
    if "batch_sampler" in order:
        options.pop("drop_last", None)
    left = {"per_batch": lambda run: run.global_step % most == 0} if most else {}
    compare(training(items, **options, **left), cuts)


@SETTINGS
@given(
    items=st.sampled_from([Shards, lambda: Shards(quiet=True), Buffered, Own, Stateful, Flagged, Cursors]),
    batches=BATCHES | st.just({"batch_size": None}),
    workers=WORKERS,
    draws=st.booleans(),
    most=st.none() | st.integers(1, 5),
    cuts=CUTS,
)
def test_any_iterable_loader_is_exact_at_any_cuts(
    items: Any, batches: dict, workers: dict, draws: bool, most: int | None, cuts: list[int]
) -> None:
    """Data set, batches, workers, passes left early."""
    options = {**batches, **workers}
    if draws and batches.get("batch_size", 3) is not None:
        options["collate_fn"] = collate
    compare(iterable_training(items, epochs=3, most=most, **options), cuts)
