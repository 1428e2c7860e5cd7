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

from chainrun.errors import RegisterError

# of torch's own, none of them public
_OF_WRAPPER = (
    *("_build_params_for_reducer", "_ddp_init_helper", "_build_debug_param_to_name_mapping"),
    *("_has_rebuilt_buckets", "_comm_hooks", "require_forward_param_sync", "static_graph", "mixed_precision"),
)
_OF_REDUCER = (
    *(
        "_rebuild_buckets",
        "_get_zeros_like_grad_buckets",
        "_remove_autograd_hooks",
        "_push_all_rebuilt_params",
    ),
)

_known: WeakKeyDictionary[DistributedDataParallel, list[torch.Tensor]] = WeakKeyDictionary()


def capture(module: torch.nn.Module) -> list[dict[str, Any]]:
    """Return what each wrapper around the module or a part of it has found out since it was made.

    Its parameters' names in the order of its buckets, whether that order was found (in the first backward) or is
    that of a new wrapper, and whether its next forward sends rank 0's buffers, which it does not after one
    under no_sync(). Where the order is found and not used yet, it is put to use, as the next forward would;
    all ranks come here together.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = []
    for ddp in _wrappers(module):
        rebuilt = _rebuilt(ddp)
        order = _order(ddp) if rebuilt else _parameters(ddp)[0]
        sync = bool(ddp.require_forward_param_sync)
        found.append({"names": [names[id(p)] for p in order], "rebuilt": rebuilt, "sync": sync})
    return found


def restore(module: torch.nn.Module, saved: list[dict[str, Any]]) -> None:
    """Set what `capture` returned on the wrappers of the same parameters; all ranks come here together."""
    parameters = dict(module.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    known = {frozenset(entry["names"]): entry for entry in saved}
    for ddp in _wrappers(module):
        entry = known.get(frozenset(names[id(p)] for p in _parameters(ddp)[0]))
        if entry is not None:
            if entry["rebuilt"]:
                _rebuild(ddp, [parameters[name] for name in entry["names"]])
            ddp.require_forward_param_sync = entry["sync"]


def check(module: torch.nn.Module) -> None:
    """Refuse wrappers of a torch that is not known.

    Raises:
        RegisterError: there is one around the module or a part of it.
    """
    for _ in _wrappers(module):
        pass


def is_static(module: torch.nn.Module) -> bool:
    """Whether a wrapper was told that its graph never changes: it finds its order only in its second backward."""
    return any(ddp.static_graph for ddp in _wrappers(module))


def averaged(module: torch.nn.Module) -> set[int]:
    """Return the ids of the parameters whose gradients a wrapper copies to its buckets, averages and copies back.

    Not of one whose gradients are views of its buckets, nor of one with a hook, which may keep what it sees.
    """
    copying = [ddp for ddp in _wrappers(module) if not (ddp.gradient_as_bucket_view or ddp._comm_hooks)]
    return {id(parameter) for ddp in copying for parameter in _parameters(ddp)[0]}


def _wrappers(module: torch.nn.Module) -> Iterator[DistributedDataParallel]:
    """Yield the wrappers, registered or not, in the order that all ranks have."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    places = {id(parameter): place for place, parameter in enumerate(module.parameters())}
    found: list[tuple[list[int], int, DistributedDataParallel]] = []
    for thing in gc.get_objects():  # nothing that belongs to the module knows its wrapper
        if issubclass(type(thing), DistributedDataParallel) and hasattr(thing, "reducer"):
            _refuse_unknown(thing)
            mine = [places.get(id(p), -1) for p in _parameters(thing)[0]]
            if mine and -1 not in mine:
                found.append((mine, len(found), thing))
    yield from (thing for *_, thing in sorted(found))


def _refuse_unknown(ddp: DistributedDataParallel) -> None:
    """Refuse a wrapper of a torch that keeps its buckets otherwise.

    Raises:
        RegisterError: names what it does not have.
    """
    missing = [name for name in _OF_WRAPPER if not hasattr(ddp, name)]
    missing += [name for name in _OF_REDUCER if not hasattr(ddp.reducer, name)]
    if missing:
        raise RegisterError(
            f"the DistributedDataParallel of torch {torch.__version__} has no {missing[0]}: this version of chainrun "
            "does not know in which order it sums gradients, and a resume would round them otherwise; use torch 2.11 to "
            "2.15, or a newer chainrun"
        )


def _parameters(ddp: DistributedDataParallel) -> tuple[list[Any], list[bool]]:
    """Return the parameters that it sums the gradients of, and which of those are sparse."""
    found: tuple[list[Any], list[bool]] = ddp._build_params_for_reducer()  # type: ignore[no-untyped-call]
    return found


def _rebuilt(ddp: DistributedDataParallel) -> bool:
    """Whether it sums in an order that it has found, or been given."""
    with contextlib.suppress(
        RuntimeError
    ):  # a backward that did not reach all parameters: told at the next forward
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
    parameters, sparse = _parameters(ddp)
    is_sparse = {id(parameter): flag for parameter, flag in zip(parameters, sparse, strict=True)}
    ddp.reducer._remove_autograd_hooks()
    ddp._ddp_init_helper(  # type: ignore[no-untyped-call]
        order,
        [is_sparse[id(parameter)] for parameter in order],
        ddp._build_debug_param_to_name_mapping(order),  # type: ignore[no-untyped-call]
        ddp.static_graph,
    )
    if ddp.static_graph:
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()  # type: ignore[union-attr]
    if ddp.mixed_precision is not None:
        ddp.reducer._set_mixed_precision_param_dtype(ddp.mixed_precision.param_dtype)  # type: ignore[attr-defined]
    for hook, state in ddp._comm_hooks:
        torch.distributed._register_comm_hook(ddp.reducer, state, hook)  # type: ignore[attr-defined]
    ddp.reducer._push_all_rebuilt_params()
    ddp._has_rebuilt_buckets = ddp.reducer._rebuild_buckets()
    _known[ddp] = order
