"""A generator that runs in a thread, a few items ahead of whoever asks for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import pytest

from msq.extract.ahead import Stopped, made_ahead

Watch = Callable[[], None]


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("ahead")]


def until(true: Callable[[], bool]) -> bool:
    """Whether it comes true; the ten minutes are there only to end."""
    end = time.monotonic() + 600
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


def test_items_come_in_order_and_only_so_many_wait() -> None:
    made: list[int] = []
    where: set[int] = set()

    def make(watch: Watch) -> Generator[int, None, None]:
        for i in range(20):
            watch()
            where.add(threading.get_ident())
            made.append(i)
            yield i

    seen = []
    for i in made_ahead(make, 3):
        assert until(lambda i=i: len(made) >= min(i + 3, 20))  # while this one is worked on
        time.sleep(0.01)
        assert len(made) <= i + 4
        seen.append(i)
    assert seen == list(range(20))
    assert len(where) == 1
    assert where != {threading.get_ident()}
    assert threads() == []


def test_an_error_in_the_thread_is_raised_in_its_turn() -> None:
    def make(_: Watch) -> Generator[int, None, None]:
        yield 1
        yield 2
        raise ValueError("the third one")

    seen = []

    def ask() -> None:
        for i in made_ahead(make, 4):
            time.sleep(0.02)
            seen.append(i)

    with pytest.raises(ValueError, match="the third one") as caught:
        ask()
    assert seen == [1, 2]
    assert any(entry.name == "make" for entry in caught.traceback)
    assert threads() == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_whoever_asks_no_more_ends_the_thread(error: Any) -> None:
    log: list[str] = []
    working = threading.Event()

    def make(watch: Watch) -> Generator[int, None, None]:
        try:
            yield 1
            while True:  # a long piece of work before the next item
                working.set()
                watch()
                time.sleep(0.001)
        except Stopped:
            log.append("stopped")
            raise
        finally:
            log.append("closed")

    def ask() -> None:
        items = made_ahead(make, 2)
        try:
            for _ in items:
                assert working.wait(600)
                if error is not None:
                    raise error
                break
        finally:
            items.close()

    if error is None:
        ask()
    else:
        with pytest.raises(error):
            ask()
    assert log == ["stopped", "closed"]
    assert threads() == []


def test_nothing_begins_before_it_is_asked_for() -> None:
    def make(_: Watch) -> Generator[int, None, None]:
        raise AssertionError
        yield 1

    made_ahead(make, 2).close()
    assert threads() == []
