"""The parts of a TarFlow: a causal transformer, and the autoregressive affine map of tokens that it drives.

Parameter names follow the layout in which Apple publishes its weights, so that those state dicts load by name.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPANSION = 4
"""Width of an MLP's hidden layer, in widths of the transformer."""
EMBEDDING_STD = 0.01
"""Standard deviation of position and class embeddings at the start."""
LOG_SCALE_LIMIT = 30.0
"""Log-scales are cut off here, so that no block overflows float32; those of usable flows stay below 10."""
NO_LABEL = -1
"""A label that stands for none: the image is read under the mean of all class embeddings."""


class Linear(nn.Linear):
    """A linear layer that starts at zero, without a global seed; `reset` draws its weights."""

    def reset_parameters(self) -> None:
        """Zero: for weights to be loaded into."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Start from weights and biases uniform within 1 / sqrt(inputs)."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in (self.weight, self.bias):
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)


class Attention(nn.Module):
    """Causal multi-head self-attention of normalised tokens."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, h: Tensor, temperature: float) -> Tensor:
        """(b, t, width) -> the same shape; logits are divided by the temperature."""
        q, k, v = self.heads(h)  # 3 x (b, heads, t, head_width)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale(temperature))
        return _as_tensor(self.proj(mixed.transpose(1, 2).flatten(2)))  # (b, t, width)

    def heads(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens (b, t, width), each (b, heads, t, head_width)."""
        qkv = _as_tensor(self.qkv(self.norm(h)))  # (b, t, 3 width)
        b, t, width = h.shape
        q, k, v = qkv.view(b, t, 3, width // self.head_width, self.head_width).permute(2, 0, 3, 1, 4)
        return q, k, v

    def scale(self, temperature: float) -> float:
        """What logits are multiplied by."""
        return 1 / (math.sqrt(self.head_width) * temperature)


class Mlp(nn.Module):
    """The token-wise half of a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.main = nn.Sequential(Linear(width, EXPANSION * width), nn.GELU(), Linear(EXPANSION * width, width))

    def forward(self, h: Tensor) -> Tensor:
        """(b, t, width) -> the same shape."""
        return _as_tensor(self.main(self.norm(h)))


class Layer(nn.Module):
    """One layer of the transformer; both halves are residual."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.attention = Attention(width, head_width)
        self.mlp = Mlp(width)

    def forward(self, h: Tensor, temperature: float) -> Tensor:
        """(b, t, width) -> the same shape."""
        h = h + self.attention(h, temperature)
        return h + _as_tensor(self.mlp(h))


class Block(nn.Module):
    """z_i = (x_i - b(x_<i)) exp(-a(x_<i)) over tokens i in one order; log|det| = -sum a.

    The first token has nothing before it and stays as it is. Embeddings are held by place, not by order.

    Args:
        tokens: t, how many there are.
        size: d, values in each.
        width, head_width, n_layer: of the transformer.
        n_classes: class embeddings; 0 for none.
        reverse: whether tokens are read from the last to the first.
    """

    class_embed: nn.Parameter | None

    def __init__(
        self, tokens: int, size: int, *, width: int, head_width: int, n_layer: int, n_classes: int, reverse: bool
    ) -> None:
        super().__init__()
        self.reverse = reverse
        self.proj_in = Linear(size, width)
        self.pos_embed = nn.Parameter(torch.zeros(tokens, width))
        if n_classes:
            self.class_embed = nn.Parameter(torch.zeros(n_classes, 1, width))
        else:
            self.register_parameter("class_embed", None)
        self.attn_blocks = nn.ModuleList(Layer(width, head_width) for _ in range(n_layer))
        self.proj_out = Linear(width, 2 * size)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Start as the identity: everything is drawn but the last layer, which stays at zero."""
        for module in self.modules():
            if isinstance(module, Linear) and module is not self.proj_out:
                module.reset(generator)
        for embedding in (self.pos_embed, self.class_embed):
            if embedding is not None:
                embedding.copy_(torch.randn(embedding.shape, generator=generator) * EMBEDDING_STD)

    def forward(self, x: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (b, t, d) and labels (b,) to tokens of the same places, and log|det| (b,)."""
        x = self.ordered(x)  # (b, t, d)
        a, b = self.coefficients(x, label)
        return self.ordered((x - b) * torch.exp(-a)), -a.sum(dim=(1, 2))

    def coefficients(self, x: Tensor, label: Tensor | None, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-scale a and shift b of every token, each from those before it: (b, t, d) both, like x, in x's dtype.

        Args:
            x: tokens (b, t, d) in this block's order.
            label: (b,), or null for none.
            temperature: of the attention; only guidance has another than 1.
        """
        h = _as_tensor(self.proj_in(x)) + self.embedding(label)  # (b, t, width)
        for layer in self.attn_blocks:
            h = layer(h, temperature)
        a, b = self.read_out(h[:, :-1], x.dtype)  # 2 x (b, t - 1, d)
        return F.pad(a, (0, 0, 1, 0)), F.pad(b, (0, 0, 1, 0))  # 2 x (b, t, d)

    def read_out(self, h: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Log-scale and shift of the tokens that follow those of h, (b, n, width): 2 x (b, n, d)."""
        a, b = _as_tensor(self.proj_out(h)).to(dtype).chunk(2, dim=2)
        return a.clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT), b

    def embedding(self, label: Tensor | None) -> Tensor:
        """What is added to the tokens in this block's order: (1 or b, t, width)."""
        places = self.ordered(self.pos_embed[None])  # (1, t, width)
        if self.class_embed is None:
            return places
        mean = self.class_embed.mean(dim=0)  # (1, width): what stands for no class
        if label is None:
            return places + mean
        known = (label != NO_LABEL)[:, None, None]  # (b, 1, 1)
        return places + torch.where(known, self.class_embed[label.clamp(min=0)], mean)

    def ordered(self, x: Tensor) -> Tensor:
        """Tokens (b, t, ...) from places to this block's order, or back: both are the same."""
        return x.flip(1) if self.reverse else x


def _as_tensor(value: Any) -> Tensor:
    """Modules are untyped callables; this gives their one output its type."""
    return value  # type: ignore[no-any-return]  # a layer's output, which is a tensor
