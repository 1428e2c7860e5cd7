"""Trainings whose state lies in shards on two ranks or more, side by side. Never imports chainrun."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

WIDTH = 6  # in, out


class Momentum32(torch.optim.Optimizer):
    """Gradient descent with momentum that is kept in float32, whatever the parameters are in."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["momentum"].mul_(0.9).add_(parameter.grad.float())
                parameter.sub_(group["lr"] * state["momentum"])


def network(hidden: int) -> torch.nn.Module:
    """A network with a dropout."""
    torch.manual_seed(0)
    layers = (
        torch.nn.Linear(WIDTH, hidden),
        torch.nn.Tanh(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(hidden, WIDTH),
    )
    return torch.nn.Sequential(*layers)


class Learner:
    """A model with its optimizer, which steps after every `every` batches.

    Args:
        kind: ``shards`` of float32 trained by AdamW; ``mixed`` computes in bfloat16; ``half`` is of bfloat16;
            ``tensor`` parallel; ``local`` adds the gradients up on each rank and reduces the last one alone. On
            four ranks: ``hybrid`` shards, on two ranks each; ``plane`` of shards and tensor parallel; ``groups``
            of tensor parallel ranks, with weights of their own; ``sequence`` parallel, whose gradients are sums
            still to be made.
    """

    def __init__(self, kind: str, mesh: DeviceMesh | None) -> None:
        self.kind, self.every = kind, 1 if kind in ("shards", "mixed", "hybrid") else 2
        parallel = kind in ("tensor", "plane", "groups", "sequence")
        self.model = model = network(8 if parallel else 7)  # fully_shard takes what ranks do not divide
        if kind == "half":
            model.bfloat16()
        if kind in ("hybrid", "plane", "groups"):
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        if kind == "sequence":
            model.append(torch.nn.LayerNorm(WIDTH))
            plan = {"3": RowwiseParallel(output_layouts=Shard(0)), "4": SequenceParallel(sequence_dim=0)}
            parallelize_module(model, mesh, {"0": ColwiseParallel(), **plan})
        elif parallel and mesh is not None:
            inner = mesh if kind == "tensor" else mesh["inner"]
            parallelize_module(model, inner, {"0": ColwiseParallel(), "3": RowwiseParallel()})
            if kind == "plane":
                fully_shard(model, mesh=mesh["outer"])
        elif mesh is not None:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if kind == "mixed" else None)
            fully_shard(model[0], mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
        optimizer = Momentum32 if kind == "half" else torch.optim.AdamW
        self.optimizer = optimizer(model.parameters(), lr=0.05)

    def learn(self, batch: torch.Tensor, step: int) -> torch.Tensor:
        """Do step number `step`, from 1, with a batch; return the loss."""
        due = step % self.every == 0
        if self.kind == "local" and isinstance(next(self.model.parameters()), DTensor):
            self.model.set_requires_gradient_sync(due)
        if self.kind in (
            "tensor",
            "plane",
            "groups",
            "sequence",
        ):  # ranks that share the work share the batch
            batch = data()[step % 10 :][:4]
        if self.kind == "groups":
            batch = batch * (1 + torch.distributed.get_rank() // 2)
        batch = batch.to(next(self.model.parameters()).dtype)
        made = self.model(batch)
        if isinstance(made, DTensor):
            made = made.full_tensor()
        loss = (made.float() - batch.float()).square().mean()
        loss.backward()
        if due:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss


def learners(kinds: str, ranks: int) -> dict[str, Learner]:
    """Return a learner for each of the kinds, sharded over all ranks if there is more than one."""
    mesh = init_device_mesh("cpu", (ranks,)) if ranks > 1 else None
    return {kind: Learner(kind, mesh) for kind in kinds.split()}


def local(tree):
    """Return the tensors of this rank in a tree, by their place, gradients not among them."""
    if isinstance(tree, DTensor):
        tree = tree.to_local()
    if isinstance(tree, torch.Tensor):
        return [tree.float()]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [tensor for value in values for tensor in local(value)]


def whole(tree):
    """Return a state_dict with whole tensors; all ranks call it."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return tree


def state_of(learner: Learner) -> list[torch.Tensor]:
    """Return all tensors that this rank has of a learner: weights, the optimizer's, gradients."""
    gradients = [p.grad for p in learner.model.parameters() if p.grad is not None]
    return local([learner.model.state_dict(), learner.optimizer.state_dict()["state"], gradients])


def data() -> torch.Tensor:
    return torch.linspace(-1, 1, 40 * WIDTH).reshape(40, WIDTH)
