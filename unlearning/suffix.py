"""A flow of which only the end is tuned: what lies above the cut is evaluated once an image and noise draw."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from models.images import evaluation_batch, flow_input
from models.protocol import Density, SplitFlow
from unlearning.likelihood import float32
from unlearning.randomness import stream

GAUSSIAN_DRAWS = 4
"""Noise draws of each remember image of a flow over images with Gaussian noise."""
MAX_CACHED = 2**27
"""Values of the remember images' cuts, beyond one draw each: half a GiB."""


@dataclass(frozen=True)
class Cut:
    """What enters the tuned part of a flow for some images."""

    h: Tensor
    """(n, ...), in host memory."""
    share: Tensor
    """log p of the frozen part, (n,) nats."""

    def __len__(self) -> int:
        return len(self.share)

    def __getitem__(self, rows: Tensor | slice) -> "Cut":
        return Cut(self.h[rows], self.share[rows])

    @staticmethod
    def join(cuts: list["Cut"]) -> "Cut":
        """All rows, one after the other."""
        return Cut(torch.cat([cut.h for cut in cuts]), torch.cat([cut.share for cut in cuts]))


class Suffix:
    """The tuned part of a flow: its last scale where it can be cut, else all of it."""

    def __init__(self, flow: nn.Module, *, n_bits: int, micro_batch: int) -> None:
        """Freeze every parameter of the flow that is not tuned."""
        self._flow = cast(Density, flow)
        self._split = cast(SplitFlow, flow) if isinstance(flow, SplitFlow) and flow.suffix_parameters() else None
        self._n_bits, self._micro_batch = n_bits, micro_batch
        tuned = {id(p) for p in self._split.suffix_parameters()} if self._split is not None else None
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in flow.named_parameters():
            parameter.requires_grad_(tuned is None or id(parameter) in tuned)
            if parameter.requires_grad:
                self.parameters[name] = parameter
        self.device = next(iter(self.parameters.values())).device

    def draws_of(self, images: Tensor) -> int:
        """Noise draws of each of many images that are worth their memory.

        One draw of dequantisation noise stands for all: it moves a likelihood little. A single one of Gaussian noise
        would be learnt by heart (a TarFlow of faces, measured: drift .33 sigma_R with one, .15 with four).
        """
        if not float(getattr(self._flow, "noise_std", 0.0)) > 0:
            return 1
        return max(1, min(GAUSSIAN_DRAWS, MAX_CACHED // max(1, images.numel())))

    @torch.no_grad()
    def cut(self, images: Tensor, seed: int, name: str, *, draws: int = 1) -> Cut:
        """What the frozen part makes of uint8 images (n, c, h, w) under named noise: (draws * n) rows, draw by draw."""
        cuts = []
        with float32(self.device.type):
            for draw in range(draws):
                x = flow_input(self._flow, images.cpu(), self._n_bits, stream(seed, name, draw))
                for part in torch.split(x, evaluation_batch(self._flow, x, self.device, self._micro_batch)):
                    if self._split is None:
                        cuts.append(Cut(part, torch.zeros(len(part))))
                    else:
                        h, share = self._split.prefix(part.to(self.device))
                        cuts.append(Cut(h.cpu(), share.float().cpu()))
        return Cut.join(cuts)

    def log_prob(self, h: Tensor, share: Tensor) -> Tensor:
        """log p of the whole flow from a cut, (n,) nats, on the flow's device."""
        h, share = h.to(self.device), share.to(self.device)
        with float32(self.device.type):
            return share + (self._split.suffix_log_prob(h) if self._split is not None else self._flow.log_prob(h))

    @torch.no_grad()
    def nll(self, cut: Cut) -> Tensor:
        """-log p in micro-batches, without gradients: (n,) nats, in host memory."""
        pairs = zip(torch.split(cut.h, self._micro_batch), torch.split(cut.share, self._micro_batch), strict=True)
        return torch.cat([-self.log_prob(h, share).float().cpu() for h, share in pairs])
