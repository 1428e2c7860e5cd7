"""The loaders of a checkpoint that goes on with another number of ranks."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset

from chainrun.errors import RestoreError
from chainrun.training.data import Chain
from chainrun.training.indices import Stream
from chainrun.training.one_pass import from_plain


def moved(chain: Chain, saved: dict[str, Any], then: int, now: int) -> dict[str, Any]:
    """Return a loader's state with its place in the running pass moved.

    After k batches on each of `then` ranks it goes on after ``k * then // now`` on each of `now`: with a sampler
    that deals one permutation out to the ranks (`DistributedSampler`), that is after the same items, but for
    what does not divide. The sampler is drawn as far, under the random state of the pass's beginning.

    Raises:
        RestoreError: the data set is iterable and was cut inside a pass: only it knows which rank gives what.
    """
    place = saved["pass"]
    if place is None:
        return saved
    if isinstance(chain.loader.dataset, IterableDataset):
        raise RestoreError(
            f"the loader '{chain.name}' was cut inside a pass over an iterable data set, whose place on {now} "
            f"instead of {then} ranks is not known; start {then} ranks again until that pass is over"
        )
    present = chain.parent_state()
    chain.set_parent_state(from_plain(place["began"]))
    stream = Stream(iter(chain.index_sampler), None, chain)
    if place["first"]:
        chain.set_parent_state(from_plain(place["first"]))
    handed_out = place["drawn"][0] * then // now
    for _ in zip(range(handed_out), stream, strict=False):
        pass
    chain.set_parent_state(present)
    return {
        **saved,
        "pass": {**place, "drawn": [stream.drawn, stream.drawn, stream.ended, stream.digest()]},
    }
