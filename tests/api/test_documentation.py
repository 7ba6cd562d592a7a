"""Every shell example of docs/api.md, run as it stands."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from services.tenancy import Caller, NewKey
from tests.onnx_files import classifier

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("openssl")), reason="needs curl and openssl")
def test_every_example_works_as_it_stands(
    client: httpx.Client,
    api_key: NewKey,
    body: dict[str, Any],
    caller: Caller,
    ready_checkpoint: Callable[..., str],
    new_classifier: Callable[..., str],
    new_image_set: Callable[..., str],
    publish: Callable[..., Any],
    image_files: Callable[..., Any],
    tmp_path: Path,
) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "base.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    (tmp_path / "smiles.onnx").write_bytes(classifier())
    for number, name in enumerate(("one.jpg", "two.jpg")):
        Image.new("L", (8, 8), number * 99).save(tmp_path / name)
    spare = io.BytesIO()
    Image.new("L", (8, 8)).save(spare, "PNG")
    job, queued = (client.post("/jobs/forget", json=body).json()["id"] for _ in range(2))
    publish(job)
    variables = {
        "PATH": os.environ["PATH"],
        "URL": str(client.base_url).rstrip("/"),
        "KEY": api_key.secret,
        "CHECKPOINT": body["checkpoint"],
        "IMAGES": body["target"]["images"],
        "SPARE_IMAGES": client.post("/image-sets", files=image_files(spare.getvalue())).json()["id"],
        "CLASSIFIER": new_classifier(),
        "SPARE_CLASSIFIER": new_classifier(),
        "GLASSES": new_image_set(),
        "NO_GLASSES": new_image_set(),
        "CHECKPOINT_OF_CLASSES": ready_checkpoint(caller, "class-prior", architecture={"n_classes": 3}),
        "CHECKPOINT_OF_A_VAE": ready_checkpoint(caller, "vae", architecture={"n_classes": 3}),
        "CHECKPOINT_OF_PROMPTS": ready_checkpoint(caller, "stable-diffusion"),
        "DIGITS": new_classifier("0", "1", "2"),
        "JOB": job,
        "QUEUED_JOB": queued,
    }
    examples = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)

    done = [
        subprocess.run(["bash", "-euc", text], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
        for text in examples
    ]

    assert len(examples) > 8
    assert [(run.args[-1], run.stdout, run.stderr) for run in done if run.returncode] == []
    assert (tmp_path / "tamed.safetensors").read_bytes() == b"weights " * 1000
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
