"""Questions that come at the same time are answered together: one thread and one statement for all who wait.

A thread and a connection for each request cost several times what the query does: threads that wait for a database
keep waking each other. Here one batch is under way while the next one gathers. A question never joins a batch that
has begun, so that its answer is as of after it was asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

from services.errors import ForgetdError

__all__ = ["Together"]

AT_ONCE = 100  # questions in a batch: bounds its statement

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Together(Generic[Question, Answer]):
    """Asks one synchronous function for all callers on an event loop.

    Args:
        answer: Given the questions of a batch, its answers in their order, a refusal being an answer too; called in a
            thread of its own, never twice at once. What it raises, all of the batch are told.
    """

    def __init__(self, answer: Callable[[Sequence[Question]], Sequence[Answer | ForgetdError]]) -> None:
        self._answer = answer
        self._waiting: list[tuple[Question, asyncio.Future[Answer]]] = []
        self._busy = False
        # Not of the common threads, which slow uploads may hold; and cheaper than them: nothing waits for its result.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="together")

    async def ask(self, question: Question) -> Answer:
        """The answer to a question; raises what it was refused with."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((question, future))
        if not self._busy:
            self._busy = True
            loop.call_soon(self._begin, loop)  # after all else that has arrived by now
        return await future

    def close(self) -> None:
        """End the thread; nobody asks any more."""
        self._thread.shutdown(wait=False)

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        batch, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
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
        if self._waiting:
            self._begin(loop)
        else:
            self._busy = False
