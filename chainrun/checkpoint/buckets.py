"""The order in which DistributedDataParallel sums gradients, which a process finds anew in its first backward.

It begins with buckets in the order of the parameters, and rebuilds them after the first backward in the order
in which the gradients came. A sum over three or more ranks is rounded by an element's place in its bucket, so
a resumed process that began as a fresh one would have other gradients in its first step.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

_known: WeakKeyDictionary[DistributedDataParallel, list[torch.Tensor]] = WeakKeyDictionary()


def capture(module: torch.nn.Module) -> list[list[str]]:
    """Return the parameters' names by bucket order, for each wrapper around the module or a part of it.

    Wrappers that have not seen a backward yet are left out: a resumed process is where they are. Where the
    order is known and not used yet, it is put to use, as the next forward would; all ranks come here together.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[names[id(parameter)] for parameter in _order(ddp)] for ddp in _wrappers(module) if _rebuilt(ddp)]


def restore(module: torch.nn.Module, saved: list[list[str]]) -> None:
    """Give each wrapper the buckets that the wrapper of the same parameters had; all ranks come here together."""
    parameters = dict(module.named_parameters())
    orders = {frozenset(names): names for names in saved}
    names = {id(parameter): name for name, parameter in parameters.items()}
    for ddp in _wrappers(module):
        order = orders.get(frozenset(names[id(p)] for p in ddp._build_params_for_reducer()[0]))
        if order is not None:
            _rebuild(ddp, [parameters[name] for name in order])


def _wrappers(module: torch.nn.Module) -> Iterator[DistributedDataParallel]:
    """Yield the wrappers, registered or not, in the order that all ranks have."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    places = {id(parameter): place for place, parameter in enumerate(module.parameters())}
    found = []
    for thing in gc.get_objects():  # nothing that belongs to the module knows its wrapper
        if issubclass(type(thing), DistributedDataParallel) and hasattr(thing, "reducer"):
            mine = [places.get(id(p), -1) for p in thing._build_params_for_reducer()[0]]
            if mine and -1 not in mine:
                found.append((mine, len(found), thing))
    yield from (thing for *_, thing in sorted(found))


def _rebuilt(ddp: DistributedDataParallel) -> bool:
    """Whether it sums in an order that it has found, or been given."""
    with contextlib.suppress(RuntimeError):  # a backward that did not reach all parameters: told at the next forward
        if ddp.reducer._rebuild_buckets():
            ddp._has_rebuilt_buckets = True
    return ddp._has_rebuilt_buckets


def _order(ddp: DistributedDataParallel) -> list[torch.Tensor]:
    if ddp not in _known:  # once: it needs the gradients' memory for a moment
        buckets = ddp.reducer._get_zeros_like_grad_buckets()
        _known[ddp] = [parameter for bucket in buckets for parameter in bucket.parameters()]
    return _known[ddp]


def _rebuild(ddp: DistributedDataParallel, order: list[Any]) -> None:
    """As `DistributedDataParallel.__setstate__` does, with the parameters in another order."""
    parameters, sparse = ddp._build_params_for_reducer()
    is_sparse = {id(parameter): flag for parameter, flag in zip(parameters, sparse, strict=True)}
    ddp.reducer._remove_autograd_hooks()
    ddp._ddp_init_helper(
        order,
        [is_sparse[id(parameter)] for parameter in order],
        ddp._build_debug_param_to_name_mapping(order),
        ddp.static_graph,
    )
    if ddp.static_graph:
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()  # type: ignore[union-attr]
    if ddp.mixed_precision is not None:
        ddp.reducer._set_mixed_precision_param_dtype(ddp.mixed_precision.param_dtype)  # type: ignore[attr-defined]
    for hook, state in ddp._comm_hooks:
        torch.distributed._register_comm_hook(ddp.reducer, state, hook)
    ddp.reducer._push_all_rebuilt_params()
    ddp._has_rebuilt_buckets = ddp.reducer._rebuild_buckets()
    _known[ddp] = order
