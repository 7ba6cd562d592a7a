"""A Stable Diffusion model of a few thousand weights, with a tokenizer of a few words, for tests."""

import json
from typing import Any

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from models.stable_diffusion import StableDiffusion

WORDS = ("zero", "one", "photo", "of", "red")
POSITIONS = 8
SPECIAL = {
    "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "!",
}  # fmt: skip
SCHEDULER = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
IMAGE_SHAPE = (3, 8, 8)


def tokenizer_files() -> tuple[bytes, bytes]:
    """vocab.json and merges.txt that know each byte but "§", and a few words whole."""
    letters = [one for one in bytes_to_unicode().values() if one != bytes_to_unicode()[0xA7]]
    tokens, merges = letters + [f"{one}</w>" for one in letters], []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = f"{parts[0]} {parts[1]}"
            if pair not in merges:
                merges.append(pair)
            parts = [parts[0] + parts[1], *parts[2:]]
            if parts[0] not in tokens:
                tokens.append(parts[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = json.dumps({token: number for number, token in enumerate(tokens)}, ensure_ascii=False)
    return vocab.encode(), "\n".join(["#version: 0.2", *merges, ""]).encode()


VOCAB, MERGES = tokenizer_files()


def architecture(**changes: Any) -> dict[str, Any]:
    """Of the tiny model; `unet={...}` and the like change single fields of a part."""
    parts: dict[str, dict[str, Any]] = {
        "unet": {
            "sample_size": 4, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "cross_attention_dim": 16,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "attention_head_dim": [1, 2],
        },
        "vae": {
            "block_out_channels": [4, 8], "down_block_types": ["DownEncoderBlock2D"] * 2, "norm_num_groups": 4,
            "up_block_types": ["UpDecoderBlock2D"] * 2, "sample_size": 8, "scaling_factor": 0.5,
        },
        "text_encoder": {
            "vocab_size": len(json.loads(VOCAB)), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": POSITIONS,
        },
        "tokenizer": {"vocab_bytes": len(VOCAB), "merges_bytes": len(MERGES), **SPECIAL},
        "scheduler": SCHEDULER,
        "sampling": {"steps": 4, "guidance_scale": 3.0},
    }  # fmt: skip
    return {part: {**config, **changes.get(part, {})} for part, config in parts.items()}


def tiny(seed: int = 0, **changes: Any) -> StableDiffusion:
    """The tiny model with drawn weights; no norm is left at its start, so that a swap of two shows."""
    generator = torch.Generator().manual_seed(seed)
    model = StableDiffusion(IMAGE_SHAPE, 8, **architecture(**changes), generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.tokenizer.vocab.copy_(torch.frombuffer(bytearray(VOCAB), dtype=torch.uint8))
    model.tokenizer.merges.copy_(torch.frombuffer(bytearray(MERGES), dtype=torch.uint8))
    return model
