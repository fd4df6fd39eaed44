"""Work of the host that goes on while the device computes."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


def in_background(items: Iterator[T], ahead: int) -> Generator[T]:
    """The same items in the same order, made by a thread of their own, at most `ahead` of them before they are asked for.

    What making one raises is raised where it would be next. Whoever stops early waits for the one that is being made.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        waiting = deque(pool.submit(next, items, _END) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, items, _END))
            yield item  # pyright: ignore[reportReturnType]
    finally:
        pool.shutdown(cancel_futures=True)
