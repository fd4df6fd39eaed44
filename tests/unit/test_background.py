"""Work in a thread of its own: the same items in their order, no more ahead than wanted, and errors where they belong."""

import threading
from collections.abc import Iterator

import pytest

from deepstack_jax.background import in_background


def test_items_come_in_their_order_from_another_thread():
    def items() -> Iterator[tuple[int, int]]:
        for number in range(20):
            yield number, threading.get_ident()

    found = list(in_background(items(), 3))
    assert [number for number, _ in found] == list(range(20))
    assert len({thread for _, thread in found} - {threading.get_ident()}) == 1


@pytest.mark.parametrize("ahead", [1, 4])
def test_no_more_are_made_than_are_wanted_ahead(ahead):
    made, let = [], threading.Semaphore(0)

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            let.release()
            yield number

    stream = in_background(items(), ahead)
    assert next(stream) == 0
    for _ in range(ahead + 1):
        assert let.acquire(timeout=60)
    stream.close()  # waits for what is being made
    assert made == list(range(ahead + 1))


def test_what_goes_wrong_is_raised_in_its_turn():
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    stream = in_background(items(), 5)
    assert next(stream) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
