"""The tokenizer of the captioned digits: CLIP's byte-pair encoding, cut down from the vocabulary in a wheel.

The vocabulary (1.3 MB) comes with open-clip-torch and is read from its files: no code of that package is run, so that
nothing of what it depends on is needed. The first merges are those of frequent words, of which captions are made.
"""

import gzip
import importlib.metadata
from itertools import islice
from pathlib import Path

from transformers import CLIPTokenizer

from models.errors import ModelError

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"


class VocabularyError(ModelError):
    """CLIP's vocabulary is not here: install the wheel that has it, without what that depends on."""


def clip_tokenizer(merges: int, positions: int) -> CLIPTokenizer:
    """CLIP's tokenizer with its first merges alone: rarer words are spelled in more pieces.

    Args:
        merges: how many of the 48,894 merges are kept; the vocabulary has 514 tokens more.
        positions: longest prompt in tokens, the first and the last included.
    """
    pairs, letters = clip_merges(merges), _byte_letters()
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(first + second for first, second in pairs),
        START,
        END,
    ]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=positions, pad_token=END)


def write_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write vocab.json and merges.txt, as Stable Diffusion folders have them and `save_pretrained` leaves them out."""
    tokenizer.backend_tokenizer.model.save(str(folder))


def clip_merges(count: int) -> list[tuple[str, str]]:
    """The first merges of CLIP's byte-pair encoding, in order: two tokens each."""
    with gzip.open(_vocabulary_file(), "rt", encoding="utf-8", newline="\n") as file:
        lines = [line.split() for line in islice(file, 1, count + 1)]  # the first line is a title
    if len(lines) < count or any(len(line) != 2 for line in lines):
        raise VocabularyError(f"{VOCABULARY} does not begin with {count} merges of two tokens; reinstall its wheel")
    return [(first, second) for first, second in lines]


def _byte_letters() -> list[str]:
    """A printable letter for each of the 256 bytes, in the order of CLIP's vocabulary: printable bytes come first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]


def _vocabulary_file() -> Path:
    """Where the wheel keeps the vocabulary; the package itself is not imported, which would load much else."""
    try:
        files = importlib.metadata.files("open-clip-torch") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if file.name == VOCABULARY and path.is_file():
            return path
    raise VocabularyError(
        "CLIP's vocabulary comes with the open-clip-torch wheel: pip install --no-deps open-clip-torch"
    )
