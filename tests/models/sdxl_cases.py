"""A Stable Diffusion XL model of a few thousand weights, for tests: the tiny one of 1.x with what XL adds."""

from typing import Any

import torch

from models.stable_diffusion_xl import StableDiffusionXL
from tests.models import sd_cases
from tests.models.sd_cases import IMAGE_SHAPE, MERGES, VOCAB

PROJECTED = 12
SIZE_WIDTH = 4
"""Values that tell the U-Net one number of an image's size."""


def architecture(**changes: Any) -> dict[str, Any]:
    """Of the tiny model; `unet={...}` and the like change single fields of a part."""
    first = sd_cases.architecture()
    text = first["text_encoder"]
    parts: dict[str, Any] = {
        **first,
        "unet": {
            **first["unet"], "cross_attention_dim": 16 + 24, "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_WIDTH, "transformer_layers_per_block": [2, 1],
            "projection_class_embeddings_input_dim": 6 * SIZE_WIDTH + PROJECTED, "use_linear_projection": True,
        },
        "text_encoder_2": {
            **text, "hidden_size": 24, "num_attention_heads": 3, "hidden_act": "gelu", "projection_dim": PROJECTED,
        },
        "tokenizer": {**first["tokenizer"], "pad_token": "<|endoftext|>"},
        "tokenizer_2": {**first["tokenizer"], "pad_token": "!"},
    }  # fmt: skip
    found = {part: {**config, **changes.get(part, {})} for part, config in parts.items()}
    return {**found, "force_zeros_for_empty_prompt": changes.get("force_zeros_for_empty_prompt", True)}


def tiny_xl(seed: int = 0, **changes: Any) -> StableDiffusionXL:
    """The tiny model with drawn weights; no norm is left at its start, so that a swap of two shows."""
    generator = torch.Generator().manual_seed(seed)
    model = StableDiffusionXL(IMAGE_SHAPE, 8, **architecture(**changes), generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    for tokenizer in model.tokenizers.values():
        tokenizer.vocab.copy_(torch.frombuffer(bytearray(VOCAB), dtype=torch.uint8))
        tokenizer.merges.copy_(torch.frombuffer(bytearray(MERGES), dtype=torch.uint8))
    return model
