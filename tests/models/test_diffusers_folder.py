"""A Stable Diffusion folder out and in, by itself and as a tar, and the tars and folders that are refused."""

import io
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
from models.diffusers_folder import load_folder, read_folder_tar, write_folder, write_folder_tar
from models.errors import CheckpointError, CheckpointFormatError, ManifestError, ModelError, UnsafeCheckpointError
from models.prompt_tokens import SPECIAL
from models.stable_diffusion import StableDiffusion
from tests.models.sd_cases import tiny

UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return tiny()


@pytest.fixture(scope="module")
def written(model: StableDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_folder(model, folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(written, tmp_path / "folder"))


def packed(folder: Path, path: Path, under: str = ".") -> Path:
    with tarfile.open(path, "w") as tar:
        tar.add(folder, under)
    return path


def changed(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


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


def sharded(folder: Path) -> None:
    tensors = sorted(load_file(folder / UNET).items())
    for number in (1, 2):
        save_file(
            dict(tensors[number - 1 :: 2]), folder / f"unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        )
    (folder / UNET).unlink()


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


def pickled(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin")


def of_transformer(folder: Path) -> None:
    (folder / "unet").rename(folder / "transformer")


def of_sdxl(folder: Path) -> None:
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2")


def sdxl_unet(folder: Path) -> None:
    changed(folder / "unet/config.json", addition_embed_type="text_time", projection_class_embeddings_input_dim=2816)


def class_conditioned(folder: Path) -> None:
    changed(folder / "unet/config.json", num_class_embeds=1000)


def distilled(folder: Path) -> None:
    changed(folder / "unet/config.json", time_cond_proj_dim=256)


def inpainting(folder: Path) -> None:
    changed(folder / "unet/config.json", in_channels=9)


def added_token(folder: Path) -> None:
    (folder / "tokenizer/added_tokens.json").write_text(json.dumps({"<my-cat>": 524}))


def no_vae(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer/merges.txt").unlink()


def half_a_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def tensor_missing(folder: Path) -> None:
    tensors = load_file(folder / VAE)
    del tensors["quant_conv.weight"]
    save_file(tensors, folder / VAE)


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / UNET)
    tensors["conv_in.bias"][0] = float("nan")
    save_file(tensors, folder / UNET)


def cut_short(folder: Path) -> None:
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-8])


def flow_matching(folder: Path) -> None:
    changed(folder / "scheduler/scheduler_config.json", prediction_type="flow_prediction")


def own_betas(folder: Path) -> None:
    changed(folder / "scheduler/scheduler_config.json", trained_betas=[0.1, 0.2])


def large_config(folder: Path) -> None:
    changed(folder / "vae/config.json", note="x" * 2**21)


def no_json(folder: Path) -> None:
    (folder / "unet/config.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (pickled, "safe_serialization=True"),
        (of_transformer, "has no U-Net .it has a transformer"),
        (of_sdxl, "text_encoder_2.*SDXL"),
        (sdxl_unet, "sets addition_embed_type to 'text_time'.*SDXL"),
        (class_conditioned, "num_class_embeds"),
        (distilled, "time_cond_proj_dim"),
        (inpainting, "reads 9 channels.*inpainting"),
        (added_token, "adds '<my-cat>'"),
        (no_vae, "lacks its vae"),
        (no_index, "0 files model_index.json"),
        (no_tokenizer, "tokenizer is missing"),
        (half_a_shard, "2 shards, and 1 of them"),
        (tensor_missing, "vae.quant_conv.weight"),
        (not_finite, "conv_in.bias.*NaN"),
        (cut_short, "the header promises"),
        (flow_matching, "flow_prediction"),
        (own_betas, "trained_betas"),
        (large_config, "bytes; the most is"),
        (no_json, "is no JSON"),
    ],
)  # fmt: skip
def test_a_folder_of_another_kind_is_refused_by_what_it_is(
    change: Callable[[Path], None], says: str, folder: Path, tmp_path: Path
) -> None:
    change(folder)

    with pytest.raises(CheckpointError, match=says):
        read_folder_tar(packed(folder, tmp_path / "a.tar"))


@pytest.mark.parametrize("vocab", [b"{", b'{"a": 0}', b'{"a": 10000000}', b'{"a": 0, "b": 0}', b"[1]"])
def test_files_that_are_no_tokenizers_are_refused_when_a_prompt_is_read(vocab: bytes, folder: Path) -> None:
    (folder / "tokenizer/vocab.json").write_bytes(vocab)

    with pytest.raises(ModelError, match=r"vocab.json|special token"):
        load_folder(folder).tokens(["zero"])


@pytest.mark.parametrize("merges", [b"#version: 0.2\na b c\n", b"#version: 0.2\nqq zz\n", b"\xff\xfe"])
def test_merges_that_do_not_fit_are_refused_when_a_prompt_is_read(merges: bytes, folder: Path) -> None:
    (folder / "tokenizer/merges.txt").write_bytes(merges)

    with pytest.raises(ModelError, match=r"merges"):
        load_folder(folder).tokens(["zero"])


def member(name: str, type_: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = type_, size, link
    return info


@pytest.mark.parametrize(
    ("info", "says"),
    [
        (member("unet/config.json", tarfile.SYMTYPE, link="/etc/passwd"), "link"),
        (member("unet/config.json", tarfile.LNKTYPE, link="model_index.json"), "link"),
        (member("unet/null", tarfile.CHRTYPE), "device"),
        (member("pipe", tarfile.FIFOTYPE), "device"),
        (member("../outside"), "leads out"),
        (member("unet/../../outside"), "leads out"),
        (member("/etc/passwd"), "leads out"),
        (member("unet\\config.json"), "leads out"),
        (member("unet/config.json"), "twice"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_tar_that_reaches_out_is_refused(info: tarfile.TarInfo, says: str, folder: Path, tmp_path: Path) -> None:
    path = packed(folder, tmp_path / "a.tar")
    with tarfile.open(path, "a") as tar:
        tar.addfile(info, io.BytesIO(b""))

    with pytest.raises(UnsafeCheckpointError, match=says):
        read_folder_tar(path)


def test_a_tar_with_countless_members_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(10_001):
            tar.addfile(member(str(number)))

    with pytest.raises(UnsafeCheckpointError, match="more than 10,000 members"):
        read_folder_tar(tmp_path / "a.tar")


def test_a_member_that_claims_more_than_the_file_has_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(
        member("model_index.json", size=8 * 2**30 - 1).tobuf(tarfile.USTAR_FORMAT) + bytes(1024)
    )

    with pytest.raises(CheckpointFormatError, match=r"ends within|cut short"):
        read_folder_tar(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_tar_whose_headers_chain_without_end_is_refused(kind: bytes, tmp_path: Path) -> None:
    first, link = member("model_index.json"), member("long", kind)
    (tmp_path / "a.tar").write_bytes(
        first.tobuf(tarfile.USTAR_FORMAT) + 3000 * link.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)
    )

    with pytest.raises(UnsafeCheckpointError, match="hundreds of headers"):
        convert(tmp_path / "a.tar", tmp_path / "a.safetensors")


def test_a_member_of_negative_size_is_refused(tmp_path: Path) -> None:
    info = member("model_index.json")
    info.pax_headers = {"size": "-512"}
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))

    with pytest.raises(CheckpointFormatError):
        convert(tmp_path / "a.tar", tmp_path / "a.safetensors")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_tar_that_was_cut_short_is_refused(share: float, model: StableDiffusion, tmp_path: Path) -> None:
    write_folder_tar(model, tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: int(len(data) * share)])

    with pytest.raises(CheckpointFormatError):
        convert(tmp_path / "a.tar", tmp_path / "a.safetensors")


def test_a_compressed_tar_is_refused_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(folder, ".")

    with pytest.raises(CheckpointFormatError, match="plain tar"):
        convert(tmp_path / "a.tar.gz", tmp_path / "a.safetensors")
