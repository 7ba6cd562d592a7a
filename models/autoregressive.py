"""MAF and IAF: flows of masked autoregressive layers, one fast in likelihoods, the other fast in samples.

Papamakarios et al., 2017 (MAF); Kingma et al., 2016 (IAF); Germain et al., 2015 (MADE, the masked network). One layer
serves both: what is one pass in the one direction is one dimension after another in the other. That slow direction is
exact here at about the arithmetic of one pass, since units are sorted by what they may see and each is computed once.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.architecture import check_ranges
from models.errors import ArchitectureError
from models.flow_layers import Linear, Norm, check_input, check_shape, log_normal

MAX_DIMENSIONS = 4096
"""Of an image or vector: every layer has a triangle of weights between its dimensions."""
MAX_FLOWS = 64
MAX_HIDDEN = 8192
MAX_DEPTH = 8
LOG_SCALE_BOUND = 3.0
"""No layer scales a dimension by more than exp(3), or less than exp(-3)."""


def bounded(raw: Tensor) -> Tensor:
    """Log-scales in (-3, 3) with slope 1 at 0: raw / (1 + |raw| / 3)."""
    return raw / (1 + raw.abs() / LOG_SCALE_BOUND)


class MaskedNet(nn.Module):
    """A network u -> (s, t) of which s_i and t_i read u_1, ..., u_(i-1) alone (MADE).

    The degree of a hidden unit is the last dimension that it may see, counted from 0; degrees ascend, so that every
    mask is a staircase. Masks are computed from the sizes and never stored: no file can break them. A triangle from u
    to t, beside the hidden layers, makes one layer alone a Gaussian of any covariance (MADE's direct connections).

    Args:
        dims: d, of u.
        hidden: units of each hidden layer.
        depth: hidden layers.
    """

    def __init__(self, dims: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.dims = dims
        self.layers = nn.ModuleList(Linear(dims if i == 0 else hidden, hidden) for i in range(depth))
        self.log_scale, self.shift = Linear(hidden, dims), Linear(hidden, dims)
        self.direct = nn.Parameter(torch.zeros(dims, dims))

    def reset(self, generator: torch.Generator) -> None:
        """Random hidden layers; s and t start at zero. A mask hides half of the inputs on average, hence the gain."""
        for layer in self._hidden():
            layer.reset(generator, gain=4.0)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(b, d) -> s and t, each (b, d)."""
        *masked, log_scale, shift = self._masked()
        h = u
        for layer, weight in zip(self._hidden(), masked, strict=True):
            h = F.relu(F.linear(h, weight, layer.bias))  # (b, hidden)
        direct = F.linear(u, self.direct.tril(-1))  # (b, d)
        return bounded(F.linear(h, log_scale, self.log_scale.bias)), F.linear(h, shift, self.shift.bias) + direct

    @torch.no_grad()
    def solve(self, v: Tensor) -> Tensor:
        """The u with u exp(s(u)) + t(u) = v, one dimension after another: (b, d) -> (b, d)."""
        *masked, log_scale, shift = self._masked()
        first = self._first_units()
        u, wanted = torch.zeros_like(v.T), v.T.contiguous()  # (d, b); units in rows, so that what is read lies together
        layers = [
            (weight, layer.bias[:, None], v.new_zeros(len(weight), len(v)))
            for weight, layer in zip(masked, self._hidden(), strict=True)
        ]
        top = layers[-1][2]  # (hidden, b)
        ends = torch.stack([log_scale, shift], dim=1)  # (d, 2, hidden)
        biases = torch.stack([self.log_scale.bias, self.shift.bias], dim=1)[:, :, None]  # (d, 2, 1)
        for i in range(self.dims):
            seen, to = first[i], first[i + 1]  # units below `seen` see dimensions below i alone
            s, t = torch.addmm(biases[i], ends[i, :, :seen], top[:seen])  # 2 x (b,)
            u[i] = (wanted[i] - t - self.direct[i, :i] @ u[:i]) * torch.exp(-bounded(s))
            if seen == to:
                continue
            below, width = u, i + 1
            for weight, bias, h in layers:
                h[seen:to] = torch.relu(torch.addmm(bias[seen:to], weight[seen:to, :width], below[:width]))
                below, width = h, to
        return u.T.contiguous()

    @torch.no_grad()
    def solve_transposed(self, u: Tensor, g: Tensor) -> Tensor:
        """The w with J^T w = g, where J = d(u exp(s(u)) + t(u)) / du at u: back-propagation, the last dimension first.

        Args:
            u: (b, d), where J is taken.
            g: (b, d).
        """
        *masked, of_s, of_t = self._masked()
        first = self._first_units()
        hidden, h = [], u
        for layer, weight in zip(self._hidden(), masked, strict=True):
            h = F.relu(F.linear(h, weight, layer.bias))
            hidden.append(h.T.contiguous())  # (hidden, b)
        raw = F.linear(h, of_s, self.log_scale.bias).T  # (d, b)
        log_scale = bounded(raw)
        slope = u.T * log_scale.exp() / (1 + raw.abs() / LOG_SCALE_BOUND).square()  # of v_i by the raw s_i
        grads = [torch.zeros_like(h) for h in hidden]
        w, of_raw = torch.zeros_like(raw), torch.zeros_like(raw)  # (d, b)
        readers = [weight.T.contiguous() for weight in masked]  # row: who is read; column: who reads it
        s_readers, t_readers, direct = of_s.T.contiguous(), of_t.T.contiguous(), self.direct.T.contiguous()
        for i in range(self.dims - 1, -1, -1):
            seen, to, later = first[i], first[i + 1], i + 1
            if seen != to:  # units of degree i: all that read them are done
                back = s_readers[seen:to, later:] @ of_raw[later:] + t_readers[seen:to, later:] @ w[later:]
                for k in range(len(hidden) - 1, -1, -1):
                    grads[k][seen:to] = back * (hidden[k][seen:to] > 0)
                    back = readers[k][seen:to, seen:] @ grads[k][seen:] if k else back
            known = readers[0][i, seen:] @ grads[0][seen:] + direct[i, later:] @ w[later:]  # (b,)
            w[i] = (g[:, i] - known) * torch.exp(-log_scale[i])
            of_raw[i] = w[i] * slope[i]
        return w.T.contiguous()

    def _masked(self) -> list[Tensor]:
        """Weights of all hidden layers, then of s and of t, with zeros where their masks are."""
        device = self.direct.device
        inputs = torch.arange(self.dims, device=device)
        degrees, weights = inputs, []
        for layer in self._hidden():
            own = self._degrees(device)
            weights.append(layer.weight * (own[:, None] >= degrees))
            degrees = own
        seen = inputs[:, None] > degrees
        return [*weights, self.log_scale.weight * seen, self.shift.weight * seen]

    def _degrees(self, device: torch.device) -> Tensor:
        """(hidden,), ascending from 0 to d - 2: the last dimension is seen by nobody."""
        count = self.shift.weight.shape[1]
        return torch.arange(count, device=device) * (self.dims - 1) // count

    def _first_units(self) -> list[int]:
        """The number of hidden units of a degree below i, for i = 0, ..., d."""
        degrees = self._degrees(torch.device("cpu"))
        counts: list[int] = torch.searchsorted(degrees, torch.arange(self.dims + 1)).tolist()
        return counts

    def _hidden(self) -> list[Linear]:
        return [layer for layer in self.layers if isinstance(layer, Linear)]


class MaskedAffine(nn.Module):
    """v = u exp(s(u)) + t(u) with a triangular Jacobian: log|det| = sum s. `forward` is parallel, `inverse` is not."""

    def __init__(self, dims: int, hidden: int, depth: int, *, flip: bool) -> None:
        super().__init__()
        self.net = MaskedNet(dims, hidden, depth)
        self.flip = flip
        """Whether the last dimension comes first."""

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(b, d) -> v (b, d) and log|det dv / du| (b,)."""
        u = self._ordered(u)
        s, t = self.net(u)
        return self._ordered(u * s.exp() + t), s.sum(dim=1)

    def inverse(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """(b, d) -> u (b, d) and log|det du / dv| (b,), with gradients of v and of the weights.

        u is found without a graph, one dimension after another. Its gradient is that of the implicit function: what
        v - v(u) passes back is multiplied by the inverse transposed Jacobian. So memory is that of two parallel passes.
        """
        v = self._ordered(v)
        u = self.net.solve(v)
        if torch.is_grad_enabled():
            s, t = self.net(u)
            residual = v - (u * s.exp() + t)  # zero, but for rounding
            u = u + cast(Tensor, _Implicit.apply(residual, self._transposed(u)))  # type: ignore[no-untyped-call]  # torch
        s, _ = self.net(u)
        return self._ordered(u), -s.sum(dim=1)

    def _transposed(self, u: Tensor) -> Callable[[Tensor], Tensor]:
        """g -> J^-T g at u, which is kept apart from the graph."""
        net = self.net
        return lambda g: net.solve_transposed(u, g)

    def _ordered(self, x: Tensor) -> Tensor:
        return x.flip(1) if self.flip else x


class _Implicit(torch.autograd.Function):
    """Zero, whose gradient with respect to the residual is a given linear map of what comes back."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, transposed: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.transposed = transposed
        return torch.zeros_like(residual)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.transposed(gradient), None


class _Autoregressive(nn.Module, ABC):
    """What both flows share: an image read pixel by pixel in raster order, a norm, and layers of alternating order.

    Args:
        image_shape: (channels, height, width); or (d,), for vectors; 2 to 4,096 dimensions in all.
        n_bits: colour depth the model was trained at; images are dequantised with U(0, 1) / 2^n_bits.
        n_flow: masked layers.
        hidden: units of a hidden layer; with fewer than there are dimensions, some steps of the order share theirs.
        depth: hidden layers of each masked network.
        generator: draws the starting weights; without it the flow is the identity, for weights to be loaded into.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        n_bits: int,
        *,
        n_flow: int = 4,
        hidden: int = 256,
        depth: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        shape = check_shape(image_shape, n_bits)
        check_ranges(
            {"n_flow": (n_flow, 1, MAX_FLOWS), "hidden": (hidden, 1, MAX_HIDDEN), "depth": (depth, 1, MAX_DEPTH)}
        )
        self.dims = math.prod(shape)
        if not 2 <= self.dims <= MAX_DIMENSIONS:
            raise ArchitectureError(
                f"an autoregressive flow has 2 to {MAX_DIMENSIONS:,} dimensions, and {shape} has {self.dims:,}; "
                "use smaller images, or a Glow, RealNVP or TarFlow"
            )
        self.image_shape = cast(tuple[int, int, int], shape)  # or (d,): no checkpoint holds a flow over vectors
        self.n_bits = n_bits
        self.architecture: dict[str, Any] = {"n_flow": n_flow, "hidden": hidden, "depth": depth}
        self.norm = Norm(self.dims, spatial=False)
        self.layers = nn.ModuleList(MaskedAffine(self.dims, hidden, depth, flip=bool(i % 2)) for i in range(n_flow))
        if generator is not None:
            for layer in self._masked_layers():
                layer.net.reset(generator)

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (b, c, h, w) or (b, d) to standard normal latents (b, d), and log|det| (b,) in nats."""

    @abstractmethod
    def inverse(self, latents: Tensor) -> Tensor:
        """Standard normal latents (b, d) back to x."""

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), (b,) nats; images (b, c, h, w) in [-0.5, 0.5), or vectors (b, d)."""
        z, log_det = self.forward(x)
        return log_det + log_normal([z])

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Draw n images or vectors from latents of standard deviation `temperature`; not clipped."""
        z = torch.randn((n, self.dims), generator=generator, device=generator.device) * temperature
        return self.inverse(z.to(self.norm.loc))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Data-dependent start of the norm on a batch x, (b, c, h, w) or (b, d). Call once, before training."""
        check_input(x, self.image_shape)
        self.norm.initialize(self._flat(x))

    def _masked_layers(self) -> list[MaskedAffine]:
        return [layer for layer in self.layers if isinstance(layer, MaskedAffine)]

    def _flat(self, x: Tensor) -> Tensor:
        """Pixel by pixel in raster order, the colours of a pixel together: (b, c, h, w) -> (b, h w c)."""
        return x if x.ndim == 2 else x.permute(0, 2, 3, 1).flatten(1)

    def _shaped(self, flat: Tensor) -> Tensor:
        """The inverse of `_flat`."""
        if len(self.image_shape) == 1:
            return flat
        channels, height, width = self.image_shape
        return flat.reshape(-1, height, width, channels).permute(0, 3, 1, 2).contiguous()  # (b, c, h, w)


class MAF(_Autoregressive):
    """z_i = x_i exp(s_i(x_1, ..., x_(i-1))) + t_i(x_1, ..., x_(i-1)), layer after layer, z ~ N(0, I).

    log p(x) = log N(z; 0, I) + sum s: one pass. A sample takes one small step a dimension and layer. Papamakarios,
    Pavlakou and Murray, "Masked Autoregressive Flow for Density Estimation", 2017, eq. 3-4. See `_Autoregressive` for
    the arguments.
    """

    family: ClassVar[str] = "maf"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (b, c, h, w) or (b, d) to standard normal latents (b, d), and log|det| (b,) in nats; parallel."""
        h, log_det = self._upper(x)
        z, rest = self._through(self._tuned(), h)
        return z, log_det + rest

    def inverse(self, latents: Tensor) -> Tensor:
        """Standard normal latents (b, d) back to x, dimension by dimension."""
        h = latents
        for layer in reversed(self._masked_layers()):
            h, _ = layer.inverse(h)
        return self._shaped(self.norm.inverse(h))

    def prefix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm and the first half of the layers: x to what enters the rest (b, d), and their share (b,)."""
        return self._upper(x)

    def suffix_log_prob(self, h: Tensor) -> Tensor:
        """The share of the other layers in log p, from what enters them: (b,) nats."""
        z, log_det = self._through(self._tuned(), h)
        return log_det + log_normal([z])

    def suffix_parameters(self) -> list[nn.Parameter]:
        """The last half of the layers, the larger one; empty for a flow of one layer, which cannot be cut."""
        if len(self.layers) < 2:
            return []
        return [parameter for layer in self._tuned() for parameter in layer.parameters()]

    def _tuned(self) -> list[MaskedAffine]:
        return self._masked_layers()[len(self.layers) // 2 :]

    def _upper(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_input(x, self.image_shape)
        h, shared = self.norm(self._flat(x))
        h, log_det = self._through(self._masked_layers()[: len(self.layers) // 2], h)
        return h, log_det + shared

    def _through(self, layers: Sequence[MaskedAffine], h: Tensor) -> tuple[Tensor, Tensor]:
        log_det = h.new_zeros(len(h))
        for layer in layers:
            h, term = layer(h)
            log_det = log_det + term
        return h, log_det


class IAF(_Autoregressive):
    """x_i = z_i exp(s_i(z_1, ..., z_(i-1))) + t_i(z_1, ..., z_(i-1)), layer after layer, z ~ N(0, I).

    A sample is one pass. A likelihood takes one small step a dimension and layer, and as many again for its gradient;
    memory is that of two parallel passes a layer. Kingma et al., "Improving Variational Inference with Inverse
    Autoregressive Flow", 2016, eq. 10-12. It cannot be cut: tamed whole. See `_Autoregressive` for the arguments.
    """

    family: ClassVar[str] = "iaf"
    sequential_log_prob: ClassVar[bool] = True
    """As `models.images.evaluation_batch` reads it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (b, c, h, w) or (b, d) to standard normal latents (b, d), and log|det| (b,), dimension by dimension."""
        check_input(x, self.image_shape)
        h, shared = self.norm(self._flat(x))
        log_det = h.new_zeros(len(h)) + shared
        for layer in self._masked_layers():
            h, term = layer.inverse(h)
            log_det = log_det + term
        return h, log_det

    def inverse(self, latents: Tensor) -> Tensor:
        """Standard normal latents (b, d) back to x; parallel."""
        h = latents
        for layer in reversed(self._masked_layers()):
            h, _ = layer(h)
        return self._shaped(self.norm.inverse(h))
