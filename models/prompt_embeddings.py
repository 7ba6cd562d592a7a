"""What a frozen text encoder makes of prompts, kept: each distinct row of tokens is encoded once."""

from collections.abc import Callable

import torch
from torch import Tensor

from models.prompt_tokens import Shared

__all__ = ["Embeddings"]

MAX_ROWS = 10_000
MAX_BYTES = 2**30
"""Of all rows that are kept; one of SD 1.x takes 237 KB."""


class Embeddings:
    """Embeddings by row of tokens, float32 on the CPU; the row that was not asked for longest goes first."""

    def __init__(self, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> None:
        self._max_rows, self._max_bytes = max_rows, max_bytes
        self._rows = Shared()  # in the order in which they were asked for last

    def __len__(self) -> int:
        return len(self._rows)

    def of(self, condition: Tensor, encode: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The embeddings of the distinct rows of `condition`, and which of them each row has.

        Args:
            condition: token ids, int64 (n, tokens).
            encode: embeds one row, (1, tokens) on the CPU. One at a time: in batches, rounding would depend on what
                else was asked for, and a resumed run would not equal one that was never interrupted.

        Returns:
            (m, tokens, width) float32 and int64 (n,), both on the CPU.
        """
        condition = condition.detach().cpu().contiguous()
        order: dict[bytes, int] = {}
        found: list[Tensor] = []
        which = []
        for row in condition:
            key = row.numpy().tobytes()
            if key not in order:
                order[key] = len(found)
                found.append(self._kept(key, row, encode))
            which.append(order[key])
        return torch.stack(found), torch.tensor(which)

    def _kept(self, key: bytes, row: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        value: Tensor | None = self._rows.pop(key, None)
        if value is None:
            value = encode(row[None])[0].detach().to("cpu", torch.float32).clone()
            while len(self._rows) >= min(self._max_rows, max(1, self._max_bytes // value.nbytes)):
                del self._rows[next(iter(self._rows))]
        self._rows[key] = value
        return value
