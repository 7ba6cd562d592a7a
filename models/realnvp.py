"""RealNVP: a multiscale flow of affine couplings over images, and its plain form over vectors (Dinh et al., 2017).

Small parts first, the whole flow last; `forward` and `inverse` stand side by side.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.architecture import check_halvings, check_ranges
from models.errors import ArchitectureError
from models.flow_layers import Conv, Linear, Norm, check_input, check_shape, log_normal

MAX_BLOCKS = 10
MAX_FLOWS = 64
MAX_HIDDEN = 4096
MAX_DEPTH = 16

Pattern = Literal["checkerboard", "channels", "parity", "halves"]
"""Which half of the input a coupling keeps; the first two for squeezed images, the others for vectors."""
PATTERNS: tuple[Pattern, ...] = ("checkerboard", "channels", "parity", "halves")


def split(x: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Cut x in two along axis 1.

    "checkerboard" reads squeezed images, (b, 4c, h, w) in the order (c, row, column) of each 2x2 patch: pixels whose
    row and column are both even or both odd, and the others. "channels" and "halves" cut in the middle, "parity" takes
    even and odd dimensions.
    """
    if pattern == "checkerboard":
        patches = x.reshape(len(x), -1, 4, *x.shape[2:])  # (b, c, 4, h, w)
        return patches[:, :, ::3].flatten(1, 2), patches[:, :, 1:3].flatten(1, 2)  # 2 x (b, 2c, h, w)
    if pattern == "parity":
        return x[:, ::2], x[:, 1::2]
    middle = x.shape[1] // 2
    return x[:, :middle], x[:, middle:]


def join(first: Tensor, second: Tensor, pattern: Pattern) -> Tensor:
    """The inverse of `split`."""
    if pattern == "checkerboard":
        a, b = (half.reshape(len(half), -1, 2, *half.shape[2:]) for half in (first, second))  # 2 x (b, c, 2, h, w)
        return torch.cat([a[:, :, :1], b, a[:, :, 1:]], dim=2).flatten(1, 2)  # (b, 4c, h, w)
    if pattern == "parity":
        x = first.new_empty(len(first), first.shape[1] + second.shape[1])
        x[:, ::2], x[:, 1::2] = first, second
        return x
    return torch.cat([first, second], dim=1)


class Residual(nn.Module):
    """h + layer(relu(layer(relu(h))))."""

    def __init__(self, layer: type[Linear], hidden: int) -> None:
        super().__init__()
        self.inner, self.outer = layer(hidden, hidden), layer(hidden, hidden)

    def forward(self, h: Tensor) -> Tensor:
        """(b, hidden, ...) -> the same shape."""
        return h + cast(Tensor, self.outer(F.relu(self.inner(F.relu(h)))))


class Net(nn.Module):
    """What a coupling makes of the half that it keeps; its last layer starts at zero."""

    def __init__(self, layer: type[Linear], inputs: int, outputs: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.enter = layer(inputs, hidden)
        self.blocks = nn.Sequential(*(Residual(layer, hidden) for _ in range(depth)))
        self.leave = layer(hidden, outputs)

    def reset(self, generator: torch.Generator) -> None:
        """Random weights in all layers but the last; what a residual block adds starts small."""
        self.enter.reset(generator)
        for block in self.blocks:
            if isinstance(block, Residual):
                block.inner.reset(generator)
                block.outer.reset(generator, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, ...) -> (b, outputs, ...)."""
        return cast(Tensor, self.leave(F.relu(self.blocks(self.enter(x)))))


class Coupling(nn.Module):
    """One half moves: y_b = x_b exp(s(x_a)) + t(x_a) with s = bound tanh(s'), y_a = x_a (Dinh et al., eq. 7-9).

    `bound` is learned, one a channel that moves, so that no scale leaves [exp(-bound), exp(bound)] (sec. 3.6, 4.1).

    Args:
        channels: of the whole input; or its dimensions.
        hidden: width of the net.
        depth: its residual blocks.
        pattern: how the input is split.
        flip: whether the first part moves, and not the second.
    """

    def __init__(self, channels: int, hidden: int, depth: int, *, pattern: Pattern, flip: bool) -> None:
        super().__init__()
        self.pattern: Pattern = pattern
        self.flip = flip
        vector = pattern in ("parity", "halves")
        first = (channels + 1) // 2 if pattern == "parity" else channels // 2
        kept, moved = (channels - first, first) if flip else (first, channels - first)
        self.net = Net(Linear if vector else Conv, kept, 2 * moved, hidden, depth)
        self.bound = nn.Parameter(torch.ones((1, moved) if vector else (1, moved, 1, 1)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x -> the same shape, and log|det| (b,)."""
        a, b = self._parts(x)
        s, t = self._scale_and_shift(a)
        return self._whole(a, b * s.exp() + t), s.flatten(1).sum(dim=1)

    def inverse(self, y: Tensor) -> Tensor:
        """The exact inverse of `forward`'s map."""
        a, b = self._parts(y)
        s, t = self._scale_and_shift(a)
        return self._whole(a, (b - t) * torch.exp(-s))

    def _scale_and_shift(self, a: Tensor) -> tuple[Tensor, Tensor]:
        s, t = cast(Tensor, self.net(a)).chunk(2, dim=1)
        return self.bound * torch.tanh(s), t

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What stays and what moves."""
        first, second = split(x, self.pattern)
        return (second, first) if self.flip else (first, second)

    def _whole(self, kept: Tensor, moved: Tensor) -> Tensor:
        return join(moved, kept, self.pattern) if self.flip else join(kept, moved, self.pattern)


class Step(nn.Module):
    """Norm, then coupling. The norm stands for the paper's batch norm: a likelihood may not depend on batch mates."""

    def __init__(self, channels: int, hidden: int, depth: int, *, pattern: Pattern, flip: bool) -> None:
        super().__init__()
        self.norm = Norm(channels, spatial=pattern in ("checkerboard", "channels"))
        self.coupling = Coupling(channels, hidden, depth, pattern=pattern, flip=flip)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x -> the same shape, and log|det| (b,)."""
        y, shared = self.norm(x)
        y, log_det = self.coupling(y)
        return y, log_det + shared

    def inverse(self, y: Tensor) -> Tensor:
        """The exact inverse of `forward`'s map."""
        return self.norm.inverse(self.coupling.inverse(y))


class Block(nn.Module):
    """One scale: squeeze, couplings of both patterns in turn, then (but for the last) half of the channels leaves.

    A block over vectors neither squeezes nor lets anything leave.
    """

    def __init__(self, channels: int, flows: int, hidden: int, depth: int, *, vector: bool, last: bool) -> None:
        super().__init__()
        self.vector, self.last = vector, last
        inside = channels if vector else channels * 4
        patterns: tuple[Pattern, Pattern] = ("parity", "halves") if vector else ("checkerboard", "channels")
        self.flows = nn.ModuleList(
            Step(inside, hidden, depth, pattern=pattern, flip=bool(i % 2)) for pattern in patterns for i in range(flows)
        )

    def steps(self) -> list[Step]:
        """In the order of `forward`."""
        return [step for step in self.flows if isinstance(step, Step)]

    def enter(self, x: Tensor) -> Tensor:
        """Squeeze images: (b, c, h, w) -> (b, 4c, h/2, w/2), in the order (c, row, column)."""
        return x if self.vector else F.pixel_unshuffle(x, 2)

    def leave(self, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What goes on (None at the last block) and the latent that leaves (None within a flow of vectors)."""
        if self.last:
            return None, h
        if self.vector:
            return h, None
        kept, z = h.chunk(2, dim=1)  # 2 x (b, 2c, h/2, w/2)
        return kept, z

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """x to what goes on, what leaves, and log|det| (b,)."""
        h = self.enter(x)
        log_det = x.new_zeros(len(x))
        for step in self.steps():
            h, term = step(h)
            log_det = log_det + term
        return *self.leave(h), log_det

    def inverse(self, kept: Tensor | None, z: Tensor | None) -> Tensor:
        """From what went on and what left back to the block's input."""
        h = torch.cat([part for part in (kept, z) if part is not None], dim=1)
        for step in reversed(self.steps()):
            h = step.inverse(h)
        return h if self.vector else F.pixel_shuffle(h, 2)


class RealNVP(nn.Module):
    """The flow x -> (z_1, ..., z_L) ~ N(0, I) over images x in [-0.5, 0.5)^(c, h, w), or over vectors x in R^d.

    log p(x) = log N(z; 0, I) + log|det dz / dx|, in nats, one value an image. Dinh, Sohl-Dickstein and Bengio, "Density
    estimation using Real NVP", sec. 3. Departures: no logit in front, so that the density is over pixels and reaches
    beyond their range; norms with a data-dependent start instead of batch norm; channel masks at the last scale too,
    since it is what taming tunes; nets of checkerboard couplings run on the squeezed image, at a quarter of the cost.

    Args:
        image_shape: (channels, height, width), sides multiples of 2^n_block; or (d,), for vectors, d >= 2.
        n_bits: colour depth the model was trained at; images are dequantised with U(0, 1) / 2^n_bits.
        n_block: scales L; over vectors, blocks of the same size.
        n_flow: couplings of each pattern in a block (paper: 3).
        hidden: width of the coupling nets.
        depth: residual blocks of a coupling net.
        generator: draws the starting weights; without it the flow is the identity, for weights to be loaded into.
    """

    family: ClassVar[str] = "realnvp"

    def __init__(
        self,
        image_shape: Sequence[int],
        n_bits: int,
        *,
        n_block: int = 3,
        n_flow: int = 3,
        hidden: int = 64,
        depth: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        ranges = {
            "n_block": (n_block, 1, MAX_BLOCKS), "n_flow": (n_flow, 2, MAX_FLOWS), "hidden": (hidden, 1, MAX_HIDDEN),
            "depth": (depth, 0, MAX_DEPTH),
        }  # fmt: skip
        shape = check_shape(image_shape, n_bits)
        check_ranges(ranges)
        check_halvings(shape, n_block)
        self.image_shape = cast(tuple[int, int, int], shape)  # or (d,): no checkpoint holds a flow over vectors
        self.n_bits = n_bits
        self.architecture: dict[str, Any] = {
            "n_block": n_block, "n_flow": n_flow, "hidden": hidden, "depth": depth
        }  # fmt: skip
        vector = len(shape) == 1
        self.blocks = nn.ModuleList(
            Block(shape[0] if vector else shape[0] * 2**i, n_flow, hidden, depth, vector=vector, last=i == n_block - 1)
            for i in range(n_block)
        )
        if generator is not None:
            for module in self.modules():
                if isinstance(module, Net):
                    module.reset(generator)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """x (b, c, h, w) or (b, d) to standard normal latents, one a scale, and log|det| (b,) in nats."""
        check_input(x, self.image_shape)
        latents, h, log_det = self._through(self._scales()[:-1], x)
        last, _, rest = self._through(self._scales()[-1:], h)
        return [*latents, *last], log_det + rest

    def inverse(self, latents: Sequence[Tensor]) -> Tensor:
        """Standard normal latents, one a scale, back to x."""
        waiting, scales = list(latents), len(self.latent_shapes())
        if len(waiting) != scales:
            raise ArchitectureError(f"inverse needs one latent a scale, {scales} in all, not {len(waiting)}")
        h = waiting.pop()
        for block in reversed(self._scales()):
            h = block.inverse(None, h) if block.last else block.inverse(h, None if block.vector else waiting.pop())
        return h

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), (b,) nats; images (b, c, h, w) in [-0.5, 0.5), or vectors (b, d)."""
        check_input(x, self.image_shape)
        h, share = self.prefix(x)
        return share + self.suffix_log_prob(h)

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Draw n images or vectors from latents of standard deviation `temperature`; not clipped."""
        weight = next(self.parameters())
        return self.inverse([
            (torch.randn((n, *shape), generator=generator, device=generator.device) * temperature).to(weight)
            for shape in self.latent_shapes()
        ])  # fmt: skip

    def latent_shapes(self) -> list[tuple[int, ...]]:
        """Shape of the latent of each scale; their sizes add up to that of x."""
        if len(self.image_shape) == 1:
            return [self.image_shape]
        channels, height, width = self.image_shape
        count = len(self.blocks)
        shapes = [(channels * 2 ** (i + 1), height >> (i + 1), width >> (i + 1)) for i in range(count)]
        last = shapes[-1]
        return [*shapes[:-1], (last[0] * 2, last[1], last[2])]

    def prefix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All blocks but the last: x to what enters the last one, and their share of log p (b,)."""
        latents, h, log_det = self._through(self._scales()[:-1], x)
        return h, log_det + log_normal(latents) if latents else log_det

    def suffix_log_prob(self, h: Tensor) -> Tensor:
        """The last block's share of log p, from what enters it: (b,) nats."""
        latents, _, log_det = self._through(self._scales()[-1:], h)
        return log_det + log_normal(latents)

    def suffix_parameters(self) -> list[nn.Parameter]:
        """The last block, whose channels see the whole image; empty for a flow of one block, which cannot be cut."""
        return list(self.blocks[-1].parameters()) if len(self.blocks) > 1 else []

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Data-dependent start of every norm on a batch x, (b, c, h, w) or (b, d). Call once, before training."""
        check_input(x, self.image_shape)
        h: Tensor | None = x
        for block in self._scales():
            if h is None:
                break
            h = block.enter(h)
            for step in block.steps():
                step.norm.initialize(h)
                h, _ = step(h)
            h, _ = block.leave(cast(Tensor, h))

    def _through(self, blocks: Sequence[Block], x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Latents that leave, what goes on (or x itself where nothing does), and log|det| (b,)."""
        latents: list[Tensor] = []
        h, log_det = x, x.new_zeros(len(x))
        for block in blocks:
            kept, z, term = block(h)
            log_det = log_det + term
            latents += [] if z is None else [z]
            h = h if kept is None else kept
        return latents, h, log_det

    def _scales(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]
