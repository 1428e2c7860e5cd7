"""The guides in docs/moving/: their diffs are those of programs that are there, and the programs are run.

The program before is plain; the program after, cut anywhere, ends as it does uncut, and that is what the one before
ends with, bit for bit.
"""

from __future__ import annotations

import ast
import difflib
import os
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from chain import Trained, cut

from chainrun import experiment
from chainrun.function import FunctionSource, load_function

MOVING = Path(__file__).parents[1] / "docs" / "moving"
GUIDES = ["plain", "nanogpt", "accelerate", "lightning", "sbatch"]
NEEDS = {"accelerate": "accelerate", "lightning": "lightning"}


def diff(guide: str) -> str:
    """Return the difference between the two programs, as the guide shows it."""
    before, after = ((MOVING / guide / f"{name}.py").read_text().splitlines() for name in ("before", "after"))
    lines = list(difflib.unified_diff(before, after, "before.py", "after.py", lineterm="", n=2))
    return "\n".join(line.rstrip() for line in lines)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder to write in; warnings of other packages are theirs; modules of one name do not meet."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield tmp_path
    sys.modules.pop("after", None)
    os.environ.clear()
    os.environ.update(before)


def plainly(guide: str, capsys) -> dict[str, float]:
    """Run the program before, as `python before.py`; return what it printed."""
    capsys.readouterr()
    runpy.run_path(str(MOVING / guide / "before.py"), run_name="__main__")
    return ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_shows_the_difference_between_its_programs(guide):
    """The diff block is the diff; tests/test_moving.py prints it where it is not."""
    (shown,) = re.findall(r"```diff\n(.*?)\n```", (MOVING / f"{guide}.md").read_text(), re.DOTALL)
    assert shown == diff(guide), f"the diff in {guide}.md should be\n{diff(guide)}"


@pytest.mark.parametrize("guide", GUIDES)
def test_the_program_after_is_the_one_before_however_it_is_cut(guide, alone, capsys):
    """Uncut, cut twice and cut at every sixth step, it ends with the numbers of the plain program."""
    if guide in NEEDS:
        pytest.importorskip(NEEDS[guide])
    expected = plainly(guide, capsys)
    train = load_function(FunctionSource(MOVING / guide / "after.py", None, "train"))
    results = {}
    for name, steps in {"whole": [], "twice": [5, 9], "often": range(1, 60, 6)}.items():
        trained: Trained = cut(lambda run, loader: train(run), steps)
        assert trained.segments > 1 or not steps
        results[name] = trained.result
    assert results == dict.fromkeys(results, expected)


def test_the_experiments_in_the_guides_are_valid():
    """They load, and name a function that is there."""
    for path in MOVING.glob("*/*.yaml"):
        described = experiment.load(path)
        assert (path.parent / described.function.partition(":")[0]).exists()


def accelerated(folder: Path, stop: int | None) -> list[float]:
    """Train 2 epochs of 5 batches with Accelerate, cut after `stop` steps and resumed as it documents; return the losses."""
    from accelerate import Accelerator, skip_first_batches
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import set_seed

    class Noisy(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor([float(index)]) / 20 + torch.randn(1)

    losses: list[float] = []
    begins = [0] if stop is None else [0, stop]
    for begin in begins:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        set_seed(0)
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        loader = torch.utils.data.DataLoader(Noisy(), batch_size=4, shuffle=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        if begin:
            accelerator.load_state(str(folder / f"state-{stop}"))
        step = begin
        for epoch in range(begin // 5, 2):
            skipped = begin % 5 if epoch == begin // 5 else 0
            for x in skip_first_batches(loader, skipped) if skipped else loader:
                loss = (model(x) - x).square().mean()
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                losses.append(loss.item())
                step += 1
                if begin == 0 and step == stop:
                    accelerator.save_state(str(folder / f"state-{stop}"))
                    break
            if begin == 0 and step == stop:
                break
    return losses


def test_accelerates_own_resume_is_exact_at_few_cuts(alone, capsys):
    """What docs/comparison.md says of it, measured anew: most cuts inside an epoch change the losses after them."""
    pytest.importorskip("accelerate")
    whole = accelerated(alone, None)
    assert len(whole) == 10
    assert accelerated(alone, None) == whole
    exact = [stop for stop in range(1, 10) if accelerated(alone, stop) == whole]
    print("exact at the cuts", exact, "of 1 to 9")
    assert len(exact) <= 2
