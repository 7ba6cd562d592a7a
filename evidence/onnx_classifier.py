"""A classifier from the store as the judge: an ONNX file, asked about a flow's samples."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from evidence.classifier import check_size
from evidence.onnx_model import OnnxModel, OnnxSpec

__all__ = ["OnnxClassifier", "OnnxSpec"]


class OnnxClassifier:
    """An `evidence.onnx_model.OnnxModel` for tensors, whose arguments and refusals it has.

    It runs in this process; a stranger's file belongs in one behind walls.
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

    @property
    def threshold(self) -> float:
        """See `evidence.readings.Probabilistic`."""
        return self.spec.threshold

    def probabilities(self, images: Tensor) -> Tensor | None:
        """See `evidence.readings.Probabilistic`; None for a score, which is on a scale of its own."""
        check_size(self.name, self.image_shape, images)
        if self.spec.output == "score":
            return None
        return torch.from_numpy(self._model.probabilities(images.cpu().numpy()))
