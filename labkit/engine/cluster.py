"""Which Ray: the one that this process uses already, one at an address, or one of labkit's own.

Each worker process imports this file, so what only a cluster needs is imported where it is needed.
"""

import atexit
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from labkit.engine import interrupts
from labkit.engine.messages import WorkerError
from labkit.machine import usable_cores

_ANSWERS = 8.0  # seconds, for each of two
_LOOK, _GONE = 2.0, 8.0  # seconds between two looks for the head; without an answer
_STORE = 0.3  # of the free memory
# Time to start in, on a busy machine.
SLOW = {"RAY_agent_register_timeout_ms": "120000", "RAY_worker_register_timeout_seconds": "120"}
# Until a machine is taken for gone that does not answer any more; Ray's own takes 15 s.
_NOTICES = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "5",
}
_own = ""  # the address of the cluster that labkit has started


def imported() -> Any:
    """The package, without a report of its use. Raises ImportError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "labkit: workers='ray' needs Ray, which is not installed here: pip install "
            f"'labkit[ray]' ({error}). Or use workers='process', on this machine alone."
        ) from None
    return ray


def connect(address: str | None, at_exit: Callable[[], None] | None = None) -> Any:
    """The package, connected to a cluster: to the one that is in use, else to `address`, else to
    that of RAY_ADDRESS, else to one on this machine, which ends with this process.

    Args:
        at_exit: is called ahead of Ray's own end.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: nothing answers there, or the token is another one.
        RuntimeError: it could not be started here.
        ValueError: the cluster in use is not that of `address`.
    """
    ray = imported()
    if ray.is_initialized():
        _expect_in_use(ray, address)
    else:
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        if address == "local":
            _start_own(ray)
        else:
            _join(ray, address)
    if at_exit is not None:
        atexit.unregister(at_exit)
        atexit.register(at_exit)
    return ray


def _expect_in_use(ray: Any, address: str | None) -> None:
    used = str(ray.get_runtime_context().gcs_address)
    same = address is None or (address == "local" and is_own())
    if same or _canonical(str(address)) == _canonical(used):
        return
    raise ValueError(
        f"labkit: the cluster at address={address!r} was asked for, and this process uses the one "
        f"at {used} already. Leave the address away, or call ray.shutdown() first."
    )


def _canonical(address: str) -> str:
    from ray._private import services

    with contextlib.suppress(Exception):  # of "auto", where there is none
        return str(services.canonicalize_bootstrap_address(address))
    return address


def is_own() -> bool:
    """Whether the cluster in use is the one that labkit has started."""
    ray = imported()
    return bool(ray.is_initialized() and ray.get_runtime_context().gcs_address == _own)


def cores(address: str | None = None, num_cpus: float | None = None, **_: Any) -> int:
    """How many actors with these options the CPUs of the cluster are enough for; as `connect`."""
    ray = connect(address)
    if is_own():
        return usable_cores()
    return max(1, int(ray.cluster_resources().get("CPU", 1) / (num_cpus or 1)))


def _join(ray: Any, address: str) -> None:
    from ray._private import services

    by = "RAY_ADDRESS" if address == os.environ.get("RAY_ADDRESS") else "address"
    told = f"labkit: no Ray cluster answers at {address}, as given by {by}"
    otherwise = (
        "Correct it, start a cluster (ray start --head), or leave the address away: labkit then "
        "starts one on this machine."
    )
    where = ""
    try:
        # Of "auto", what Ray has noted.
        where = str(services.canonicalize_bootstrap_address(address))
        _await_answer(where)
        _try_token(where)
        ray.init(address=address)
    except ray.exceptions.AuthenticationError as error:
        raise ConnectionError(
            f"labkit: the Ray cluster at {address}, as given by {by}, asks for a token, and it is "
            "not the one that this process has. Set RAY_AUTH_MODE=token, and the cluster's "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, before Ray is used."
        ) from error
    except Exception as error:
        raise ConnectionError(f"{told}: {error} ({where}). {otherwise}") from error


def _await_answer(where: str) -> None:
    """Raises OSError if nothing answers there, or no server of gRPC: Ray would try for minutes."""
    host, _, port = where.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), _ANSWERS) as line:
        # The two sides of HTTP/2 begin with a frame of settings.
        line.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
        if line.recv(4)[3:] != b"\x04":
            raise OSError("something else answers there")


def _try_token(where: str) -> None:
    """Raises AuthenticationError if it is the wrong one: Ray would try it 20 times."""
    from ray._private.authentication import authentication_token_setup as token
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    token.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    GcsClient(address=where)


def _start_own(ray: Any) -> None:
    """A cluster of this machine alone, which ends with this process. Asked for 127.0.0.1, Ray takes
    the machine's own address all the same."""
    global _own
    _ask_for_token()
    try:
        with _environment(SLOW), patience():
            ray.init(
                address="local",
                num_cpus=usable_cores(),
                num_gpus=0,
                include_dashboard=False,
                object_store_memory=_store_bytes(),
                _node_ip_address="127.0.0.1",
            )
    except Exception as error:
        raise RuntimeError(
            f"labkit: Ray could not be started on this machine ({error}). Look into its logs "
            "(ray/session_latest/logs in the folder for temporary files), or start a cluster "
            "(ray start --head) and set RAY_ADDRESS."
        ) from error
    _own = ray.get_runtime_context().gcs_address


def _ask_for_token() -> None:
    """Ray's servers, which run code for whoever has the token, ask for it. It is drawn here, and
    lives in the environment of this process and of Ray's, on no disk; what a user has set stays."""
    import secrets

    from ray._raylet import Config  # type: ignore[attr-defined]

    if not any(name.startswith("RAY_AUTH_") for name in os.environ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        Config.initialize("")  # it has read the environment already


@contextlib.contextmanager
def local_nodes(count: int, cores: int = 1, store: int = 150 << 20) -> Iterator[Any]:
    """Several nodes on this machine, as if each were one: to try what a cluster does.

    Yields Ray's `cluster_utils.Cluster`, to whose head this process is connected; the others are
    its `worker_nodes`, and `remove_node(node, allow_graceful=False)` kills one. All end with the
    block. Ray asks for a token that is drawn here.

    Args:
        count: nodes, the head included.
        cores: that each says it has.
        store: bytes of each one's object store.

    Raises:
        ImportError: Ray is not installed.
        RuntimeError: this process uses a cluster already, which labkit did not start.
    """
    ray = imported()
    close()
    if ray.is_initialized():
        raise RuntimeError(
            "labkit: local_nodes needs a process without a Ray cluster, got one that is connected. "
            "Call ray.shutdown() first."
        )
    _ask_for_token()
    from ray._private import utils, worker
    from ray.cluster_utils import Cluster

    # What "auto" means on this machine stays; and of a killed node Ray would print the logs.
    hidden = {utils: "write_ray_address", worker: "print_to_stdstream"}
    ours, shown = {**SLOW, **_NOTICES}, {m: getattr(m, name) for m, name in hidden.items()}
    each = {"num_cpus": cores, "object_store_memory": store, "no_monitor": True}
    each["include_log_monitor"] = False
    nodes: Any = Cluster()
    try:
        with interrupts.held_back(), _environment(ours), patience():  # half a node stays behind
            for module, name in hidden.items():
                setattr(module, name, lambda *_, **__: None)
            for _ in range(count):
                nodes.add_node(**each)
            ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        yield nodes
    finally:
        with interrupts.held_back():
            ray.shutdown()
            nodes.shutdown()
            for module, name in hidden.items():
                setattr(module, name, shown[module])


def close() -> None:
    """Ends the cluster that labkit has started, if there is one."""
    ray = imported()
    if is_own():
        ray.shutdown()


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Nodes that start meanwhile do without Ray's limit of 15 s until its helpers are there, of
    which none is needed: on a busy machine they take longer, and the node would give up. Nor do
    they wait for the server of the dashboard, which nobody looks at."""
    from ray._private.node import Node
    from ray._private.ray_constants import KV_NAMESPACE_DASHBOARD as DASHBOARD
    from ray._raylet import persist_port  # type: ignore[attr-defined]

    start, serve = Node.start_raylet, Node.start_api_server

    def serve_nothing(self: Any, **_: Any) -> None:
        self._webui_url = ""
        self.get_gcs_client().internal_kv_put(b"webui:url", b"", True, DASHBOARD)

    def start_without_them(self: Any, *args: Any, **kwargs: Any) -> Any:
        for port in ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port"):
            persist_port(self._session_dir, self._node_id, port, -1)
        given = self._ray_params
        given.runtime_env_agent_port = given.runtime_env_agent_port or _free_port()
        return start(self, *args, **kwargs)

    node: Any = Node
    node.start_raylet, node.start_api_server = start_without_them, serve_nothing
    try:
        yield
    finally:
        node.start_raylet, node.start_api_server = start, serve


def _store_bytes() -> int:
    import shutil

    import psutil

    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError):
        free = min(free, 2 * shutil.disk_usage("/dev/shm").free)
    return max(100 << 20, int(_STORE * free))


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    """With these set, where they are not."""
    new = {name: value for name, value in more.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def _needs(options: dict[str, Any]) -> dict[str, float]:
    needs = {"CPU": options.get("num_cpus") or 0, "GPU": options.get("num_gpus") or 0}
    return needs | {"memory": options.get("memory") or 0, **(options.get("resources") or {})}


def waits(actor: Any, options: dict[str, Any]) -> bool:
    """Whether Ray still looks for a place for it. If it does not, the actor holds its CPUs and is
    starting: a process was lent to it, or its runtime_env is being made."""
    from ray._private import worker
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    if place(actor):
        return False
    asked: Any = worker.global_worker
    pending = get_cluster_resource_state(asked.gcs_client).pending_resource_requests
    cpus = _needs(options)["CPU"]
    wanted = (dict(one.request.resources_bundle).get("CPU", 0) for one in pending)
    return any(abs(cpus - its) < 1e-3 for its in wanted)


def place(actor: Any) -> str:
    """Where Ray has it, or had it when it was lost; "" as long as it has no place."""
    from ray._private import state

    with contextlib.suppress(Exception):
        its = state.actors(actor._actor_id.hex())["Address"]
        return f"{its['IPAddress']} (node {its['NodeID'][:8]})" if its["Port"] else ""
    return ""


def store(ray: Any, node: str) -> float:
    """Bytes of the object store of a node, by its id or a text with the beginning of that."""
    sizes = (n["Resources"] for n in ray.nodes() if n["NodeID"][:8] in node)
    return next((float(its.get("object_store_memory", 0)) for its in sizes), 0.0)


def missing(ray: Any, options: dict[str, Any]) -> str:
    """Which resource the cluster lacks for one more actor with these options; "" if none."""
    needs = _needs(options)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    free = ray.available_resources()
    for name, need in needs.items():
        most = max((node.get(name, 0) for node in nodes), default=0)
        if need > most:
            return f"{need:g} {name}, and the largest of {len(nodes)} nodes has {most:g}"
        if need > free.get(name, 0):
            total = sum(node.get(name, 0) for node in nodes)
            left = free.get(name, 0)
            return f"{need:g} {name}, and of the cluster's {total:g} only {left:g} are free"
    return ""


class Head:
    """The cluster's head: a minute after it is gone, Ray would end this process without a word, as
    it does where nobody looks so long, since the consumer takes no batch."""

    def __init__(self, ray: Any) -> None:
        self.where = str(ray.get_runtime_context().gcs_address)
        self.gone = False
        self._asked = time.monotonic()
        self._silent: float | None = None  # since then, at each look

    def look(self) -> None:
        """Now and then, asks it. Raises WorkerError, once, if it has not answered for a while."""
        now = time.monotonic()
        if self.gone or now - self._asked < _LOOK:
            return
        self._asked = now
        host, _, port = self.where.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), 1.0).close()
            self._silent = None
        except OSError:
            self._silent = self._silent or now
        if self._silent is not None and now - self._silent > _GONE:
            self.gone = True
            raise WorkerError(
                f"labkit: the head of the Ray cluster, {self.where}, has not answered for "
                f"{_GONE:g} s, and without it there are no workers. Look for its end in its logs, "
                "start the cluster anew, and this program: Ray itself ends it within a minute, "
                "unless it calls ray.shutdown()."
            )
