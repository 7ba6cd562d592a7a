"""Randomness by name: each draw of a run has its own generator, so that a resumed run needs none of its past."""

import hashlib

import torch


def stream(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for one purpose, such as `stream(seed, "noise", step)`; equal names give equal draws."""
    digest = hashlib.sha256(repr((int(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
