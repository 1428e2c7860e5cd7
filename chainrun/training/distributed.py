"""The ranks of one segment: how they find each other, agree and exchange small values.

Rank 0 serves one TCPStore on a port of the system's choice and writes its address into the run directory.
The same store serves the user's ``torch.distributed.init_process_group()``: with TORCHELASTIC_USE_AGENT_STORE
every rank joins it as a client (torch/distributed/rendezvous.py), so no port is guessed from a job id.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore  # torch.distributed's own, with types

from chainrun.allocation import Allocation
from chainrun.errors import ChainrunError, RankFailed
from chainrun.rundir import RunDir, read_json, write_durably
from chainrun.training.stop import Wish

MEET = 600.0  # seconds for all ranks to start
_ANSWER = 10.0  # seconds for a rank's side thread to answer; it may be waiting for SLURM or for the disk
_POLL = 0.005


def export(allocation: Allocation, address: str, port: int) -> None:
    """Set the environment that ``init_process_group()`` reads (method ``env://``)."""
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        RANK=str(allocation.rank),
        WORLD_SIZE=str(allocation.world_size),
        LOCAL_RANK=str(allocation.local_rank),
        LOCAL_WORLD_SIZE=str(allocation.local_world_size),
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def connect(allocation: Allocation, run: RunDir) -> Control | None:
    """Bring the ranks together; return None for a single one.

    Raises:
        ChainrunError: a rank did not come within `MEET` seconds.
    """
    if allocation.world_size == 1:
        export(allocation, "127.0.0.1", _free_port())
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        return None
    meeting = run.rendezvous(allocation.job, allocation.restart)
    server = None
    if allocation.rank == 0:
        server = TCPStore(
            "0.0.0.0" if allocation.local_world_size < allocation.world_size else "127.0.0.1",
            0,
            is_master=True,
            wait_for_workers=False,
        )
        write_durably(meeting, json.dumps({"host": allocation.host, "port": server.port}).encode())
    until = time.monotonic() + MEET
    while (found := read_json(meeting)) is None:
        if time.monotonic() > until:
            raise ChainrunError(
                f"rank {allocation.rank} found no {meeting} within {MEET:.0f} s: rank 0 did not start, or the "
                "run directory is not on a filesystem that all nodes share"
            )
        time.sleep(0.05)
    address = "127.0.0.1" if found["host"] == allocation.host else found["host"]
    export(allocation, address, found["port"])
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    control = Control(allocation, address, found["port"], server)
    control.gather("here")
    control.broadcast("all here")
    if allocation.rank == 0:
        meeting.unlink(missing_ok=True)
    return control


class Control:
    """The small talk between the ranks: values for the training thread, wishes for the side thread.

    Each thread has a connection of its own, since a store's client answers one caller at a time.
    """

    def __init__(self, allocation: Allocation, address: str, port: int, server: Any) -> None:
        self.rank, self.world_size = allocation.rank, allocation.world_size
        self._server = server  # kept alive: it serves as long as rank 0 lives
        self._main, self._side = (
            PrefixStore(
                "chainrun",
                TCPStore(
                    address,
                    port,
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=MEET),
                ),
            )
            for _ in range(2)
        )
        self._sequence = 0
        self._answered = -1
        self._all_returned = False

    # ---- training thread: see checkpoint.writer.Group

    def gather(self, value: Any) -> list[Any] | None:
        """Return every rank's value on rank 0, None on the others.

        Raises:
            ChainrunError: a rank has failed, or has returned from the function.
        """
        self._sequence += 1
        self._main.set(f"gather/{self._sequence}/{self.rank}", json.dumps(value))
        if self.rank:
            return None
        return [json.loads(self._get(f"gather/{self._sequence}/{r}", r)) for r in range(self.world_size)]

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        self._sequence += 1
        key = f"broadcast/{self._sequence}"
        if self.rank == 0:
            self._main.set(key, json.dumps(value))
            return value
        return json.loads(self._get(key, 0))

    def _get(self, key: str, sender: int) -> bytes:
        while not self._main.check([key]):
            for rank in range(self.world_size):
                if self._main.check([f"failed/{rank}"]):
                    raise RankFailed(f"rank {rank} has failed; its log says why")
            returned = not self._all_returned and self._main.check([f"returned/{sender}"])
            if returned and not self._main.check([key]):  # what it said before it returned still counts
                raise ChainrunError(
                    f"rank {sender} has returned from the function while rank {self.rank} still trains: the "
                    "ranks do not call run.step() equally often, so no common boundary is left"
                )
            time.sleep(_POLL)
        return self._main.get(key)

    def fail(self) -> None:
        """Tell the others not to wait for this rank."""
        self._main.set(f"failed/{self.rank}", "1")

    def gone(self) -> int | None:
        """Return a rank that has ended without a word, as one that was killed; None where there is none.

        A collective in which such a rank took part fails on the others, and looks there like an error of theirs.
        """
        try:
            call = self._main.add("calls", 1)
            others = {*range(self.world_size)} - {self.rank}
            silent = [rank for rank in sorted(others) if self._main.check([f"here/{rank}"])]
            until = time.monotonic() + _ANSWER
            while silent and time.monotonic() < until:
                time.sleep(_POLL)
                silent = [rank for rank in silent if not self._accounts_for_itself(rank, call)]
        except RuntimeError:  # rank 0 serves the store
            return 0
        return silent[0] if silent else None

    def _accounts_for_itself(self, rank: int, call: int) -> bool:
        said = (f"{how}/{rank}" for how in ("failed", "returned", "left"))
        return any(self._main.check([key]) for key in said) or int(self._main.get(f"here/{rank}")) >= call

    def returned(self) -> None:
        """Say that this rank's function has returned; come back when every rank's has."""
        self._main.set(f"returned/{self.rank}", "1")
        missing = set(range(self.world_size))
        while missing:
            for rank in range(self.world_size):
                if self._main.check([f"failed/{rank}"]):
                    raise RankFailed(f"rank {rank} has failed; its log says why")
            missing = {r for r in missing if not self._main.check([f"returned/{r}"])}
            time.sleep(_POLL)
        self._all_returned = True

    def leave(self) -> None:
        """Rank 0 serves the store: it goes last."""
        try:
            self._main.set(f"left/{self.rank}", "1")
        except RuntimeError:
            return  # it was killed, or gave up waiting: how this rank's segment ended is not changed by that
        until = time.monotonic() + 30
        everyone = [f"left/{rank}" for rank in range(self.world_size)]
        while self.rank == 0 and time.monotonic() < until and not self._main.check(everyone):
            time.sleep(_POLL)

    # ---- side thread: see training.stop.Agreement

    def answer(self) -> None:
        """Say that this rank is there: at the first look, and when another asks (`gone`)."""
        call = self._side.add("calls", 0)
        if call != self._answered:
            self._answered = call
            self._side.set(f"here/{self.rank}", str(call))

    def ask(self, round_: int, wish: Wish) -> None:
        """Tell rank 0 of a wish."""
        self._side.set(f"ask/{round_}/{wish.kind}", json.dumps(asdict(wish)))

    def announced(self, round_: int) -> Wish | None:
        """Return the wish that rank 0 has announced for this round."""
        key = f"round/{round_}"
        if self.rank == 0 and not self._side.check([key]):
            for kind in ("stop", "save"):
                if self._side.check([f"ask/{round_}/{kind}"]):
                    self._side.set(key, self._side.get(f"ask/{round_}/{kind}").decode())
                    break
        return Wish(**json.loads(self._side.get(key))) if self._side.check([key]) else None

    def post(self, round_: int, boundary: int) -> None:
        """Say how many boundaries this rank has passed."""
        self._side.set(f"posted/{round_}/{self.rank}", str(boundary))

    def posted(self, round_: int) -> int | None:
        """Return the most boundaries that any rank has passed, None until all have said it."""
        keys = [f"posted/{round_}/{rank}" for rank in range(self.world_size)]
        if not self._side.check(keys):
            return None
        return max(int(self._side.get(key)) for key in keys)
