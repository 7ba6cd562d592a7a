"""One block of a TarFlow over tokens that arrive a few at a time: what came before is kept as keys and values."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import ModelError
from models.tarflow_blocks import LOG_SCALE_LIMIT, Block, Layer


class GuidanceError(ModelError):
    """This guidance cannot be given: correct its weight or temperature, or name a class to be led to."""


@dataclass(frozen=True)
class Guidance:
    """Leads samples away from a weaker prediction: a~ = a + w (a - a'), b~ = b + w (b - b') in every block.

    The weaker prediction a', b' knows no class and attends at temperature tau. With a class and tau = 1 that is
    guidance to the class; without a class and with another tau, unconditional guidance. Zhai et al., sec. 3.4.
    """

    weight: float
    """w; 0 leaves the flow's own law."""
    temperature: float = 1.0
    """tau, above 0."""
    annealed: bool = False
    """Whether the weight rises linearly from nothing at the first token to w at the last."""

    def __post_init__(self) -> None:
        """Refuse what is not finite or not positive."""
        if not math.isfinite(self.weight):
            raise GuidanceError(f"the weight of guidance must be finite, not {self.weight}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise GuidanceError(f"the attention's temperature must be above 0, not {self.temperature}")

    def lead(self, strong: Tensor, weak: Tensor, first: int, tokens: int) -> Tensor:
        """strong + w (strong - weak) of tokens first, first + 1, ...: (b, n, d)."""
        weight: float | Tensor = self.weight
        if self.annealed:
            places = torch.arange(first, first + strong.shape[1], device=strong.device, dtype=strong.dtype)
            weight = (self.weight / max(1, tokens - 1)) * places[:, None]  # (n, 1)
        return strong + weight * (strong - weak)


def guided_coefficients(
    block: Block, x: Tensor, label: Tensor | None, guidance: Guidance | None
) -> tuple[Tensor, Tensor]:
    """`Block.coefficients` under guidance: log-scale and shift of every token in one parallel pass."""
    a, b = block.coefficients(x, label)
    if guidance is None:
        return a, b
    weak_a, weak_b = block.coefficients(x, None, temperature=guidance.temperature)
    a, b = (guidance.lead(s, w, 0, x.shape[1]) for s, w in ((a, weak_a), (b, weak_b)))
    return a.clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT), b


class Decoder:
    """A block that is read a window at a time; the cache lives here, none on the module, so calls do not meet.

    Args:
        block: which.
        like: any tensor (b, t, d) of the batch's shape, dtype and device.
        label: (b,), or null for none.
        guidance: null for none; else every row has a twin for the weaker prediction.
    """

    def __init__(self, block: Block, like: Tensor, label: Tensor | None, guidance: Guidance | None) -> None:
        batch, tokens, _ = like.shape
        self._block, self._guidance, self._tokens = block, guidance, tokens
        self._layers = [layer for layer in block.attn_blocks if isinstance(layer, Layer)]
        attention = self._layers[0].attention
        self._width, self._head_width = attention.proj.in_features, attention.head_width
        self._heads = self._width // self._head_width
        self._rows = batch if guidance is None else 2 * batch
        embedding = block.embedding(label)  # (1 or b, t, width)
        if guidance is not None:
            strong = embedding.expand(batch, -1, -1)
            embedding = torch.cat([strong, block.embedding(None).expand(batch, -1, -1)])
        self._embedding = embedding + block.proj_in.bias  # (1 or rows, t, width)
        shape = (len(self._layers), self._rows, tokens, 2, self._heads, self._head_width)
        self._cache = like.new_empty(shape)
        self._scale = attention.scale(1.0)
        self._sharpness = None
        if guidance is not None:
            self._sharpness = like.new_ones(self._rows, 1, 1, 1)
            self._sharpness[batch:] = 1 / guidance.temperature
        self._mask = like.new_full((tokens, tokens), -math.inf).triu_(1)

    def read(self, x: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Take tokens x (b, w, d) as those from `start` on, and say what follows each.

        What was read from there on before is forgotten, so a window can be read again with better values.

        Returns:
            Log-scale and shift of tokens start + 1 to start + w: 2 x (b, w, d). There may be no such last token.
        """
        rows, w = self._rows, x.shape[1]
        stop = start + w
        if self._guidance is not None:
            x = x.repeat(2, 1, 1)
        h = torch.matmul(x, self._block.proj_in.weight.t()) + self._embedding[:, start:stop]  # (rows, w, width)
        h = h.view(rows * w, self._width)
        mask = None if w == 1 else self._mask[start:stop, :stop]
        for layer, cache in zip(self._layers, self._cache, strict=True):
            attention, mlp = layer.attention, layer.mlp
            normed = F.layer_norm(h, (self._width,), attention.norm.weight, attention.norm.bias, attention.norm.eps)
            qkv = F.linear(normed, attention.qkv.weight, attention.qkv.bias)
            qkv = qkv.view(rows, w, 3, self._heads, self._head_width)
            cache[:, start:stop] = qkv[:, :, 1:]
            q = qkv[:, :, 0].transpose(1, 2)  # (rows, heads, w, head_width)
            if self._sharpness is not None:
                q = q * self._sharpness
            k, v = cache[:, :stop].permute(2, 0, 3, 1, 4)  # 2 x (rows, heads, stop, head_width)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self._scale)
            mixed = mixed.transpose(1, 2).reshape(rows * w, self._width)
            h = h + F.linear(mixed, attention.proj.weight, attention.proj.bias)
            normed = F.layer_norm(h, (self._width,), mlp.norm.weight, mlp.norm.bias, mlp.norm.eps)
            h = h + mlp.main(normed)
        h = h.view(rows, w, self._width)
        a, b = self._block.read_out(h, x.dtype)  # 2 x (rows, w, d)
        if self._guidance is None:
            return a, b
        batch = rows // 2
        lead = self._guidance.lead
        a, b = (lead(value[:batch], value[batch:], start + 1, self._tokens) for value in (a, b))
        return a.clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT), b
