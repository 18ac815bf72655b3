"""What every test shares: a check that nothing is left running, and a data set of a few digits."""

import contextlib
import faulthandler
import gc
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from labkit.data import Mnist
from tests.consumers import in_dataset, in_graph

_HANGS_AFTER = 120.0

# Who starts the tests in the background, as `nohup` does, may ignore Ctrl-C, and so would each
# program that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _labkit_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("labkit")}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of tests run several at a time (`-n 2`), those of a file stay together, in one process."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def _children(of: int | str = "self") -> set[int]:
    """Ids of a process's own and of theirs, those that ended unnoticed included. Where the system
    tells them: psutil looks at every process there is, before and after each of so many tests."""
    tasks = [*Path(f"/proc/{of}/task").glob("*/children")]
    if not tasks and of == "self":
        return {child.pid for child in psutil.Process().children(recursive=True)}
    found: set[int] = set()
    for task in tasks:
        with contextlib.suppress(OSError):  # a thread that has ended since
            for child in map(int, task.read_text().split()):
                found |= {child, *_children(child)}
    return found


_LONGEST = (
    "test_ray",
    "notebooks/",
    "test_faults",
    "test_lifetime",
    "test_notebooks",
    "test_train",
    "test_passes",
    "test_watch",
    "test_keras",
    "test_shares",
    "test_race",
    "test_diagnosis_models",
    "test_kinds",
    "test_diagnosis.",
    "test_order",
    "test_resume",
    "test_processes",
    "test_batches",
    "test_checkpoint",
    "test_imports",
    "test_queue_runner",
    "test_audit",
    "test_sources",
    "test_again",
    "test_twelve",
)


def pytest_collection_modifyitems(items):
    """What takes longest first, and at the end what is short: no process then waits for another.

    Diagnosis behind test_faults and test_lifetime: after all of it something, not found yet, keeps
    the iterator of an error in those, which they count as left behind. Alone, or after any part of
    its tests, none is kept.
    """
    place = {name: at for at, name in enumerate(_LONGEST)}

    def of_its_file(item):
        file = item.nodeid.split("::")[0]  # the tests of a file stay together
        return min((place[name] for name in place if name in file), default=99)

    items.sort(key=of_its_file)


def pytest_collection_finish():
    """TensorFlow's own million objects stay anyway: without them, looking for garbage is quick."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_left_running():
    """No test may leave one of labkit's threads, or a child process, behind."""
    threads, children = _labkit_threads(), _children()
    # A consumer that waits for ever sits in native code, where no Python timeout reaches it.
    faulthandler.dump_traceback_later(_HANGS_AFTER, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    assert not [thread.name for thread in _labkit_threads() - threads]
    assert not _children() - children


@pytest.fixture
def few_settings(monkeypatch):
    """Of diagnose, as few runs as there can be, for tests that look at no rates."""
    from labkit.engine import KINDS

    for name, kind in KINDS.items():
        monkeypatch.setitem(KINDS, name, replace(kind, limit=lambda: 2))
    monkeypatch.setattr("labkit.instruments.diagnosis._ROUNDS", 1)
    monkeypatch.setattr("labkit.instruments.laws._A_CORE", 1)


@pytest.fixture(params=[in_graph, in_dataset], ids=["graph", "eager"])
def consume(request):
    return request.param


@pytest.fixture
def numbered() -> Mnist:
    """500 training and 130 test images that tell which one they are, all of them different.

    The first two pixels of an image spell its index, in base 256; test images start at 10,000.
    """

    def images(first: int, count: int) -> np.ndarray:
        pixels = np.zeros((count, 28, 28), np.uint8)
        index = np.arange(first, first + count)
        pixels[:, 0, 0], pixels[:, 0, 1] = index // 256, index % 256
        return pixels

    labels = (np.arange(500) % 10).astype(np.uint8)
    return Mnist(images(0, 500), labels, images(10_000, 130), labels[:130])


@pytest.fixture
def index_of():
    """Reads the indices of `numbered` images back off a batch."""

    def read(images: np.ndarray) -> list[int]:
        pixels = np.rint(images[:, 0, :2, 0] * 255).astype(int)
        return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()

    return read


@pytest.fixture
def small_mnist(monkeypatch) -> Mnist:
    """600 training and 200 test digits, in place of all of them, wherever labkit loads MNIST."""
    import labkit.data

    full = labkit.data.load_mnist()
    small = Mnist(full.x_train[:600], full.y_train[:600], full.x_test[:200], full.y_test[:200])
    monkeypatch.setattr(labkit.data, "load_mnist", lambda: small)
    return small
