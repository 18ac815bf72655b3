"""The engine: what makes the queue runner hold.

    QueueRunner ──spec(), feed(queue, epoch), stop()──► Feeder (one thread, one run, one pool)
                                                          │ set_active, get, release, next_epoch
                       batches.Spec: does it fit? ◄─┐     ▼
    your iterator ──► produce (one loop for all) ───┴─► Pool: ThreadPool | ProcessPool | RayPool
                                                          │ Chunk | Ended | Lost | Skipped
                                                          ▼
                         Feeder ──arrays──► tf_queue (graph or eager) ──► training
                                   past it, for a loop in Python: handover.py

    a process:  child.main ──wire──► ProcessPool; batches by ring.py, the factory by pickling.py

    an actor:  ray.py, and there actor.py; of which cluster, cluster.py

    copies:  memory.py, aligned as TensorFlow wants it, and warm

    a moment without batches, for `watch`:  rest.py

    a known order:  turns.py, order.py; record.py notes what came, and state.py goes on from that

    several trainers of one data set:  shares.py

Workers deliver, the feeder decides. An exception, a death, a stall and the end of the data are
messages, and each reaches the consumer. No TensorFlow but in tf_queue.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

from labkit.engine import cluster
from labkit.engine.auto import usable_cores
from labkit.engine.pool import Pool
from labkit.engine.processes import ProcessPool
from labkit.engine.ray import PLACES, RayPool
from labkit.engine.ring import MOST_CHUNKS
from labkit.engine.threads import ThreadPool


@dataclass(frozen=True)
class Kind:
    """A kind of worker.

    Attributes:
        pool: runs them.
        limit: how many n_workers="auto" may use, given `worker_options`.
        plural: what several are called.
        single: what one is called, if not by the kind's name.
        shares_lock: Python's lock (GIL) is one for them and the training step.
        ahead: the most chunks that one of them has ready.
        by_name: it is not tried where nobody asked for it.
        elsewhere: the factory has to go to another process.
        takes_options: it has `worker_options`.
        copies: of a batch's bytes on their way, at the least: into the queue, out of it, and of a
            process into shared memory. One fewer of large samples, which are queued as they lie.
    """

    pool: type[Pool]
    limit: Callable[..., int]
    plural: str
    single: str = ""
    shares_lock: bool = False
    ahead: int = 2
    copies: int = 2
    by_name: bool = False
    elsewhere: bool = False
    takes_options: bool = False


# The cheapest first: one worker of it is the serial loop.
KINDS: dict[str, Kind] = {
    "thread": Kind(ThreadPool, lambda: 32, "threads", shares_lock=True),
    "process": Kind(ProcessPool, usable_cores, "processes", ahead=MOST_CHUNKS, copies=3,
                    elsewhere=True),
    "ray": Kind(RayPool, cluster.cores, "actors", "actor", ahead=PLACES, copies=3, by_name=True,
                elsewhere=True, takes_options=True),
}  # fmt: skip
TRIED = tuple(name for name, kind in KINDS.items() if not kind.by_name)
