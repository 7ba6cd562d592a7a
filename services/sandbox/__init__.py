"""Processes that touch foreign bytes: no credentials, no network where the kernel allows it, and limits."""

from services.sandbox.classifiers import TRIALS, try_classifier
from services.sandbox.images import DECODERS, ImageDecoder, Pixels

__all__ = ["DECODERS", "TRIALS", "ImageDecoder", "Pixels", "try_classifier"]
