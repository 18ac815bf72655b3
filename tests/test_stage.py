"""labkit.stage: what parts of a generator take, timed where a batch is made and nowhere else."""

import threading
import time

import numpy as np
import pytest

import labkit
from labkit import stage
from labkit.engine import KINDS, TRIED
from labkit.engine.messages import Chunk
from labkit.engine.pool import Job
from labkit.engine.produce import IteratorFactory, produce
from labkit.engine.stage import listen, take
from labkit.instruments.measure import alone
from labkit.instruments.stages import Stage, in_words, stages_of


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only by `clock(seconds)`."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def heard(work, listens=True):
    """What `work` leaves behind in a thread that listens."""
    found = []

    def run():
        if listens:
            listen()
        work()
        found.append(take())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_parts_of_one_name_are_added_up_and_an_inner_second_counts_once(clock):
    decode = stage("decode")  # may be kept, and entered again

    def work():
        for _ in range(2):
            with decode:
                clock(1)
                with stage("resize"):
                    clock(3)
                    with decode:
                        clock(0.5)
                clock(1)

    assert heard(work) == {"decode": (5.0, 4), "resize": (6.0, 2)}


def test_an_exception_passes_through_and_its_stage_counts(clock):
    def work():
        with pytest.raises(OSError, match="no disk"), stage("outer"), stage("read"):
            clock(2)
            raise OSError("no disk")

    assert heard(work) == {"outer": (0.0, 1), "read": (2.0, 1)}


def test_above_a_function_it_times_each_of_its_calls(clock):
    @stage("decode")
    def decode(depth):
        """Decodes."""
        clock(1)
        return depth and decode(depth - 1)

    def work():
        assert decode(0) == 0 and decode(depth=2) == 0

    assert heard(work) == {"decode": (4.0, 4)}
    assert (decode.__name__, decode.__doc__) == ("decode", "Decodes.")


def test_above_what_its_call_does_not_run_it_is_refused():
    def batches():
        yield

    async def later():
        pass

    for wrong in (batches, later, 3):
        with pytest.raises(TypeError, match=r"^labkit\.stage: @stage\('x'\) must stand above") as e:
            stage("x")(wrong)
        assert "with labkit.stage('x'): around" in str(e.value)


@pytest.mark.parametrize(("begins", "kept"), [(lambda: None, None), (listen, {})])
def test_nothing_is_kept_where_nobody_listened_when_it_began(begins, kept):
    def work():
        with stage("decode"):
            begins()

    assert heard(work, listens=False) == kept


def test_it_is_imported_at_most_once_however_often_it_is_named():
    assert labkit.stage is stage is vars(labkit)["stage"]


def produced(batches, listens=True):
    """The stages of each batch, as `produce` gives them."""
    found = []

    def walk():
        made = produce(IteratorFactory(batches, 1), 0, 0, None, copies=True)
        found.extend(one.stages for one in made)

    heard(walk, listens)
    return found


def test_each_batch_has_its_own_and_one_that_a_yield_interrupts_is_not_timed(clock):
    def batches():
        with stage("around"):
            for _ in range(2):
                with stage("read"):
                    clock(1)
                yield np.zeros((2, 1))
                clock(100)
        yield np.zeros((2, 1))

    assert produced(batches) == [{"read": (1.0, 1)}, {"read": (1.0, 1)}, {}]
    assert produced(batches, listens=False) == [None] * 3


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [(3, TypeError, "got 3"), (None, TypeError, "got None"), ("", ValueError, "not be empty")],
)
def test_a_name_that_is_none_is_refused_though_nobody_listens(wrong, error, words):
    with pytest.raises(error, match=rf"^labkit.stage: name must .*{words}"):
        stage(wrong)


# Text goes another way from a process than numbers, and a batch longer than the first in parts.
@pytest.mark.parametrize("workers", TRIED)
@pytest.mark.parametrize("form", ["numbers", "text", "longer"])
def test_a_worker_of_each_kind_sends_them_with_its_batches(workers, form):
    def batches():
        for turn in range(3):
            with stage("odd" if turn % 2 else "even"):
                rows = 2 * (1 + turn * (form == "longer"))
                batch = np.full(rows, "a" if form == "text" else 1)
            yield batch

    got = [chunk.stages for chunk in chunks(workers, batches)]
    names = [list(times) for times in got if times is not None]
    assert names == [["even"], ["odd"], ["even"]]
    assert all(seconds > 0 and n == 1 for times in got for seconds, n in (times or {}).values())


def chunks(workers, batches):
    """All that one worker of a kind delivers in a pass."""
    pool = KINDS[workers].pool(Job(IteratorFactory(batches, 1), timeout=60, stages=True))
    found = []
    try:
        pool.set_active(1)
        while not found or isinstance(found[-1], Chunk):
            message = pool.get(1.0)
            if message is not None:
                found.append(message)
                if isinstance(message, Chunk):
                    pool.release(message)
    finally:
        pool.stop()
    return found[:-1]


def test_the_slowest_stage_comes_first_with_share_spread_and_count():
    batches = [{"read": (1.0, 1), "decode": (4.0, 8)}, {"decode": (8.0, 8)}]
    decode, read = stages_of(batches, 20.0)
    assert decode == Stage("decode", 6.0, 0.6, 2.0, 8)
    assert read == Stage("read", 0.5, 0.05, 0.5, 0.5)
    words = in_words([decode, read])
    assert "faster first: decode 60% (6000 ms, sd 2000, 8 times)" in words
    assert "read 5%" in words and "outside of stages 35%" in words
    assert stages_of([], 0.0) == stages_of([{}], 1.0) == [] and in_words([]) == ""


def test_a_run_alone_finds_the_stages_of_its_batches():
    def batches():
        while True:
            with stage("wait"):
                time.sleep(0.002)
            with stage("make"):
                batch = np.zeros((4, 2))
            yield batch

    wait, make = alone(batches, "thread", 1, 0.05).stages
    assert (wait.name, make.name, wait.count) == ("wait", "make", 1)
    assert wait.seconds >= 0.002 and make.share < wait.share <= 1


def test_the_report_shows_the_stage_to_make_faster(monkeypatch):
    def batches():
        while True:
            with stage("decode"):
                time.sleep(0.001)
            yield np.zeros((4, 2), np.float32)

    monkeypatch.setattr("labkit.instruments.diagnosis._ROUNDS", 1)
    report = labkit.diagnose(batches, 0.0001, seconds=0.01, progress=False, workers="thread")
    assert [found.name for found in report.stages] == ["decode"]
    for said in (str(report), report._repr_html_()):
        assert "make faster first: decode" in said
