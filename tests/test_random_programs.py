"""Programs made at random (loops in loops, looks, draws, breaks, boundaries anywhere), cut at random."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from chain import cut, digest, plain, random_state
from test_loader import Noisy

from chainrun.errors import RegisterError

PROGRAMS = int(os.environ.get("CHAINRUN_PROGRAMS", "30"))
CUTS = 3  # chains a program

Block = list[tuple[Any, ...]]


class Maker:
    """Makes a program of one seed: nested lists of statements over three loaders and one endless one."""

    def __init__(self, number: int) -> None:
        self.dice = dice = random.Random(number)
        self.endless = dice.random() < 0.4
        self.options = [
            {"shuffle": dice.random() < 0.7, "num_workers": int(dice.random() < 0.1)} for _ in range(4)
        ]
        self.block: Block = [("open",)] if self.endless else []
        self.held = self.endless and dice.random() < 0.4  # looked at first, made anew, gone over beside
        if self.held:
            self.block += [("next",)] * dice.randint(0, 4)
        for _ in range(dice.randint(1, 3)):
            kind = dice.choice(["epochs", "epochs", "steps", "plain"])
            if kind == "plain":
                self.block += self.statements(0, set(), inside=False)
            else:
                inner = self.statements(int(kind == "steps"), set(), inside=kind == "steps")
                self.block.append((kind, dice.randint(1, 3), inner))

    def statements(self, depth: int, running: set[int], inside: bool) -> Block:
        dice, block = self.dice, []
        for _ in range(dice.randint(1, 3)):
            loaders = [loader for loader in range(3) if loader not in running]
            kind = dice.choices(["draw", "look", "pass", "loop", "boundary"], [4, 2, 1, 8, 5])[0]
            if kind == "loop" and loaders and depth < 3:
                loader = dice.choice(loaders)
                inner = self.statements(depth + 1, running | {loader}, inside=True)
                block.append(("loop", loader, inner, dice.random() < 0.25))
            elif kind in ("look", "pass") and loaders:
                block.append((kind, dice.choice(loaders)))
            elif kind == "boundary" and inside:
                block.append((dice.choice(["step", "step", "poll", "log"]),))
            else:
                block.append(("draw", dice.randrange(4)))
        if inside:
            block.insert(dice.randint(0, len(block)), ("step",))
            if self.endless and dice.random() < 0.5:
                block.insert(0, ("next",))
        if self.held and dice.random() < 0.3:
            block.insert(0, ("open",))
        elif self.held and 3 not in running and dice.random() < 0.3:
            inner = self.statements(depth + 1, running | {3}, inside=True) if depth < 3 else [("draw", 2)]
            block.append(("loop", 3, inner, dice.random() < 0.25))
        return block


def program(made: Maker) -> Callable[[Any, Any], Any]:
    """Return the function that does what was made; all that it sees goes into one number in `run.state`."""

    def train(run: Any, DataLoader: Any) -> Any:
        loaders = [
            DataLoader(Noisy(length), batch_size=2, **options)
            for length, options in zip((4, 5, 3, 6), made.options, strict=True)
        ]
        generator = np.random.default_rng(3)
        run.register(generator=generator, **{f"loader{n}": loader for n, loader in enumerate(loaders)})
        run.state.setdefault("seen", 0.0)
        draws = (random.random, np.random.rand, lambda: torch.rand(()).item(), generator.normal)
        endless = None

        def see(value: float) -> None:
            run.state["seen"] = (0.7 * run.state["seen"] + value) % 1000

        def do(block: Block, value: float) -> None:
            nonlocal endless
            for kind, *rest in block:
                if kind == "draw":
                    see(value + draws[rest[0]]())
                elif kind == "look":
                    see(next(iter(loaders[rest[0]])).sum().item())
                elif kind == "pass":
                    see(sum(x.sum().item() for x in loaders[rest[0]]))
                elif kind == "open":
                    endless = iter(loaders[3])
                elif kind == "next":
                    try:
                        x = next(endless)
                    except StopIteration:
                        endless = iter(loaders[3])
                        x = next(endless)
                    see(x.sum().item())
                elif kind == "loop":
                    loader, inner, may_break = rest
                    for x in loaders[loader]:
                        see(x.sum().item())
                        do(inner, x.sum().item())
                        if may_break and int(x[0, 0]) % 3 == 1:
                            break
                elif kind == "step":
                    run.step(seen=run.state["seen"], random=random_state())
                elif kind == "log":
                    run.log(seen=run.state["seen"])
                elif kind == "poll":
                    run.poll()
                else:
                    for index in getattr(run, kind)(rest[0]):
                        do(rest[1], float(index))

        do(made.block, 0.0)
        return run.state["seen"], digest(generator.normal())

    return train


@pytest.mark.parametrize("number", range(PROGRAMS))
def test_program_made_at_random(number: int) -> None:
    """Whatever the shape, a cut program is the plain one; to repeat one alone: -k "random[NUMBER]"."""
    made = Maker(number)
    train = program(made)
    reference = plain(train)
    count = reference.boundaries
    if not 0 < count <= 60:
        return
    try:
        cut(train)
    except RegisterError as refused:  # by what it does with the iterator that is held
        said = (
            "was taken before a loop began",
            "are used at the same time",
            "that an earlier turn made is used",
            "may be used in a later one",
        )
        assert any(each in str(refused) for each in said)
        return
    for _ in range(CUTS):
        after = [made.dice.randint(1, max(1, count // 2)) for _ in range(made.dice.choice([1, 1, 4]))]
        difference = reference.difference(cut(train, after=after))
        assert difference is None, f"cut after {after} boundaries: {difference}\n{made.options}\n{made.block}"
