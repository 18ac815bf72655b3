"""Iterator factories that more than one file of tests needs."""

import threading


def taking_turns(batches):
    """A factory whose workers take their batches from one iterator."""
    shared, lock = iter(batches), threading.Lock()

    def factory():
        while True:
            with lock:
                batch = next(shared, None)
            if batch is None:
                return
            yield batch

    return factory
