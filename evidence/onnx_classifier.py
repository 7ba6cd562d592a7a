"""A classifier from the store as the judge: an ONNX file, asked about a flow's samples."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from evidence.classifier import check_size
from evidence.onnx_model import OnnxModel, OnnxSpec

__all__ = ["OnnxClassifier", "OnnxSpec"]


class OnnxClassifier:
    """An ONNX model that answers for images (n, c, h, w) float32 with (n, k), or (n,) and (n, 1) for two classes.

    It runs in this process, on the CPU (see `evidence.onnx_model`); a stranger's file belongs in one behind walls.

    Args:
        path: the file.
        spec: what the file does not tell.
        image_shape: (c, h, w) that the flow draws.
        threads: of the runtime.

    Raises:
        ClassifierFileError: the file is no such model.
        ClassifierShapeError: it reads other images than the flow draws, or answers with another number of values.
    """

    def __init__(
        self, path: Path | str, spec: OnnxSpec, image_shape: tuple[int, int, int], *, threads: int = 1
    ) -> None:
        self.name = spec.name
        self.classes = spec.classes
        self.image_shape = image_shape
        self.spec = spec
        self._model = OnnxModel(path, spec, image_shape, threads=threads)

    def __call__(self, images: Tensor) -> Tensor:
        """Labels (n,) int64 of images (n, c, h, w) uint8.

        Raises:
            ClassifierOutputError: an answer is not finite, is no probability, or has another shape than stated.
        """
        check_size(self.name, self.image_shape, images)
        return torch.from_numpy(self._model.labels(images.cpu().numpy()))
