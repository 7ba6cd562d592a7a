"""Folders of diffusers that are no Stable Diffusion, or damaged, are refused by what they are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from models.diffusers_folder import load_folder, read_folder_tar
from models.errors import CheckpointError, ModelError
from tests.models.sd_folders import UNET, VAE, packed, sharded


def changed(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


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


def other_process(folder: Path) -> None:
    changed(folder / "scheduler/scheduler_config.json", _class_name="EDMEulerScheduler")


def no_betas(folder: Path) -> None:
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "FlowScheduler", "num_train_timesteps": 1000}))


def switched_off(folder: Path) -> None:
    changed(folder / "unet/config.json", flip_sin_to_cos=False)


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
        (other_process, "'EDMEulerScheduler' is of another process"),
        (no_betas, "beta_schedule"),
        (switched_off, "sets flip_sin_to_cos to False"),
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
