"""One line an event on standard error; nothing that a caller sent is ever in it."""

from __future__ import annotations

import logging
import time

__all__ = ["configure_logging"]

QUIET = ("botocore", "boto3", "s3transfer", "urllib3", "amqp", "kombu")


def configure_logging(level: int = logging.INFO) -> None:
    """Set up the root logger of a process: UTC time, level, where from, what."""
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
