"""Work done before it is asked for."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The same items, drawn by a thread of their own, up to ``depth`` before they are asked for.

    An error in the thread is raised here, in its place. Closed early, the thread ends with the item it is at.
    """
    ready: queue.Queue[T | _End] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: "T | _End") -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def draw() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    break
        except BaseException as error:
            put(_End(error))
        else:
            put(_End(None))

    thread = threading.Thread(target=draw, name="ahead", daemon=True)  # a server that hangs must not hold up an exit
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        thread.join(timeout=5)


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error
