"""Questions that come at the same time are answered together: one thread and one statement for all who wait.

A thread and a connection for each request cost several times what the query does: threads that wait for a database
keep waking each other. Here one batch is under way while the next one gathers. A question never joins a batch that
has begun, so that its answer is as of after it was asked.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

from sqlalchemy.exc import TimeoutError as PoolTimeout

from services.database import ANSWER_SECONDS, CONNECT_SECONDS
from services.errors import ForgetdError

__all__ = ["Together"]

AT_ONCE = 100  # questions in a batch: bounds its statement
PATIENCE_SECONDS = ANSWER_SECONDS + CONNECT_SECONDS  # a connection that is lost, and another one

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Together(Generic[Question, Answer]):
    """Asks one synchronous function for all callers on an event loop.

    Args:
        answer: Given the questions of a batch, its answers in their order, a refusal being an answer too; called in a
            thread of its own, never twice at once. What it raises, all of the batch are told.
        seconds: How long a question waits, those before it included.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Question]], Sequence[Answer | ForgetdError]],
        *,
        seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._answer, self._seconds = answer, seconds
        self._waiting: deque[tuple[Question, asyncio.Future[Answer]]] = deque()
        self._busy = False
        # Who waits and until when, the oldest first; one timer for all costs less than one for each.
        self._deadlines: deque[tuple[float, asyncio.Future[Answer]]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        # Not of the common threads, which slow uploads may hold; and cheaper than them: nothing waits for its result.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="together")

    async def ask(self, question: Question) -> Answer:
        """The answer to a question; raises what it was refused with, or that it waited too long, as for a full pool."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((question, future))
        self._deadlines.append((loop.time() + self._seconds, future))
        if self._timer is None:
            self._watch(loop)
        if not self._busy:
            self._busy = True
            loop.call_soon(self._begin, loop)  # after all else that has arrived by now
        return await future

    def close(self) -> None:
        """End the thread; nobody asks any more."""
        self._thread.shutdown(wait=False)

    def _give_up(self, loop: asyncio.AbstractEventLoop) -> None:
        """At the oldest one's deadline, which may be answered by now: tell all who waited too long."""
        now = loop.time()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, future = self._deadlines.popleft()
            if not future.done():
                future.set_exception(PoolTimeout(f"no answer within {self._seconds:g} s"))
        self._timer = None
        self._watch(loop)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have a timer while somebody waits, and none else."""
        while self._deadlines and self._deadlines[0][1].done():
            self._deadlines.popleft()
        if self._deadlines and self._timer is None:
            self._timer = loop.call_at(self._deadlines[0][0], self._give_up, loop)
        elif not self._deadlines and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        batch: list[tuple[Question, asyncio.Future[Answer]]] = []
        while self._waiting and len(batch) < AT_ONCE:
            question, future = self._waiting.popleft()
            if not future.done():  # else its caller is gone, or waited too long
                batch.append((question, future))
        self._busy = bool(batch)
        if batch:
            self._thread.submit(self._work, batch, loop)

    def _work(self, batch: list[tuple[Question, asyncio.Future[Answer]]], loop: asyncio.AbstractEventLoop) -> None:
        """In the thread: answer a batch, whatever comes of it."""
        futures = [future for _, future in batch]
        settled: list[tuple[asyncio.Future[Answer], Answer | Exception]] = []
        try:
            answers = self._answer([question for question, _ in batch])
            settled += zip(futures, answers, strict=True)
        except Exception as error:
            settled = [(future, error) for future in futures]
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(self._settle, settled, loop)

    def _settle(
        self, settled: list[tuple[asyncio.Future[Answer], Answer | Exception]], loop: asyncio.AbstractEventLoop
    ) -> None:
        for future, answer in settled:
            if future.done():  # its caller is gone
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
        self._watch(loop)
        self._begin(loop)
