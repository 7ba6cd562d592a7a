"""Glow: a multiscale flow of actnorm, invertible 1x1 convolutions and coupling layers (Kingma & Dhariwal, 2018).

Parameter names and conventions follow the layout in which the Flow Taming authors publish their weights, so that their
state dicts load by name. Small parts first, the whole flow last; `forward` and `inverse` stand side by side.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.architecture import check_halvings, check_image, check_ranges
from models.convolutions import Conv, ZeroConv, as_tensor
from models.errors import ArchitectureError

MAX_BLOCKS = 10
MAX_FLOWS = 256
MAX_HIDDEN = 4096
RECOMPUTE_BYTES = 32 * 2**20
"""A step that would keep more than this for its backward pass keeps its input alone, and is computed a second time.

The paper's flow keeps 1.07 GiB an image without (128 steps, of which the first 32 keep 24 MiB each). A flow of as many
steps then keeps at most 4 GiB, whatever the batch, and small flows pay nothing. Gradients have the same bits.
"""
KEPT_TENSORS = 3
"""Tensors of the coupling net's hidden width that autograd keeps: two activations, and the padded second one."""


class ActNorm(nn.Module):
    """y = scale (x + loc), one pair a channel; log|det| = h w sum log|scale|.

    `initialized` belongs to the published layout. Nothing here reads it to change a weight: the data-dependent start is
    an explicit call (`Glow.initialize`), so a loaded model is never re-initialised by its first forward.
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.uint8))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set loc and scale so that each channel of y has mean 0 and deviation 1 on x, (b, c, h, w)."""
        self.loc.copy_(-x.mean(dim=(0, 2, 3), keepdim=True))
        self.scale.copy_(1.0 / (x.std(dim=(0, 2, 3), keepdim=True) + 1e-6))
        self.initialized.fill_(1)


class InvConv(nn.Module):
    """An invertible 1x1 convolution with a free matrix W; log|det| = h w log|det W|."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_identity(channels)[:, :, None, None])

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Start from a random rotation."""
        self.weight.copy_(_random_rotation(self.weight.shape[0], generator)[:, :, None, None])

    def matrix(self) -> tuple[Tensor, Tensor]:
        """W, (c, c), and log|det W|, a scalar in nats."""
        w = self.weight[:, :, 0, 0]  # (c, c)
        return w, torch.linalg.slogdet(w.double())[1].to(w.dtype)


class InvConvLU(nn.Module):
    """The same convolution as W = P L (U + diag(sign exp(log s))); log|det| = h w sum log s (Glow, eq. 10-11)."""

    w_p: Tensor
    s_sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("w_p", _identity(channels))
        self.register_buffer("s_sign", torch.ones(channels))
        self.w_l = nn.Parameter(_identity(channels))
        self.w_s = nn.Parameter(torch.zeros(channels))
        self.w_u = nn.Parameter(torch.zeros(channels, channels))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Start from the LU factors of a random rotation."""
        p, lower, upper = torch.linalg.lu(_random_rotation(self.w_p.shape[0], generator))
        s = upper.diagonal()
        self.w_p.copy_(p)
        self.s_sign.copy_(s.sign())
        self.w_l.copy_(lower)
        self.w_s.copy_(s.abs().log())
        self.w_u.copy_(upper.triu(1))

    def matrix(self) -> tuple[Tensor, Tensor]:
        """W, (c, c), and log|det W|, a scalar in nats. Entries on the wrong side of a triangle are not read."""
        eye = torch.eye(self.w_p.shape[0], dtype=self.w_p.dtype, device=self.w_p.device)
        lower = self.w_l.tril(-1) + eye
        upper = self.w_u.triu(1) + torch.diag(self.s_sign * self.w_s.exp())
        return self.w_p @ lower @ upper, self.w_s.sum()


class Coupling(nn.Module):
    """The first half of the channels moves the second: b' = b + t(a), or affine b' = (b + t(a)) sigmoid(s(a) + 2)."""

    def __init__(self, channels: int, hidden: int, affine: bool) -> None:
        super().__init__()
        self.affine = affine
        half = channels // 2
        self.net = nn.Sequential(
            Conv(half, hidden, 3), nn.ReLU(), Conv(hidden, hidden, 1), nn.ReLU(),
            ZeroConv(hidden, channels if affine else half),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(b, c, h, w) -> the same shape, and log|det| (b,), or None where it is zero."""
        a, b = x.chunk(2, dim=1)  # 2 x (b, c/2, h, w)
        if not self.affine:
            return torch.cat([a, b + as_tensor(self.net(a))], dim=1), None
        s, t = as_tensor(self.net(a)).chunk(2, dim=1)  # 2 x (b, c/2, h, w)
        log_scale = F.logsigmoid(s + 2.0)
        return torch.cat([a, (b + t) * log_scale.exp()], dim=1), log_scale.sum(dim=(1, 2, 3))

    def inverse(self, y: Tensor) -> Tensor:
        """The exact inverse of `forward`'s map."""
        a, b = y.chunk(2, dim=1)  # 2 x (b, c/2, h, w)
        if not self.affine:
            return torch.cat([a, b - as_tensor(self.net(a))], dim=1)
        s, t = as_tensor(self.net(a)).chunk(2, dim=1)  # 2 x (b, c/2, h, w)
        return torch.cat([a, b * torch.exp(-F.logsigmoid(s + 2.0)) - t], dim=1)


class FlowStep(nn.Module):
    """actnorm -> 1x1 convolution -> coupling. The first two are one affine map of the channels and run as one."""

    def __init__(self, channels: int, hidden: int, affine: bool, lu: bool) -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.invconv: InvConv | InvConvLU = InvConvLU(channels) if lu else InvConv(channels)
        self.coupling = Coupling(channels, hidden, affine)
        self._hidden = hidden

    def recomputed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward`, of which autograd keeps x alone: what happens in between is computed again on the way back."""
        y, log_det = checkpoint(self, x, use_reentrant=False, preserve_rng_state=False)
        return as_tensor(y), as_tensor(log_det)

    def kept_bytes(self, x: Tensor) -> int:
        """What autograd would keep of `forward` for (b, c, h, w), in bytes: the activations of the coupling net."""
        return KEPT_TENSORS * x.shape[0] * self._hidden * x.shape[2] * x.shape[3] * x.element_size()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, c, h, w) -> the same shape, and log|det|, (b,) or a scalar that every image shares."""
        w, log_det_w = self.invconv.matrix()  # (c, c), ()
        scale, loc = self.actnorm.scale.flatten(), self.actnorm.loc.flatten()  # (c,), (c,)
        y = F.conv2d(x, (w * scale)[:, :, None, None], w @ (scale * loc))  # (b, c, h, w)
        log_det = (log_det_w + scale.abs().log().sum()) * (x.shape[2] * x.shape[3])
        y, log_det_coupling = self.coupling(y)
        return y, log_det if log_det_coupling is None else log_det + log_det_coupling

    def inverse(self, y: Tensor) -> Tensor:
        """The exact inverse of `forward`'s map."""
        y = self.coupling.inverse(y)
        w, _ = self.invconv.matrix()
        x = F.conv2d(y, torch.linalg.inv(w.double()).to(w.dtype)[:, :, None, None])  # (b, c, h, w)
        return x / self.actnorm.scale - self.actnorm.loc


class Block(nn.Module):
    """One scale: squeeze, K steps, then (but for the last) half of the channels leaves under a learned prior.

    What leaves is standardised by that prior: eps = (z - mean) exp(-log_sd), with (mean, log_sd) read from the half
    that stays, or from zeros at the last scale. So the whole flow maps to N(0, I), and -sum log_sd joins the
    log-determinant.
    """

    def __init__(self, channels: int, flows: int, hidden: int, *, split: bool, affine: bool, lu: bool) -> None:
        super().__init__()
        squeezed = channels * 4
        self.split = split
        self.flows = nn.ModuleList(FlowStep(squeezed, hidden, affine, lu) for _ in range(flows))
        self.prior = ZeroConv(channels * 2, channels * 4) if split else ZeroConv(squeezed, squeezed * 2)

    def transform(self, x: Tensor, recompute_bytes: int) -> tuple[Tensor, Tensor]:
        """Squeeze and flow: (b, c, h, w) -> (b, 4c, h/2, w/2), and log|det| (b,)."""
        h = _squeeze(x)  # (b, 4c, h/2, w/2)
        log_det = x.new_zeros(x.shape[0])
        recompute = torch.is_grad_enabled() and self._steps()[0].kept_bytes(h) > recompute_bytes
        for step in self._steps():
            h, term = step.recomputed(h) if recompute else step(h)
            log_det = log_det + term
        return h, log_det

    def factor_out(self, h: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """What stays (or None at the last scale), what leaves as eps, and log|det| (b,)."""
        kept, z = h.chunk(2, dim=1) if self.split else (torch.zeros_like(h), h)
        mean, log_sd = as_tensor(self.prior(kept)).chunk(2, dim=1)
        eps = (z - mean) * torch.exp(-log_sd)
        return (kept if self.split else None), eps, -log_sd.sum(dim=(1, 2, 3))

    def inverse(self, kept: Tensor | None, eps: Tensor) -> Tensor:
        """From what stayed and what left back to the block's input."""
        mean, log_sd = as_tensor(self.prior(torch.zeros_like(eps) if kept is None else kept)).chunk(2, dim=1)
        z = eps * torch.exp(log_sd) + mean
        h = z if kept is None else torch.cat([kept, z], dim=1)  # (b, 4c, h/2, w/2)
        for step in reversed(self._steps()):
            h = step.inverse(h)
        return _unsqueeze(h)  # (b, c, h, w)

    def _steps(self) -> list[FlowStep]:
        return [step for step in self.flows if isinstance(step, FlowStep)]


class Glow(nn.Module):
    """The flow x -> (eps_1, ..., eps_L) ~ N(0, I) over images x in [-0.5, 0.5)^(c, h, w).

    log p(x) = log N(eps; 0, I) + log|det d eps / d x|, in nats, one value an image. L blocks of K steps each; the side
    of the image is a multiple of 2^L. Kingma & Dhariwal, "Glow", sec. 3 and fig. 2; taming paper, App. A.

    Args:
        image_shape: (channels, height, width).
        n_bits: colour depth the model was trained at; images are dequantised with U(0, 1) / 2^n_bits.
        n_block: number of scales L.
        n_flow: steps per scale K.
        hidden: width of the coupling nets.
        affine: affine coupling, else additive.
        lu: LU-parametrised 1x1 convolutions; one flag for all scales or one a scale.
        generator: draws the starting weights; without it the flow is a fixed linear map, for weights to be loaded into.
    """

    family: ClassVar[str] = "glow"

    def __init__(
        self,
        image_shape: Sequence[int],
        n_bits: int,
        *,
        n_block: int = 3,
        n_flow: int = 8,
        hidden: int = 96,
        affine: bool = False,
        lu: bool | Sequence[bool] = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.image_shape: tuple[int, int, int] = check_image(image_shape, n_bits)
        check_ranges(
            {"n_block": (n_block, 1, MAX_BLOCKS), "n_flow": (n_flow, 1, MAX_FLOWS), "hidden": (hidden, 1, MAX_HIDDEN)}
        )
        check_halvings(image_shape, n_block)
        flags = _one_flag_a_block(lu, n_block)
        self.n_bits = n_bits
        self.recompute_bytes = RECOMPUTE_BYTES
        self.architecture: dict[str, Any] = {
            "n_block": n_block, "n_flow": n_flow, "hidden": hidden, "affine": affine, "lu": flags,
        }  # fmt: skip
        self.blocks = nn.ModuleList(
            Block(self.image_shape[0] * 2**i, n_flow, hidden, split=i < n_block - 1, affine=affine, lu=flags[i])
            for i in range(n_block)
        )
        if generator is not None:
            for module in self.modules():
                if isinstance(module, Conv | InvConv | InvConvLU):
                    module.reset(generator)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images (b, c, h, w) to standard normal latents, one tensor a scale, and log|det| (b,) in nats."""
        latents, h, log_det = self._upper(x)
        last, rest = self._last_scale(h)
        return [*latents, last], log_det + rest

    def inverse(self, latents: Sequence[Tensor]) -> Tensor:
        """Standard normal latents, one a scale, back to images (b, c, h, w)."""
        h: Tensor | None = None
        for block, eps in zip(reversed(self._scales()), reversed(latents), strict=True):
            h = block.inverse(h, eps)
        if h is None:
            raise ArchitectureError("inverse needs one latent a scale, and got none")
        return h

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), (b,) nats; images (b, c, h, w) in [-0.5, 0.5)."""
        if tuple(x.shape[1:]) != self.image_shape:
            raise ArchitectureError(f"this flow takes images of shape {self.image_shape}, not {tuple(x.shape[1:])}")
        h, share = self.prefix(x)
        return share + self.suffix_log_prob(h)

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Draw n images, (n, c, h, w), from latents of standard deviation `temperature`; not clipped."""
        weight = next(self.parameters())
        latents = [
            (torch.randn((n, *shape), generator=generator, device=generator.device) * temperature).to(weight)
            for shape in self.latent_shapes()
        ]
        return self.inverse(latents)

    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """Shape (c, h, w) of the latent of each scale; their sizes add up to the image's."""
        channels, height, width = self.image_shape
        count = len(self.blocks)
        shapes = [(channels * 2 ** (i + 1), height >> (i + 1), width >> (i + 1)) for i in range(count)]
        last = shapes[-1]
        return [*shapes[:-1], (last[0] * 2, last[1], last[2])]

    def prefix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All scales but the last: images (b, c, h, w) to what enters the last scale, and their share of log p (b,)."""
        latents, h, log_det = self._upper(x)
        return h, log_det + _log_normal(latents, log_det)

    def suffix_log_prob(self, h: Tensor) -> Tensor:
        """The last scale's share of log p, from what enters it: (b,) nats."""
        eps, log_det = self._last_scale(h)
        return log_det + _log_normal([eps], log_det)

    def suffix_parameters(self) -> list[nn.Parameter]:
        """The last scale, whose channels see the whole image; empty for a flow of one scale, which cannot be cut."""
        return list(self.blocks[-1].parameters()) if len(self.blocks) > 1 else []

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Data-dependent start of every actnorm on a batch x, (b, c, h, w). Call once, before training."""
        h: Tensor | None = x
        for block in self._scales():
            if h is None:
                break
            h = _squeeze(h)
            for step in block.flows:
                if isinstance(step, FlowStep):
                    step.actnorm.initialize(h)
                    h, _ = step(h)
            h, _, _ = block.factor_out(h)

    def _upper(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Through all scales but the last: latents, what enters the last scale, and log|det| so far (b,)."""
        latents: list[Tensor] = []
        h, log_det = x, x.new_zeros(x.shape[0])
        for block in self._scales()[:-1]:
            h, term = block.transform(h, self.recompute_bytes)
            kept, eps, prior_term = block.factor_out(h)
            h = eps if kept is None else kept
            latents.append(eps)
            log_det = log_det + term + prior_term
        return latents, h, log_det

    def _last_scale(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The last latent and its log|det| (b,)."""
        block = self._scales()[-1]
        h, log_det = block.transform(h, self.recompute_bytes)
        _, eps, prior_term = block.factor_out(h)
        return eps, log_det + prior_term

    def _scales(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]


def _squeeze(x: Tensor) -> Tensor:
    """Each 2x2 patch becomes four channels: (b, c, h, w) -> (b, 4c, h/2, w/2), channel order (c, row, column)."""
    return F.pixel_unshuffle(x, 2)


def _unsqueeze(x: Tensor) -> Tensor:
    """The inverse of `_squeeze`."""
    return F.pixel_shuffle(x, 2)


def _identity(size: int) -> Tensor:
    """I, (size, size). `torch.eye` on the meta device would load torch's compiler: a second of every start."""
    return torch.zeros(size, size).fill_diagonal_(1)


def _random_rotation(size: int, generator: torch.Generator) -> Tensor:
    rotation: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    return rotation


def _log_normal(latents: Sequence[Tensor], like: Tensor) -> Tensor:
    """log N(eps; 0, I) summed over latents, (b,) nats."""
    total = torch.zeros_like(like)
    for eps in latents:
        total = total - 0.5 * (eps.square().sum(dim=(1, 2, 3)) + eps[0].numel() * math.log(2 * math.pi))
    return total


def _one_flag_a_block(lu: bool | Sequence[bool], n_block: int) -> list[bool]:
    flags = [lu] * n_block if isinstance(lu, bool) else list(lu)
    if len(flags) != n_block or not all(isinstance(flag, bool) for flag in flags):
        raise ArchitectureError(f"lu takes one flag a block: {n_block} flags, not {flags!r}")
    return flags
