"""Take the lock of a run as often as told, from several processes at once.

python hold.py RUN                   take it, say so, and keep it until killed
python hold.py RUN CONTENDERS ROUNDS  in each round all processes meet a dead holder's lock at the same time;
                                     prints a line a round: how many took it, how many hold it
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from chainrun.lock import Lock, Locked
from chainrun.rundir import RunDir


def keep(run: RunDir) -> None:
    print(Lock(run, "keeper", 0).acquire(wait=0), flush=True)
    time.sleep(600)


def contend(run: RunDir, job: str, start: float, out: int, go: int) -> None:
    lock = Lock(run, job, 0)
    time.sleep(max(0.0, start - time.time() - 0.001))
    while time.time() < start:
        pass
    try:
        lock.acquire(wait=0)
        taken = True
    except Locked:
        taken = False
    os.write(out, b"\n")
    os.read(go, 1)  # comes back when every contender has made its move: nobody is dead until then
    os.write(out, json.dumps([taken, lock.held()]).encode() + b"\n")


def rounds(run: RunDir, contenders: int, count: int) -> None:
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    for number in range(count):
        holder = {
            "job": "dead",
            "restart": 0,
            "host": os.uname().nodename,
            "pid": dead,
            "born": "1",
            "time": 0.0,
        }
        run.lock.write_text(json.dumps(holder))
        readable, writable = os.pipe()
        go, all_moved = os.pipe()
        start = time.time() + 0.03
        pids = []
        for contender in range(contenders):
            pid = os.fork()
            if pid == 0:
                try:
                    os.close(all_moved)
                    contend(run, f"{number}.{contender}", start, writable, go)
                finally:
                    os._exit(0)
            pids.append(pid)
        os.close(writable)
        os.close(go)
        with open(readable) as answers:
            for _ in pids:
                answers.readline()
            os.close(all_moved)
            found = [json.loads(line) for line in answers]
        for pid in pids:
            os.waitpid(pid, 0)
        print(json.dumps([sum(taken for taken, _ in found), sum(held for _, held in found)]), flush=True)


if __name__ == "__main__":
    run = RunDir(Path(sys.argv[1]))
    if len(sys.argv) == 2:
        keep(run)
    else:
        rounds(run, int(sys.argv[2]), int(sys.argv[3]))
