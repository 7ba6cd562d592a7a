"""From prompts to rows of token ids, by a CLIP tokenizer whose files lie in the checkpoint beside the weights.

A prompt that would be cut off, or that the vocabulary does not know, is refused: what is forgotten would be another
concept than the one that was asked for.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from models.architecture import check_ranges
from models.errors import ArchitectureError, PromptError
from models.tensor_files import quoted

__all__ = ["MAX_FILE_BYTES", "SPECIAL", "PromptTokenizer", "Shared", "checked_tokenizer"]

SPECIAL = {
    "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}  # fmt: skip
"""The special tokens, with what SD 1.x has; SD 2.x pads with "!"."""
MAX_FILE_BYTES = 16 * 2**20
"""Of vocab.json and of merges.txt; CLIP's have 1.1 and 0.5 MB."""
MAX_TOKEN_CHARACTERS = 100


def checked_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer's configuration: the bytes of its two files, and its special tokens.

    Raises:
        ArchitectureError: a field is unknown, missing or out of range.
    """
    fields = {"vocab_bytes", "merges_bytes", *SPECIAL}
    if not isinstance(config, Mapping) or config.keys() != fields:
        raise ArchitectureError(f"the tokenizer's configuration has the fields {', '.join(sorted(fields))}")
    check_ranges({name: (config[name], 1, MAX_FILE_BYTES) for name in ("vocab_bytes", "merges_bytes")})
    for name in SPECIAL:
        if not isinstance(config[name], str) or not 0 < len(config[name]) <= MAX_TOKEN_CHARACTERS:
            raise ArchitectureError(f"the tokenizer's {name} is a short text, not {quoted(config[name])}")
    return dict(config)


class Shared(dict[Any, Any]):
    """A cache that copies of a model have in common: what it holds follows from weights that none of them changes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class PromptTokenizer(nn.Module):
    """A CLIP tokenizer as a module without weights: `vocab` and `merges` are its files' bytes, uint8.

    Args:
        config: see `checked_tokenizer`.
        positions: tokens of a row, which is padded to it.
        vocab_size: ids that the text encoder has.
    """

    vocab: Tensor
    merges: Tensor

    def __init__(self, config: Mapping[str, Any], positions: int, vocab_size: int) -> None:
        super().__init__()
        self.config = checked_tokenizer(config)
        self.positions, self.vocab_size = positions, vocab_size
        self.register_buffer("vocab", torch.zeros(self.config["vocab_bytes"], dtype=torch.uint8))
        self.register_buffer("merges", torch.zeros(self.config["merges_bytes"], dtype=torch.uint8))
        self._built: Shared = Shared()

    def rows(self, prompts: Sequence[str]) -> Tensor:
        """Token ids of prompts, int64 (n, positions), on the CPU.

        Raises:
            PromptError: a prompt has no tokens, too many of them, or something that the vocabulary does not have.
            ArchitectureError: the files are none of a CLIP tokenizer.
        """
        return torch.tensor([self._row(prompt) for prompt in prompts], dtype=torch.int64).view(-1, self.positions)

    @property
    def empty(self) -> Tensor:
        """The row of the empty prompt, (positions,)."""
        return torch.tensor(self._padded([]), dtype=torch.int64)

    def forget(self) -> None:
        """Build the tokenizer anew when it is needed next: the files were replaced."""
        self._built = Shared()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the files, built when it is needed first."""
        if not self._built:
            self._built["tokenizer"] = self._build()
        return self._built["tokenizer"]

    def _row(self, prompt: str) -> list[int]:
        if not isinstance(prompt, str):
            raise PromptError(f"a prompt is text, not {quoted(prompt)}")
        if "\0" in prompt or any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise PromptError(f"the prompt {quoted(prompt)} holds characters that are no text; take them out")
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise PromptError(f"the prompt {quoted(prompt)} has no tokens; say in words what is meant")
        special = {self.tokenizer.convert_tokens_to_ids(self.config[name]) for name in SPECIAL if name != "pad_token"}
        if special & set(ids):
            raise PromptError(
                f"the prompt {quoted(prompt)} has parts that the model's tokenizer does not know, or that mark the "
                "start or end of a text; say it in other words"
            )
        most = self.positions - 2
        if len(ids) > most:
            raise PromptError(
                f"the prompt {quoted(prompt)} has {len(ids)} tokens and the model reads {most}: the last "
                f"{len(ids) - most} would be cut off; shorten it"
            )
        return self._padded(ids)

    def _padded(self, ids: list[int]) -> list[int]:
        start, end, pad = (
            self.tokenizer.convert_tokens_to_ids(self.config[name]) for name in ("bos_token", "eos_token", "pad_token")
        )
        row = [start, *ids, end]
        return row + [pad] * (self.positions - len(row))

    def _build(self) -> Any:
        vocab, merges = _vocabulary(self._bytes("vocab"), self.vocab_size), _merges(self._bytes("merges"))
        special = {name: self.config[name] for name in SPECIAL}
        if odd := sorted(set(special.values()) - vocab.keys()):
            raise ArchitectureError(f"the tokenizer's special token {quoted(odd[0])} is not in its vocabulary")
        try:
            return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=self.positions, **special)
        except BaseException as error:  # what the tokenizer's own language raises on merges that do not fit
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise ArchitectureError(f"vocabulary and merges are of no tokenizer: {quoted(error)}") from error

    def _bytes(self, name: str) -> bytes:
        return bytes(getattr(self, name).cpu().numpy().tobytes())


def _vocabulary(text: bytes, size: int) -> dict[str, int]:
    try:
        vocab = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArchitectureError("the tokenizer's vocab.json is no JSON") from error
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    if not ids or not all(type(one) is int and 0 <= one < size for one in ids) or len(set(ids)) != len(ids):
        raise ArchitectureError(
            f"the tokenizer's vocab.json does not give each token an id of its own below {size:,}, the text encoder's "
            "vocab_size"
        )
    return {str(token): one for token, one in vocab.items()}


def _merges(text: bytes) -> list[tuple[str, str]]:
    """The pairs that merges.txt lists, one a line; `str.splitlines` would split at more than line ends."""
    found = []
    try:
        lines = text.decode().split("\n")
    except UnicodeDecodeError as error:
        raise ArchitectureError("the tokenizer's merges.txt is no text") from error
    for line in lines:
        if line.startswith("#version") or not line.strip("\r"):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise ArchitectureError(f"a line of the tokenizer's merges.txt is no pair: {quoted(line)}")
        found.append((pair[0], pair[1]))
    return found
