"""Shared by all tests: a real SLURM, and a command line that runs chainrun as a user would."""

from __future__ import annotations

import gc
import os
import signal
import threading
import warnings

from slurm_cluster import running, slurm_cluster  # noqa: F401 fixtures

# torch asks for the name of whoever connects to a store: where a name server loses questions, each costs 5 seconds
os.environ.setdefault("RES_OPTIONS", "timeout:1")

# what a script starts in the background ignores Ctrl-C, and so would all programs under test
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    and threading.current_thread() is threading.main_thread()
):
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Put the tests of SLURM first, which wait most of the time, then the other groups; last what waits for others."""
    groups = {item: item.get_closest_marker("xdist_group") for item in items}
    items.sort(key=lambda item: 2 if groups[item] is None else groups[item].args != ("slurm",))
    items.sort(key=lambda item: hasattr(getattr(item, "function", None), "body"))


def pytest_collection_finish(session):
    """Put what importing has made out of the garbage collector's sight: looks through all objects are then quick."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item, nextitem):
    """Likewise what the tests of a file have left."""
    if nextitem is not None and nextitem.path != item.path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files and processes that tests have left open
            gc.collect()
        gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """After `make exact`: what was compared."""
    file = os.environ.get("CHAINRUN_EXACT", "")
    if file and os.path.exists(file):
        from everywhere import summary

        for line in summary(file):
            terminalreporter.write_line(line)
