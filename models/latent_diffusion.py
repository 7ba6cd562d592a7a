"""What diffusion models of latents and prompts share: VAE, embeddings of prompts, draws, scopes, configurations.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022). The networks are those of
diffusers and transformers, under the names that they have there; importing them takes seconds, so `models.families`
reaches for these modules only when such a model is built.

A text-to-image architecture is a class of its own, which says what it is made of (`PARTS`, `TOKENIZERS`), what its
U-Net is told of a prompt (`_embedded`), what it is called with (`answer`), and which weights a scope names (`SCOPES`).
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.architecture import check_image
from models.conditional import Sampling
from models.diffusion import KNOWN, Diffusion, Predict, check_sampling, guided
from models.errors import ArchitectureError, ImageError
from models.guided_diffusion import GuidedDiffusion
from models.prompt_embeddings import Embeddings
from models.prompt_tokens import PromptTokenizer
from models.stable_diffusion_parts import Part, check_together, checked
from models.tensor_files import quoted
from models.vae import ConditionError

__all__ = ["N_BITS", "SCOPES", "LatentDiffusion"]

N_BITS = 8
DRAWN_POSITIONS = 2**14
"""Latent positions of all images that are drawn at once: 4 of 512 x 512 pixels, under guidance 8 rows of the U-Net."""
VAE_PIXELS = 2**19
"""Pixels of all images that pass through the VAE at once: 2 of 512 x 512."""
MOST_ROWS = 512

KEPT_APART = ("unet.conv_norm_out.", "unet.conv_out.", "unet.time_embedding.")
"""Left out of "all-but-cross-attention", as the paper's code leaves them: they concern every image."""
SCOPES: dict[str, Callable[[str], bool]] = {
    "all": lambda name: name.startswith("unet."),
    "cross-attention": lambda name: name.startswith("unet.") and ".attn2." in name,
    "all-but-cross-attention": lambda name: (
        name.startswith("unet.") and ".attn2." not in name and not name.startswith(KEPT_APART)
    ),
}
"""Which parameters can be trained: of the U-Net alone. Text encoders and VAE are as they came."""


class LatentDiffusion(GuidedDiffusion):
    """p(x | prompt) over latents x of a VAE: a U-Net tells the noise in x_t from x_t, t and the prompt's embedding.

    The loss of a row is the MEAN over the latent's elements of (answer - target)^2, where the target is the noise, the
    velocity or x, as the scheduler's configuration has it. A condition is a row of token ids, those of each tokenizer
    after each other. All weights are float32.

    Args:
        image_shape: (channels, side, side), what the VAE makes of latents of the U-Net's sample_size.
        n_bits: 8.
        configs: of each of `PARTS`.
        tokenizers: bytes of the files and special tokens of each, see `models.prompt_tokens.checked_tokenizer`.
        scheduler: of the forward process and the sampler, see `models.diffusion.KNOWN`.
        sampling: {"steps", "guidance_scale"}, see `models.conditional.Sampling`; `SAMPLING` where it is silent.
        generator: draws the starting weights; without it all of them are zero, for weights to be loaded into.

    Raises:
        ArchitectureError: a value is out of range, or the parts do not fit each other.
    """

    family: ClassVar[str]
    PARTS: ClassVar[Mapping[str, Part]]
    """What it is made of, by submodule: a "unet", a "vae", and the rest text encoders in the order of their widths."""
    TOKENIZERS: ClassVar[Mapping[str, str]]
    """The text encoder of each tokenizer."""
    SAMPLING: ClassVar[Mapping[str, Any]]
    """How its pipeline draws where it is told nothing."""
    SCOPES: ClassVar[Mapping[str, Callable[[str], bool]]] = SCOPES
    unet: Any
    vae: Any

    def __init__(
        self,
        image_shape: Sequence[int],
        n_bits: int,
        configs: Mapping[str, Mapping[str, Any]],
        tokenizers: Mapping[str, Mapping[str, Any]],
        *,
        scheduler: Mapping[str, Any],
        sampling: Mapping[str, Any] | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.image_shape, self.n_bits = check_image(image_shape, n_bits), n_bits
        if n_bits != N_BITS:
            raise ArchitectureError(f"Stable Diffusion draws images of {N_BITS} bits a channel, not {n_bits}")
        self._configs = {name: checked(part.called, configs[name], part.fields) for name, part in self.PARTS.items()}
        self._check_parts()
        if not isinstance(scheduler, Mapping) or (odd := sorted(map(str, scheduler.keys() - KNOWN.keys()))):
            raise ArchitectureError(f"the scheduler's configuration has unknown fields {quoted(odd)}; leave them out")
        self.diffusion = Diffusion(scheduler)
        steps = min(self.SAMPLING["steps"], self.terms)
        self.sampling = _read_sampling({**self.SAMPLING, "steps": steps, **(sampling or {})}, self.terms)
        for name, encoder in self.TOKENIZERS.items():
            positions, vocab_size = (self._configs[encoder][of] for of in ("max_position_embeddings", "vocab_size"))
            self.add_module(name, PromptTokenizer(tokenizers[name], positions, vocab_size))
        seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator, device=generator.device))
        with torch.random.fork_rng(devices=[]):  # the libraries draw from the global generator, which is put back
            torch.default_generator.manual_seed(seed)
            for name, part in self.PARTS.items():
                self.add_module(name, part.build(self._configs[name]))
        if generator is None:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.zero_()
        latent = self._configs["unet"]
        self.latent_shape = (latent["in_channels"], latent["sample_size"], latent["sample_size"])
        self._embeddings = Embeddings()
        self.register_load_state_dict_post_hook(_forget_caches)  # type: ignore[no-untyped-call]  # torch's own
        self.eval()

    @property
    def tokenizers(self) -> dict[str, PromptTokenizer]:
        """Its tokenizers, by submodule."""
        found: dict[str, PromptTokenizer] = {name: getattr(self, name) for name in self.TOKENIZERS}
        return found

    @property
    def architecture(self) -> dict[str, Any]:
        """The constructor's arguments beyond image shape and n_bits, as JSON values."""
        return {
            **{part: dict(config) for part, config in self._configs.items()},
            **{name: dict(one.config) for name, one in self.tokenizers.items()},
            "scheduler": dict(self.diffusion.config),
            "sampling": asdict(self.sampling),
        }

    @property
    def null_condition(self) -> Tensor:
        """The tokens of the empty prompt, int64 (tokens,): the condition of p(x)."""
        return torch.cat([one.empty for one in self.tokenizers.values()])

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids of prompts, int64 (n, tokens), on the CPU.

        Raises:
            PromptError: a prompt has no tokens, more than the model reads, or something that it does not know.
        """
        return torch.cat([one.rows(prompts) for one in self.tokenizers.values()], dim=1)

    def scopes(self) -> Mapping[str, Sequence[str]]:
        """Names of what can be trained, by scope: see `SCOPES`."""
        names = [name for name, _ in self.named_parameters()]
        return {scope: [name for name in names if among(name)] for scope, among in self.SCOPES.items()}

    def enable_gradient_checkpointing(self) -> None:
        """Keep the inputs of the U-Net's blocks alone, and compute the rest anew: less memory, equal gradients."""
        self.unet.enable_gradient_checkpointing()

    @torch.no_grad()
    def encode(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Latents of images: a draw from the VAE's posterior, times its scaling_factor.

        Args:
            images: uint8 (n, c, h, w).
            generator: draws from the posterior, on the CPU, row by row.

        Returns:
            float32 (n, *latent_shape), on the device of the images.

        Raises:
            ImageError: they are not uint8, or of another shape.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.image_shape:
            raise ImageError(
                f"the model takes uint8 images (n, {', '.join(map(str, self.image_shape))}), "
                f"not {images.dtype} {tuple(images.shape)}"
            )
        found = []
        for part in torch.split(images, self._vae_rows):
            with self._exactly():
                posterior = self.vae.encode(part.to(self._device).float() / 127.5 - 1).latent_dist
            noise = self._noise(len(part), generator).to(self._device)
            found.append(((posterior.mean + posterior.std * noise) * self._scaling_factor).to(images.device))
        return torch.cat(found) if found else torch.empty(0, *self.latent_shape, device=images.device)

    @torch.no_grad()
    def images(self, x: Tensor) -> Tensor:
        """Latents (n, *latent_shape) as images, uint8 (n, c, h, w), on the device of x."""
        found = []
        for part in torch.split(x, self._vae_rows):
            with self._exactly():
                decoded = self.vae.decode(part.to(self._device) / self._scaling_factor).sample
            found.append(((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(x.device, torch.uint8))
        return torch.cat(found) if found else torch.empty(0, *self.image_shape, device=x.device, dtype=torch.uint8)

    @torch.no_grad()
    def generate(self, condition: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw latents of each condition, by DDIM under guidance as `sampling` says.

        Args:
            condition: token ids, int64 (n, tokens).
            generator: draws the noise to start from, on the CPU, row by row: the first rows of many are those of few.

        Returns:
            float32 (n, *latent_shape), on the model's device.
        """
        start = self._noise(len(condition), generator)
        null = self.told(self.null_condition[None], 1)
        rows = max(1, min(MOST_ROWS, DRAWN_POSITIONS // self.latent_shape[1] ** 2))
        drawn = [torch.empty(0, *self.latent_shape, device=self._device)]
        for noise, tokens in zip(torch.split(start, rows), torch.split(condition, rows), strict=True):
            told = self.told(tokens, len(noise))
            predict = guided(self.answer, told, null.expand_as(told), self.sampling.guidance_scale)
            drawn.append(self.diffusion.reverse(predict, noise.to(self._device), self.sampling.steps).float())
        return torch.cat(drawn)

    def sample(self, condition: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw an image of each condition, uint8 (n, c, h, w), on the model's device."""
        return self.images(self.generate(condition, generator=generator))

    def told(self, condition: Tensor, n: int | None = None) -> Tensor:
        """What the U-Net is told of prompts, (n, ...) float32, on its device.

        Args:
            condition: token ids, int64 (n, tokens).
            n: how many there have to be.

        Raises:
            ConditionError: they are none, or another number.
        """
        n = len(condition) if n is None else n
        sizes = [one.vocab_size for one in self.tokenizers.values() for _ in range(one.positions)]
        if condition.dtype != torch.int64 or tuple(condition.shape) != (n, len(sizes)):
            raise ConditionError(
                f"conditions are rows of token ids (int64), ({n}, {len(sizes)}), not {condition.dtype} "
                f"{tuple(condition.shape)}; `tokens` makes them of prompts"
            )
        if not n:
            return self.told(self.null_condition[None])[:0]
        if bool(((condition < 0) | (condition >= torch.tensor(sizes, device=condition.device))).any()):
            raise ConditionError(f"a token id lies outside of 0 to {min(sizes) - 1}; `tokens` makes them of prompts")
        rows, which = self._embeddings.of(condition, self._embedded)
        return rows.to(self._device)[which.to(self._device)]

    @abstractmethod
    def answer(self, x: Tensor, steps: Tensor, told: Tensor) -> Tensor:
        """What the U-Net answers, row by row, to x_t (n, c, h, w), timesteps (n,) and what it is told (`told`)."""

    @abstractmethod
    def _embedded(self, row: Tensor) -> Tensor:
        """What the U-Net is told of one row of token ids, (1, tokens) on the CPU: (1, ...), in float32."""

    def _check_parts(self) -> None:
        """Raise ArchitectureError unless the configurations make one model."""
        texts = [config for part, config in self._configs.items() if part not in ("unet", "vae")]
        check_together(self._configs["unet"], self._configs["vae"], texts, self.image_shape)

    @property
    def x_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of a latent."""
        return self.latent_shape

    def _told(self, condition: Tensor, x: Tensor) -> Predict:
        told = self.told(condition, len(x))
        return lambda noised, steps: self.answer(noised, steps, told)

    def _joined(self, errors: Tensor) -> Tensor:
        mean: Tensor = errors.flatten(1).mean(dim=1)
        return mean

    def _exactly(self) -> torch.autocast:
        """In float32, whatever precision the caller trains in."""
        return torch.autocast(self._device.type, enabled=False)

    def _noise(self, n: int, generator: torch.Generator) -> Tensor:
        """N(0, I), (n, *latent_shape), row by row: a draw of many at once has other values than one of few."""
        noise = torch.empty(n, *self.latent_shape)
        for row in noise:
            row.copy_(torch.randn(self.latent_shape, generator=generator))
        return noise

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.unet.parameters()).device
        return device

    @property
    def _scaling_factor(self) -> float:
        return float(self._configs["vae"]["scaling_factor"])

    @property
    def _vae_rows(self) -> int:
        return max(1, min(MOST_ROWS, VAE_PIXELS // self.image_shape[1] ** 2))


def _forget_caches(model: nn.Module, _: object) -> None:
    """Other weights give other embeddings, and other files another tokenizer."""
    if isinstance(model, LatentDiffusion):
        model._embeddings = Embeddings()
        for tokenizer in model.tokenizers.values():
            tokenizer.forget()


def _read_sampling(values: Mapping[str, Any], terms: int) -> Sampling:
    names = [one.name for one in fields(Sampling)]
    if values.keys() != set(names):
        raise ArchitectureError(f"sampling is {', '.join(names)}, not {quoted(sorted(map(str, values)))}")
    scale = values["guidance_scale"]
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ArchitectureError(f"the sampling's guidance_scale is a number, not {quoted(scale)}")
    sampling = Sampling(values["steps"], float(scale))
    check_sampling(sampling, terms)
    return sampling
