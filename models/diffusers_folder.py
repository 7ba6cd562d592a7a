"""Stable Diffusion as a diffusers folder, or as a tar of one: read, and written so that `from_pretrained` opens it.

Weights are read from safetensors alone, from where they lie; of the configurations, what
`models.stable_diffusion_parts` knows. Whatever else the folder holds (safety checker, feature extractor, model card) is
left out, and said so.
"""

import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers

from models.diffusion import KNOWN
from models.errors import CheckpointFormatError, UnknownFamilyError, UnsafeCheckpointError
from models.folder_files import files_of_folder, files_of_tar
from models.latent_diffusion import LatentDiffusion
from models.prompt_tokens import MAX_FILE_BYTES, SPECIAL
from models.stable_diffusion import StableDiffusion
from models.stable_diffusion_parts import adopted
from models.stable_diffusion_state import TokenizerFiles, assembled, read_json, renamed
from models.stable_diffusion_xl import StableDiffusionXL
from models.tensor_files import Extent, encoded, quoted

__all__ = ["import_folder_tar", "load_folder", "read_folder_tar", "write_folder", "write_folder_tar"]

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Name of the weights' file by the library of the network, without what tells variant, shard and format."""
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Layers of a VAE's attention by the names that old folders give them."""
METADATA = {"format": "pt"}
BLOCK = 512
USTAR_BYTES = 8**11
"""From which size on a tar's header has no place for it in octal digits."""
OTHER_PROCESSES = ("EDM", "FlowMatch")
"""How the classes of schedulers begin that noise otherwise than by betas."""
"""Bytes: members of a tar are padded to a multiple."""

File = tuple[str, int, Iterable[bytes | memoryview]]
"""A file to be written: its path, its size in bytes, and its parts."""


@dataclass(frozen=True)
class _Kind:
    """A pipeline that is read and written."""

    called: str
    """In messages."""
    pipeline: str
    """Its class; those that are called alike, with an ending of their own, have the same parts."""
    model: type[LatentDiffusion]
    absent: tuple[str, ...]
    """Parts that it is written without."""
    settings: Mapping[str, bool]
    """What its index tells a model beside the parts, as it is where the index is silent."""
    written: Mapping[str, bool]
    """What it is written with, where the model does not say."""

    def weights(self) -> dict[str, str]:
        """The weights' file of each part, without what tells variant, shard and format."""
        return {name: f"{name}/{WEIGHTS[part.written[0]]}" for name, part in self.model.PARTS.items()}


XL = _Kind(
    "Stable Diffusion XL", "StableDiffusionXL", StableDiffusionXL, ("feature_extractor", "image_encoder"),
    {"force_zeros_for_empty_prompt": True}, {},
)  # fmt: skip
FIRST = _Kind(
    "Stable Diffusion 1.x and 2.x", "StableDiffusion", StableDiffusion,
    ("feature_extractor", "image_encoder", "safety_checker"), {}, {"requires_safety_checker": False},
)  # fmt: skip


def read_folder_tar(path: Path | str) -> LatentDiffusion:
    """The model in a plain tar of a folder that a diffusers pipeline's `save_pretrained` wrote.

    Raises:
        CheckpointError: a leaf of that tree says what is wrong and what to do.
    """
    return import_folder_tar(path)[0]


def import_folder_tar(path: Path | str) -> tuple[LatentDiffusion, dict[str, Any]]:
    """`read_folder_tar`, beside facts for the manifest: what the folder was, and what of it was left out."""
    return _read(files_of_tar(path, INDEX))


def load_folder(folder: Path | str) -> LatentDiffusion:
    """The model in a folder that a diffusers pipeline's `save_pretrained` wrote.

    Raises:
        CheckpointError: as above.
    """
    return _read(files_of_folder(folder, INDEX))[0]


def write_folder(model: LatentDiffusion, folder: Path | str) -> None:
    """Write a folder that the `from_pretrained` of its pipeline opens, of `StableDiffusionPipeline` or
    `StableDiffusionXLPipeline`: float32 safetensors, no safety checker.

    Its scheduler is DDIM, by which the model draws here. Equal models give equal bytes.
    """
    for name, _, parts in _files(model):
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for part in parts:
                file.write(part)


def write_folder_tar(model: LatentDiffusion, path: Path | str) -> None:
    """`write_folder`, as a plain tar with the files at its top; weights are written as they lie in memory."""
    with Path(path).open("wb") as file:
        for name, size, parts in _files(model):
            file.write(member_header(name, size))
            for part in parts:
                file.write(part)
            file.write(bytes(-size % BLOCK))
        file.write(bytes(-(file.tell() + 2 * BLOCK) % tarfile.RECORDSIZE + 2 * BLOCK))


def member_header(name: str, size: int) -> bytes:
    """What stands before a file in a tar: as every tar has it up to 8 GiB, and GNU's beyond, as for SDXL's U-Net."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.USTAR_FORMAT if size < USTAR_BYTES else tarfile.GNU_FORMAT)


def _read(files: Mapping[str, Extent]) -> tuple[LatentDiffusion, dict[str, Any]]:
    index = read_json(files[INDEX], INDEX)
    kind = XL if str(index.get("_class_name")).startswith(XL.pipeline) else FIRST
    _check_index(kind, index, files)
    configs: dict[str, Any] = {
        name: adopted(part, read_json(files[_config(name)], _config(name)), kind.called)
        for name, part in kind.model.PARTS.items()
    }
    scheduler = read_json(files[SCHEDULER], SCHEDULER)
    if scheduler.get("trained_betas") is not None:
        raise CheckpointFormatError("the scheduler lists its betas (trained_betas), which is not supported")
    called = str(scheduler.get("_class_name"))
    if called.startswith(OTHER_PROCESSES) or "beta_schedule" not in scheduler:
        raise CheckpointFormatError(
            f"the scheduler {called[:80]!r} is of another process than that of betas (beta_schedule), which is the one "
            "that is supported"
        )
    configs["scheduler"] = {name: value for name, value in scheduler.items() if name in KNOWN}
    configs |= {name: index.get(name, default) for name, default in kind.settings.items()}
    tokenizers = {name: _tokenizer(name, files) for name in kind.model.TOKENIZERS}
    weights = {}
    for part, stem in kind.weights().items():
        weights.update(renamed(_weights_of(part, stem, files), partial(_our_name, part)))
    model = assembled(kind.model, configs, weights, tokenizers)
    used = {INDEX, *kind.model.PARTS, *tokenizers, "scheduler"}
    return model, {
        "converted_from": "diffusers folder",
        "pipeline": str(index.get("_class_name"))[:80],
        "left_out": sorted({name.partition("/")[0][:80] for name in files} - used)[:20],
    }


def _config(part: str) -> str:
    return f"{part}/config.json"


def _check_index(kind: _Kind, index: Mapping[str, Any], files: Mapping[str, Extent]) -> None:
    """Refuse other pipelines, by what they have and what they lack."""
    folders = {name.partition("/")[0] for name in files if "/" in name}
    pipeline = quoted(index.get("_class_name"))
    if "unet" not in folders:
        inside = " (it has a transformer instead: SD 3, Flux and the like)" if "transformer" in folders else ""
        raise UnknownFamilyError(
            f"the pipeline {pipeline} has no U-Net{inside}; this release takes Stable Diffusion 1.x, 2.x and XL"
        )
    others = {"text_encoder_2", "image_encoder", "controlnet", "low_res_scheduler"} - kind.model.PARTS.keys()
    if odd := sorted(others & folders):
        raise UnknownFamilyError(
            f"the pipeline {pipeline} has a {odd[0]}: it is of another kind than {kind.called} (image prompts, "
            "ControlNet, upscaling, or an SDXL whose index names another class); give a plain text-to-image folder"
        )
    if kind is XL and (index.get("requires_aesthetics_score") or index.get("text_encoder") == [None, None]):
        raise UnknownFamilyError(
            f"the pipeline {pipeline} reads prompts with one text encoder alone: an SDXL refiner; give the base model"
        )
    for part, name in {**{part: _config(part) for part in kind.model.PARTS}, "scheduler": SCHEDULER}.items():
        if name not in files:
            raise CheckpointFormatError(f"the pipeline {pipeline} lacks its {part}: {name} is not in the folder")
    for part, expected in kind.model.PARTS.items():
        named = index.get(part)
        if not isinstance(named, list) or len(named) != 2 or named[1] != expected.written[1]:
            raise UnknownFamilyError(
                f"the pipeline's {part} is {quoted(named)}; this release takes a {expected.written[1]}"
            )


def _weights_of(part: str, stem: str, files: Mapping[str, Extent]) -> dict[str, Extent]:
    """The safetensors of a part: one file, or all shards; in full precision where the folder has it twice."""
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
    if name.endswith("embeddings.position_ids"):  # counted anew
        return None
    if part == "text_encoder":
        name = name.removeprefix("text_model.")
    if part == "vae" and (match := re.fullmatch(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)(\..*)", name)):
        name = match.group(1) + OLD_ATTENTION[match.group(2)] + match.group(3)
    return f"{part}.{name}"


def _tokenizer(folder: str, files: Mapping[str, Extent]) -> TokenizerFiles:
    vocab, merges = _tokenizer_files(folder, files)
    return TokenizerFiles(vocab, merges, _special_tokens(folder, files, vocab))


def _tokenizer_files(folder: str, files: Mapping[str, Extent]) -> tuple[bytes, bytes]:
    """vocab.json and merges.txt, or what tokenizer.json says in their place."""
    names = [f"{folder}/{name}" for name in ("vocab.json", "merges.txt")]
    for name in names:
        if name in files and files[name].size > MAX_FILE_BYTES:
            raise CheckpointFormatError(f"{name} has {files[name].size:,} bytes; the most is {MAX_FILE_BYTES:,}")
    if all(name in files for name in names):
        return files[names[0]].read(), files[names[1]].read()
    if (name := f"{folder}/tokenizer.json") not in files:
        raise CheckpointFormatError(f"the {folder} is missing: there is no {folder}/vocab.json with a merges.txt")
    model = read_json(files[name], name, MAX_FILE_BYTES).get("model")
    pairs = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(pairs, list) or model.get("end_of_word_suffix") != "</w>":
        raise UnknownFamilyError(f"{name} is of another kind of tokenizer than CLIP's; this release takes CLIP's")
    lines = [
        pair if isinstance(pair, str) else " ".join(map(str, pair)) for pair in pairs if isinstance(pair, str | list)
    ]
    vocab = json.dumps(model.get("vocab"), ensure_ascii=False, separators=(",", ":"))
    return vocab.encode(errors="replace"), "\n".join(["#version: 0.2", *lines, ""]).encode(errors="replace")


def _special_tokens(folder: str, files: Mapping[str, Extent], vocab: bytes) -> dict[str, str]:
    """The special tokens as transformers reads them: special_tokens_map.json counts before tokenizer_config.json, but
    where the latter lists added tokens itself."""
    config, before, added = (
        read_json(files[name], name) if (name := f"{folder}/{one}") in files else {}
        for one in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    decoder = config.get("added_tokens_decoder")
    names = list(added)
    if isinstance(decoder, dict):
        names += [_content(one) for one in decoder.values()]
    try:
        known = json.loads(vocab)
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"the {folder}'s vocab.json is no JSON") from error
    if odd := [one for one in names if not isinstance(known, dict) or one not in known]:
        raise CheckpointFormatError(
            f"the {folder} adds {quoted(odd[0])} to its vocabulary, as textual inversion does, which is not "
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


def _files(model: LatentDiffusion) -> Iterator[File]:
    """Every file of the folder, weights last, in an order that is always the same."""
    kind = XL if isinstance(model, XL.model) else FIRST
    architecture = model.architecture
    ours = {"_diffusers_version": diffusers.__version__}
    index: dict[str, Any] = {
        "_class_name": f"{kind.pipeline}Pipeline", **ours, **kind.written, "scheduler": ["diffusers", "DDIMScheduler"],
        **{name: architecture[name] for name in kind.settings},
        **{name: ["transformers", "CLIPTokenizer"] for name in model.tokenizers},
        **{name: part.written for name, part in model.PARTS.items()},
        **{name: [None, None] for name in kind.absent},
    }  # fmt: skip
    yield _json(INDEX, index)
    yield _json(SCHEDULER, {"_class_name": "DDIMScheduler", **ours, **architecture["scheduler"]})
    for folder, tokenizer in model.tokenizers.items():
        special = {name: tokenizer.config[name] for name in SPECIAL}
        most = {"model_max_length": tokenizer.positions}
        yield _json(f"{folder}/tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", **special, **most})
        yield _json(f"{folder}/special_tokens_map.json", special)
        for name, buffer in (("vocab.json", tokenizer.vocab), ("merges.txt", tokenizer.merges)):
            data = buffer.cpu().numpy().tobytes()
            yield f"{folder}/{name}", len(data), [data]
    for name, part in model.PARTS.items():
        library, called = part.written
        told: dict[str, Any] = {"_class_name": called, **ours}
        if library == "transformers":
            told = {"architectures": [called], "model_type": "clip_text_model", "torch_dtype": "float32"}
        yield _json(_config(name), {**told, **architecture[name]})
    for name, stem in kind.weights().items():
        prefix = "text_model." if name == "text_encoder" else ""  # as all releases of transformers read it
        state = getattr(model, name).state_dict()
        size, parts = encoded({f"{prefix}{own}": value for own, value in state.items()}, METADATA)
        yield f"{stem}.safetensors", size, parts


def _json(name: str, content: Mapping[str, Any]) -> File:
    data = json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"
    return name, len(data), [data]
