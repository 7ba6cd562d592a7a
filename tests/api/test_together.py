"""Questions asked at once are answered together, each with its own answer, none with an old one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy.exc import TimeoutError as PoolTimeout

from api.together import AT_ONCE, Together
from services.errors import ForgetdError, NotFound


class Asked:
    """Squares numbers; 13 is refused, 0 a defect. Notes each batch, the first of which ends when it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go_on = threading.Event()

    def __call__(self, numbers: Sequence[int]) -> list[int | ForgetdError]:
        self.batches.append(list(numbers))
        assert self.go_on.wait(10)
        if 0 in numbers:
            raise ZeroDivisionError
        return [NotFound("unlucky") if number == 13 else number**2 for number in numbers]


@contextmanager
def asking(**options: float) -> Iterator[tuple[Asked, Together[int, int]]]:
    asked = Asked()
    together = Together[int, int](asked, **options)
    try:
        yield asked, together
    finally:
        together.close()


def gather(asked: Asked, *questions: Coroutine[Any, Any, int]) -> list[int | BaseException]:
    """Ask the first alone; the others while it is being answered."""

    async def all_of_them() -> list[int | BaseException]:
        first = asyncio.ensure_future(questions[0])
        while not asked.batches:
            await asyncio.sleep(0.001)
        others = [asyncio.ensure_future(question) for question in questions[1:]]
        await asyncio.sleep(0)
        asked.go_on.set()
        return list(await asyncio.gather(first, *others, return_exceptions=True))

    return asyncio.run(all_of_them())


def test_what_comes_meanwhile_is_the_next_batch() -> None:
    with asking() as (asked, together):
        answers = gather(asked, *(together.ask(number) for number in (1, 2, 3, 2)))

    assert answers == [1, 4, 9, 4]
    assert asked.batches == [[1], [2, 3, 2]]


def test_refusal_is_its_askers_alone() -> None:
    with asking() as (asked, together):
        one, unlucky, three = gather(asked, *(together.ask(number) for number in (1, 13, 3)))

    assert (one, three) == (1, 9)
    assert isinstance(unlucky, NotFound)


def test_defect_ends_its_batch_and_no_other() -> None:
    with asking() as (asked, together):
        first, *failed = gather(asked, *(together.ask(number) for number in (1, 0, 3)))
        later = asyncio.run(together.ask(5))

    assert (first, later) == (1, 25)
    assert [type(error) for error in failed] == [ZeroDivisionError] * 2


def test_batches_are_bounded() -> None:
    with asking() as (asked, together):
        answers = gather(asked, *(together.ask(number) for number in range(1, 2 * AT_ONCE) if number != 13))

    assert len(answers) == 2 * AT_ONCE - 2
    assert max(len(batch) for batch in asked.batches) == AT_ONCE


def test_asker_who_left_holds_nobody_up() -> None:
    async def leave(asked: Asked, together: Together[int, int]) -> int:
        gone = asyncio.ensure_future(together.ask(2))
        while not asked.batches:
            await asyncio.sleep(0.001)
        gone.cancel()
        waiting = asyncio.ensure_future(together.ask(3))
        await asyncio.sleep(0)
        asked.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await gone
        return await waiting

    with asking() as (asked, together):
        assert asyncio.run(leave(asked, together)) == 9


def test_who_waits_too_long_is_told_and_is_not_asked_for() -> None:
    async def wait(asked: Asked, together: Together[int, int]) -> list[int | BaseException]:
        hung = [asyncio.ensure_future(together.ask(2))]
        while not asked.batches:
            await asyncio.sleep(0.001)
        hung.append(asyncio.ensure_future(together.ask(3)))
        told = await asyncio.gather(*hung, return_exceptions=True)
        later = asyncio.ensure_future(together.ask(4))
        await asyncio.sleep(0)
        asked.go_on.set()
        return [*told, await later]

    with asking(seconds=0.5) as (asked, together):
        *told, answer = asyncio.run(asyncio.wait_for(wait(asked, together), 8))

    assert [type(error) for error in told] == [PoolTimeout] * 2
    assert answer == 16
    assert asked.batches == [[2], [4]]


def test_a_batch_of_nobody_is_not_asked() -> None:
    async def leave(asked: Asked, together: Together[int, int]) -> int:
        first = asyncio.ensure_future(together.ask(2))
        while not asked.batches:
            await asyncio.sleep(0.001)
        gone = asyncio.ensure_future(together.ask(3))
        await asyncio.sleep(0)
        gone.cancel()
        asked.go_on.set()
        await first
        return await together.ask(4)

    with asking() as (asked, together):
        assert asyncio.run(asyncio.wait_for(leave(asked, together), 8)) == 16

    assert asked.batches == [[2], [4]]
