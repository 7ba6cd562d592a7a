"""Generative models, their checkpoint format, and images as tensors."""

from models.checkpoints import Manifest, load_checkpoint, load_conditional, load_flow, read_manifest, save_checkpoint
from models.convert import convert
from models.errors import CheckpointError, ImageError, ModelError
from models.families import FAMILIES
from models.glow import Glow
from models.images import Fit, dequantize, load_images, quantize, save_png, to_uint8
from models.protocol import CheckpointedFlow, Flow, SplitFlow
from models.vae import ConditionalVAE

__all__ = [
    "FAMILIES",
    "CheckpointError",
    "CheckpointedFlow",
    "ConditionalVAE",
    "Fit",
    "Flow",
    "Glow",
    "ImageError",
    "Manifest",
    "ModelError",
    "SplitFlow",
    "convert",
    "dequantize",
    "load_checkpoint",
    "load_conditional",
    "load_flow",
    "load_images",
    "quantize",
    "read_manifest",
    "save_checkpoint",
    "save_png",
    "to_uint8",
]
