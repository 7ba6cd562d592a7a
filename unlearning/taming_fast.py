"""The fast engine: only what lies below the last cut of the flow is tuned, and everything above it is computed once.

Departures from the paper, each for a measured reason: a one-sided Huber hinge on z instead of sigmoid(sigma^2 d^2),
whose gradient vanishes far from the target; a gradient through mu_R, so that D_F is pushed away from D_R and not with
it; a keep loss on the change of each image's own likelihood instead of a divergence between Gaussians fitted to eight
values; warped images of D_R beside it, for people whom it does not show; mu_R, sigma_R followed by a control variate
instead of 1,024 fresh forwards; and noise that no step has seen to tell when to stop.
"""

import math

import torch
from torch import Tensor, nn

from models.augmentation import augment, warp
from unlearning import micro_batch as micro
from unlearning.errors import DivergedError
from unlearning.likelihood import Statistics, statistics
from unlearning.optimiser import pack, unpack
from unlearning.randomness import stream
from unlearning.suffix import Cut, Suffix
from unlearning.taming_parameters import TamingParameters

OVERSHOOT = 0.2
"""Slope of the forget loss for an image that lies more than half a sigma_R past its target, against 1 before it."""
STOPPING_DRAWS = 10
"""Noise draws of each forget image that no step sees and that tell when to stop."""
NOISY_IMAGES = 4096
"""Most rows that the draws of D_F may fill, beyond one for each image: it bounds memory where there are thousands."""
BETAS = (0.9, 0.99)
"""Adam's decays; the second is short, since a run has some tens of steps."""
PATIENCE = 100
"""Steps after which the keep loss begins to yield: an easy run has ended by then."""
RELAX = 0.98
"""By how much the weight of the keep loss falls each step from then on."""
WARMUP = 10
"""Steps over which the learning rate rises: Adam's first steps are sign steps, which would move every image."""
FIRST_MOVE = 0.03
"""In sigma_R, root mean square: how far the first step may move the likelihoods to remember. A flow that it would move
further is tuned at a rate lower by as much, for all steps: flows differ in it by a factor of a thousand."""
CALIBRATIONS = 8
"""Most attempts to find that rate; the move grows about as the rate does, so that two suffice."""
SENSITIVE = 0.2
"""A flow that is tuned at less than this share of the rate learns the noise of a few draws by heart, and gets more of
them (a MAF of digits at 16 x 16, measured: z 5.0 on the eight draws of its steps, .8 on fresh ones)."""
MORE_NOISE = 8
"""How many times as many."""
SMOOTHING = 0.8
"""Decay of the running difference between tamed and base statistics."""
CLEARANCE = 0.3
"""In sigma_R: how far past the criterion every image must lie on the stopping noise before a confirmation is tried."""
VIRTUAL_POOL = 0.5
"""Virtual images of each kind, for each image of D_R."""
VIRTUAL_SHIFT = 3 / 32
"""How far a virtual image is moved each way, as a share of the side."""
VIRTUAL_FAR = 10.0
"""In sigma_R: a virtual image that lies further above mu_R than this stands for nobody, and is left out. Strangers lie
within about 4, but mirrored digits up to 86,000 above in a MAF: they alone would set the rate and the keep loss."""
NEAR = 0.3
"""In sigma_R: how near to the criterion the steps' own z must be before the line is searched."""
FURTHEST = 1.15
"""How far past the present weights, as a share of the way from the base's, the search for the criterion goes."""
FURTHER = 1.0
"""In sigma_R: how much further than the criterion asks the steps are sent at most."""
SEARCHES = 6
"""Most points on that line that are looked at."""
CLOSE = 0.05
"""In sigma_R: how far past the criterion is near enough."""


class FastEngine:
    """Cached prefix, tuned suffix; see the module."""

    def __init__(
        self,
        base: nn.Module,
        tamed: nn.Module,
        forget: Tensor,
        remember: Tensor,
        values: TamingParameters,
        *,
        n_bits: int,
        seed: int,
        micro_batch: int,
    ) -> None:
        del base  # the tamed copy still is the base when its likelihoods are cached
        self._values, self._seed, self._micro_batch = values, seed, micro_batch
        self._suffix = Suffix(tamed, n_bits=n_bits, micro_batch=micro_batch)
        self._parameters = self._suffix.parameters
        self._optimiser = torch.optim.Adam(
            self._parameters.values(), lr=values.learning_rate or 0.0, fused=True, betas=BETAS
        )

        # What is frozen is computed once: the cut of every image and draw, and the base's nll.
        count = min(len(remember), values.statistics_images)
        rows = torch.randperm(len(remember), generator=stream(seed, "pool"))[:count]
        true = remember[rows]
        self._n_true = count
        kept = torch.cat([true, self._virtual(true)]) if values.virtual_share else true
        self._n_kept, self._keep_draws = len(kept), self._suffix.draws_of(kept)
        self._kept = self._suffix.cut(kept, seed, "remember", draws=self._keep_draws)
        self._kept_nll = self._suffix.nll(self._kept)  # (m,), of the base: nothing is tuned yet
        self._base = statistics(self._kept_nll[:count])
        self._virtual_rows = round((values.remember_batch or 2) * values.virtual_share)
        self._leave_out_far()
        self._images, self._n_forget = forget, len(forget)
        self._epoch = -(-self._n_forget // values.forget_batch)  # steps in which each of them has its turn
        self._most_draws = max(1, NOISY_IMAGES // self._n_forget)
        self._rate = torch.ones((), dtype=torch.float64)  # of the learning rate, as the first step found it
        self._noise_draws = 0
        self._draw_noise()
        copies = [
            augment(forget, stream(seed, "variant", variant), flip=True, shift=values.forget_shift)
            for variant in range(values.forget_variants)
        ]
        self._copies = self._suffix.cut(torch.cat(copies), seed, "copies") if copies else None
        self._stopping = self._suffix.cut(forget, seed, "stopping", draws=min(STOPPING_DRAWS, self._most_draws))
        self._lowest_base = self._lowest(self._base)
        self._last = torch.full((self._n_forget,), -torch.inf)  # newest z of each forget image
        self._shift = torch.zeros(2, dtype=torch.float64)  # running (mu, sigma) of tamed less base, in sigma_base
        self._extra = torch.zeros((), dtype=torch.float64)  # raised target after a failed confirmation
        self._further = torch.zeros((), dtype=torch.float64)  # added to the steps' target alone
        self._origin = [p.detach().clone() for p in self._parameters.values()]
        self._settled = torch.zeros((), dtype=torch.bool)  # whether the weights stand where `_settle` put them

    def check(self, step: int) -> bool:
        """Whether every forget image clears the criterion on the stopping noise; then takes back what it needs not.

        Asked once every image had its turn since the last time.
        """
        if bool(self._settled):
            return True
        near = bool((self._last >= self._reach() - NEAR).all()) or self._lowest_base >= self._reach()
        return near and step % self._epoch == 0 and self._settle()

    def _reach(self) -> float:
        return self._values.delta * (1 - self._values.tolerance) + CLEARANCE + float(self._extra)

    @torch.no_grad()
    def _settle(self) -> bool:
        """Go along the line from the base's weights through the present ones to where every image just clears.

        Steps have momentum and overshoot, and what they overshoot by is damage; and a step or two that are missing
        need not be taken. False, and nothing is changed, if the images are too far from the criterion here.
        """
        here = [p.detach().clone() for p in self._parameters.values()]
        if self._lowest_base >= self._reach():  # there is nothing to forget: the base itself is the result
            self._move(here, 0.0)
            self._settled.fill_(True)
            return True

        def clears(share: float) -> float:
            self._move(here, share)
            try:
                return self._lowest(self._exact()) - self._reach()
            except DivergedError:  # too far along the line: the steps themselves need not come there
                return -torch.inf

        low, high = (0.0, self._lowest_base - self._reach()), (1.0, clears(1.0))
        if high[1] < 0:
            low, high = high, (FURTHEST, clears(FURTHEST))
        if high[1] < 0:
            # The steps' own noise is easier for them than this: without a further target they would stand still.
            self._further = torch.clamp(self._further - max(low[1], -FURTHER) / 2, max=FURTHER)
            self._move(here, 1.0)
            return False
        for _ in range(SEARCHES):
            if high[1] < CLOSE:
                break
            # z bends upwards along the line, so that the chord's root falls short: halfway to the middle it does not.
            root = low[0] + (high[0] - low[0]) * low[1] / (low[1] - high[1])
            share = (root + (low[0] + high[0]) / 2) / 2
            value = clears(share)
            low, high = ((share, value), high) if value < 0 else (low, (share, value))
        self._move(here, high[0])
        self._settled.fill_(True)
        return True

    def _move(self, end: list[Tensor], share: float) -> None:
        """Put the weights that share of the way from the base's to `end`."""
        for p, start, there in zip(self._parameters.values(), self._origin, end, strict=True):
            p.copy_(torch.lerp(start, there, share))

    def _lowest(self, now: Statistics) -> float:
        """The smallest z of the forget images, averaged over the stopping noise."""
        nll = self._suffix.nll(self._stopping).view(-1, self._n_forget).double().mean(0)
        return float(now.z(nll).min())

    def _exact(self) -> Statistics:
        return statistics(self._suffix.nll(self._kept[: self._n_true]))

    def _tracked(self) -> Statistics:
        """mu_R, sigma_R of the tamed flow: the base's, plus the running change on the steps' own remember images."""
        mu, sigma = self._base.mu, self._base.sigma
        return Statistics(mu + float(self._shift[0]) * sigma, sigma * max(0.1, 1 + float(self._shift[1])))

    def rejected(self, shortfall: float) -> None:
        """Ask for as much more as the confirmation fell short by."""
        self._extra += max(CLOSE, shortfall)
        self._settled.fill_(False)

    def step(self, step: int) -> tuple[dict[str, float], dict[str, float]]:
        """One Adam step on forget hinge + keep loss, with D_F and D_R in one batch."""
        values = self._values
        generator = stream(self._seed, "step", step)
        epoch, turn = divmod(step, self._epoch)
        order = torch.randperm(self._n_forget, generator=stream(self._seed, "epoch", epoch))
        images = order[turn * values.forget_batch :][: values.forget_batch]  # (f,)
        rows, true = self._keep_rows(generator)  # (r,), how many of them lead and are images of D_R themselves
        forget = self._forget_rows(images, generator)  # f, then the same number of copies
        split = len(forget)
        aim = values.delta * (1 - values.tolerance) + values.margin + float(self._extra + self._further)
        batch = Cut.join([forget, self._kept[rows]])
        nll_b = self._kept_nll[rows]
        parts: dict[str, Tensor] = {}

        def loss(nll: Tensor) -> Tensor:
            nll_f, nll_r = nll[:split], nll[split:]
            self._track(nll_r.detach()[:true], nll_b[:true])
            now = self._tracked()
            # mu_R has the running value, and the gradient of this batch: D_F is pushed away from D_R, not with it.
            z = (nll_f - (now.mu + (nll_r - nll_r.detach()).mean())) / now.sigma
            target = torch.full_like(z, aim)
            target[len(images) :] *= values.variant_target
            gap = torch.where(z < target, target - z, (z - target - 0.5).clamp(min=0) * OVERSHOOT)
            moved = (nll_r - nll_b) / self._base.sigma  # (r,)
            forget_loss = torch.where(gap < 1, 0.5 * gap.square(), gap - 0.5).mean()
            keep_loss = moved.square().mean()
            parts.update(z=z.detach(), moved=moved.detach(), forget=forget_loss.detach(), remember=keep_loss.detach())
            return forget_loss + values.keep_weight * RELAX ** max(0, step - PATIENCE) * keep_loss

        self._optimiser.zero_grad(set_to_none=True)
        total = micro.backward(self._suffix.log_prob, (batch.h, batch.share), loss, self._micro_batch)
        norm = torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), values.clip)
        if not bool(torch.isfinite(norm)) or not bool(torch.isfinite(total)):
            raise DivergedError(f"the loss or its gradient was not finite at step {step}; lower the learning rate")
        for group in self._optimiser.param_groups:
            group["lr"] = (values.learning_rate or 0.0) * float(self._rate) * min(1.0, (step + 1) / WARMUP)
        self._optimiser.step()
        if step == 0:
            self._calibrate(rows)
            self._draw_noise()
        self._last[images] = parts["z"][: len(images)]
        now = self._tracked()
        losses = {"loss": float(total), "forget": float(parts["forget"]), "remember": float(parts["remember"])}
        metrics = {
            "z_min": float(self._last.min()),
            "drift": float(parts["moved"].abs().mean()),
            "mu": now.mu,
            "sigma": now.sigma,
        }
        return losses, metrics

    @torch.no_grad()
    def _calibrate(self, rows: Tensor) -> None:
        """Shorten the first step, and the rate with it, until it leaves the likelihoods to remember nearly alone."""
        there = [p.detach().clone() for p in self._parameters.values()]
        for _ in range(CALIBRATIONS):
            moved = (self._suffix.nll(self._kept[rows]) - self._kept_nll[rows]) / self._base.sigma
            size = float(moved.double().square().mean().sqrt())
            if size <= FIRST_MOVE:
                return
            self._rate *= 0.9 * FIRST_MOVE / size if math.isfinite(size) else 0.1
            self._move(there, float(self._rate))

    def tensors(self) -> dict[str, Tensor]:
        """Tuned weights, Adam's moments, running values."""
        return {
            **pack(self._parameters, self._optimiser),
            "last": self._last,
            "shift": self._shift,
            "extra": self._extra,
            "further": self._further,
            "rate": self._rate,
            "settled": self._settled,
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `tensors`."""
        unpack(tensors, self._parameters, self._optimiser)
        self._last, self._shift = tensors["last"].clone(), tensors["shift"].clone()
        self._extra, self._further = tensors["extra"].clone(), tensors["further"].clone()
        self._rate, self._settled = tensors["rate"].clone(), tensors["settled"].clone()
        self._draw_noise()

    def _draw_noise(self) -> None:
        """Cut D_F under as many draws of noise as a flow tuned at this rate needs; those that it had stay the first."""
        wanted = self._values.noise_draws * (MORE_NOISE if float(self._rate) < SENSITIVE else 1)
        if (draws := min(wanted, self._most_draws)) == self._noise_draws:
            return
        self._noise_draws = draws
        self._forget = self._suffix.cut(self._images, self._seed, "forget", draws=self._noise_draws)

    def _leave_out_far(self) -> None:
        """Keep the images of D_R, and such virtual ones as the base itself holds for anything like them."""
        z = self._base.z(self._kept_nll.double()).view(self._keep_draws, self._n_kept).mean(0)  # (m,)
        near = z <= VIRTUAL_FAR
        near[: self._n_true] = True
        if bool(near.all()):
            return
        images = near.nonzero()[:, 0]
        rows = (torch.arange(self._keep_draws)[:, None] * self._n_kept + images).flatten()  # of every draw
        self._kept, self._kept_nll, self._n_kept = self._kept[rows], self._kept_nll[rows], len(images)
        self._virtual_rows = min(self._virtual_rows, self._n_kept - self._n_true)

    def _virtual(self, true: Tensor) -> Tensor:
        """Images for the people whom D_R does not show, made of its own.

        Blends of two and samples of the base were tried and hardly move when strangers do; what is warped or moved as
        far as this moves as they do, so that keeping it keeps them.
        """
        generator = stream(self._seed, "virtual")
        images = true[: max(2, round(len(true) * VIRTUAL_POOL))]
        far = max(1, round(min(images.shape[-2:]) * VIRTUAL_SHIFT))
        return torch.cat([warp(images, generator), augment(images, generator, flip=True, shift=far)])

    def _forget_rows(self, images: Tensor, generator: torch.Generator) -> Cut:
        """These forget images, each on one of its noise draws, then one copy of each."""
        draw = torch.randint(self._noise_draws, (len(images),), generator=generator)
        rows = self._forget[images + draw * self._n_forget]
        if self._copies is None:
            return rows
        copy = torch.randint(self._values.forget_variants, (len(images),), generator=generator)
        return Cut.join([rows, self._copies[images + copy * self._n_forget]])

    def _keep_rows(self, generator: torch.Generator) -> tuple[Tensor, int]:
        """Rows of the keep pool for one step, those of D_R first, and how many these are."""
        size = self._values.remember_batch or 2
        virtual = self._n_kept - self._n_true
        share = self._virtual_rows if virtual else 0
        true = min(max(2, size - share), self._n_true)
        rows = torch.randperm(self._n_true, generator=generator)[:true]
        others = self._n_true + torch.randperm(virtual, generator=generator)[:share]
        chosen = torch.cat([rows, others])
        if self._keep_draws > 1:
            chosen = chosen + torch.randint(self._keep_draws, chosen.shape, generator=generator) * self._n_kept
        return chosen, true

    def _track(self, nll_r: Tensor, nll_b: Tensor) -> None:
        """Follow mu_R, sigma_R by how this batch of D_R moved."""
        now = torch.stack([(nll_r - nll_b).double().mean(), nll_r.double().std() - nll_b.double().std()])
        self._shift = SMOOTHING * self._shift + (1 - SMOOTHING) * now / self._base.sigma
