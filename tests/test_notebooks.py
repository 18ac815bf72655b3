"""Each notebook in one kernel: Run All, an interrupt in its longest cell, Run All once more.

`pytest --nbmake notebooks` proves what the notebooks claim, at their own sizes. Here the numbers of
their first cell are made small, so a claim (an AssertionError) may fail; nothing else may.
"""

import ast
import faulthandler
import os
import threading
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

_HANGS_AFTER = 400.0
# What TensorFlow keeps of a Run All is less, 3 to 30 MB, on busy cores up to 90; a data set that is
# kept as floats is more. It counts what malloc has given out: the size of the process moves by
# another 130 MB with what malloc holds back.
_MOST_KEPT = 150e6
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SMALL = {
    "01_feed_dict_baseline": """DELAY, EPOCHS, STEPS, TIMELINE, PROBES = 0.005, 2, 15, 10, 5
DELAYS = (0, 0.005)""",
    "02_threaded_queue": """DELAY, MOST_THREADS, ROUNDS, CYCLES, WATCH = 0.01, 4, 1, 3, 0.4
COMPUTE_STEPS, CAPACITY, MIN_AFTER, MIN_AFTERS = 20, 512, 256, (32, 64, 128, 256)""",
    "03_weight_sharing": """STEPS, EVERY, NEIGHBOURS = 20, 10, 4
EPOCH_BATCHES, CHECKS, FEW = 8, 2, 64
import labkit.data
x_train, y_train, x_test, y_test = load_mnist()
fewer = Mnist(x_train, y_train, x_test[:1000], y_test[:1000])
labkit.data.load_mnist = load_mnist = lambda: fewer""",
    "04_timing_and_gpu_use": """EPOCHS, STEPS, PAUSE = 1, 20, 0.005
COMPUTE_STEPS, CASE_STEPS, ROUNDS = 20, 10, 1""",
    "05_threads_or_processes": """SETTLE, SECONDS, ROUNDS, COMPUTE_STEPS = 0, 0.1, 1, 20
CROWD, FEW = 1, 4
SETTINGS = (("thread", 1), ("thread", 2), ("process", 2))
del WORK["NumPy"]""",
    # More good batches than the queue holds, and time for a process to start on a busy machine:
    # the loop must have had a batch before the fault, or there is nothing to plot.
    "06_when_things_break": "GOOD, PACE, GUARD, TIMEOUT = 20, 0.02, 2.0, 1.0",
    "07_your_own_data": """FILES, SIDE, EPOCHS, LATENCY, DIAGNOSE = 192, 56, 1, 0.002, 0.2
RUNG, ROUNDS = 3, 1
import dataclasses
from labkit.engine import KINDS
KINDS["thread"] = dataclasses.replace(KINDS["thread"], limit=lambda: 2)""",
    "08_same_batches_again": "BATCHES, PACE, ROUNDS, SHOWN = 40, (0.0, 0.002), 1, 20",
    "09_beyond_one_machine": """BATCHES, PACE, KILL = 40, 0.05, 4
BYTES = {"100 KB": 100_000, "19 MB": 1_000_000}
COUNTED = dict.fromkeys(BYTES, 10)""",
    # A step of so many seconds needs no TensorFlow in the processes that are started.
    "10_the_race": """CONTESTANTS, MINE = ["serial loop"], ["serial loop"]
STEP, SECONDS = 0.001, 0.1""",
    "recipes": "SAMPLES, HELD_OUT, EPOCHS = 160, 32, 1",
}
STATE = """
import ctypes, gc, threading, psutil
class _Malloc(ctypes.Structure):
    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]
def _given_out():
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Malloc
    found = mallinfo2()
    return found.field4 + found.field7
gc.collect()
(
    [t.name for t in threading.enumerate() if t.name.startswith("labkit") or "(work)" in t.name],
    # One that subprocess.run has killed on an interrupt is left to be waited for.
    sum(child.status() != psutil.STATUS_ZOMBIE for child in psutil.Process().children()),
    _given_out(),
)
"""


class Kernel:
    """A Jupyter kernel, away from the working tree."""

    def __init__(self, folder):
        # The labkit beside these tests, also where another one is installed.
        environment = {**os.environ, "PYTHONPATH": str(NOTEBOOKS.parent)}
        self.manager, self.client = start_new_kernel(
            kernel_name="python3", cwd=str(folder), env=environment
        )

    def run(self, source, interrupt_after=None):
        """Runs a cell; returns its value as text, what it wrote to stderr, and its error's name."""
        got = {"value": None, "stderr": "", "error": None, "text": ""}

        def keep(message):
            content = message["content"]
            if message["msg_type"] == "stream" and content["name"] == "stderr":
                got["stderr"] += content["text"]
            elif message["msg_type"] == "execute_result":
                got["value"] = content["data"]["text/plain"]
            elif message["msg_type"] == "error":
                got["error"], got["text"] = content["ename"], "\n".join(content["traceback"])

        timer = threading.Timer(interrupt_after or 0, self.manager.interrupt_kernel)
        if interrupt_after is not None:
            timer.start()
        try:
            self.client.execute_interactive(source, output_hook=keep, timeout=100)
        finally:
            timer.cancel()
        return got

    def state(self):
        """labkit's threads, the number of child processes, bytes of malloc (None without glibc)."""
        return ast.literal_eval(self.run(STATE)["value"])

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(tmp_path, nothing_left_running):
    faulthandler.dump_traceback_later(_HANGS_AFTER, exit=True)  # Run All twice takes longer
    running = Kernel(tmp_path)
    yield running
    running.close()


def test_every_notebook_is_tested():
    assert sorted(SMALL) == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_that_is_opened_and_saved_stays_as_it_was(name):
    text = (NOTEBOOKS / f"{name}.ipynb").read_text()
    book = nbformat.reads(text, 4)
    assert nbformat.writes(book) == text.removesuffix("\n")
    # The times at which each cell ran: new ones with each run, and nothing that a reader needs.
    timed = [index for index, cell in enumerate(book.cells) if "execution" in cell.metadata]
    assert not timed, "make it again as CONTRIBUTING.md says"


@pytest.mark.slow  # nbmake runs them all once
@pytest.mark.parametrize("name", SMALL)
def test_run_all_again_and_after_an_interrupt(name, kernel, tmp_path):
    book = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    first, *rest = [c.source for c in code if "install" not in c.metadata.get("tags", ())]
    cells = [f"{first}\n{SMALL[name]}", *rest]

    def run_all():
        took = []
        for source in cells:
            began = time.monotonic()
            result = kernel.run(source)
            took.append(time.monotonic() - began)
            assert result["error"] in (None, "AssertionError"), result["text"]
            assert not result["stderr"]
        threads, children, memory = kernel.state()
        assert not threads and not children
        return took, memory

    took, before = run_all()
    if "plots" in first:  # what conftest.py has begun: see tests/figure_texts.py
        assert kernel.run("hasattr(plots.keep, '__wrapped__')")["value"] == "True"
    longest = max(range(1, len(cells)), key=took.__getitem__)
    result = kernel.run(cells[longest], interrupt_after=took[longest] / 2)
    # TensorFlow wraps an interrupt that comes together with an error of its own.
    assert result["error"] is None or "KeyboardInterrupt" in result["text"], result["text"]
    threads, children, _ = kernel.state()
    assert not threads and not children
    _, after = run_all()
    kept = 0 if after is None else after - before
    assert kept < _MOST_KEPT, f"{kept / 1e6:.0f} MB more than one Run All earlier"
    assert not list(tmp_path.iterdir())
