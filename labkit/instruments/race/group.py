"""All processes of one contestant: found by a mark in their environment, whatever their parents."""

import contextlib
import os

import psutil

MARK = "LABKIT_RACE"


def members(mark: str) -> list[psutil.Process]:
    """Those that run and have the mark: a contestant, and what it started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def own_members() -> list[psutil.Process]:
    """Those of the contestant that this process is."""
    return members(os.environ[MARK]) if MARK in os.environ else [psutil.Process()]


def cpu_of(processes: list[psutil.Process]) -> float:
    """Processor seconds, user and system, that they have taken so far."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def memory_of(processes: list[psutil.Process]) -> int:
    """Bytes: the sum of PSS, which counts a page that k of them share as 1/k in each; of USS where
    the system has no PSS."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            full = process.memory_full_info()
            total += getattr(full, "pss", full.uss)
    return total


def end(mark: str, seconds: float) -> int:
    """Waits `seconds` for all that have the mark, then ends them, kindly and then not; returns how
    many did not end by themselves."""
    _, left = psutil.wait_procs(members(mark), seconds)
    stubborn = len(left)
    for way in (psutil.Process.terminate, psutil.Process.kill):
        for process in left:
            with contextlib.suppress(psutil.Error):
                way(process)
        _, left = psutil.wait_procs(left, 3.0)
        left = members(mark)  # what the others started meanwhile
    return stubborn
