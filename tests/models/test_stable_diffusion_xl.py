"""Stable Diffusion XL at the size of a toy: what it is told and draws is what diffusers' pipeline does, out and in."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from models.checkpoints import Manifest, build, load_conditional
from models.conditional import CheckpointedConditional, PromptConditional
from models.convert import convert
from models.diffusers_folder import load_folder, read_folder_tar, write_folder, write_folder_tar
from models.errors import ArchitectureError, CheckpointError, ManifestError, PromptError, UnusableModelError
from models.probe import probe
from models.prompt_tokens import PromptTokenizer
from models.stable_diffusion_xl import StableDiffusionXL
from models.vae import ConditionError
from tests.models import sdxl_cases
from tests.models.sd_cases import POSITIONS
from tests.models.sd_folders import packed
from tests.models.sdxl_cases import tiny_xl
from unlearning import AmnesiaParameters, Check, Examples, Pool, fisher_information, forget_conditions
from unlearning.memory import LiveBytes, estimate
from unlearning.passes import recomputing

PROMPTS = ["zero", "a photo of one", "red!"]  # of which the second tokenizer pads with the last letter


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model() -> StableDiffusionXL:
    return tiny_xl()


@pytest.fixture(scope="module")
def written_xl(model: StableDiffusionXL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder; not to be changed."""
    folder = tmp_path_factory.mktemp("written-xl")
    write_folder(model, folder)
    return folder


@pytest.fixture
def folder_xl(written_xl: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(written_xl, tmp_path / "folder"))


def opened(folder: Path) -> Any:
    """The folder as diffusers opens it."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def case(model: StableDiffusionXL, n: int = 3) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Latents, conditions and draws of n rows."""
    x = torch.randn(n, *model.latent_shape, generator=seeded(1))
    return x, model.tokens([PROMPTS[row % len(PROMPTS)] for row in range(n)]), model.draw(n, generator=seeded(2))


def their_answer(pipeline: Any, noised: Tensor, steps: Tensor, hidden: Tensor, pooled: Tensor) -> Tensor:
    """What diffusers' U-Net answers, told as its pipeline tells it."""
    side = noised.shape[-1] * pipeline.vae_scale_factor
    sizes = pipeline._get_add_time_ids((side, side), (0, 0), (side, side), torch.float32, sdxl_cases.PROJECTED)
    added = {"text_embeds": pooled, "time_ids": sizes.repeat(len(noised), 1)}
    answer: Tensor = pipeline.unet(noised, steps, encoder_hidden_states=hidden, added_cond_kwargs=added).sample
    return answer


def test_it_is_a_guided_model_of_prompts_that_a_manifest_can_rebuild(model: StableDiffusionXL) -> None:
    assert isinstance(model, PromptConditional)
    assert isinstance(model, CheckpointedConditional)


@pytest.mark.parametrize("zeros", [True, False])
def test_diffusers_tells_and_answers_the_same(zeros: bool, tmp_path: Path) -> None:
    model = tiny_xl(force_zeros_for_empty_prompt=zeros)
    write_folder(model, tmp_path)
    pipeline = opened(tmp_path)
    x, condition, (steps, noise) = case(model)
    with torch.no_grad():
        hidden, null, pooled, null_pooled = pipeline.encode_prompt(PROMPTS)
        noised = pipeline.scheduler.add_noise(x, noise, steps)

        for theirs, ours in (
            ((hidden, pooled), model.told(condition)),
            ((null, null_pooled), model.told(model.null_condition.expand(3, -1))),
        ):
            torch.testing.assert_close(ours, torch.cat([theirs[0].flatten(1), theirs[1]], dim=1), rtol=1e-4, atol=1e-5)
            answer = their_answer(pipeline, noised, steps, *theirs)
            torch.testing.assert_close(model.answer(noised, steps, ours), answer, rtol=1e-4, atol=1e-5)

    assert bool(model.told(model.null_condition[None]).any()) != zeros


@pytest.mark.parametrize(
    ("prediction", "changes"), [("epsilon", {}), ("v_prediction", {"force_zeros_for_empty_prompt": False})]
)
def test_diffusers_opens_the_tar_and_draws_what_the_model_draws(
    prediction: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_xl(scheduler={"prediction_type": prediction}, **changes)
    write_folder_tar(model, tmp_path / "a.tar")
    shutil.unpack_archive(tmp_path / "a.tar", tmp_path / "a", filter="data")
    pipeline = opened(tmp_path / "a")
    start = torch.stack([torch.randn(model.latent_shape, generator=one) for one in [seeded()] for _ in PROMPTS])
    how = {"num_inference_steps": model.sampling.steps, "guidance_scale": model.sampling.guidance_scale}

    theirs = pipeline(prompt=PROMPTS, latents=start.clone(), output_type="pt", **how).images
    ours = model.sample(model.tokens(PROMPTS), generator=seeded())

    assert model.sampling.guidance_scale > 1
    assert ours.float().std() > 1
    torch.testing.assert_close((theirs * 255).round(), ours.float(), rtol=0, atol=1)  # a level, where rounding is close


def test_the_loss_is_the_mean_squared_error_of_what_diffusers_answers(
    model: StableDiffusionXL, written_xl: Path
) -> None:
    pipeline = opened(written_xl)
    x, condition, (steps, noise) = case(model)
    with torch.no_grad():
        hidden, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        answer = their_answer(pipeline, pipeline.scheduler.add_noise(x, noise, steps), steps, hidden, pooled)

        losses = model.losses(x, condition, (steps, noise))

    torch.testing.assert_close(losses, F.mse_loss(answer, noise, reduction="none").mean(dim=(1, 2, 3)))


def test_a_loss_does_not_depend_on_batch_mates(model: StableDiffusionXL) -> None:
    x, condition, draws = case(model)

    together = model.losses(x, condition, draws)
    apart = [
        model.losses(x[row : row + 1], condition[row : row + 1], tuple(one[row : row + 1] for one in draws))
        for row in range(len(x))
    ]

    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-6)  # sums in another order


def test_scopes_part_the_unet_and_leave_its_ends_apart(model: StableDiffusionXL) -> None:
    scopes = {scope: set(names) for scope, names in model.scopes().items()}
    apart = scopes["all"] - scopes["cross-attention"] - scopes["all-but-cross-attention"]

    assert scopes["all"] == {f"unet.{name}" for name, _ in model.unet.named_parameters()}
    assert scopes["cross-attention"] == {name for name in scopes["all"] if ".attn2." in name}
    assert scopes["cross-attention"] | scopes["all-but-cross-attention"] | apart == scopes["all"]
    assert not scopes["cross-attention"] & scopes["all-but-cross-attention"]
    assert {name.split(".")[1] for name in apart} == {"conv_norm_out", "conv_out", "time_embedding"}


def test_only_the_unet_gets_gradients(model: StableDiffusionXL) -> None:
    losses = model.losses(*case(model))

    gradients = torch.autograd.grad(losses.sum(), list(model.parameters()), allow_unused=True)

    named = zip(model.named_parameters(), gradients, strict=True)
    assert {name for (name, _), gradient in named if gradient is not None} == set(model.scopes()["all"])


def test_conditions_are_rows_of_both_tokenizers(model: StableDiffusionXL) -> None:
    first, second = model.tokens(["zero"]).chunk(2, dim=1)

    assert torch.equal(first[:, :3], second[:, :3])
    assert not torch.equal(first[:, 3:], second[:, 3:])  # padded otherwise
    with pytest.raises(ConditionError, match=rf"\(1, {2 * POSITIONS}\)"):
        model.told(first)
    with pytest.raises(ConditionError, match="lies outside"):
        model.told(model.tokens(["zero"]) + 10_000)
    assert model.told(model.tokens([])).shape == (0, POSITIONS * (16 + 24) + sdxl_cases.PROJECTED)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_either_tokenizer_refuses_what_it_would_cut_off(name: str, model: StableDiffusionXL) -> None:
    model = copy.deepcopy(model)
    for other, narrow in model.tokenizers.items():
        if other != name:
            roomy = PromptTokenizer(narrow.config, 77, narrow.vocab_size)
            roomy.load_state_dict(narrow.state_dict())
            model.add_module(other, roomy)

    with pytest.raises(PromptError, match="has 9 tokens and the model reads 6: the last 3 would be cut off"):
        model.tokens(["zero " * 9])


def test_a_tar_and_a_checkpoint_return_every_bit(model: StableDiffusionXL, tmp_path: Path) -> None:
    write_folder_tar(model, tmp_path / "a.tar")

    manifest = convert(tmp_path / "a.tar", tmp_path / "a.safetensors")
    again = load_conditional(tmp_path / "a.safetensors")

    assert isinstance(again, StableDiffusionXL)
    assert (manifest.family, manifest.extra["left_out"]) == ("stable-diffusion-xl", [])
    assert {**again.architecture, "sampling": None} == {**model.architecture, "sampling": None}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    again.sampling = model.sampling
    condition = model.tokens(PROMPTS)
    assert torch.equal(again.sample(condition, generator=seeded()), model.sample(condition, generator=seeded()))
    with pytest.raises(ManifestError, match=r"family was stated as 'stable-diffusion'; .* 'stable-diffusion-xl'"):
        convert(tmp_path / "a.tar", tmp_path / "b.safetensors", family="stable-diffusion")


def test_what_diffusers_saves_itself_is_read(model: StableDiffusionXL, written_xl: Path, tmp_path: Path) -> None:
    opened(written_xl).save_pretrained(tmp_path, safe_serialization=True)
    changed(tmp_path / "unet/config.json", upcast_attention=None)  # as the published base model has it

    again = load_folder(tmp_path)

    own = {name: value for name, value in again.state_dict().items() if not name.startswith("tokenizer")}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in own.items())
    assert torch.equal(again.tokens(PROMPTS), model.tokens(PROMPTS))
    assert torch.equal(again.null_condition, model.null_condition)


def changed(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def no_second(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder_2")


def refiner(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    changed(
        folder / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", text_encoder=[None, None],
        tokenizer=[None, None], requires_aesthetics_score=True,
    )  # fmt: skip


def first_unet(folder: Path) -> None:
    config = json.loads((folder / "unet/config.json").read_text())
    del config["addition_embed_type"]
    (folder / "unet/config.json").write_text(json.dumps(config))


def refining_unet(folder: Path) -> None:
    changed(folder / "unet/config.json", projection_class_embeddings_input_dim=32)


def other_kind(folder: Path) -> None:
    changed(folder / "model_index.json", _class_name="StableDiffusionPipeline")


def one_kind_of_encoder(folder: Path) -> None:
    changed(folder / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"])


def no_tokenizer_2(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer_2")


def controlled(folder: Path) -> None:
    (folder / "controlnet").mkdir()
    (folder / "controlnet/config.json").write_text("{}")


def own_mean(folder: Path) -> None:
    changed(folder / "vae/config.json", latents_mean=[0.0] * 4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (no_second, "lacks its text_encoder_2"),
        (refiner, "one text encoder alone: an SDXL refiner; give the base"),
        (first_unet, "addition_embed_type .* no U-Net of SDXL"),
        (refining_unet, "is 32; the second text encoder and 6 sizes make 36: a refiner"),
        (other_kind, "has a text_encoder_2.*SDXL"),
        (one_kind_of_encoder, "takes a CLIPTextModelWithProjection"),
        (no_tokenizer_2, "the tokenizer_2 is missing"),
        (controlled, "has a controlnet"),
        (own_mean, "latents_mean"),
    ],
)
def test_what_is_no_base_model_is_refused_by_what_is_wrong(
    change: Callable[[Path], None], says: str, folder_xl: Path, tmp_path: Path
) -> None:
    change(folder_xl)

    with pytest.raises(CheckpointError, match=says):
        read_folder_tar(packed(folder_xl, tmp_path / "a.tar"))


@pytest.mark.parametrize(
    "changes",
    [
        {"unet": {"cross_attention_dim": 16}},
        {"unet": {"transformer_layers_per_block": [1]}},
        {"unet": {"transformer_layers_per_block": [1, 1000]}},
        {"unet": {"addition_embed_type": "text"}},
        {"unet": {"addition_time_embed_dim": 8}},
        {"text_encoder_2": {"projection_dim": 16}},
        {"text_encoder_2": {"max_position_embeddings": 16}},
        {"tokenizer_2": {"pad_token": ""}},
        {"force_zeros_for_empty_prompt": 1},
    ],
    ids=str,
)
def test_a_manifest_that_asks_for_the_impossible_is_refused_unbuilt(changes: dict[str, Any]) -> None:
    manifest = Manifest("stable-diffusion-xl", sdxl_cases.architecture(**changes), 8, 3, 8, "")

    with pytest.raises((ArchitectureError, ManifestError)):
        build(manifest)


def test_the_published_configuration_is_of_the_published_size() -> None:
    clip = {"vocab_size": 49408, "max_position_embeddings": 77}
    four = {"in_channels": 4, "out_channels": 4}
    architecture = sdxl_cases.architecture()
    vae = {
        "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "sample_size": 1024,
        "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "scaling_factor": 0.13025,
    }  # fmt: skip
    unet = {
        **four, "sample_size": 128, "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": 2048,
        "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True, "upcast_attention": None,
    }  # fmt: skip
    first = {**clip, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    second = {
        **clip, "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32,
        "hidden_act": "gelu", "projection_dim": 1280,
    }  # fmt: skip
    parts = {"unet": unet, "vae": vae, "text_encoder": first, "text_encoder_2": second}
    with torch.device("meta"):
        model = StableDiffusionXL((3, 1024, 1024), 8, **{**architecture, **parts})

    sizes = [sum(one.numel() for one in model.get_submodule(name).parameters()) for name in parts]

    assert sizes == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]


def test_a_pass_of_many_rows_takes_what_two_of_few_foretell_with_all_that_is_told() -> None:
    model = tiny_xl(text_encoder={"max_position_embeddings": 77}, text_encoder_2={"max_position_embeddings": 77})
    x, condition, draws = case(model, 8)
    model.told(condition)
    names = model.scopes()["all"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in set(names)).grad = torch.zeros_like(parameter)
    found = estimate(model, names, {}, x[:2], condition[:2], tuple(one[:2] for one in draws))
    for name in names:
        model.get_parameter(name).grad = torch.zeros_like(model.get_parameter(name))

    for recompute in (False, True):
        live = LiveBytes()
        with recomputing(model, recompute), live:
            torch.autograd.backward(model.losses(x, condition, draws).sum())
        assert found.needed(8, recompute) == pytest.approx(live.most, rel=0.1)
    assert found.kept is not None
    assert found.kept.row > model.told(condition)[0].nbytes


@pytest.mark.parametrize("scope", ["cross-attention", "all-but-cross-attention"])
def test_forgetting_changes_the_weights_of_its_scope_alone(scope: str, model: StableDiffusionXL) -> None:
    before = copy.deepcopy(model.state_dict())
    names = list(model.scopes()[scope])
    x, condition, _ = case(model, 3)
    replay = Examples(x[1:], condition[1:])
    fisher = fisher_information(model, replay.x, replay.condition, names=names, seed=0, draws_per_example=2)

    result = forget_conditions(
        model, condition[:1], Pool(x[:1]), replay, fisher,
        AmnesiaParameters(max_steps=2, batch=2, replay_batch=2, check_every=100, null_share=0.5),
        criterion=lambda changed, seed: Check(False), seed=3,
    )  # fmt: skip

    after = cast(StableDiffusionXL, result.model).state_dict()
    assert result.steps == 2
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == set(names)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_probe_passes_it_and_refuses_what_overflows(model: StableDiffusionXL) -> None:
    assert isinstance(probe(model), list)
    for part in ("unet.add_embedding.linear_1", "text_encoder_2.text_projection"):
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.get_submodule(part).weight.mul_(float("inf"))
        broken.load_state_dict(broken.state_dict())
        with pytest.raises(UnusableModelError, match="not finite"):
            probe(broken)
