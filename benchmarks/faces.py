"""An outside embedding of faces for the benchmarks: dlib's recognition network, which forgetd itself never uses."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from examples.orl import PEOPLE, PHOTOS, photo_path

SCALE = 2
"""The photos are enlarged so much, since the network was made for faces of 150 pixels."""


def face_embeddings() -> Tensor:
    """Embeddings of the 400 ORL photos at their full size, (400, 128), in the order of people and photos.

    Distances below 0.6 mean the same person, says the network's author (dlib, `dnn_face_recognition_ex`).

    Raises:
        SystemExit: dlib or its weights are not installed.
    """
    try:
        import dlib  # half a minute to build where there is no wheel: only who benchmarks needs it
    except ImportError as error:
        raise SystemExit("install the extra 'benchmarks' (dlib-bin, face-recognition-models)") from error
    folder = _weights_folder()
    points = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
    network = dlib.face_recognition_model_v1(str(folder / "dlib_face_recognition_resnet_model_v1.dat"))
    rows = []
    for person in range(1, PEOPLE + 1):
        for photo in range(1, PHOTOS + 1):
            with Image.open(photo_path(person, photo)) as image:
                large = image.convert("RGB").resize((image.width * SCALE, image.height * SCALE))
            pixels = np.asarray(large)
            whole = dlib.rectangle(0, (large.height - large.width) // 2, large.width, (large.height + large.width) // 2)
            rows.append(np.array(network.compute_face_descriptor(pixels, points(pixels, whole))))
    return torch.tensor(np.stack(rows), dtype=torch.float32)


def _weights_folder() -> Path:
    # Looked up and not imported: the package's own module asks for a part of setuptools that is gone.
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("install the extra 'benchmarks' (dlib-bin, face-recognition-models)")
    return Path(spec.submodule_search_locations[0]) / "models"
