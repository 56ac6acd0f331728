"""Threads in place of a run's processes, with a table in place of JAX's key-value store."""

import threading
import time

from commands import free_port

from dmd_jax.errors import UserError
from dmd_jax.parallel.lifeline import Lifeline
from dmd_jax.parallel.processes import Processes


class Store:
    """What Processes needs of JAX's client."""

    def __init__(self):
        self.values, self._lock = {}, threading.Lock()

    def key_value_set(self, key, value):
        with self._lock:
            assert key not in self.values
            self.values[key] = value

    def key_value_dir_get(self, folder):
        with self._lock:
            return [item for item in self.values.items() if item[0].startswith(folder)]

    def key_value_delete(self, folder):
        with self._lock:
            for key in [key for key in self.values if key.startswith(folder)]:
                del self.values[key]


class Company:
    """Processes that have found each other, and what each heard of others' ends."""

    def __init__(self, count):
        address = f"127.0.0.1:{free_port()}"
        self.heard, self.store = [[] for _ in range(count)], Store()
        self.lifelines = each(
            count,
            lambda index: Lifeline(
                address, index, count, timeout=10, on_end=lambda *end: self.heard[index].append(end)
            ),
        )
        self.all = [Processes(lifeline, self.store) for lifeline in self.lifelines]

    def wait_until_heard(self, index):
        deadline = time.monotonic() + 10
        while not self.heard[index]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self.heard[index][0]


def each(count, action):
    """action(0), …, action(count - 1) at once; what they return, or the UserErrors' texts."""
    results = [None] * count

    def run(index):
        try:
            results[index] = action(index)
        except UserError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results
