"""Which Ray cluster: addresses where none answers, and what is asked of one. None is started."""

import contextlib
import socket
import threading
import time

import numpy as np
import pytest

ray = pytest.importorskip("ray")

from labkit import QueueRunner, WorkerError  # noqa: E402
from labkit.engine import KINDS, cluster  # noqa: E402
from labkit.engine.ray import RayPool  # noqa: E402


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch, tmp_path):
    """In this process; and none that Ray would find noted in its folder for temporary files."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", None)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
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
    (tmp_path / "ray_current_cluster").write_text(dead)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert "at auto, as given by RAY_ADDRESS: " in refused(None)


def test_a_server_that_keeps_silent_or_is_something_else_is_no_cluster():
    with server(b"") as mute:
        assert f"no Ray cluster answers at {mute}, as given by address: timed out" in refused(
            {"address": mute}
        )
    with server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as other:
        assert "something else answers there" in refused({"address": other})


class Context:
    gcs_address = "127.0.0.1:1234"

    def get_node_id(self):
        return "ab" * 16


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


def test_arrays_of_the_factory_that_the_store_has_no_room_for_are_told(monkeypatch):
    def full(_):
        raise ray.exceptions.ObjectStoreFullError("full")

    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(cluster, "connect", lambda *_: ray)
    monkeypatch.setattr(ray, "put", full)
    one = {"NodeID": "ab" * 16, "Resources": {"object_store_memory": 2e6}}
    monkeypatch.setattr(ray, "nodes", lambda: [one])
    big = np.zeros(3_000_000, np.uint8)

    def factory():
        yield (big,)

    with pytest.raises(MemoryError, match=r"need 3\.0 MB, and .* holds 2\.0 MB"):
        QueueRunner(factory, 4, 1, "ray").dataset()
