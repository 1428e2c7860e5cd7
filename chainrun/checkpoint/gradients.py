"""Gradients between two boundaries: which a step is still to use, and what stands for those that are not saved.

Most trainings replace a gradient after the step that used it, so that a checkpoint need not hold it. Whether
the next turn will do so too nobody knows. So a tensor without content takes its place after a restore: replaced
like the others it costs nothing, and whatever would have needed the content is refused. A backward may add to it
before it is replaced: a generator's does so to the discriminator's gradients, which are zeroed after that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from chainrun.checkpoint import sharded
from chainrun.errors import RestoreError

_aten = torch.ops.aten
_CARRYING = (_aten.view.default, _aten._to_copy.default)
_SAME = (_aten.detach.default, _aten.alias.default)
_ADD_IN_PLACE, _ADD = _aten.add_.Tensor, _aten.add.Tensor  # a backward's sum; the latter with `create_graph`
_TO_BUCKET, _FROM_BUCKET = _aten.mul.out, _aten.copy_.default  # of DistributedDataParallel, without hooks


class LeftOut(torch.Tensor):
    """Stands for a gradient that the checkpoint left out, to be replaced by the next backward.

    It has shape, dtype and device, and may be carried about with its parameter, to another device say. The sum of
    it and a new gradient is one again, and so is the mean of such sums over the ranks, where nothing but it is
    made of the bucket. All else that asks for its content raises RestoreError.
    """

    _whose: str  # for the message
    _averaged: bool  # by DistributedDataParallel, which copies it to a bucket and back

    @staticmethod
    def of(like: torch.Tensor, whose: str, averaged: bool = False) -> torch.Tensor:
        """Return one for a tensor like this, a DTensor for a DTensor."""
        if sharded.is_sharded(like):
            from torch.distributed.tensor import DTensor

            given: Any = like
            local = LeftOut.of(given.to_local().detach(), whose)
            return DTensor.from_local(
                local,
                given.device_mesh,
                given.placements,
                run_check=False,
                shape=like.shape,
                stride=like.stride(),
            )
        made: LeftOut = torch.Tensor._make_wrapper_subclass(
            LeftOut, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        made._whose, made._averaged = whose, averaged
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        given = torch.utils._pytree.tree_leaves((args, kwargs))
        whose, averaged = next((one._whose, one._averaged) for one in given if isinstance(one, cls))
        to_one = isinstance(args[0], cls)
        if func is _ADD_IN_PLACE and to_one:
            return args[0]
        if averaged and to_one and torch._C._current_graph_task_id() >= 0:  # in a backward
            if func is _TO_BUCKET and not isinstance(kwargs["out"], cls):
                return kwargs["out"].fill_(math.nan)
            if func is _FROM_BUCKET:
                return args[0]
        if func in _SAME:
            return cls.of(args[0], whose, averaged)
        if func not in _CARRYING and not (func is _ADD and to_one):
            raise RestoreError(
                f"the gradient of {whose} is used once more ({func}), which the checkpoint left out: until then each "
                "step had found new gradients in place of the used ones. Read gradients before run.step(), or drop "
                "them there by zero_grad(). Where a training stops replacing them, remove this checkpoint and go on "
                "from an older one, or begin anew with zero_grad(set_to_none=False), which keeps them, and has every "
                "checkpoint hold them"
            )
        shown = torch.empty((), dtype=args[0].dtype, device=args[0].device).expand(args[0].shape)
        return cls.of(func(shown, *args[1:], **(kwargs or {})), whose, averaged)


def _is_left_out(grad: torch.Tensor) -> bool:
    return isinstance(getattr(grad, "_local_tensor", grad), LeftOut)


def _version(grad: torch.Tensor) -> tuple[int, int]:
    """Return what changes with a gradient; fully_shard adds to the local tensor of a DTensor."""
    return grad._version, getattr(grad, "_local_tensor", grad)._version


class Gradients:
    """The gradients of an optimizer's parameters, by their place.

    Args:
        name: the optimizer's.
        parameters: gives its parameters, in their order.
    """

    def __init__(self, name: str, parameters: Callable[[], list[torch.Tensor]]) -> None:
        self._name, self._parameters = name, parameters
        # by the parameter's id: whether every step so far found another gradient tensor, None after one step
        self._renewed: dict[int, bool | None] = {}
        self._absent: list[int] = []  # left out of the checkpoint that is being restored

    def mark(self) -> None:
        """Note on each gradient that this optimizer has used it as it now is."""
        for parameter in self._parameters():
            if parameter.grad is None or _is_left_out(parameter.grad):
                continue
            used = vars(parameter.grad).setdefault("_used_by", {})
            if id(parameter) not in self._renewed:
                self._renewed[id(parameter)] = None
            elif self._name in used:
                self._renewed[id(parameter)] = False
            elif self._renewed[id(parameter)] is None:
                self._renewed[id(parameter)] = True
            used[self._name] = _version(parameter.grad)

    def _leaves_out(self, parameter: torch.Tensor, grad: torch.Tensor) -> bool:
        """Whether a gradient was used, and such gradients were seen to be replaced before the next step."""
        if _is_left_out(grad):
            return True
        used = vars(grad).get("_used_by", {}).get(self._name) == _version(grad)
        return used and bool(self._renewed.get(id(parameter)))

    def unused(self) -> dict[int, torch.Tensor]:
        """Return the gradients that a step is still to use, or may use again."""
        return {
            place: parameter.grad.detach()
            for place, parameter in enumerate(self._parameters())
            if parameter.grad is not None and not self._leaves_out(parameter, parameter.grad)
        }

    def left_out(self) -> list[int]:
        """Return the places of all other gradients."""
        return [
            place
            for place, parameter in enumerate(self._parameters())
            if parameter.grad is not None and self._leaves_out(parameter, parameter.grad)
        ]

    def expect(self, left_out: list[int]) -> None:
        """Take what `left_out` returned when the checkpoint was taken."""
        self._absent = left_out

    def settle(self, averaged: set[int]) -> None:
        """All gradients that were saved are set: make up for those that were left out.

        Args:
            averaged: see `buckets.averaged`.
        """
        parameters = self._parameters()
        for place in self._absent:
            parameter = parameters[place]
            self._renewed[id(parameter)] = True
            if parameter.grad is None:
                whose = f"parameter {place} of the optimizer '{self._name}'"
                parameter.grad = LeftOut.of(parameter, whose, id(parameter) in averaged)
            else:  # another optimizer is still to use it
                vars(parameter.grad).setdefault("_used_by", {})[self._name] = _version(parameter.grad)
