"""`chainrun verify` finds what makes a resume inexact, and says nothing where it is exact.

Most pieces of a verification run here in a fork of this process, which has torch imported already; a few
tests go through the command and its processes.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

import chainrun
from chainrun import journal
from chainrun.allocation import Allocation
from chainrun.errors import ChainrunError, UsageError
from chainrun.experiment import from_dict
from chainrun.launch import verify
from chainrun.segment import run_segment
from chainrun.training.stop import Signals

PROGRAM = Path(__file__).parent / "programs" / "faulty.py"
CODES = {"done": 0, "failed": 1, "stopped": 75, "retry": 75}


def run_forked(run, described, interrupt_at, record, save_at, end):
    """Do what `local.run_one` does, in a fork."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            log = os.open(run.jobs / "log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stderr = sys.__stderr__
            gc.freeze()  # what other tests have left alive belongs to no training
            torch.set_num_threads(1)
            torch.seed()  # as in a process of its own
            np.random.seed(None)
            allocation = Allocation(
                scheduler="local",
                job=str(os.getpid()),
                restart=1 + sum(1 for _ in journal.events(run, "segment")),
                interrupt_at=frozenset(interrupt_at),
                save_at=frozenset(save_at),
                record=record,
                end=lambda: end,
            )
            code = CODES[run_segment(run, allocation, Signals().install()).kind]
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in CODES.values(), (run.jobs / "log").read_text()
    return code


@pytest.fixture
def verified(tmp_path, monkeypatch):
    """Return a function that verifies one of the programs."""
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports much, which the forks then have
    monkeypatch.setattr(verify.local, "run_one", run_forked)
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)

    def verified(function, cuts=(4,), seed=0, **args):
        data = {"name": "v", "function": f"{PROGRAM}:{function}", "args": args, "seed": seed}
        data["chain"] = {"retry_errors": 1}  # is not for verify
        return verify.verify(from_dict(data, tmp_path), tmp_path, 12, cuts)

    return verified


def test_an_exact_training_is_called_identical(verified):
    """No difference, wherever it is cut."""
    verdict = verified("exact", cuts="every")
    assert verdict.exact
    assert verdict.text() == "identical over 12 steps, 11 cuts"
    assert verified("by_hand", own=True, register=True).text() == "identical over 12 steps, 1 cut"


TRAINED = {"metrics", "model", "optimizer"}
RANDOM = {"random state: python", "random state: numpy", "random state: torch"}
LOADED = {"batch of an unregistered loader", *TRAINED, "random state: torch"}


@pytest.mark.parametrize(
    ("function", "args", "step", "parts", "cause", "remedy"),
    [
        (
            "exact",
            {"unregistered": "model optimizer"},
            5,
            {"metrics", "scheduler"},
            "`model` in exact() (Sequential) is not registered",
            "run.register(model=model)",
        ),
        (
            "exact",
            {"unregistered": "optimizer"},
            5,
            {"model", "scheduler"},
            "`optimizer` in exact() (AdamW) is not registered",
            "run.register(optimizer=optimizer)",
        ),
        (  # StepLR lowers the rate after steps 3, 6 and 9: at step 6 it should do so a second time
            "exact",
            {"unregistered": "scheduler"},
            6,
            {"optimizer"},
            "`scheduler` in exact() (StepLR) is not registered",
            "run.register(scheduler=scheduler)",
        ),
        ("teacher", {}, 5, TRAINED, "`slow` in teacher() (Sequential) is not", "run.register(slow=slow)"),
        ("average_of_weights", {}, 5, TRAINED, "`ema.weights` in average_of_weights()", "state_dict"),
        ("torch_generator", {}, 5, TRAINED, "`noise` in torch_generator() (Generator)", "noise=noise"),
        ("numpy_generator", {}, 5, TRAINED, "`noise` in numpy_generator() (Generator)", "noise=noise"),
        ("by_hand", {"own": True}, 5, LOADED, "a chainrun.DataLoader is not registered", "run.register"),
        (
            "by_hand",
            {"own": False},
            5,
            LOADED,
            "a torch.utils.data.DataLoader is used",
            "chainrun.DataLoader",
        ),
        ("local_in_metrics", {}, 5, {"metrics"}, "`average` in local_in_metrics()", "run.state"),
        ("local_in_weights", {}, 5, TRAINED, "`previous` in local_in_weights()", "run.state"),
        ("global_of_the_module", {}, 5, TRAINED, "`faulty.CALLS` is not what", "run.state"),
        ("attribute", {}, 5, TRAINED, "`self.scale` in fit() is not what", "state_dict"),
        ("counted", {}, 5, TRAINED, "`number` counts from 0 again", "run.global_step"),
        (
            "data_set_with_a_count",
            {},
            5,
            {"batch of loader", *TRAINED},
            "`dataset.visits` in data_set_with_a_count() is not what",
            "state_dict",
        ),
        ("forgetful", {}, 5, {"scaler", *TRAINED}, "'scaler' did not come back", "load_state_dict"),
        ("number_of_the_segment", {}, 5, TRAINED, "asks for run.segment", "whether the run was resumed"),
        (  # the permutation of the next epoch is drawn from the stream that was moved
            "draw_before_the_loop",
            {},
            6,
            {"batch of loader", *TRAINED, "random state: torch"},
            "asks for run.resumed",
            "draw no random numbers",
        ),
        (
            "draw_after_the_restore",
            {},
            5,
            {"random state: torch"},
            "`look` in draw_after_the_rest",
            "run.state",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_a_fault_of_the_resume_is_found_and_its_cause_named(
    verified, function, args, step, parts, cause, remedy
):
    """The cut, the first step, all components that differ there, the likeliest cause and what to do."""
    verdict = verified(function, **args)
    assert verdict.cut == 4
    assert (verdict.difference.step, verdict.difference.rank) == (step, 0)
    assert {part for part in verdict.difference.parts if part != "scheduler" or part in parts} == parts - {""}
    assert cause in verdict.causes[0][0]
    assert remedy in verdict.causes[0][1]
    assert f"at step {step}, rank 0:" in verdict.text()
    assert f"likely cause: {verdict.causes[0][0]}" in verdict.text()


@pytest.mark.parametrize(
    ("function", "step", "parts", "cause", "remedy"),
    [
        ("clock", 1, TRAINED, "clock() asks for the time", "depend on it"),
        ("time_left", 1, TRAINED, "asks for run.time_left()", "depend on it"),
        ("process_id", 1, TRAINED, "asks for getpid", "seeded generator"),
        ("kernel", 1, {"model", "optimizer"}, "a kernel that is not deterministic", "deterministic: true"),
        ("data_that_changes", 1, {"batch of loader", *TRAINED}, "the data changes", "index"),
        ("unseeded_generator", 0, {"noise"}, "'noise' does not begin alike", "seed"),
        ("unseeded", 0, {"model", *RANDOM}, "seed: null", "give the experiment a seed"),
    ],
)
def test_a_training_that_does_not_repeat_itself_is_told_from_a_resume(
    verified, tmp_path, function, step, parts, cause, remedy
):
    """Two uninterrupted runs differ: no cut is blamed, and what differs first points to the kind of cause."""
    args = {"file": str(tmp_path / "data")} if function == "data_that_changes" else {}
    verdict = verified(function, seed=None if function == "unseeded" else 0, **args)
    assert verdict.cut is None
    assert verdict.difference.step == step
    assert set(verdict.difference.parts) == parts
    assert cause in verdict.causes[0][0]
    assert remedy in verdict.causes[0][1]
    assert verdict.text().startswith("the training does not repeat itself: two uninterrupted runs differ")


def test_what_two_whole_runs_have_different_as_well_is_not_blamed(verified):
    """A variable that holds the time differs after a resume too; the one that matters is named alone."""
    assert [cause.split("`")[1] for cause, _ in verified("local_in_weights").causes] == ["previous"]


def test_the_first_entries_and_the_values_of_numbers_are_shown(verified):
    """Which tensor of a component, how many more, and numbers as they were and are."""
    text = verified("local_in_weights").text()
    assert "  model: 0.weight and 3 more" in text
    assert "  metrics: loss 0." in text
    assert " instead of 0." in text


def test_a_resume_that_fails_is_a_verdict(verified):
    """The uninterrupted run did not fail: what the cut one says is what was found."""
    verdict = verified("fails_when_resumed")
    assert not verdict.exact
    assert verdict.cut == 4
    assert "ValueError: this part was never run before" in verdict.text()


def test_an_attribute_that_only_a_loop_sets_that_was_over_is_explained(verified):
    """Where Python says no more than that there is no such attribute."""
    text = verified("reads_what_a_loop_that_was_over_has_set", cuts=(6,)).text()
    assert "AttributeError: 'Fitting' object has no attribute 'loss'\na loop that was over when" in text
    assert "give the attribute a value before that loop, or write the loop around it as `for epoch in" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [({"steps": False}, "took no step"), ({"unregistered": "model"}, "no registered object holds")],
)
def test_a_function_that_cannot_be_verified_is_told_so(verified, args, message):
    """Nothing to compare is an error, not a success."""
    with pytest.raises(ChainrunError, match=message):
        verified("exact", **args)


def command(folder, experiment, *options, **env):
    """Run `chainrun verify` on an experiment; return its exit code and its verdict."""
    file = folder / "exp.yaml"
    file.write_text(json.dumps(experiment))
    line = [sys.executable, "-m", "chainrun", "verify", str(file), "--json", *options]
    env = {**os.environ, **env}
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, cwd=folder, check=False, env=env)
    return done.returncode, json.loads(done.stdout) if done.stdout else {"text": done.stderr}


def test_the_command_names_the_rank(tmp_path):
    """Of two ranks the one that differs; exit code 1."""
    experiment = {"function": f"{PROGRAM}:rank_one", "local": {"tasks": 2}}
    code, verdict = command(tmp_path, experiment, "--steps", "6", "--cuts", "3")
    assert (code, verdict["cut"], verdict["step"], verdict["rank"]) == (1, 3, 4, 1)
    assert "`scale` in rank_one()" in verdict["causes"][0]["cause"]
    assert verdict["parts"]["metrics"] == ["loss"]


def test_the_command_finds_a_random_hash_seed(tmp_path):
    """Segments have hash seed 0; where a person has set it to random, that is the cause."""
    experiment = {"function": f"{PROGRAM}:hash_seed"}
    code, verdict = command(tmp_path, experiment, "--steps", "4", "--cuts", "2", PYTHONHASHSEED="random")
    assert (code, verdict["cut"], verdict["step"]) == (1, None, 1)
    assert "PYTHONHASHSEED" in verdict["causes"][0]["cause"]


def test_from_python(tmp_path, monkeypatch):
    """`chainrun.verify` takes a function as `chainrun.submit` does, and returns the verdict."""
    monkeypatch.setattr(verify.local, "run_one", run_forked)
    verdict = chainrun.verify(f"{PROGRAM}:exact", steps=6, cuts=[2])
    assert verdict == chainrun.Verdict(6, [2])
    with pytest.raises(UsageError, match="at least 2"):
        chainrun.verify(f"{PROGRAM}:exact", steps=1)
