"""Whom a record is about: known from the context, in threads too, and told once."""

from __future__ import annotations

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

from services.logs import JsonFormatter, LineFormatter, about, fields, inheriting


def record(message: str, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("test", level, __file__, 1, message, None, None)


def test_a_line_ends_with_the_fields_that_its_message_does_not_say() -> None:
    with about(job="job_1", attempt=2, token=7):
        line = LineFormatter().format(record("job_1 attempt 2: claimed"))

    assert line.endswith("INFO test job_1 attempt 2: claimed token=7")


def test_a_record_as_json_has_the_fields_as_members() -> None:
    with about(job="job_1", attempt=2):
        told = json.loads(JsonFormatter().format(record("claimed\nor not")))

    assert told.pop("time").endswith("Z")
    assert told == {"level": "INFO", "logger": "test", "message": "claimed\nor not", "job": "job_1", "attempt": 2}


def test_no_field_replaces_what_a_record_says_itself() -> None:
    with about(message="x", level="x", logger="x", time="x", exception="x"):
        told = json.loads(JsonFormatter().format(record("claimed")))

    assert (told["message"], told["level"], told["logger"]) == ("claimed", "INFO", "test")
    assert "exception" not in told


def test_what_is_about_nothing_has_no_fields() -> None:
    with about(job="job_1"):
        pass

    assert fields() == {}


def test_an_inner_subject_adds_to_the_outer_one_and_ends_with_its_block() -> None:
    with about(job="job_1"):
        with about(attempt=1):
            inner = dict(fields())
        outer = dict(fields())

    assert (inner, outer) == ({"job": "job_1", "attempt": 1}, {"job": "job_1"})


def test_a_thread_that_inherits_is_about_the_same_and_another_is_not() -> None:
    seen: dict[str, dict[str, object]] = {}

    def look(name: str) -> None:
        seen[name] = dict(fields())

    with about(job="job_1"):
        threads = [
            threading.Thread(target=inheriting(look), args=("heir",)),
            threading.Thread(target=look, args=("stranger",)),
        ]
    for thread in threads:
        thread.start()
        thread.join()

    assert seen == {"heir": {"job": "job_1"}, "stranger": {}}


def test_any_number_of_threads_inherit_one_function_at_once() -> None:
    meeting = threading.Barrier(4)

    def look(_: int) -> dict[str, object]:
        meeting.wait(10)
        return dict(fields())

    with about(job="job_1"), ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(inheriting(look), range(4)))

    assert seen == [{"job": "job_1"}] * 4
