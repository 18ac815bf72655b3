"""workers="ray": what the other kinds promise, run over actors, and the faults of a cluster.

Two clusters for all of it: labkit's own, and one of two nodes, of which one is killed.
"""

import faulthandler
import os
import sys
import threading
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest

ray = pytest.importorskip("ray")

from labkit import QueueRunner, WorkerError, diagnose  # noqa: E402
from labkit.engine import KINDS, cluster  # noqa: E402
from labkit.engine.ray import _ASIDE, _POOLS, RayPool  # noqa: E402
from labkit.instruments import diagnosis  # noqa: E402
from labkit.machine import usable_cores  # noqa: E402
from tests import test_faults  # noqa: E402
from tests.consumers import IN_SECONDS, in_dataset  # noqa: E402
from tests.programs import run_program  # noqa: E402

SMALL = {"capacity": 64, "min_after_dequeue": 8}
_HANGS_AFTER = 300.0

# The same test as of threads and processes; the others are run by test_ray_faults.
test_stop_while_starting = test_faults.test_stop_while_starting


@pytest.fixture
def workers():
    return "ray"


@pytest.fixture
def consume():
    return in_dataset


@pytest.fixture
def repeat():
    return 0


@pytest.fixture(scope="module")
def own():
    """labkit's own cluster, as the first runner starts it."""
    ray.shutdown()
    cluster.connect(None, lambda: None)
    yield
    cluster.close()


@pytest.fixture
def nothing_left_running(request):
    """In place of the one for all tests: Ray's processes stay for the next test; no actor does, no
    object in its store, and no thread of labkit's."""
    if request.node.name.startswith("test_without"):
        yield
        return
    request.getfixturevalue("two_nodes" if "two_nodes" in request.fixturenames else "own")
    shared = sorted(os.listdir("/dev/shm"))
    faulthandler.dump_traceback_later(_HANGS_AFTER, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    _in_seconds(lambda: not _labkit_threads(), "a thread of labkit's lives")
    _in_seconds(lambda: not _living_actors(), "an actor lives")
    _in_seconds(lambda: not _bytes_in_store(), "objects are left in the store")
    assert sorted(os.listdir("/dev/shm")) == shared


def _labkit_threads():
    return [one for one in threading.enumerate() if one.name.startswith("labkit")]


def _living_actors():
    states = ray._private.state.actors().values()
    return [actor for actor in states if actor["State"] != "DEAD"]


def _bytes_in_store():
    have = ray.cluster_resources().get("object_store_memory", 0)
    return have - ray.available_resources().get("object_store_memory", 0)


def _in_seconds(fits, told):
    end = time.monotonic() + 10.0
    while not fits():
        assert time.monotonic() < end, told
        time.sleep(0.05)


def counted(total, chunk):
    """Its shares can begin later."""

    def factory(worker, n_workers, start):
        for at in range(start + worker, total, n_workers):
            yield (np.arange(at * chunk, (at + 1) * chunk),)

    return factory


def index_of(batches):
    return sorted(int(i) for (index,) in batches for i in index)


def test_the_same_actors_make_every_pass_and_share_the_arrays_of_the_factory(own):
    data = np.ones(30_000_000, np.uint8)

    def factory(worker, n_workers, epoch):
        if epoch == 2:
            raise LookupError("no third pass")
        yield (np.full(4, os.getpid() * int(data[worker])),)

    runner = QueueRunner(factory, 4, 2, "ray", **SMALL)
    told = r"LookupError(?s:.*)On [0-9.]+ \(node [0-9a-f]+\)"
    with pytest.raises(WorkerError, match=told), runner:
        passes = [{int(i) for (pids,) in runner.dataset() for i in pids} for _ in range(2)]
        in_store = _bytes_in_store()
        list(runner.dataset())
    assert 30e6 <= in_store < 45e6
    assert passes[0] == passes[1] and len(passes[0]) == 2


def test_a_killed_actor_is_told_with_its_node_and_restarted(own, tmp_path, monkeypatch):
    marks = str(tmp_path)

    def factory(worker, n_workers, start):
        for at in range(start + worker, 40, n_workers):
            mark = os.path.join(marks, str(at))
            if at in (5, 21) and not os.path.exists(mark):
                open(mark, "w").close()
                os.kill(os.getpid(), 9)
            yield (np.arange(at * 4, at * 4 + 4),)

    with pytest.raises(WorkerError, match=r"worker 1 died on [0-9.]+ \(node [0-9a-f]+\)"):
        in_dataset(QueueRunner(factory, 8, 2, "ray", **SMALL))
    start = RayPool._start
    lives = []

    def start_on_a_machine_that_is_gone(self, worker, life, begin):
        start(self, worker, life, begin)
        lives.append(life)
        if lives.count(1) == 1 == life:
            ray.kill(self._actors[worker].handle)

    monkeypatch.setattr(RayPool, "_start", start_on_a_machine_that_is_gone)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        runner = QueueRunner(factory, 8, 2, "ray", on_error="restart", max_restarts=1, **SMALL)
        assert index_of(in_dataset(runner)) == list(range(160))
    told = [str(w.message) for w in said if "is started again, 1 of 1 times" in str(w.message)]
    assert len(told) == 1 and "worker 1 died on" in told[0]
    assert lives == [0, 0, 1, 1]  # the one that never had a place counts for nothing


def test_an_actor_that_died_before_it_could_tell_where_it_was_is_told_with_its_node(
    own, monkeypatch
):
    def factory():
        os.kill(os.getpid(), 9)
        yield (np.zeros(8),)

    monkeypatch.setattr(RayPool, "_peek", lambda self, ref: "")
    with pytest.raises(WorkerError, match=r"worker 0 died on [0-9.]+ \(node [0-9a-f]+\)"):
        in_dataset(QueueRunner(factory, 8, 1, "ray", **SMALL))


def test_a_stall_is_shown_with_its_line_and_large_batches_come_whole(own):
    data = np.arange(3_000_000).reshape(3, -1)

    def factory():
        for part in data:
            yield (part[None],)
        time.sleep(3600.0)  # where it stands

    seen = []
    with pytest.raises(WorkerError, match=r"worker 0 has delivered nothing for 2 s") as caught:
        in_dataset(
            QueueRunner(factory, 1, 1, "ray", timeout=2.0, shuffle=False, capacity=4), seen=seen
        )
    assert "time.sleep(3600.0)  # where it stands" in str(caught.value)
    assert "site-packages/ray" not in str(caught.value) and "labkit/engine" not in str(caught.value)
    assert all((got[0] == part).all() for (got,), part in zip(seen, data, strict=True))


def test_a_cluster_that_is_too_small_says_what_it_lacks(own):
    for options, lack in (({"num_cpus": 99}, "99 CPU"), ({"resources": {"disk": 1}}, "1 disk")):
        runner = QueueRunner(
            counted(4, 4), 4, 1, "ray", timeout=2.0, worker_options=options, **SMALL
        )
        with pytest.raises(WorkerError, match=f"no place in the cluster within 1 s: .*{lack}"):
            in_dataset(runner)


def test_a_buffer_that_is_used_again_changes_no_batch_of_a_call(own):
    def reuse():
        buffer = np.zeros(4, int)
        for number in range(100):
            buffer[:] = number
            yield (buffer,)

    options = {"capacity": 8, "shuffle": False}
    with QueueRunner(reuse, 4, 1, "ray", **options) as runner:
        came = [batch.numpy().tolist() for (batch,) in runner.dataset()]
    assert came == [[number] * 4 for number in range(100)]


def test_no_more_batches_are_made_than_have_a_place(own, tmp_path):
    made = tmp_path / "made"
    path = str(made)

    def factory():
        for number in range(1000):
            with open(path, "a") as file:
                file.write(".")
            yield (np.full(4, number),)

    with QueueRunner(factory, 4, 1, "ray", capacity=8, min_after_dequeue=0) as runner:
        taken = iter(runner.dataset())
        next(taken)
        _in_seconds(lambda: runner.depth() >= 8, "the queue stays empty")
        time.sleep(0.5)
        assert made.stat().st_size < 80  # a call brings up to 16, and there are three
        del taken


def test_without_ray_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"needs Ray, which is not .* 'labkit\[ray\]'.*'process'"):
        QueueRunner(counted(4, 4), 4, 1, "ray").dataset()


@pytest.mark.slow  # it starts actors again and again
def test_diagnose_takes_the_cluster_as_a_kind(own, few_settings, monkeypatch):
    monkeypatch.setitem(KINDS, "ray", replace(KINDS["ray"], limit=lambda: 1))

    def factory(worker, n_workers):
        while True:
            time.sleep(0.01)
            yield (np.zeros((8, 2), np.float32),)

    report = diagnose(factory, 0.002, seconds=1.0, progress=False, workers=("thread", "ray"))
    assert not report.problems and report.demands["ray"].wall > 0.01
    assert "an actor takes" in str(report) and "1 actor" in {row.name for row in report.rows}
    handed = {kind: need.handed for kind, need in report.demands.items()}
    assert handed["ray"] > handed["thread"] >= 0 and " ms by one actor" in str(report)
    assert 1e6 < report.demands["ray"].memory < 400e6
    monkeypatch.setitem(KINDS, "ray", replace(KINDS["ray"], limit=lambda: 64))
    assert diagnosis._cores("ray") == 64 and diagnosis._cores("thread") == usable_cores()


def _first_noticed(handle, noticed):
    """Asks an actor until Ray says that it is gone, and notes when."""
    try:
        while True:
            ray.get(handle.nbytes.options(**_ASIDE).remote())
            time.sleep(0.005)
    except ray.exceptions.RayActorError:
        noticed.append(time.monotonic())


@pytest.mark.slow  # its limits are those that are promised, of a machine that does nothing else
def test_a_lost_actor_is_told_2_s_after_rays_own_notice_and_a_stop_takes_5(own):
    def factory(worker, n_workers):
        for number in range(1 << 30):
            time.sleep(0.02 if number < 10 or worker == 0 else 3600.0)
            yield (np.full(4, os.getpid() if worker == 0 else 0),)

    for n_workers in (1, 4):
        noticed = []
        runner = QueueRunner(factory, 4, n_workers, "ray", **SMALL)
        with pytest.raises(WorkerError, match="worker 0 died on"), runner:
            batches = iter(runner.dataset())
            pids = set()
            while not pids:
                pids = {int(i) for i in next(batches)[0]} - {0}
            (pool,) = (pool for pool in _POOLS if pool._actors)
            asked = pool._actors[0].handle
            asks = threading.Thread(target=_first_noticed, args=(asked, noticed))
            asks.start()
            os.kill(*pids, 9)
            try:
                list(batches)
            finally:
                told = time.monotonic()
                asks.join()
        assert time.monotonic() - told < 5.0
        assert told - noticed[0] < 2.0

    runner = QueueRunner(factory, 4, 4, "ray", **SMALL)
    batches = iter(runner.dataset())
    for _ in range(40):
        next(batches)
    began = time.monotonic()  # while three of four are at a batch that takes an hour
    runner.stop()
    assert time.monotonic() - began < 5.0


@pytest.mark.slow  # a worker that takes 6 s to start, and waits for it
def test_an_actor_that_has_its_place_and_still_starts_is_not_said_to_have_none(own, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(6.0)\n")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    its = {"num_cpus": usable_cores(), "runtime_env": {"env_vars": {"PYTHONPATH": paths}}}
    runner = QueueRunner(counted(4, 4), 4, 1, "ray", timeout=4.0, worker_options=its, **SMALL)
    assert index_of(in_dataset(runner)) == list(range(16))


@pytest.mark.slow  # a process that imports Ray
def test_a_wrong_token_is_told_at_once(own, tmp_path):
    program = """
        import time, ray
        from labkit.engine import cluster
        began = time.monotonic()
        try:
            cluster.connect(None, print)
        except ConnectionError as error:
            print(error, time.monotonic() - began < 10)
    """
    address = ray.get_runtime_context().gcs_address
    done = run_program(program, tmp_path, RAY_ADDRESS=address, RAY_AUTH_TOKEN="ab" * 32)
    assert f"the Ray cluster at {address}, as given by RAY_ADDRESS, asks for a" in done.stdout
    assert done.stdout.strip().endswith("True")


FULL_STORE_CTRL_C_AND_NO_HEAD = """
    import os, signal, sys, threading, time
    import numpy as np
    from labkit import QueueRunner, WorkerError
    from labkit.engine import cluster

    def endless(nbytes):
        def batches():
            while True:
                time.sleep(0.01)
                yield (np.zeros((1, nbytes // 8)),)
        return batches

    def run(nbytes, capacity, until):
        few = {"num_cpus": 0.1}
        with QueueRunner(endless(nbytes), 1, 1, "ray", shuffle=False, capacity=capacity,
                         worker_options=few) as runner:
            for count, _ in enumerate(runner.dataset()):
                if until(count):
                    return

    def interrupt(count):
        if count == 10:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()

    def kill_head(count):
        global began
        if count == 10:
            began = time.monotonic()
            nodes.head_node.kill_gcs_server(check_alive=False)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    with cluster.local_nodes(1, store=80 << 20) as nodes:
        import ray
        run(20_000_000, 16, lambda count: count == 40)  # more than the store holds
        print("the full store went on")
        try:
            run(8, 8, interrupt)
        except KeyboardInterrupt:
            print("interrupted")
        for _ in range(100):
            states = {actor["State"] for actor in ray._private.state.actors().values()}
            if states == {"DEAD"}:
                break
            time.sleep(0.1)
        print("actors are", *states)
        try:
            run(8, 8, kill_head)
        except WorkerError as error:
            print(error)
        print("in time:", time.monotonic() - began < 30)
    print("left:", [t.name for t in threading.enumerate() if t.name.startswith("labkit")])
"""


@pytest.mark.slow  # a cluster of its own, of which the head is killed
def test_without_room_after_ctrl_c_and_without_its_head(tmp_path):
    done = run_program(FULL_STORE_CTRL_C_AND_NO_HEAD, tmp_path, timeout=300)
    said = done.stdout
    assert "the full store went on" in said and "interrupted" in said, said + done.stderr
    assert "actors are DEAD" in said
    assert "labkit: the head of the Ray cluster" in said and "in time: True" in said
    assert "left: []" in said and done.returncode == 0


# -- two nodes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_nodes():
    ray.shutdown()
    with cluster.local_nodes(2) as both:
        yield both


@pytest.mark.slow  # a cluster of its own, a minute and a half
def test_a_killed_node_raises_or_its_share_is_made_elsewhere(two_nodes):
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    assert not cluster.is_own()
    (other,) = two_nodes.worker_nodes

    def slow(worker, n_workers, start):
        for at in range(start + worker, 60 if n_workers == 2 else 10**6, n_workers):
            time.sleep(0.05)
            yield (np.arange(at * 4, at * 4 + 4),)

    def there(soft):
        """On the other node, and soft: elsewhere once that is gone."""
        affine = NodeAffinitySchedulingStrategy(other.node_id, soft=soft)
        return {"worker_options": {"num_cpus": 0.1, "scheduling_strategy": affine}}

    settings = {"capacity": 8, "min_after_dequeue": 0}
    goes_on = QueueRunner(slow, 4, 2, "ray", on_error="restart", **settings, **there(soft=True))
    raises = QueueRunner(slow, 4, 1, "ray", **settings, **there(soft=False))
    with warnings.catch_warnings(record=True) as said, goes_on:
        warnings.simplefilter("always")
        batches = iter(goes_on.dataset())
        seen = [next(batches)[0].numpy() for _ in range(4)]
        with pytest.raises(WorkerError, match=r"worker 0 died on"), raises:
            rest = iter(raises.dataset())
            next(rest)
            began = time.monotonic()
            two_nodes.remove_node(other, allow_graceful=False)
            list(rest)
        assert time.monotonic() - began < IN_SECONDS
        seen += [index.numpy() for (index,) in batches]
    assert sorted(np.concatenate(seen).tolist()) == list(range(240))
    # More than one of each, where Ray takes the killed node for alive for a moment.
    assert len([w for w in said if "is started again" in str(w.message)]) >= 2
