"""diagnose, its report and "auto": what they say is right, for generators of known nature.

How well the predictions fit is a benchmark (tests/benchmarks/sweep.py), not a test.
"""

import sys
import threading
import time
from dataclasses import replace

import cloudpickle
import numpy as np
import pytest

import labkit
from labkit import QueueRunner, WorkerError
from labkit.engine import KINDS
from labkit.engine.auto import Scaler
from labkit.instruments import laws, measure, plots
from labkit.instruments.diagnosis import Measured, report_of
from labkit.instruments.laws import Demands, bounds, nature
from labkit.instruments.measure import Alone, Model, Watch
from labkit.instruments.report import Row, best_of
from labkit.machine import _cgroup_cores, usable_cores
from labkit.workloads import busy_python, sleep
from tests.producers import heavy, light

QUICK = {"seconds": 3.0, "progress": False}
VERY_QUICK = {"seconds": 0.8, "progress": False}
# For tests that look at no rates: as few steps as there can be.
NO_TIME = {"seconds": 0.01, "progress": False, "workers": "thread"}
# By value: a worker process that imported this file would import TensorFlow with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


# -- the verdict ---------------------------------------------------------------------------------


def test_a_waiting_generator_gets_threads():
    # Which kind is the better one, where both wait, is noise on a busy machine; `best_of` has tests
    report = labkit.diagnose(heavy(sleep(0.02)), 0.005, workers="thread", **QUICK)
    assert report.nature == "waits" and report.verdict.startswith("Input-bound")
    assert report.best.n >= 2 and report.speed_up > 1.5
    assert 50 < report.model_rate <= 205
    assert "<- recommended" in str(report) and report.verdict in str(report)
    html = report._repr_html_()
    assert "<table>" in html and "image/png" in html
    with report.runner(min_after_dequeue=0) as runner:
        assert (runner.n_workers, runner.workers) == (report.best.n, "thread")
        assert runner.batch_size == 8
        assert next(iter(runner.dataset()))[0].shape == (8, 4)


def test_what_a_batch_computes_is_measured_on_a_busy_machine_too_and_can_be_checked(
    few_settings, capsys
):
    """By its processor time, which other programs do not change. What follows from that, and from
    the rates, is tested by numbers."""
    computes = labkit.diagnose(heavy(busy_python(0.02)), 0.002, **VERY_QUICK)
    assert 0.01 < computes.demands["thread"].cpu < 0.06
    assert {row.workers for row in computes.rows} == {"thread", "process"}
    thread, process = computes.demands["thread"], computes.demands["process"]
    assert (thread.moved, process.moved) == (2 * 8 * 20, 3 * 8 * 20)  # of 8 samples, 20 bytes each
    assert 0 < thread.bandwidth < np.inf
    # The batches on their way; and an interpreter with NumPy.
    assert 0 < thread.memory < 1e5 < 2e6 < process.memory < process.free
    assert computes.ready_rate > 0 and "Headroom" in str(computes) and "Memory: " in str(computes)
    # check measures the recommendation and two others, and prints them.
    rows = computes.check(0.3)
    assert rows[0] is computes.best and len(rows) == 3
    assert {row.workers for row in rows} == {"thread", "process"}
    assert all(row.measured and row.measured > 0 for row in rows)
    assert sum(row.measured is not None for row in computes.rows) == 3
    printed = capsys.readouterr().out
    assert computes.table() in printed and all(f"{row.measured:.1f}" in printed for row in rows)


@pytest.mark.parametrize(
    ("own", "busy", "sharing", "apart", "words"),
    [
        (0.02, 0.1, 1.9, 1.9, "waits"),
        (0.02, 0.1, None, 1.9, "waits"),
        (0.02, 1.0, 0.9, 1.9, "holds Python's lock"),
        (0.02, 1.0, 0.9, None, "holds Python's lock"),
        (0.02, 1.0, 1.8, 1.9, "computes without holding Python's lock"),
        (0.02, 1.0, None, 1.9, "computes"),
        (0.02, 1.9, 1.0, 1.0, "uses all cores"),
        (0.02, 0.1, 1.0, 1.9, "makes threads take turns"),
        (0.02, 0.1, 1.0, None, "makes threads take turns"),
        (0.02, 0.1, 1.0, 1.0, "makes workers take turns"),
        (0.02, 1.0, 1.0, 1.1, "makes workers take turns"),
        (2e-5, 1.5, 1.1, 1.1, "costs next to nothing"),
    ],
)
def test_what_was_measured_alone_tells_the_generators_nature(own, busy, sharing, apart, words):
    assert nature(own, busy, sharing, apart, cores=2) == words


def test_where_the_model_is_the_bottleneck_it_says_that_nothing_is_to_be_had(few_settings):
    report = labkit.diagnose(light, 0.02, **VERY_QUICK)
    assert report.verdict.startswith("Model-bound") and "none" in report.verdict
    assert report.leave and "leave your loop" in str(report)
    assert report.nature == "costs next to nothing"
    assert report.speed_up < 1.2 and report.best.n == 1 and report.best.workers == "thread"


def test_an_unpicklable_factory_still_gets_a_report_for_threads():
    lock = threading.Lock()

    def locked():
        for batch in light():
            with lock:
                time.sleep(0.005)
            yield batch

    report = labkit.diagnose(locked, 0.001, **VERY_QUICK)
    assert {row.workers for row in report.rows} == {"thread"}
    assert "Processes could not be tried" in report.verdict and "lock" in report.verdict


def test_a_small_finite_generator_is_started_again_and_again(few_settings):
    def three():
        for _ in range(3):
            time.sleep(0.002)
            yield np.zeros((8, 4), np.float32), np.zeros((8, 1), np.float32)

    report = labkit.diagnose(three, 0.001, **VERY_QUICK)
    assert all(row.predicted > 0 for row in report.rows)


def test_an_iterator_that_can_be_walked_only_once_is_an_error():
    once = iter([(np.zeros((8, 4)),)] * 3)
    with pytest.raises(WorkerError, match="diagnose: the iterator ended before its first batch"):
        labkit.diagnose(lambda: once, 0.001, **NO_TIME)


@pytest.mark.filterwarnings("error")
def test_a_third_kind_of_worker_is_diagnosed_and_no_short_run_warns(monkeypatch, few_settings):
    monkeypatch.setitem(KINDS, "other", replace(KINDS["thread"], plural="others"))
    report = labkit.diagnose(light, 0.0001, seconds=0.01, progress=False, workers="other")
    assert {row.workers for row in report.rows} == {"other"} and "<table>" in report._repr_html_()


# -- its arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["process", ("thread",)])
def test_only_the_kinds_that_are_given_are_considered(given, few_settings):
    report = labkit.diagnose(light, 0.001, seconds=0.01, progress=False, workers=given)
    (only,) = [given] if isinstance(given, str) else given
    assert {row.workers for row in report.rows} == set(report.demands) == {only}
    assert {row.workers for row in report.check(0.01)} == {only}
    assert "workers" in str(report) and "<table>" in report._repr_html_()


def test_where_only_processes_are_considered_what_cannot_be_sent_is_an_error(few_settings):
    lock = threading.Lock()

    def locked():
        with lock:
            yield from light()

    with pytest.raises(TypeError, match="lock"):
        labkit.diagnose(locked, 0.001, seconds=0.01, progress=False, workers="process")


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("workers", 4),
        ("workers", "fibre"),
        ("workers", ()),
        ("workers", ("thread", 2)),
        ("seconds", -1),
        ("seconds", 0),
        ("seconds", float("nan")),
        ("seconds", "long"),
        ("batch_size", 0),
        ("batch_size", 1.5),
        ("restore", "weights"),
    ],
)
def test_a_wrong_argument_of_diagnose_is_named(argument, wrong):
    with pytest.raises(ValueError, match=rf"^diagnose: {argument} must be ") as error:
        labkit.diagnose(light, 0.01, **{"progress": False, argument: wrong})
    assert f"got {wrong!r}." in str(error.value)


def test_an_argument_that_it_does_not_have_is_named():
    with pytest.raises(TypeError, match=r"diagnose\(\) got an unexpected keyword.*probes"):
        labkit.diagnose(light, 0.01, probes=len)


# -- the law -------------------------------------------------------------------------------------


def test_bounds_are_the_operational_laws():
    need = Demands(wall=0.05, cpu=0.02, lock=0.025, step=0.01, step_cpu=0.005, cores=2)
    assert bounds(1, need)["the generator"] == pytest.approx(20)
    assert bounds(1, need)["Python's lock"] == np.inf
    four = bounds(4, need)
    assert four["the generator"] == pytest.approx(80)
    assert four["Python's lock"] == pytest.approx(40)
    assert four["the cores"] == pytest.approx(80)
    assert four["the model"] == pytest.approx(100)


def test_no_more_batches_come_than_their_bytes_can_be_moved():
    need = Demands(0.01, 0.001, 0, 0.001, 0.001, 64, moved=3e6, bandwidth=3e8)
    assert bounds(1, need)["moving the bytes"] == bounds(64, need)["moving the bytes"] == 100
    assert laws.limit(1, need, 95) != "moving the bytes" == laws.limit(4, need, 95)
    # What has passed it has shown that the machine moves more.
    (faster,) = laws.corrected({"thread": need}, {("thread", 4): 130}).values()
    assert bounds(4, faster)["moving the bytes"] == pytest.approx(130)


def test_a_cluster_has_its_own_cores_and_what_it_reaches_says_nothing_of_this_machine():
    here = Demands(0.5, 0.5, 0, 0.01, 0.01, 2, handed=2e-4)
    there = replace(here, cores=64, handed=4.5e-3)
    numbers = laws.counts(64, there)
    assert numbers[-1] == 64 == laws.to_try(numbers, there)[-1]
    by_law = {n: rate for n, rate, _, _ in laws.predict(numbers, there, {1: [1.9]}, 0.1, 0.1)}
    assert by_law[64] > 50 and laws.limit(64, there, 90) == "the model"
    # The same generator on this machine's two cores is bound by them, whatever the cluster does.
    needs = {"process": here, "ray": there}
    found = laws.corrected(needs, {("ray", 64): 95.0, ("process", 2): 3.8})
    assert found["process"].cpu == pytest.approx(0.5) and found["process"].step == 0.01
    assert bounds(2, found["process"])["the cores"] < 4 < 90 < bounds(64, found["ray"])["the cores"]
    # What was reached here, on no more cores, holds there as well.
    faster = laws.corrected(needs, {("process", 2): 8.0})
    assert faster["process"].cpu < 0.3 and faster["ray"].cpu == 0.5
    words = laws.handing({"process": here, "actor": there})
    assert "0.2 ms by one process, 4.5 ms by one actor" in words


def test_the_servers_of_a_ray_that_has_just_started_are_no_workers():
    class Process:
        def __init__(self, *line):
            self.cmdline = lambda: line

    for own in (
        ("/lib/site-packages/ray/core/src/ray/raylet/raylet", "--node=1"),
        ("python", "-u", "/lib/site-packages/ray/_private/log_monitor.py"),
        ("ray::IDLE",),
    ):
        assert not measure._is_worker(Process(*own))
    assert measure._is_worker(Process("ray::Producer.next"))
    assert measure._is_worker(Process("python", "-m", "labkit.engine.child"))


def test_more_workers_than_there_is_memory_for_are_not_tried_and_are_bound_by_it():
    need = Demands(0.05, 0.001, 0, 0.001, 0.001, 8, memory=1.5e9, free=7e9)
    assert laws.to_try([1, 2, 4, 8], need)[-1] == 4
    assert laws.limit(4, need, 80) == "the generator" and laws.limit(8, need, 80) == "memory"
    assert laws.to_try([1, 2, 4, 8], replace(need, free=1e9)) == [1, 2]  # those have run alone
    words = laws.memory(
        {"thread": replace(need, memory=2e6), "process": need}, {"thread": 8, "process": 8}
    )
    assert "a thread takes 2 MB, 8 take 16 MB; a process takes 1.5 GB, 8 take 12.0 GB" in words
    assert "7.0 GB are free" in words and laws.memory({"thread": replace(need, memory=0)}, {}) == ""


@pytest.mark.parametrize(
    ("wall", "cpu", "gain", "shares_lock", "expected"),
    [
        (0.02, 0.02, 0.9, True, (0.02, "Python's lock")),
        (0.02, 0.02, 1.28, True, (0.015, "Python's lock")),  # 0.75 of the time: sqrt(2 / g - 1)
        (0.02, 0.001, 1.0, True, (0.02, "taking turns")),  # no processor time: not Python's
        (0.02, 0.001, 1.0, False, (0.02, "taking turns")),
        (0.02, 0.02, 1.0, False, (0.0, "taking turns")),  # two that compute: that is the cores
        (0.02, 0.02, 1.9, True, (0.0, "Python's lock")),
    ],
)
def test_the_lock_is_inferred_from_two_workers_alone(wall, cpu, gain, shares_lock, expected):
    seconds, name = laws.turn(wall, cpu, gain, shares_lock)
    assert (pytest.approx(seconds, rel=0.01), name) == expected


def test_ninety_percent_of_measurements_are_within_the_noise():
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(400):
        runs = np.exp(rng.normal(scale=0.1, size=(6, 2)))
        half = laws.noise(runs.tolist()) * np.sqrt(1 + 1 / 2)
        found, later = runs[0].mean(), np.exp(rng.normal(scale=0.1))
        inside.append(abs(np.log(later / found)) < half)
    assert 0.86 < np.mean(inside) < 0.94


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([("thread", 4, 100), ("thread", 8, 104), ("process", 4, 103)], ("thread", 4)),
        ([("thread", 4, 80), ("thread", 8, 104)], ("thread", 8)),
        ([("thread", 8, 104), ("process", 4, 103)], ("process", 4)),
        ([("thread", 4, 144), ("process", 4, 158), ("process", 8, 157)], ("process", 4)),
    ],
)
def test_the_smaller_number_wins_where_ranges_overlap(rows, best):
    made = [Row(kind, n, rate, 0.95 * rate, 1.05 * rate, "") for kind, n, rate in rows]
    assert (best_of(made).workers, best_of(made).n) == best


def test_a_range_that_holds_everything_does_not_make_the_slowest_the_best():
    rows = [Row("thread", n, rate, 1, 1000, "") for n, rate in ((1, 30), (2, 60), (4, 70))]
    assert best_of(rows).n == 2


@pytest.mark.parametrize(("settle", "steps"), [(60.0, 20 + 10), (0.0, 1 + 10)])
def test_what_workers_had_stored_is_not_counted_as_their_speed(settle, steps, monkeypatch):
    """Unless the model is so slow that it never uses it up: then there is no end to wait for."""
    monkeypatch.setattr("labkit.instruments.measure._SETTLE", settle)
    watch = Watch(1e-9, stored=20, least=10)
    assert [watch.enough() for _ in range(steps)] == [False] * (steps - 1) + [True]
    assert watch.steps == 10


def test_fewer_batches_than_workers_are_not_waited_for(monkeypatch):
    """In a second pass all have had their turn."""
    monkeypatch.setattr("labkit.instruments.measure._PATIENCE", 600.0)

    def one(worker, n_workers):
        if worker == 0:
            yield (np.zeros((8, 1), np.float32),)

    assert measure.alone(one, "thread", 2, 0.05).rate > 0
    assert measure.together(one, Model.of(0.001, None), "thread", 2, 8, 0.05) > 0


def test_four_that_gain_a_third_over_two_do_not_take_turns(monkeypatch):
    """The lock is withdrawn, though a slow machine has not passed its bound."""
    both = {**threads(16, 24, 35), **threads(26, 50, kind="process")}
    report = made_up(monkeypatch, **{**NOTEBOOK_7, "together": both})
    assert report.demands["thread"].lock == 0 and report.nature == "waits"


# -- measurements that are made up: numbers in, report out -----------------------------------------


def made_up(
    monkeypatch, alone, cpu, step, together, own=None, problems=None, again=None, memory=0, moved=0
):
    """A report of batches of one sample, on two cores. `alone`: batches/s by setting; `cpu` and
    `own`: seconds of a batch; `step`: seconds, `again` at the end; `together`: steps/s. `memory`:
    bytes of a process, where 1 GB is free; `moved`: bytes of a batch, of 1 GB/s."""
    monkeypatch.setattr("labkit.instruments.diagnosis.usable_cores", lambda: 2)
    monkeypatch.setitem(KINDS, "process", replace(KINDS["process"], limit=lambda: 2))
    own = 1 / alone["thread", 1] if own is None else own
    single = {
        (kind, n): Alone(rate, cpu, own, memory=memory * (kind == "process"))
        for (kind, n), rate in alone.items()
    }
    steps = [(step, 0.001), (again or step * 1.01, 0.001)]
    both = {key: list(rates) for key, rates in together.items()}
    bytes_of = dict.fromkeys(KINDS, moved)
    measured = Measured(single, problems or {}, both, steps, bytes_of, 1e9, 1e9)
    return report_of(measured, 1, 1.0, light, Model.of(step, None), None)


def threads(*rates, kind="thread"):
    return {(kind, 2**k): (rate, 0.99 * rate) for k, rate in enumerate(rates)}


# Two threads alone were slow for a moment, which looked like a lock.
NOTEBOOK_7 = {
    "alone": {("thread", 1): 26, ("thread", 2): 36, ("process", 1): 26, ("process", 2): 50},
    "cpu": 0.008,
    "step": 0.0025,
    "together": {**threads(26, 50, 99, 128, 125), **threads(26, 50, 98, kind="process")},
}


def test_a_bound_that_a_measurement_has_passed_is_withdrawn(monkeypatch):
    few = {**threads(26, 30), **threads(26, 50, kind="process")}
    need = made_up(monkeypatch, **{**NOTEBOOK_7, "together": few}).demands["thread"]
    assert need.lock > 0.02 and need.lock_name == "taking turns"
    report = made_up(monkeypatch, **NOTEBOOK_7)
    need = report.demands["thread"]
    assert need.lock == 0 and report.nature == "waits"
    assert {row.bound_by for row in report.rows} <= {*bounds(2, need), "each other"}
    for row in report.rows:
        assert row.predicted <= min(bounds(row.n, report.demands[row.workers]).values()) * 1.001


def named_limits(report):
    """What the report names as a limit though another bound is smaller."""
    for row in report.rows:
        found = bounds(row.n, report.demands[row.workers])
        if row.bound_by in found and found[row.bound_by] > min(found.values()):
            yield row


def test_no_bound_is_named_that_is_not_the_smallest_and_check_withdraws_more(monkeypatch):
    report = made_up(monkeypatch, **NOTEBOOK_7)
    assert not list(named_limits(report))
    row = next(row for row in report.rows if (row.workers, row.n) == ("thread", 8))
    row.measured = 500.0  # more than the model alone made, and than the cores allowed
    report.take_in([row], now=report.model_rate)
    assert not list(named_limits(report))
    assert min(bounds(8, report.demands["thread"]).values()) == pytest.approx(500)
    assert report.model_rate == 500 and "could take 500" in report.verdict


@pytest.mark.parametrize(("now", "why"), [(400, "not the reason"), (300, "become slower")])
def test_what_is_outside_its_range_is_told_and_why_that_can_be(now, why, monkeypatch):
    report = made_up(monkeypatch, **NOTEBOOK_7)
    report.best.measured = report.best.predicted
    report.take_in([report.best], now)
    assert "outside" not in str(report).lower()
    report.best.measured = 0.5 * report.best.predicted
    report.take_in([report.best], now)
    for said in (str(report), report._repr_html_()):
        assert "outside its range" in said and f"Outside its range: {report.best.name}" in said
        assert why in said


def test_processes_beyond_the_cores_are_considered_where_the_generator_waits(monkeypatch):
    alone = {("thread", 1): 43, ("thread", 2): 84, ("process", 1): 43, ("process", 2): 85}
    both = {**threads(42, 82, 144, 140, 138, 130), **threads(42, 84, 165, kind="process")}
    report = made_up(monkeypatch, alone, 0.003, 0.005, both)
    assert {row.n for row in report.rows if row.workers == "process"} == {1, 2, 4}
    assert report.best.name == "4 processes" and "4 processes" in report.verdict
    # One that computes has no use for more than there are cores.
    alone = {("thread", 1): 50, ("thread", 2): 48, ("process", 1): 50, ("process", 2): 98}
    both = {**threads(48, 47, 46), **threads(49, 95, kind="process")}
    report = made_up(monkeypatch, alone, 0.02, 0.005, both)
    assert report.nature == "holds Python's lock" and report.best.name == "2 processes"
    assert {row.n for row in report.rows if row.workers == "process"} == {1, 2}


WAITS = {
    "alone": {("thread", 1): 43, ("thread", 2): 84, ("process", 1): 43, ("process", 2): 85},
    "cpu": 0.003,
    "step": 0.005,
    "together": {**threads(42, 70, 60, 55, 50, 45), **threads(42, 84, kind="process")},
}


def test_a_setting_that_does_not_fit_in_memory_is_neither_recommended_nor_run(monkeypatch):
    assert made_up(monkeypatch, **WAITS, memory=200e6).best.name == "4 processes"
    report = made_up(monkeypatch, **WAITS, memory=300e6)  # of 1 GB that is free
    bound_by = {row.n: row.bound_by for row in report.rows if row.workers == "process"}
    assert bound_by[4] == "memory" != bound_by[2]
    assert report.best.name == "2 processes"
    assert "a process takes 300 MB, 4 take 1.2 GB; 1.0 GB are free" in str(report)
    run = []
    monkeypatch.setattr(type(report), "_measure", lambda self, row, _: run.append(row.name) or 1.0)
    monkeypatch.setattr(report.model, "run", lambda *_: (0.005, 0.001))
    report.check()
    assert "4 processes" not in run and "memory" in {row.bound_by for row in report.rows}
    assert best_of([replace(row, bound_by="memory") for row in report.rows]).n == 1


def test_the_bytes_of_a_batch_limit_what_workers_can_bring(monkeypatch):
    report = made_up(monkeypatch, **WAITS, moved=12e6)  # 83 batches/s at 1 GB/s
    (two,) = [row for row in report.rows if row.name == "2 processes"]
    assert two.bound_by == "moving the bytes" and "   moving the bytes  " in report.table()
    assert "moving the bytes will be the limit, at 42%" in report.verdict


def test_the_headroom_is_what_batches_that_are_ready_would_gain(monkeypatch):
    report = made_up(monkeypatch, **WAITS)
    assert "Headroom" not in str(report)  # not measured
    report.ready_rate = 1.5 * report.best.predicted
    assert report.headroom == pytest.approx(1.5)
    assert "Headroom 1.50x: with its batches cached" in str(report)
    assert f"{report.best.name} would make {report.ready_rate:.1f} steps/s" in str(report)
    left = made_up(monkeypatch, **FREE)  # its own loop, without a queue
    assert left.leave and left.headroom == left.model_rate / left.serial_rate
    assert "your loop would make" in str(left)


def test_over_repeated_diagnoses_ranges_hold_ninety_percent_and_the_advice_stays(monkeypatch):
    """Twenty milliseconds of waiting and three of Python; every measurement scatters by 5 %."""
    rng = np.random.default_rng(0)
    alone = {("thread", 1): 43, ("thread", 2): 84, ("process", 1): 43, ("process", 2): 85}
    true = {**threads(42, 80, 144, 158, 158), **threads(43, 82, 163, 166, kind="process")}
    inside, advised = [], []
    for _ in range(60):
        noisy = {key: rates[0] * np.exp(rng.normal(0, 0.05, 2)) for key, rates in true.items()}
        step, again = 0.0051 * np.exp(rng.normal(0, 0.05, 2))
        report = made_up(monkeypatch, alone, 0.003, step, noisy, again=again)
        advised.append(report.best.n)
        for row in (row for row in report.rows if (row.workers, row.n) in true):
            row.measured = true[row.workers, row.n][0] * np.exp(rng.normal(0, 0.05))
            inside.append(not row.outside)
    assert 0.87 < np.mean(inside) < 0.97
    assert np.mean(np.array(advised) == 4) > 0.95


@pytest.mark.parametrize(
    ("processes", "words"), [(98, "makes threads take turns"), (50, "makes workers take turns")]
)
def test_a_lock_of_the_users_own_is_not_called_pythons(processes, words, monkeypatch):
    alone = {("thread", 1): 50, ("thread", 2): 50, ("process", 1): 50, ("process", 2): processes}
    both = {**threads(49, 50, 50), **threads(49, 0.98 * processes, kind="process")}
    report = made_up(monkeypatch, alone, 0.001, 0.002, both)
    assert report.nature == words and "Python's lock" not in str(report)
    assert ("Threads take turns" in report.verdict) == (processes > 50)
    assert ("processes do not" in report.verdict) == (processes > 50)
    bound_by = {row.n: row.bound_by for row in report.rows if row.workers == "thread"}
    assert bound_by[2] == "taking turns" and "Python's lock" not in bound_by.values()


FREE = {
    "alone": {("thread", 1): 9e3, ("thread", 2): 9e3, ("process", 1): 1e4, ("process", 2): 1e4},
    "cpu": 1e-4,
    "step": 1 / 1324,
    "together": {**threads(820, 780, 760, 750), **threads(800, 790, kind="process")},
    "own": 2e-5,
}


def test_where_the_handing_over_loses_more_than_workers_bring_the_advice_is_to_leave(monkeypatch):
    report = made_up(monkeypatch, **FREE)
    assert report.verdict.startswith("Model-bound")
    assert report.leave and "none" in report.verdict and "Leave your loop" in report.verdict
    assert "1 thread would make about 815.9 steps/s" in report.verdict  # the mean of two runs
    assert "handing the batches over costs 36%" in report.verdict
    assert {row.bound_by for row in report.rows} == {"handing over"}
    (recommended,) = [line for line in str(report).splitlines() if "recommended" in line]
    assert recommended.startswith("your loop") and "leave your loop" in recommended
    assert report.plot().get_suptitle().startswith("Leave your loop")


def test_where_workers_bring_nothing_though_the_model_waits_it_says_so(monkeypatch):
    alone = {("thread", 1): 50, ("thread", 2): 50, ("process", 1): 50, ("process", 2): 50}
    both = {**threads(45, 44), **threads(45, 44, kind="process")}
    report = made_up(monkeypatch, alone, 0.038, 0.002, both)
    assert report.nature == "uses all cores" and report.leave
    assert report.verdict.startswith("Input-bound, but not by a lack of workers")
    assert "make the generator cheaper" in report.verdict and "none" in report.verdict


def test_the_report_says_that_onednn_is_off(monkeypatch):
    report = made_up(monkeypatch, **FREE)
    monkeypatch.setattr("labkit.instruments.report.onednn_note", lambda: "oneDNN is off here: x")
    assert "oneDNN is off here: x" in str(report) and "oneDNN is off here" in report._repr_html_()
    monkeypatch.setattr("labkit.instruments.report.onednn_note", lambda: None)
    assert "oneDNN" not in str(report)


@pytest.mark.parametrize(("step", "scale"), [(0.0005, "log"), (0.009, "linear")])
def test_the_plot_tells_kinds_apart_and_is_logarithmic_where_the_model_is_far_off(
    step, scale, monkeypatch
):
    both = {**threads(26, 50, 99), **threads(26, 50, kind="process")}
    report = made_up(monkeypatch, **{**NOTEBOOK_7, "step": step, "together": both})
    for row in report.rows:
        row.measured = row.predicted
    (axes,) = plots.diagnosis(report).axes
    assert axes.get_yscale() == scale
    measured = {line.get_label(): line.get_marker() for line in axes.lines}
    assert measured["thread, measured"] != measured["process, measured"]
    assert measured["thread, measured"] not in ("", "None")


# -- auto ----------------------------------------------------------------------------------------


def run_search(model_rate, per_worker, start=1, most=10**9, windows=20):
    """The number of workers after `windows` windows, for workers and a model of given samples/s."""
    scaler = Scaler(32)
    scaler.count = start
    for _ in range(windows):
        made = min(scaler.count * per_worker, most)
        rate = min(made, model_rate)
        scaler._decide(made > model_rate, rate, rate / per_worker)
    return scaler.count


def test_auto_grows_until_the_model_no_longer_waits(capsys):
    assert 10 <= run_search(model_rate=1000, per_worker=100) <= 20
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("QueueRunner: 1 -> 2 workers: ") and len(lines) == len(set(lines))


def test_auto_shrinks_where_the_model_is_slow(capsys):
    assert run_search(model_rate=100, per_worker=100, start=32) <= 2
    assert "the queue is full" in capsys.readouterr().out


def test_auto_goes_back_where_more_workers_bring_nothing(capsys):
    assert run_search(model_rate=1000, per_worker=100, most=110) <= 2
    assert "no more than" in capsys.readouterr().out


def counts_at(rates):
    """The number of workers after each window of these samples/s, none with a full queue."""
    scaler, counts = Scaler(32), []
    for rate in rates:
        scaler._decide(False, rate, 1.0)
        counts.append(scaler.count)
    return counts


def test_auto_takes_more_workers_after_all_where_one_was_measured_as_the_queue_filled(capsys):
    assert counts_at([560, 500, 430, 600, 400, 600, 590]) == [2, 1, 2, 4, 2, 2, 2]
    assert "1 -> 2 workers: 430 samples/s, less than with 2" in capsys.readouterr().out


def test_auto_tries_a_number_that_brought_nothing_once_more_and_no_oftener(capsys):
    assert counts_at([100, 105, 95, 101, 94, 94, 90, 94]) == [2, 1, 2, 1, 1, 1, 1, 1]
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_auto_runs_and_delivers_every_sample_of_its_shares(capsys):
    def shares(worker, n_workers):
        for number in range(worker, 400, n_workers):
            time.sleep(0.005)
            yield (np.array([number]),)

    with QueueRunner(shares, 8, "auto", max_workers=4, min_after_dequeue=16) as runner:
        for _ in range(2):
            got = sorted(int(n) for (numbers,) in runner.dataset() for n in numbers)
            assert got == list(range(400))
    assert "QueueRunner: 1 -> 2 workers" in capsys.readouterr().out


# -- cores ---------------------------------------------------------------------------------------


def test_cores_respect_the_affinity_mask():
    import os

    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_cores_respect_a_containers_quota(files, cores, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert _cgroup_cores(tmp_path) == cores
    monkeypatch.setattr("labkit.machine._cgroup_cores", lambda: 0.5)
    assert usable_cores() == 1
