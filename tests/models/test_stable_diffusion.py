"""Stable Diffusion at the size of a toy: its loss, its draws, its prompts, and what a manifest may not ask for."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from models.checkpoints import Manifest, build, load_conditional, save_checkpoint
from models.conditional import CheckpointedConditional, PromptConditional, Sampling
from models.errors import ArchitectureError, ImageError, PromptError, UnusableModelError
from models.probe import probe
from models.prompt_embeddings import Embeddings
from models.stable_diffusion import StableDiffusion
from models.vae import ConditionError, InputError
from tests.models import sd_cases
from tests.models.sd_cases import IMAGE_SHAPE, SCHEDULER, tiny
from unlearning.fisher import fisher_information

PROMPTS = ["zero", "a photo of one", "red"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return tiny()


def case(model: StableDiffusion, n: int = 3) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Latents, conditions and draws of n rows."""
    x = torch.randn(n, *model.latent_shape, generator=seeded(1))
    return x, model.tokens([PROMPTS[row % len(PROMPTS)] for row in range(n)]), model.draw(n, generator=seeded(2))


def test_it_is_a_guided_model_of_prompts_that_a_manifest_can_rebuild(model: StableDiffusion) -> None:
    assert isinstance(model, PromptConditional)
    assert isinstance(model, CheckpointedConditional)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_the_mean_squared_error_against_what_the_scheduler_has_the_network_predict(prediction: str) -> None:
    model = tiny(scheduler={"prediction_type": prediction})
    x, condition, (steps, noise) = case(model)
    known = {name: value for name, value in SCHEDULER.items() if name != "set_alpha_to_one"}
    scheduler = DDPMScheduler(**known, prediction_type=prediction)
    hidden = torch.cat([model.text_encoder(row[None]).last_hidden_state for row in condition])
    answer = model.unet(scheduler.add_noise(x, noise, steps), steps, hidden).sample
    target = {"epsilon": noise, "sample": x, "v_prediction": scheduler.get_velocity(x, noise, steps)}[prediction]

    losses = model.losses(x, condition, (steps, noise))

    torch.testing.assert_close(losses, F.mse_loss(answer, target, reduction="none").mean(dim=(1, 2, 3)))


def test_a_loss_does_not_depend_on_batch_mates(model: StableDiffusion) -> None:
    x, condition, draws = case(model)

    together = model.losses(x, condition, draws)
    apart = [
        model.losses(x[row : row + 1], condition[row : row + 1], tuple(one[row : row + 1] for one in draws))
        for row in range(len(x))
    ]

    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-6)  # sums in another order


def test_only_the_unet_gets_gradients(model: StableDiffusion) -> None:
    losses = model.losses(*case(model))

    gradients = torch.autograd.grad(losses.sum(), list(model.parameters()), allow_unused=True)

    reached = {
        name for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True) if gradient is not None
    }
    assert reached == set(model.scopes()["all"])


def test_prompts_make_a_difference(model: StableDiffusion) -> None:
    x, _, draws = case(model, 1)

    losses = [float(model.losses(x, model.tokens([prompt]), draws).detach()) for prompt in ("zero", "one")]

    assert losses[0] != losses[1]


def test_the_first_rows_of_many_draws_are_those_of_few(model: StableDiffusion) -> None:
    condition = model.tokens(PROMPTS)

    many, few = (model.generate(condition[:n], generator=seeded()) for n in (3, 1))

    torch.testing.assert_close(many[:1], few, rtol=1e-4, atol=1e-5)  # a batch of another size sums in another order


def test_more_rows_than_pass_at_once_are_drawn_in_pieces_from_one_stream(model: StableDiffusion) -> None:
    model = copy.deepcopy(model)
    model.sampling = Sampling(1, 1.0)
    condition, generator = model.tokens(["zero"]).expand(514, -1), seeded()

    whole = model.generate(condition, generator=seeded())
    parts = torch.cat([model.generate(condition[:n], generator=generator) for n in (512, 2)])

    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_equal_generators_draw_equal_images(model: StableDiffusion) -> None:
    condition = model.tokens(PROMPTS)

    first, second, other = (model.sample(condition, generator=seeded(seed)) for seed in (0, 0, 1))

    assert first.shape == (3, *IMAGE_SHAPE)
    assert first.dtype == torch.uint8
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(first, model.images(model.generate(condition, generator=seeded())))


def test_guidance_goes_along_the_difference_that_the_prompt_makes(model: StableDiffusion) -> None:
    model, condition = copy.deepcopy(model), model.tokens(["zero"])
    drawn = []
    for scale in (1.0, 2.0, 3.0):
        model.sampling = Sampling(1, scale)  # of one step, x is linear in the answer
        drawn.append(model.generate(condition, generator=seeded()))

    torch.testing.assert_close(drawn[2] - drawn[1], drawn[1] - drawn[0], rtol=1e-2, atol=1e-3)
    assert not torch.allclose(drawn[1], drawn[0], rtol=1e-2)


def test_encoding_is_a_draw_from_the_posterior_at_the_scale_of_the_unet(model: StableDiffusion) -> None:
    images = torch.randint(256, (3, *IMAGE_SHAPE), generator=seeded()).to(torch.uint8)
    posterior = model.vae.encode(images.float() / 127.5 - 1).latent_dist
    generator = seeded(5)
    noise = torch.stack([torch.randn(model.latent_shape, generator=generator) for _ in images])

    x = model.encode(images, generator=seeded(5))

    torch.testing.assert_close(x, (posterior.mean + posterior.std * noise).detach() * 0.5)  # 0.5 is its scaling_factor
    torch.testing.assert_close(x[:2], model.encode(images[:2], generator=seeded(5)), rtol=1e-5, atol=1e-6)


def test_other_images_are_refused(model: StableDiffusion) -> None:
    with pytest.raises(ImageError, match=r"uint8 images \(n, 3, 8, 8\)"):
        model.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), generator=seeded())


def test_odd_inputs_of_the_loss_are_refused(model: StableDiffusion) -> None:
    x, condition, (steps, noise) = case(model)

    with pytest.raises(InputError, match="float tensor"):
        model.losses(x[:, :2], condition, (steps, noise))
    with pytest.raises(InputError, match="timesteps"):
        model.losses(x, condition, (steps + 1000, noise))
    with pytest.raises(ConditionError, match="token ids"):
        model.losses(x, torch.zeros(3, dtype=torch.int64), (steps, noise))
    with pytest.raises(ConditionError, match="lies outside"):
        model.losses(x, condition + 10_000, (steps, noise))


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "has no tokens"),
        ("  ", "has no tokens"),
        ("zero " * 9, "has 9 tokens and the model reads 6: the last 3 would be cut off"),
        ("zero §", "does not know"),
        ("<|endoftext|>", "start or end"),
        ("a\ud800", "no text"),
        ("a\0", "no text"),
    ],
)
def test_a_prompt_that_the_model_would_misread_is_refused(model: StableDiffusion, prompt: str, says: str) -> None:
    with pytest.raises(PromptError, match=says):
        model.tokens(["zero", prompt])


def test_the_longest_prompt_still_fits(model: StableDiffusion) -> None:
    assert model.tokens(["zero " * 6]).shape == (1, sd_cases.POSITIONS)


def test_scopes_name_the_unet_alone_and_leave_its_ends_apart(model: StableDiffusion) -> None:
    scopes = {scope: set(names) for scope, names in model.scopes().items()}
    apart = scopes["all"] - scopes["cross-attention"] - scopes["all-but-cross-attention"]

    assert scopes["all"] == {f"unet.{name}" for name, _ in model.unet.named_parameters()}
    assert all(".attn2." in name for name in scopes["cross-attention"])
    assert not scopes["cross-attention"] & scopes["all-but-cross-attention"]
    assert {name.split(".")[1] for name in apart} == {"conv_norm_out", "conv_out", "time_embedding"}


def test_gradient_checkpointing_changes_no_gradient(model: StableDiffusion) -> None:
    plain, saving = copy.deepcopy(model), copy.deepcopy(model)
    saving.enable_gradient_checkpointing()
    found = []
    for one in (plain, saving):
        one.losses(*case(one)).sum().backward()
        found.append([parameter.grad for parameter in one.unet.parameters()])

    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_returns_every_bit(model: StableDiffusion, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", model)

    loaded = load_conditional(tmp_path / "a.safetensors")

    assert isinstance(loaded, StableDiffusion)
    assert loaded.architecture == model.architecture
    assert not any(buffer.is_meta for buffer in loaded.buffers())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded.losses(*case(loaded)), model.losses(*case(model)))
    assert torch.equal(
        loaded.sample(model.tokens(PROMPTS), generator=seeded()),
        model.sample(model.tokens(PROMPTS), generator=seeded()),
    )


def test_without_a_generator_the_weights_are_zero_and_with_equal_ones_equal() -> None:
    before = torch.get_rng_state()
    empty = StableDiffusion(IMAGE_SHAPE, 8, **sd_cases.architecture())

    assert all(not bool(parameter.any()) for parameter in empty.parameters())
    assert all(torch.equal(a, b) for a, b in zip(tiny(3).parameters(), tiny(3).parameters(), strict=True))
    assert not torch.equal(tiny(3).unet.conv_in.weight, tiny(4).unet.conv_in.weight)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"unet": {"block_out_channels": [8, 1_000_000]}},
        {"unet": {"block_out_channels": []}},
        {"unet": {"block_out_channels": [8, 10]}},
        {"unet": {"down_block_types": ["CrossAttnDownBlock2D", "os.system"]}},
        {"unet": {"down_block_types": ["DownBlock2D"]}},
        {"unet": {"layers_per_block": 1000}},
        {"unet": {"layers_per_block": True}},
        {"unet": {"attention_head_dim": [1, 3]}},
        {"unet": {"in_channels": 9}},
        {"unet": {"out_channels": 8}},
        {"unet": {"cross_attention_dim": 32}},
        {"unet": {"sample_size": 8}},
        {"unet": {"class_embed_type": "timestep"}},
        {"unet": {"act_fn": ["silu"]}},
        {"vae": {"latent_channels": 8}},
        {"vae": {"scaling_factor": 0}},
        {"vae": {"norm_num_groups": 3}},
        {"vae": {"block_out_channels": [4]}},
        {"text_encoder": {"hidden_size": 10**9}},
        {"text_encoder": {"vocab_size": 2**40}},
        {"text_encoder": {"num_attention_heads": 3}},
        {"text_encoder": {"_attn_implementation": "flash"}},
        {"tokenizer": {"vocab_bytes": 2**40}},
        {"tokenizer": {"pad_token": ""}},
        {"tokenizer": {"more": 1}},
        {"scheduler": {"beta_schedule": "sigmoid"}},
        {"scheduler": {"thresholding": True}},
        {"sampling": {"steps": 0}},
        {"sampling": {"guidance_scale": 0.0}},
        {"sampling": {"guidance_scale": "7"}},
        {"sampling": {"eta": 1.0}},
    ],
    ids=str,
)
def test_a_manifest_that_asks_for_the_impossible_is_refused_unbuilt(changes: Mapping[str, Any]) -> None:
    manifest = Manifest("stable-diffusion", sd_cases.architecture(**changes), 8, 3, 8, "")

    with pytest.raises(ArchitectureError):
        build(manifest)


def test_copies_share_embeddings_which_are_no_part_of_the_state(model: StableDiffusion) -> None:
    fresh = tiny()
    condition = fresh.tokens(["zero", "one", "zero"])
    told = fresh.told(condition)
    held = fresh.told(condition)

    copied = copy.deepcopy(fresh)
    with torch.no_grad():
        for parameter in copied.text_encoder.parameters():
            parameter.zero_()  # what is kept is used, not computed anew

    assert torch.equal(told, held)
    assert torch.equal(copied.told(condition), told)
    assert fresh.state_dict().keys() == model.state_dict().keys()
    copied.load_state_dict(copied.state_dict())
    assert not torch.equal(copied.told(condition), told)


def test_the_cache_forgets_the_row_that_was_not_asked_for_longest() -> None:
    asked: list[int] = []

    def encode(row: Tensor) -> Tensor:
        asked.append(int(row[0, 0]))
        return row[..., None].float()

    cache = Embeddings(max_rows=2)
    for ids in ([0], [1], [0, 0], [2], [0], [1]):
        rows, which = cache.of(torch.tensor(ids)[:, None], encode)
        assert torch.equal(rows[which][:, 0, 0], torch.tensor(ids).float())

    assert asked == [0, 1, 2, 1]
    assert len(cache) == 2


def test_the_fisher_information_takes_rows_of_tokens_as_conditions(model: StableDiffusion) -> None:
    x, condition, _ = case(model, 2)
    names = list(model.scopes()["cross-attention"])

    found = fisher_information(model, x, condition, names=names, seed=0, draws_per_example=4, reduction="mean")

    assert set(found.tensors) == set(names)
    assert all(bool((value >= 0).all()) for value in found.tensors.values())
    assert sum(float(value.sum()) for value in found.tensors.values()) > 0


def test_a_probe_warns_of_what_predicts_nothing(model: StableDiffusion) -> None:
    silent = copy.deepcopy(model)
    with torch.no_grad():
        silent.unet.conv_out.weight.zero_()
        silent.unet.conv_out.bias.zero_()

    warnings = probe(silent)

    assert any("hardly trained" in warning for warning in warnings)
    assert any("prompts make no difference" in warning for warning in warnings)


@pytest.mark.parametrize("part", ["unet.conv_in", "vae.decoder.conv_out", "text_encoder.final_layer_norm"])
def test_a_probe_refuses_what_overflows(model: StableDiffusion, part: str) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_submodule(part).weight.mul_(float("inf"))
    broken.load_state_dict(broken.state_dict())

    with pytest.raises(UnusableModelError, match="not finite"):
        probe(broken)


def test_a_probe_refuses_what_answers_something_else(model: StableDiffusion) -> None:
    loud = copy.deepcopy(model)
    with torch.no_grad():
        loud.unet.conv_out.weight.mul_(100)

    with pytest.raises(UnusableModelError, match="state prediction_type"):
        probe(loud)
