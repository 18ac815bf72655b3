"""Workers as actors of a Ray cluster, for iterators that need more cores than a machine has.

RayPool ── next(epoch), a few calls under way ──► Producer, an actor: the loop of produce.py
        ◄── arrays, through Ray's object store ──

A call is a place: it brings a chunk, or several small ones that are made at once, and the next
call follows when those are released. What an actor is told beside that (another pass, the stop)
goes past the calls that wait.
"""

import collections
import contextlib
import functools
import pickle
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

from labkit.engine import cluster
from labkit.engine.actor import Producer
from labkit.engine.messages import Chunk, Ended, Lost, Message, Skipped
from labkit.engine.pickling import load_error, pack_factory
from labkit.engine.pool import Job, Pool
from labkit.engine.tracebacks import readable

PLACES = 3
_OVER = 1 << 62  # a pass that never comes
_PATIENCE, _ASK_AGAIN = 30.0, 2.0  # seconds, until an actor has a place; between two questions
_START = 60.0  # seconds, that an actor's start may take and do not count as a batch's
_POLL = 0.02  # seconds, since Ray's own wait cannot be interrupted
_IN_VAIN = 3  # times that it is started anew, where it is lost before it has a place
_AGAIN = 1.0  # second, since Ray believes for a while in a machine that is gone
_CLEAN_UP = 0.5  # seconds, for the iterators' own
_ASIDE = {"concurrency_group": "aside"}
_POOLS: "weakref.WeakSet[RayPool]" = weakref.WeakSet()


class _Actor:
    """The driver's side of one of them."""

    def __init__(self, handle: Any, life: int, where: Any, begin: Any, vain: int) -> None:
        self.handle, self.life, self._where, self._node = handle, life, where, ""
        self.begin = begin  # pass, and its chunk
        self.vain = vain  # so many before it in this life were lost without a place
        self.calls: collections.deque[tuple[int, Any]] = collections.deque()  # passes, and refs
        self.idle = 0  # places whose calls found nothing to bring
        self.gone = False
        self.since = self.asked = time.monotonic()

    @property
    def node(self) -> str:
        """Where it runs; "" as long as it has no place, or did not answer."""
        if not self._node:
            with contextlib.suppress(Exception):
                self._node = str(self._where())
        return self._node


class RayPool(Pool):
    """Each worker is an actor, in a process of its own, on any machine of the cluster.

    The factory travels by cloudpickle and lies in the object store once, with its large arrays,
    which the workers of a machine share and cannot write into. Its modules, and labkit, have to be
    there (or in runtime_env). A worker asks for one CPU, unless `job.options` say otherwise: those
    are an actor's (num_cpus, resources, runtime_env, scheduling_strategy, ...), and `address`.

    Small chunks that come quickly travel several at a time: where one then takes long, up to 15
    that were made just before it wait for it, and are lost with it if its actor dies.

    Without a cluster, Ray is started here for as long as this process lives. Its servers (GCS,
    raylet, object manager, agents and each worker, on ports that they draw) listen on all
    interfaces and run code for whoever has the token (RAY_AUTH_TOKEN), so that stays on.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: no cluster answers at the address.
        ValueError: this process uses another cluster already.
        TypeError: the factory, or something that it refers to, cannot be pickled.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        packed = pack_factory(job.factory, "ray")
        options = dict(job.options or {})
        self._ray = cluster.connect(options.pop("address", None), _end_all)
        # On this machine alone there may be more workers than cores, as there may be of processes.
        self._options = {"num_cpus": 0 if cluster.is_own() else 1, **options}
        parts = [pickle.PickleBuffer(buffer) for buffer in packed[1]]
        self._packed = self._ray.put((packed[0], parts))
        self._actors: list[_Actor] = []
        self._waiting: set[int] = set()  # of whose place nothing is known
        self._head = cluster.Head(self._ray)
        self._woken = threading.Event()
        _POOLS.add(self)

    def _start(self, worker: int, life: int, begin: int) -> None:
        vain = 0
        for before in self._actors[worker : worker + 1]:
            self._kill(before)
            if not before.node:
                time.sleep(_AGAIN)
            vain = before.vain + 1 if life == before.life else 0
        job = self.job
        actor = self._ray.remote(concurrency_groups={"aside": 1})(Producer)
        orders = worker, self.spec, job.stages, job.skip, begin
        handle = actor.options(**self._options).remote(self._packed, orders)
        # Ahead of the first batch, in which it may die.
        where = functools.partial(self._peek, handle.where.remote())
        new = _Actor(handle, life, where, (self.epoch, begin), vain)
        self._actors[worker : worker + 1] = [new]
        self._waiting.add(worker)
        for _ in range(PLACES):
            self._call(worker)

    def _call(self, worker: int) -> None:
        actor = self._actors[worker]
        # A call without a cluster would start one.
        if actor.gone or self._stopping or not self._ray.is_initialized():
            return
        actor.calls.append((self.epoch, actor.handle.next.remote(self.epoch)))

    def _peek(self, ref: Any) -> Any:
        """What a call has brought; raises if it is not done. "" without a cluster: it would start
        one."""
        return self._ray.get(ref, timeout=0) if self._ray.is_initialized() else ""

    def _receive(self, seconds: float) -> list[Message]:
        self._head.look()
        messages: list[Message] = []
        end = time.monotonic() + seconds
        while not messages:
            done = self._done(max(0.0, min(_POLL, end - time.monotonic())))
            for worker in range(len(self._actors)):
                messages += self._done_by(worker, done)
            messages += filter(None, map(self._without_a_place, [*self._waiting]))
            if self._woken.is_set() or time.monotonic() >= end:
                break
        self._woken.clear()
        return messages

    def _done(self, seconds: float) -> set[Any]:
        """Calls of all actors that are done; waits up to `seconds` for one that is next. Not by
        futures, whose results Ray unpacks in a thread that all others then wait for."""
        living = [actor for actor in self._actors if actor.calls and not actor.gone]
        if not living or not self._ray.is_initialized():
            self._woken.wait(seconds)
            return set()
        refs = [ref for actor in living for _, ref in actor.calls]
        # All of them, so that they travel to this machine at once.
        done = set(self._ray.wait(refs, num_returns=len(refs), timeout=0)[0])
        heads = [actor.calls[0][1] for actor in living]
        if seconds and done.isdisjoint(heads):
            done |= set(self._ray.wait(heads, timeout=seconds)[0])
        return done

    def _done_by(self, worker: int, done: set[Any]) -> Iterator[Message]:
        """In the order of the calls: a small result may be here before a large one ahead of it."""
        actor = self._actors[worker]
        while not actor.gone and actor.calls and actor.calls[0][1] in done:
            epoch, ref = actor.calls.popleft()
            try:
                told = self._ray.get(ref)
            except BaseException as error:
                if not self._again(worker):
                    yield self._lost(worker, error)
                return
            for one in told:
                yield self._message(worker, epoch, one, (0,) if one is told[-1] else ())
            if not told:
                actor.idle += 1
                if epoch != self.epoch:
                    self._use_idle(worker)

    def _message(self, worker: int, epoch: int, told: Any, slots: tuple[int, ...]) -> Message:
        actor = self._actors[worker]
        life = actor.life
        kind, *content = told
        if kind == "chunk":
            arrays, seconds, stages, number, spec = content
            if self.spec is None:
                self.spec = pickle.loads(spec)
            return Chunk(worker, arrays, seconds, epoch, slots, True, stages, number, life)
        if kind == "ended":
            actor.idle += 1
            return Ended(worker, epoch, life)
        summary, text, code, *number = content
        where = actor.node or self._asked(actor, "where") or "a node"
        failed = summary, f"On {where}:\n{readable(text)}", load_error(code, summary)
        if kind == "skipped":
            return Skipped(worker, *failed, epoch, number[0], slots, life=life)
        self._kill(actor)
        return Lost(worker, *failed, life=life)

    def _again(self, worker: int) -> bool:
        """Whether one that was to replace a lost one is replaced itself: Ray may have given it a
        place on the machine that is gone, and that is no second fault."""
        actor = self._actors[worker]
        again = actor.life > 0 and not actor.node and actor.vain < _IN_VAIN
        if again and not self._stopping:
            epoch, begin = actor.begin
            self._start(worker, actor.life, begin if epoch == self.epoch else 0)
        return again

    def _lost(self, worker: int, error: BaseException) -> Lost:
        actor, full = self._actors[worker], self._ray.exceptions
        node = actor.node or ("" if self._head.gone else cluster.place(actor.handle))
        where = f" on {node}" if node else ""
        why = (
            f"died{where}: its actor is gone, or what it made ({type(error).__name__}). Look for a "
            "crash in native code, for a killer of processes that use too much memory, or for a "
            "machine that left the cluster."
        )
        if isinstance(error, (full.OutOfDiskError, full.ObjectStoreFullError)):
            size, has = self._asked(actor, "nbytes") or 0, cluster.store(self._ray, node)
            why = (
                f"made what the object store{where} has no room for: {size / 1e6:.1f} MB in one "
                f"call, and all of the store is {has / 1e6:.1f} MB, with no disk left beside it. "
                "Yield smaller batches, or give Ray more (object_store_memory, or disk)."
            )
        self._kill(actor)
        text = f"What Ray says of it:\n{error}"
        return Lost(worker, why, text, error, life=actor.life)

    def _without_a_place(self, worker: int) -> Lost | None:
        """If it still has none, and the cluster has none."""
        actor, now = self._actors[worker], time.monotonic()
        if actor.gone or actor.node:
            self._waiting.discard(worker)
            return None
        if now - actor.since < _START:
            self._states[worker].since = now
        patience = min(_PATIENCE, (self.job.timeout or 2 * _PATIENCE) / 2)
        if now - actor.since < patience or now - actor.asked < _ASK_AGAIN:
            return None
        actor.asked = now
        lacks = cluster.missing(self._ray, self._options)
        if not lacks or not cluster.waits(actor.handle, self._options):
            return None
        self._kill(actor)
        return Lost(
            worker,
            f"found no place in the cluster within {patience:g} s: it needs {lacks}. Take fewer "
            "workers, ask for less (worker_options), or add nodes; half of timeout is the limit.",
            life=actor.life,
        )

    def _kill(self, actor: _Actor) -> None:
        actor.gone = True
        if self._head.gone:
            return  # it would be asked
        with contextlib.suppress(Exception):
            self._ray.kill(actor.handle)

    def _refill(self, worker: int, slots: tuple[int, ...]) -> None:
        if slots:  # the last chunk of its call
            self._call(worker)

    def _use_idle(self, worker: int) -> None:
        actor = self._actors[worker]
        calls, actor.idle = actor.idle, 0
        for _ in range(calls):
            self._call(worker)

    def _go_on(self, worker: int) -> None:
        actor = self._actors[worker]
        if not actor.gone and self._ray.is_initialized():
            actor.handle.begin.options(**_ASIDE).remote(self.epoch)
            self._use_idle(worker)

    def _room(self, worker: int) -> int:
        return PLACES

    def _doing(self, worker: int) -> str:
        actor = self._actors[worker]
        if not actor.node:
            return "its actor has not started yet\n"
        text = self._asked(actor, "doing") or "(it did not answer)\n"
        return f"On {actor.node}:\n{readable(text)}"

    def _asked(self, actor: _Actor, method: str) -> Any:
        with contextlib.suppress(Exception):
            its = getattr(actor.handle, method).options(**_ASIDE)
            return self._ray.get(its.remote(), timeout=2.0)
        return None

    def wake(self) -> None:
        self._woken.set()

    def _end(self, seconds: float) -> list[str]:
        deadline = time.monotonic() + seconds
        living = [actor for actor in self._actors if not actor.gone]
        here = self._ray.is_initialized() and not self._head.gone
        if here and living:
            with contextlib.suppress(Exception):
                for actor in living:
                    actor.handle.begin.options(**_ASIDE).remote(_OVER)
                left = [actor.handle.leave.remote() for actor in living if actor.node]
                self._ray.wait(left, num_returns=len(left), timeout=min(_CLEAN_UP, seconds))
        for actor in living:
            self._kill(actor)
        if here:
            # Their last calls fail once they are gone.
            last = [ref for actor in living for _, ref in actor.calls]
            if last:
                rest = max(0.0, deadline - time.monotonic())
                self._ray.wait(last, num_returns=len(last), timeout=rest, fetch_local=False)
        self._actors.clear()
        self._packed = None
        return []


def _end_all() -> None:
    """Ahead of Ray's own end at exit."""
    for pool in list(_POOLS):
        pool.stop(1.0)
