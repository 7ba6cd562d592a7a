"""Processes that touch foreign bytes: no credentials, no network where the kernel allows it, and limits."""

from services.sandbox.images import ImageDecoder, Pixels

__all__ = ["ImageDecoder", "Pixels"]
