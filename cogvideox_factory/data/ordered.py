"""Threads that keep order: results come in the order of the inputs, with a bounded number in flight.

Decoding, hashing and drawing noise release the interpreter lock, so threads are enough; an exception travels
to the caller unchanged, at its item's turn.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int, ahead: int | None = None
) -> Iterator[Result]:
    """Yield `function(item)` for each item in order.

    Args:
        function: runs in a worker thread.
        items: may be endless; at most `ahead` items are taken before their results are asked for.
        num_workers: threads; 0 runs in the caller's.
        ahead: results in flight or waiting; default two a worker.
    """
    if num_workers == 0:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="data")
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= (ahead or 2 * num_workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
