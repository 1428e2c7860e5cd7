"""The ranks' small talk where one of them is no longer there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from chainrun.allocation import Allocation
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
        assert not control.lost()
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        control.leave()
        assert control.lost()
