"""Stable Diffusion as a diffusers folder, or as a tar of one: read, and written so that `from_pretrained` opens it.

Weights are read from safetensors alone, from where they lie; of the configurations, what
`models.stable_diffusion_parts` knows. Whatever else the folder holds (safety checker, feature extractor, model card) is
left out, and said so.
"""

import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKL, UNet2DConditionModel

from models.diffusion import KNOWN
from models.errors import CheckpointFormatError, UnknownFamilyError, UnsafeCheckpointError
from models.folder_files import files_of_folder, files_of_tar
from models.prompt_tokens import MAX_FILE_BYTES, SPECIAL
from models.stable_diffusion import StableDiffusion
from models.stable_diffusion_parts import TEXT_ENCODER, UNET, VAE, adopted
from models.stable_diffusion_state import assembled, read_json, renamed
from models.tensor_files import Extent, encoded, quoted

__all__ = ["import_folder_tar", "load_folder", "read_folder_tar", "write_folder", "write_folder_tar"]

INDEX = "model_index.json"
CONFIGS = {
    "unet": "unet/config.json", "vae": "vae/config.json", "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}  # fmt: skip
WEIGHTS = {
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
}  # fmt: skip
"""Name of the weights' file by folder, without what tells variant, shard and format."""
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Layers of a VAE's attention by the names that old folders give them."""
METADATA = {"format": "pt"}
BLOCK = 512
"""Bytes: members of a tar are padded to a multiple."""

File = tuple[str, int, Iterable[bytes | memoryview]]
"""A file to be written: its path, its size in bytes, and its parts."""


def read_folder_tar(path: Path | str) -> StableDiffusion:
    """The model in a plain tar of a folder that a diffusers pipeline's `save_pretrained` wrote.

    Raises:
        CheckpointError: a leaf of that tree says what is wrong and what to do.
    """
    return import_folder_tar(path)[0]


def import_folder_tar(path: Path | str) -> tuple[StableDiffusion, dict[str, Any]]:
    """`read_folder_tar`, beside facts for the manifest: what the folder was, and what of it was left out."""
    return _read(files_of_tar(path, INDEX))


def load_folder(folder: Path | str) -> StableDiffusion:
    """The model in a folder that a diffusers pipeline's `save_pretrained` wrote.

    Raises:
        CheckpointError: as above.
    """
    return _read(files_of_folder(folder, INDEX))[0]


def write_folder(model: StableDiffusion, folder: Path | str) -> None:
    """Write a folder that `StableDiffusionPipeline.from_pretrained` opens: float32 safetensors, no safety checker.

    Its scheduler is DDIM, by which the model draws here. Equal models give equal bytes.
    """
    for name, _, parts in _files(model):
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for part in parts:
                file.write(part)


def write_folder_tar(model: StableDiffusion, path: Path | str) -> None:
    """`write_folder`, as a plain tar with the files at its top; weights are written as they lie in memory."""
    with Path(path).open("wb") as file:
        for name, size, parts in _files(model):
            member = tarfile.TarInfo(name)
            member.size, member.mode = size, 0o644
            file.write(member.tobuf(tarfile.USTAR_FORMAT))
            for part in parts:
                file.write(part)
            file.write(bytes(-size % BLOCK))
        file.write(bytes(-(file.tell() + 2 * BLOCK) % tarfile.RECORDSIZE + 2 * BLOCK))


def _read(files: Mapping[str, Extent]) -> tuple[StableDiffusion, dict[str, Any]]:
    index = read_json(files[INDEX], INDEX)
    _check_index(index, files)
    configs: dict[str, Any] = {part: read_json(files[name], name) for part, name in CONFIGS.items()}
    configs["unet"] = adopted("U-Net", configs["unet"], UNET, UNet2DConditionModel)
    configs["vae"] = adopted("VAE", configs["vae"], VAE, AutoencoderKL)
    configs["text_encoder"] = adopted("text encoder", configs["text_encoder"], TEXT_ENCODER, None)
    trained_betas = configs["scheduler"].get("trained_betas")
    configs["scheduler"] = {name: value for name, value in configs["scheduler"].items() if name in KNOWN}
    if trained_betas is not None:
        raise CheckpointFormatError("the scheduler lists its betas (trained_betas), which is not supported")
    vocab, merges = _tokenizer_files(files)
    special = _special_tokens(files, vocab)
    weights = {}
    for part in WEIGHTS:
        weights.update(renamed(_weights_of(part, files), partial(_our_name, part)))
    model = assembled(configs, weights, (vocab, merges), special)
    used = {INDEX.partition("/")[0], *WEIGHTS, "scheduler", "tokenizer"}
    return model, {
        "converted_from": "diffusers folder",
        "pipeline": str(index.get("_class_name"))[:80],
        "left_out": sorted({name.partition("/")[0][:80] for name in files} - used)[:20],
    }


def _check_index(index: Mapping[str, Any], files: Mapping[str, Extent]) -> None:
    """Refuse other pipelines, by what they have and what they lack."""
    folders = {name.partition("/")[0] for name in files if "/" in name}
    pipeline = quoted(index.get("_class_name"))
    if "unet" not in folders:
        inside = " (it has a transformer instead: SD 3, Flux and the like)" if "transformer" in folders else ""
        raise UnknownFamilyError(
            f"the pipeline {pipeline} has no U-Net{inside}; this release takes Stable Diffusion 1.x and 2.x"
        )
    if odd := sorted({"text_encoder_2", "image_encoder", "controlnet", "low_res_scheduler"} & folders):
        raise UnknownFamilyError(
            f"the pipeline {pipeline} has a {odd[0]}: it is of another kind than Stable Diffusion 1.x and 2.x (SDXL, "
            "image prompts, ControlNet, upscaling); give a plain text-to-image folder"
        )
    for part, name in CONFIGS.items():
        if name not in files:
            raise CheckpointFormatError(f"the pipeline {pipeline} lacks its {part}: {name} is not in the folder")
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    for part, expected in classes.items():
        named = index.get(part)
        if not isinstance(named, list) or len(named) != 2 or named[1] != expected:
            raise UnknownFamilyError(f"the pipeline's {part} is {quoted(named)}; this release takes a {expected}")


def _weights_of(part: str, files: Mapping[str, Extent]) -> dict[str, Extent]:
    """The safetensors of a part: one file, or all shards; in full precision where the folder has it twice."""
    stem = f"{part}/{WEIGHTS[part]}"
    for variant in ("", ".fp32", ".fp16", ".bf16"):
        if (single := f"{stem}{variant}.safetensors") in files:
            return {single: files[single]}
        pattern = re.compile(
            rf"{re.escape(stem)}(?:{re.escape(variant)})?-(\d{{5}})-of-(\d{{5}})(?:{re.escape(variant)})?\.safetensors"
        )
        shards = {name: match for name in files if (match := pattern.fullmatch(name))}
        if variant:
            shards = {name: match for name, match in shards.items() if variant in name}
        if shards:
            total = int(next(iter(shards.values())).group(2))
            if {int(match.group(1)) for match in shards.values()} != set(range(1, min(total, 1000) + 1)):
                raise CheckpointFormatError(f"{stem} is in {total} shards, and {len(shards)} of them are there")
            return {name: files[name] for name in sorted(shards)}
    if any(name.startswith(f"{part}/") and name.endswith((".bin", ".ckpt", ".pt", ".msgpack")) for name in files):
        raise UnsafeCheckpointError(
            f"the weights of {part} are pickled or of another framework, and are not read; write the folder again: "
            "pipeline.save_pretrained(folder, safe_serialization=True)"
        )
    raise CheckpointFormatError(f"the weights of {part} are missing: there is no {stem}.safetensors")


def _our_name(part: str, name: str) -> str | None:
    """Names that older releases of the libraries gave, as those of today."""
    if part == "text_encoder":
        name = name.removeprefix("text_model.")
        if name == "embeddings.position_ids":  # counted anew
            return None
    if part == "vae" and (match := re.fullmatch(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)(\..*)", name)):
        name = match.group(1) + OLD_ATTENTION[match.group(2)] + match.group(3)
    return f"{part}.{name}"


def _tokenizer_files(files: Mapping[str, Extent]) -> tuple[bytes, bytes]:
    """vocab.json and merges.txt, or what tokenizer.json says in their place."""
    names = [f"tokenizer/{name}" for name in ("vocab.json", "merges.txt")]
    for name in names:
        if name in files and files[name].size > MAX_FILE_BYTES:
            raise CheckpointFormatError(f"{name} has {files[name].size:,} bytes; the most is {MAX_FILE_BYTES:,}")
    if all(name in files for name in names):
        return files[names[0]].read(), files[names[1]].read()
    if (name := "tokenizer/tokenizer.json") not in files:
        raise CheckpointFormatError("the tokenizer is missing: there is no tokenizer/vocab.json with a merges.txt")
    model = read_json(files[name], name, MAX_FILE_BYTES).get("model")
    pairs = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(pairs, list) or model.get("end_of_word_suffix") != "</w>":
        raise UnknownFamilyError(f"{name} is of another kind of tokenizer than CLIP's; this release takes CLIP's")
    lines = [
        pair if isinstance(pair, str) else " ".join(map(str, pair)) for pair in pairs if isinstance(pair, str | list)
    ]
    vocab = json.dumps(model.get("vocab"), ensure_ascii=False, separators=(",", ":"))
    return vocab.encode(errors="replace"), "\n".join(["#version: 0.2", *lines, ""]).encode(errors="replace")


def _special_tokens(files: Mapping[str, Extent], vocab: bytes) -> dict[str, str]:
    """The special tokens as transformers reads them: special_tokens_map.json counts before tokenizer_config.json, but
    where the latter lists added tokens itself."""
    config, before, added = (
        read_json(files[name], name) if (name := f"tokenizer/{one}") in files else {}
        for one in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    decoder = config.get("added_tokens_decoder")
    names = list(added)
    if isinstance(decoder, dict):
        names += [_content(one) for one in decoder.values()]
    try:
        known = json.loads(vocab)
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError("the tokenizer's vocab.json is no JSON") from error
    if odd := [one for one in names if not isinstance(known, dict) or one not in known]:
        raise CheckpointFormatError(
            f"the tokenizer adds {quoted(odd[0])} to its vocabulary, as textual inversion does, which is not "
            "supported; save the pipeline without the added tokens"
        )
    found = {**config, **(before if "added_tokens_decoder" not in config else {})}
    return {name: _content(found[name]) if found.get(name) else default for name, default in SPECIAL.items()}


def _content(token: Any) -> str:
    """A token's text, which stands by itself or in an object with how it is to be treated."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise CheckpointFormatError(f"the tokenizer's special token {quoted(token)} has no text")
    return text


def _files(model: StableDiffusion) -> Iterator[File]:
    """Every file of the folder, weights last of their part, in an order that is always the same."""
    architecture = model.architecture
    ours = {"_diffusers_version": diffusers.__version__}
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline", **ours, "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], **{part: ["diffusers", name] for part, name in classes.items()},
        **{part: [None, None] for part in ("feature_extractor", "image_encoder", "safety_checker")},
    }  # fmt: skip
    yield _json(INDEX, index)
    yield _json(CONFIGS["scheduler"], {"_class_name": "DDIMScheduler", **ours, **architecture["scheduler"]})
    special = {name: architecture["tokenizer"][name] for name in SPECIAL}
    most = {"model_max_length": model.tokenizer.positions}
    yield _json("tokenizer/tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", **special, **most})
    yield _json("tokenizer/special_tokens_map.json", special)
    for name, buffer in (("vocab.json", model.tokenizer.vocab), ("merges.txt", model.tokenizer.merges)):
        data = buffer.cpu().numpy().tobytes()
        yield f"tokenizer/{name}", len(data), [data]
    for part, name in classes.items():
        yield _json(CONFIGS[part], {"_class_name": name, **ours, **architecture[part]})
    told = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "torch_dtype": "float32"}
    yield _json(CONFIGS["text_encoder"], {**told, **architecture["text_encoder"]})
    for part, stem in WEIGHTS.items():
        prefix = "text_model." if part == "text_encoder" else ""  # as all releases of transformers read it
        state = getattr(model, part).state_dict()
        size, parts = encoded({f"{prefix}{name}": value for name, value in state.items()}, METADATA)
        yield f"{part}/{stem}.safetensors", size, parts


def _json(name: str, content: Mapping[str, Any]) -> File:
    data = json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"
    return name, len(data), [data]
