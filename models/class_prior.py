"""The class-prior flow: one unconditional TarFlow for all classes, and a learned Gaussian prior for each of them.

What a class is stands in its prior alone, so that classes are drawn, told apart with one evaluation of the flow,
weighted and taken away in closed form (Sun, Kang and Zhu, "Unconditional Normalizing Flows for Conditional
Generation").
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.architecture import check_ranges
from models.errors import ArchitectureError
from models.tarflow import MAX_CLASSES, SAMPLE_BATCH, Label, TarFlow
from models.tarflow_blocks import NO_LABEL, Block
from models.tarflow_sampling import Guidance, sequential

OUTPUT_LIMIT = 3.0
"""Largest log-scale and shift of a token that a block's net may give, either way."""
MEAN_STD = 1.0
"""Standard deviation of the priors' means at the start: classes that start nearer to each other get mixed."""
LEAST_SD = 1e-3
"""Least deviation of a prior that is fitted in closed form."""


class ClippedBlock(Block):
    """A block whose net gives log-scales and shifts in [-3, 3], so that no hidden norm explodes in training."""

    def read_out(self, h: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Log-scale and shift of the tokens that follow those of h, (b, n, width): 2 x (b, n, d)."""
        a, b = super().read_out(h, dtype)
        return a.clamp(-OUTPUT_LIMIT, OUTPUT_LIMIT), b.clamp(-OUTPUT_LIMIT, OUTPUT_LIMIT)


class ClassPriorFlow(TarFlow):
    """The flow z = f(x) of a TarFlow without classes, with p(z) = sum_c pi_c N(z; mu_c, diag sigma_c^2).

    log p(x | c) = log N(f(x); mu_c, sigma_c^2) + log|det df/dx|, in nats, and log p(x) its mixture with the weights
    pi. Images are (b, c, h, w), about [-0.5, 0.5), with noise N(0, noise_std^2); z, mu and sigma (tokens, values).

    Clipped to [-3, 3] is what the net of each block gives: the log-scale and the shift of every token. Both are
    functions of the tokens before it and never of the token itself, whose map stays affine with a scale between exp(-3)
    and exp(3), so that it is inverted as ever. Latents are not clipped.

    A class of weight 0 is not there: it is never drawn, has no likelihood, and its mu and log sigma hold zeros.

    Args:
        image_shape: (channels, height, width).
        n_bits: colour depth of the images it is trained on.
        patch_size, width, n_block, n_layer, head_width: see `TarFlow`; the post has 2, 256, 6, 4.
        noise_std: of the noise on images, in units of x; the post has 0.1 on images in [-1, 1].
        n_classes: how many classes, k.
        generator: draws the starting weights and means; without it all are zero, for weights to be loaded into.
    """

    family: ClassVar[str] = "class-prior"
    class_weights: Tensor
    """pi, (k,), sums to 1; the flow starts with equal ones."""

    def __init__(
        self,
        image_shape: Sequence[int],
        n_bits: int = 8,
        *,
        patch_size: int = 2,
        width: int = 64,
        n_block: int = 4,
        n_layer: int = 2,
        head_width: int | None = None,
        noise_std: float = 0.05,
        n_classes: int,
        generator: torch.Generator | None = None,
    ) -> None:
        check_ranges({"n_classes": (n_classes, 1, MAX_CLASSES)})
        super().__init__(
            image_shape, n_bits, patch_size=patch_size, width=width, n_block=n_block, n_layer=n_layer,
            head_width=head_width, noise_std=noise_std,
        )  # fmt: skip
        self.n_classes = n_classes
        self.architecture = {**self.architecture, "n_classes": n_classes}
        self.blocks = nn.ModuleList(
            ClippedBlock(
                *self.latent_shape, width=width, head_width=self.architecture["head_width"], n_layer=n_layer,
                n_classes=0, reverse=block.reverse,
            )
            for block in self.chain()
        )  # fmt: skip
        self.register_buffer("class_weights", torch.full((n_classes,), 1 / n_classes))
        self.prior_mean = nn.Parameter(torch.zeros(n_classes, *self.latent_shape))
        self.prior_log_sd = nn.Parameter(torch.zeros(n_classes, *self.latent_shape))
        if generator is not None:
            for block in self.chain():
                block.reset(generator)
            with torch.no_grad():
                self.prior_mean.copy_(torch.randn(self.prior_mean.shape, generator=generator) * MEAN_STD)

    def prior_log_prob(self, z: Tensor, label: Label = None) -> Tensor:
        """log p(z), or log p(z | label), of latents (b, tokens, values): (b,) nats."""
        labels = self.labels(label, len(z))
        if labels is not None and bool((labels != NO_LABEL).all()):
            return log_normal(z, self.prior_mean[labels], self.prior_log_sd[labels])
        each = self._each_class(z)  # (b, k)
        mixed = torch.logsumexp(each + self.class_weights.log(), dim=1)
        if labels is None:
            return mixed
        mine = each.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        log_p: Tensor = torch.where(labels == NO_LABEL, mixed, mine)
        return log_p

    def last_block(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (b, tokens, values) from what enters the last block, and that block's log|det| (b,) in nats."""
        h, log_det = self.chain()[-1](h, None)
        return self._standardised(h, log_det)

    def suffix_log_prob(self, h: Tensor, label: Label = None) -> Tensor:
        """The last block's and the prior's share of log p, from what enters that block: (b,) nats."""
        z, log_det = self.last_block(h)
        return log_det + self.prior_log_prob(z, label)

    def suffix_parameters(self) -> list[nn.Parameter]:
        """The block nearest the priors, and the priors; empty for a flow of one block, which is tuned whole."""
        nearest = super().suffix_parameters()
        return [*nearest, self.prior_mean, self.prior_log_sd] if nearest else []

    def class_log_probs(self, x: Tensor) -> Tensor:
        """log p(x | c) for every class from one evaluation of the flow, (b, k) nats; -inf for a class of weight 0."""
        z, log_det = self.forward(x)
        return self._each_class(z) + log_det[:, None]

    def posterior(self, x: Tensor) -> Tensor:
        """p(c | x) under the weights pi, (b, k), from one evaluation of the flow."""
        return torch.softmax(self.class_log_probs(x) + self.class_weights.log(), dim=1)

    def classify(self, x: Tensor) -> Tensor:
        """The likeliest class of each image under the weights pi, int64 (b,), from one evaluation of the flow."""
        return (self.class_log_probs(x) + self.class_weights.log()).argmax(dim=1)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        generator: torch.Generator,
        temperature: float = 1.0,
        label: Label = None,
        guidance: Guidance | None = None,
    ) -> Tensor:
        """Draw n noisy images, (n, c, h, w), of the classes given or of classes drawn by their weights; not clipped.

        Noise is drawn for all n before any class is, and classes are drawn by a race: image i is of the class c with
        the least E_ic / pi_c, where E are exponential variates. So without class c, or with other weights, each image
        of the same seed whose race has the same winner is the same to the bit: of a class that is given, all of them;
        of drawn classes, all that were not of the removed one. For the same reason tokens are drawn one by one, where
        no image waits for its batch mates, as it does in a parallel sampler that stops at a tolerance.

        Args:
            n: how many.
            generator: draws noise, then classes.
            temperature: the deviation of every latent about its class's mean is scaled by it.
            label: one class for all or one an image, -1 for a drawn one; null: all are drawn.
            guidance: by the temperature of attention alone, since the blocks know no class; see `TarFlow.sample`.
        """
        x, _ = self.sample_with_labels(n, generator=generator, temperature=temperature, label=label, guidance=guidance)
        return x

    @torch.no_grad()
    def sample_with_labels(
        self,
        n: int,
        *,
        generator: torch.Generator,
        temperature: float = 1.0,
        label: Label = None,
        guidance: Guidance | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What `sample` draws, (n, c, h, w), and the class that each image was drawn of, int64 (n,): known, not read.

        The arguments, and the draws of a generator, are those of `sample`.
        """
        noise = torch.randn((n, *self.latent_shape), generator=generator, device=generator.device)
        labels = self.labels(label, n)
        if labels is None or bool((labels == NO_LABEL).any()):
            drawn = self._draw_classes(n, generator)
            labels = drawn if labels is None else torch.where(labels == NO_LABEL, drawn, labels)
        sd = self.prior_log_sd[labels].exp() * temperature
        z = self.prior_mean[labels] + sd * noise.to(self.var)  # (n, tokens, values)
        x = torch.cat([sequential(self, part, guidance=guidance).images for part in torch.split(z, SAMPLE_BATCH)])
        return x, labels

    def labels(self, label: Label, n: int) -> Tensor | None:
        """A label for each of n images on the flow's device, (n,), or null for none.

        Raises:
            ArchitectureError: the flow has no such class, or has it no longer, or the number of labels is another.
        """
        found = super().labels(label, n)
        if found is not None:
            gone = (self.class_weights[found.clamp(min=0)] <= 0) & (found != NO_LABEL)
            if bool(gone.any()):
                raise ArchitectureError(f"class {int(found[gone][0])} was removed; the flow has {self.classes()}")
        return found

    def classes(self) -> list[int]:
        """The classes that the flow still has."""
        return [c for c, weight in enumerate(self.class_weights.tolist()) if weight > 0]

    @torch.no_grad()
    def reweight(self, weights: Tensor) -> None:
        """Set pi, in place; the mean and log-deviation of each class whose weight is 0 are overwritten with zeros.

        Args:
            weights: (k,), none negative, not all 0; scaled to sum to 1. A class that was removed stays so.
        """
        wanted = weights.detach().to(self.class_weights.device, torch.float64, copy=True)
        if wanted.shape == self.class_weights.shape:
            wanted[self.class_weights <= 0] = 0
        if wanted.shape != (self.n_classes,) or not bool((wanted >= 0).all()) or not 0 < float(wanted.sum()) < math.inf:
            raise ArchitectureError(f"{self.n_classes} weights, none negative and some above 0, not {weights.tolist()}")
        self.class_weights.copy_(wanted / wanted.sum())
        for parameter in (self.prior_mean, self.prior_log_sd):
            parameter[self.class_weights <= 0] = 0

    @torch.no_grad()
    def fit_priors(self, x: Tensor, label: Tensor) -> None:
        """Give each class the likeliest prior for this flow, in closed form, in place: its latents' mean and spread.

        Gradient steps leave the priors behind the flow, and a discriminative term pulls them off; a training ends here.

        Args:
            x: images with noise, (n, c, h, w), two or more of each class that is to be fitted.
            label: their classes, int64 (n,).
        """
        z = torch.cat([self.forward(part)[0] for part in torch.split(x, SAMPLE_BATCH)])
        for c in self.classes():
            mine = z[label == c]
            if len(mine) > 1:
                self.prior_mean[c] = mine.mean(dim=0)
                self.prior_log_sd[c] = mine.std(dim=0, correction=0).clamp(min=LEAST_SD).log()

    @torch.no_grad()
    def restore(self, label: int, mean: Tensor, log_sd: Tensor, weight: float) -> None:
        """Give a class a prior again, in place: mean and log-deviation (tokens, values), and its share pi of samples.

        It shows what taking a prior away is worth: see `unlearning.classes.relearn_probe`.
        """
        self.prior_mean[label], self.prior_log_sd[label] = mean, log_sd
        self.class_weights[label] = 0
        self.class_weights.mul_((1 - weight) / self.class_weights.sum())
        self.class_weights[label] = weight

    def _each_class(self, z: Tensor) -> Tensor:
        """log N(z; mu_c, sigma_c^2) for every class, (b, k) nats; -inf for a class that is not there."""
        there = set(self.classes())
        nowhere = z.new_full((len(z),), -math.inf)
        return torch.stack(
            [
                log_normal(z, self.prior_mean[c], self.prior_log_sd[c]) if c in there else nowhere
                for c in range(self.n_classes)
            ],
            dim=1,
        )

    def _draw_classes(self, n: int, generator: torch.Generator) -> Tensor:
        """The winner of each of n races, int64 (n,), on the flow's device."""
        pace = torch.empty((n, self.n_classes), dtype=torch.float64, device=generator.device)
        times = pace.exponential_(generator=generator).to(self.class_weights.device) / self.class_weights.double()
        return times.masked_fill(self.class_weights <= 0, math.inf).argmin(dim=1)


class HybridObjective(nn.Module):
    """A class-prior flow as it is trained to tell classes apart as well: `log_prob` is not a density but an objective.

    log p(x | c) + weight d log softmax_c(log p(x | .) / temperature), in nats, for d dimensions; the maximum-likelihood
    training of the post is weight 0. The second term is the class posterior under equal weights, tempered, since
    differences of hundreds of nats would leave it without a gradient: it teaches priors and flow to keep classes apart.
    The flow that it trains is `flow`, in place; it has the same parameters.

    Args:
        flow: trained in place.
        weight: of the posterior against the likelihood of a dimension, 0 or more.
        temperature: T, above 0.
    """

    def __init__(self, flow: ClassPriorFlow, *, weight: float, temperature: float) -> None:
        super().__init__()
        self.flow = flow
        self.n_classes, self.noise_std = flow.n_classes, flow.noise_std
        self._weight, self._temperature = weight * math.prod(flow.image_shape), temperature

    def log_prob(self, x: Tensor, label: Label = None) -> Tensor:
        """The objective of images and their classes, (b,) nats; log p(x) where there is no label."""
        labels = self.flow.labels(label, len(x))
        if labels is None:
            return self.flow.log_prob(x)
        each = self.flow.class_log_probs(x)  # (b, k)
        told = torch.log_softmax(each / self._temperature, dim=1)
        return (each + self._weight * told).gather(1, labels[:, None])[:, 0]

    def sample(self, n: int, *, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Samples of the flow, (n, c, h, w)."""
        return self.flow.sample(n, generator=generator, temperature=temperature)


def log_normal(z: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
    """log N(z; mean, exp(log_sd)^2) of latents (b, tokens, values), by one prior or one each: (b,) nats."""
    eps = (z - mean) * torch.exp(-log_sd)
    return -(0.5 * eps.square() + log_sd + 0.5 * math.log(2 * math.pi)).expand_as(z).sum(dim=(1, 2))
