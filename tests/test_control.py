"""The ranks' small talk where one of them is no longer there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch._C._distributed_c10d import TCPStore

from chainrun.allocation import Allocation
from chainrun.training import distributed
from chainrun.training.distributed import Control

SERVER = """
import time
from torch._C._distributed_c10d import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


def test_a_rank_whose_segment_has_ended_leaves_in_peace_when_rank_0_was_killed_first() -> None:
    """Its outcome stays what it was: there is no traceback, and nobody is waited for."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        allocation = Allocation(rank=1, world_size=2)
        control = Control(allocation, "127.0.0.1", int(server.stdout.readline()), None)
        assert control.gone() is None
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        control.leave()
        assert control.gone() == 0


@pytest.fixture
def three(monkeypatch) -> list[Control]:
    monkeypatch.setattr(distributed, "_ANSWER", 1.0)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    places = [Allocation(rank=rank, world_size=3) for rank in range(3)]
    return [Control(place, "127.0.0.1", server.port, server) for place in places]


@contextmanager
def answering(*controls: Control) -> Iterator[None]:
    """Let the side threads of these ranks look, as `Watch` does."""
    over = threading.Event()

    def look(control: Control) -> None:
        while not over.wait(0.01):
            control.answer()

    threads = [threading.Thread(target=look, args=[control]) for control in controls]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_a_rank_that_no_longer_answers_is_gone_for_each_that_asks(three) -> None:
    """Also for the one that asks after the first has ended for it."""
    for control in three:
        control.answer()
    with answering(three[0], three[1]):
        assert three[0].gone() == 2
        assert three[1].gone() == 2
    assert three[1].gone() in (0, 2)


def test_a_rank_whose_own_side_thread_waits_is_not_gone_for_itself(three) -> None:
    for control in three:
        control.answer()
    with answering(three[0], three[2]):
        assert three[1].gone() is None


@pytest.mark.parametrize("how", ["answers", "failed", "returned", "left", "was never there"])
def test_a_rank_that_lives_or_has_said_how_it_ends_is_not_gone(three, how) -> None:
    for control in three[:2] if how == "was never there" else three:
        control.answer()
    if how == "failed":
        three[2].fail()
    elif how == "returned":
        threads = [threading.Thread(target=control.returned) for control in three]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    elif how == "left":
        three[2].leave()
    with answering(*three[: 3 if how == "answers" else 2]):
        assert three[0].gone() is None
        assert three[1].gone() is None
