"""A Stable Diffusion folder out and in, by itself and as a tar, in each way to save it."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from models.checkpoints import load_conditional
from models.convert import convert
from models.diffusers_folder import load_folder, read_folder_tar, write_folder_tar
from models.errors import ManifestError
from models.prompt_tokens import SPECIAL
from models.stable_diffusion import StableDiffusion
from tests.models.sd_cases import tiny
from tests.models.sd_folders import TEXT, UNET, VAE, packed, sharded


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return tiny()


def assert_same_weights(a: StableDiffusion, b: StableDiffusion) -> None:
    theirs = b.state_dict()
    assert a.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


def test_a_folder_and_a_tar_return_every_bit(model: StableDiffusion, written: Path, tmp_path: Path) -> None:
    write_folder_tar(model, tmp_path / "a.tar")

    for again in (load_folder(written), read_folder_tar(tmp_path / "a.tar")):
        assert_same_weights(again, model)
        assert {**again.architecture, "sampling": None} == {**model.architecture, "sampling": None}
        assert not any(buffer.is_meta for buffer in again.buffers())


def test_equal_models_give_equal_tars_which_hold_the_folder(
    model: StableDiffusion, written: Path, tmp_path: Path
) -> None:
    for name in ("a.tar", "b.tar"):
        write_folder_tar(model, tmp_path / name)

    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        held = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    files = {path.relative_to(written).as_posix(): path for path in written.rglob("*") if path.is_file()}
    assert held == {name: path.read_bytes() for name, path in files.items()}
    assert (tmp_path / "a.tar").stat().st_size % tarfile.RECORDSIZE == 0


def test_diffusers_opens_the_folder_and_draws_what_the_model_draws(model: StableDiffusion, written: Path) -> None:
    prompts, generator = ["zero", "a photo of one"], torch.Generator().manual_seed(0)
    start = torch.stack([torch.randn(model.latent_shape, generator=generator) for _ in prompts])
    pipeline = StableDiffusionPipeline.from_pretrained(written, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": model.sampling.steps, "guidance_scale": model.sampling.guidance_scale}

    theirs = pipeline(prompt=prompts, latents=start, output_type="pt", **how).images
    ours = model.sample(model.tokens(prompts), generator=torch.Generator().manual_seed(0))

    assert pipeline.safety_checker is None
    assert ours.float().std() > 1
    torch.testing.assert_close((theirs * 255).round(), ours.float(), rtol=0, atol=1)  # a level, where rounding is close


def test_diffusers_reads_prompts_as_the_model_does(model: StableDiffusion, written: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(written / "tokenizer")
    prompts = ["Zero", "a  photo\tof one!", "red red", ""]

    theirs = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    assert torch.equal(theirs[:3], model.tokens(prompts[:3]))
    assert torch.equal(theirs[3], model.null_condition)


def test_what_diffusers_saves_itself_is_read(model: StableDiffusion, written: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(written, local_files_only=True)
    pipeline.save_pretrained(tmp_path / "theirs", safe_serialization=True)

    again = load_folder(tmp_path / "theirs")

    assert all(
        torch.equal(value, model.state_dict()[name])
        for name, value in again.state_dict().items()
        if not name.startswith("tokenizer.")
    )
    assert torch.equal(again.tokens(["a photo of zero"]), model.tokens(["a photo of zero"]))


def halved(folder: Path) -> None:
    for name in (UNET, VAE, TEXT):
        tensors = load_file(folder / name)
        file = folder / name
        save_file({key: value.half() for key, value in tensors.items()}, file.with_suffix(".fp16.safetensors"))
        file.unlink()


def old_names(folder: Path) -> None:
    """As SD 1.x was first published."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(folder / VAE)
    for new, name in old.items():
        tensors = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): one for key, one in tensors.items()}
    save_file(tensors, folder / VAE)
    text = load_file(folder / TEXT)
    save_file({**text, "text_model.embeddings.position_ids": torch.arange(8)[None]}, folder / TEXT)


def one_tokenizer_file(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    shutil.rmtree(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    assert not (folder / "tokenizer/vocab.json").exists()


@pytest.mark.parametrize("change", [halved, sharded, old_names, one_tokenizer_file])
def test_other_ways_to_save_the_same_model_are_read(
    change: Callable[[Path], None], model: StableDiffusion, folder: Path, tmp_path: Path
) -> None:
    change(folder)

    again = read_folder_tar(packed(folder, tmp_path / "a.tar"))

    for name, value in again.state_dict().items():
        if not name.startswith("tokenizer."):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3 if change is halved else 0, atol=1e-6)
    assert torch.equal(again.tokens(["a photo of zero"]), model.tokens(["a photo of zero"]))


@pytest.mark.parametrize(
    ("config", "map_"),
    [
        ({"pad_token": "<|endoftext|>"}, {"pad_token": "!"}),
        ({"pad_token": {"content": "!", "__type": "AddedToken"}}, {}),
        ({"pad_token": "!", "added_tokens_decoder": {}}, {"pad_token": "<|endoftext|>"}),
        ({}, {}),
    ],
    ids=str,
)
def test_special_tokens_are_those_that_transformers_takes(
    config: dict[str, Any], map_: dict[str, Any], folder: Path
) -> None:
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer/special_tokens_map.json").write_text(json.dumps(map_))
    theirs = CLIPTokenizer.from_pretrained(folder / "tokenizer")

    ours = load_folder(folder).tokenizer.config

    assert {name: ours[name] for name in SPECIAL} == {name: str(getattr(theirs, name)) for name in SPECIAL}


def test_a_folder_within_the_tar_is_found_and_what_is_not_needed_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/pytorch_model.bin").write_bytes(b"never read")
    (folder / "._model_index.json").write_bytes(b"macOS")

    manifest = convert(packed(folder, tmp_path / "a.tar", "my-model"), tmp_path / "a.safetensors")

    assert manifest.family == "stable-diffusion"
    assert manifest.extra["left_out"] == ["safety_checker"]
    assert isinstance(load_conditional(tmp_path / "a.safetensors"), StableDiffusion)


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        ({"family": "glow"}, "family was stated as 'glow'"),
        ({"image_size": 512}, "image_size was stated as 512; the file says 8"),
        ({"n_bits": 5}, "n_bits"),
        ({"prediction_type": "v_prediction"}, "the file says 'epsilon'"),
    ],
)
def test_what_is_stated_must_agree_with_the_folder(
    stated: dict[str, Any], says: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match=says):
        convert(packed(folder, tmp_path / "a.tar"), tmp_path / "a.safetensors", **stated)
