"""Where the time of each step went: waiting for data, or computing."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from labkit.instruments.waiting import everything


class StepTimer:
    """Splits each step into the seconds that it waited for data and the seconds that it computed.

    In a graph, time stamps before and after the dequeue op tell the two apart, so a step that
    waits inside `session.run` is not taken for a slow one:

        timer = StepTimer()
        inputs = timer.around(runner.get_inputs)
        ...
        timer.run(sess, train_op)

    With feed_dict the waiting is in Python: `with timer.waiting(): batch = next(iterator)`.

    Attributes:
        waits: seconds per step spent waiting for data.
        computes: seconds per step spent in the rest of `run`.
    """

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.computes: list[float] = []
        self._stamps: Any = ()
        self._waited = 0.0
        self._totals = self._seen = (0.0, 0.0)

    def around(self, get_inputs: Callable[[], Any]) -> Any:
        """Calls `get_inputs()` and returns its tensors, with time stamps around what makes them."""
        from labkit.quiet import tf

        before = tf.timestamp()
        with tf.control_dependencies([before]):
            inputs = get_inputs()
        tensors = tf.nest.flatten(inputs)
        with tf.control_dependencies(tensors):
            after = tf.timestamp()
        self._stamps = (before, after)
        # Without this the model could start on one tensor while the clock still waits its turn.
        with tf.control_dependencies([after]):
            return tf.nest.map_structure(tf.identity, inputs)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside the block as waiting, for the step that follows."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began

    def run(self, sess: Any, fetches: Any, feed_dict: Any = None) -> Any:
        """`sess.run(fetches, feed_dict)`, timed as one step."""
        began = time.perf_counter()
        results, stamps = sess.run((fetches, self._stamps), feed_dict)
        total = time.perf_counter() - began
        inside = stamps[1] - stamps[0] if stamps else 0.0
        waited, computed = self._waited + inside, total - inside
        self.waits.append(waited)
        self.computes.append(computed)
        everything.add(1, waited + computed, waited, waited + computed)
        self._totals = self._totals[0] + waited, self._totals[1] + computed
        self._waited = 0.0
        return results

    def recent_waiting(self) -> float:
        """Share of waiting, 0 to 1, in the steps that ended since the last call; NaN without one.

        A probe for `UsageMonitor`.
        """
        seen, self._seen = self._seen, self._totals
        waited, computed = (now - then for now, then in zip(self._seen, seen, strict=True))
        return waited / (waited + computed) if waited + computed else math.nan
