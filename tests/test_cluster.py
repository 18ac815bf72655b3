"""Which Ray cluster: addresses where none answers, and what is asked of one. None is started."""

import contextlib
import functools
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

ray = pytest.importorskip("ray")

from ray._private import services  # noqa: E402

from labkit import QueueRunner, WorkerError  # noqa: E402
from labkit.engine import KINDS, cluster  # noqa: E402
from labkit.engine.actor import Producer  # noqa: E402
from labkit.engine.pickling import pack_factory  # noqa: E402
from labkit.engine.produce import IteratorFactory  # noqa: E402
from labkit.engine.ray import RayPool, _Actor  # noqa: E402


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch, tmp_path):
    """In this process; and none that Ray would find noted in its folder for temporary files."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", None)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(services, "find_gcs_addresses", list)
    monkeypatch.setattr(cluster, "_ANSWERS", 0.3)


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def server(answer):
    """Takes lines, and sends `answer` on each; b"" keeps silent."""
    held = []

    def serve():
        with contextlib.suppress(OSError):
            while True:
                held.append(listens.accept()[0])
                held[-1].sendall(answer)

    # Ray takes 127.0.0.1 for the machine's own address.
    with socket.create_server(("", 0)) as listens:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listens.getsockname()[1]}"
        finally:
            listens.shutdown(socket.SHUT_RDWR)
            thread.join()
            for line in held:
                line.close()


def refused(factory_options):
    runner = QueueRunner(lambda: iter(()), 4, 1, "ray", worker_options=factory_options)
    began = time.monotonic()
    with pytest.raises(ConnectionError) as caught:
        runner.dataset()
    assert time.monotonic() - began < 10.0
    return str(caught.value)


def test_where_nothing_answers_the_address_is_named_and_who_gave_it(monkeypatch, tmp_path):
    dead = closed_port()
    told = refused({"address": dead})
    assert f"no Ray cluster answers at {dead}, as given by address: " in told
    assert "ray start --head" in told
    monkeypatch.setenv("RAY_ADDRESS", dead)
    assert f"at {dead}, as given by RAY_ADDRESS: " in refused(None)
    # What a cluster that is gone has left in Ray's folder.
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(dead)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    told = refused(None)
    assert "at auto, as given by RAY_ADDRESS: " in told and f":{dead.split(':')[1]})" in told


def test_a_server_that_keeps_silent_or_is_something_else_is_no_cluster():
    with server(b"") as mute:
        assert f"no Ray cluster answers at {mute}, as given by address: timed out" in refused(
            {"address": mute}
        )
    with server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as other:
        assert "something else answers there" in refused({"address": other})


class Context:
    gcs_address = "127.0.0.1:1234"


def test_another_cluster_than_the_one_in_use_is_told(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    for same in (None, "127.0.0.1:1234", "localhost:1234"):
        assert cluster.connect(same) is ray
    for other in ("127.0.0.1:1235", "local", "auto"):
        with pytest.raises(ValueError, match=rf"'{other}' was asked for, .* 127.0.0.1:1234 alr"):
            cluster.connect(other)


def test_auto_may_use_what_the_cluster_has(monkeypatch):
    """And not what this machine has, which does not run the actors."""
    asked = []

    def connect(address=None, at_exit=None):
        asked.append(address)
        return ray

    monkeypatch.setattr(cluster, "connect", connect)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0})
    limit = KINDS["ray"].limit
    assert limit() == 64 and limit(address="there:1", num_cpus=4, resources={"disk": 1}) == 16
    assert asked == [None, "there:1"]

    jobs = []

    def no_pool(self, job):
        jobs.append(job)
        raise ConnectionError

    monkeypatch.setattr(RayPool, "__init__", no_pool)
    for more in ({}, {"worker_options": {"num_cpus": 2}}, {"max_workers": 3}):
        with pytest.raises(ConnectionError):
            QueueRunner(lambda worker, n_workers: iter(()), 4, "auto", "ray", **more).dataset()
    assert [job.factory.n_workers for job in jobs] == [64, 32, 3]


def test_the_head_is_gone_once_it_has_kept_silent_for_a_while(monkeypatch):
    monkeypatch.setattr(cluster, "_LOOK", 0.0)
    monkeypatch.setattr(cluster, "_GONE", 0.05)
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    head = cluster.Head(ray)
    dead = closed_port()
    with server(b"") as alive:
        # Nobody looked for long, and then one look fails: that is not the end.
        for where in (alive, dead, alive, dead):
            head.where = where
            time.sleep(0.08)
            head.look()
        head.where = alive
        head.look()
    head.where = dead
    head.look()
    time.sleep(0.08)
    with pytest.raises(WorkerError, match=f"head of the Ray cluster, {dead}, has not answered"):
        head.look()
    head.look()
    assert head.gone


def test_chunks_travel_together_only_while_they_come_at_once():
    """So that none that is done waits for one that takes long."""

    def factory():
        for number in range(30):
            time.sleep(0.02 if number in (0, 12) else 0.0)
            yield (np.full(4, number),)

    code, parts = pack_factory(IteratorFactory(factory, 1), "ray")
    producer = Producer((code, [bytes(part) for part in parts]), (0, None, False, False, 0))
    calls = []
    while told := producer.next(0):
        calls.append([int(one[1][0][0]) for one in told if one[0] == "chunk"])
    assert [number for call in calls for number in call] == list(range(30))
    slow = next(call for call in calls if 12 in call)
    assert calls[0] == [0] and calls[1] == [1] and slow[-1] == 12
    assert max(map(len, calls)) > 1 and max(map(len, calls)) <= 16
    assert len(calls[calls.index(slow) + 1]) == 1
    assert producer.nbytes() >= 4 * 8


def test_without_a_cluster_no_actor_is_asked_for_its_place(monkeypatch):
    """As after ray.shutdown(): the question would start a cluster."""
    asked = []
    monkeypatch.setattr(ray, "get", lambda *ref, timeout: asked.append(ref) or "there")
    pool = RayPool.__new__(RayPool)
    pool._ray = ray
    actor = _Actor(None, 0, functools.partial(pool._peek, object()), (0, 0), 0)
    assert actor.node == "" and not asked
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    assert actor.node == actor.node == "there" and len(asked) == 1


def test_what_the_object_store_has_no_room_for_is_told_with_both_sizes(monkeypatch):
    actor = SimpleNamespace(node="10.0.0.1 (node abababab)", life=0)
    node = {"NodeID": "ab" * 16, "Resources": {"object_store_memory": 83.9e6}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    pool = RayPool.__new__(RayPool)
    pool._ray, pool._actors = ray, [actor]
    pool._asked, pool._kill = lambda *_: 200_000_000, lambda _: None
    for error in (ray.exceptions.OutOfDiskError("full"), ray.exceptions.ObjectStoreFullError("")):
        told = pool._lost(0, error).as_error()
        assert "object store on 10.0.0.1" in str(told) and "died" not in str(told)
        assert "200.0 MB in one call, and all of the store is 83.9 MB" in str(told)
    assert "its actor is gone" in str(pool._lost(0, OSError("another")).as_error())
