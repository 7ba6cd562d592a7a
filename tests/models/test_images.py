"""Images: what is read, what is refused, and the two colour depths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from models.errors import ImageError
from models.families import FLOWS
from models.images import dequantize, evaluation_batch, load_images, quantize, save_png, to_uint8


def picture(path: Path, size: tuple[int, int], mode: str = "L", image_format: str | None = None) -> Path:
    """A file with a diagonal ramp."""
    ramp = Image.linear_gradient("L").resize(size)
    ramp.convert(mode).save(path, format=image_format)
    return path


def test_an_image_of_the_right_size_is_left_alone(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_png(image, tmp_path / "a.png")

    images, (fit,) = load_images([tmp_path / "a.png"], image_size=16, channels=1)

    assert torch.equal(images[0], image)
    assert not fit.changed


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(("mode", "channels", "colour"), [("RGB", 1, "RGB to grey"), ("L", 3, "L to RGB")])
def test_colour_conversion_is_told(tmp_path: Path, image_format: str, mode: str, channels: int, colour: str) -> None:
    path = picture(tmp_path / "a.bin", (16, 16), mode, image_format)

    images, (fit,) = load_images([path], image_size=16, channels=channels)

    assert images.shape == (1, channels, 16, 16)
    assert fit.colour == ("RGB to grey" if mode == "RGB" else None if fit.original_mode == "RGB" else colour)


def test_crop_keeps_the_central_square_and_resizes(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", (40, 20))

    images, (fit,) = load_images([path], image_size=10, channels=1)

    assert images.shape == (1, 1, 10, 10)
    assert fit.cropped == (10, 0, 30, 20)
    assert fit.resized == (20, 20)


def test_squash_keeps_the_whole_image(tmp_path: Path) -> None:
    _, (fit,) = load_images([picture(tmp_path / "a.png", (40, 20))], image_size=10, channels=1, fit="squash")

    assert fit.cropped is None
    assert fit.resized == (40, 20)


def test_exact_refuses_another_size(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="40 x 20"):
        load_images([picture(tmp_path / "a.png", (40, 20))], image_size=10, channels=1, fit="exact")


def test_bad_files_are_refused_with_their_name(tmp_path: Path) -> None:
    whole = picture(tmp_path / "whole.png", (64, 64)).read_bytes()
    frames = [Image.new("L", (8, 8), value) for value in (0, 255)]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_bytes(b"hello")
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    picture(tmp_path / "dot.png", (1, 1))
    picture(tmp_path / "gif.png", (8, 8), image_format="GIF")
    Image.new("1", (8000, 7000)).save(tmp_path / "huge.png")
    reasons = {
        "empty": "is empty", "text": "no JPEG, PNG or WEBP", "cut": "damaged or cut short", "dot": "1 x 1 pixels",
        "gif": "no JPEG, PNG or WEBP", "huge": "pixels", "moving": "animated", "absent": "cannot be read",
    }  # fmt: skip

    for name, reason in reasons.items():
        with pytest.raises(ImageError, match=reason) as caught:
            load_images([tmp_path / f"{name}.png"], image_size=8, channels=1)
        assert str(caught.value).startswith(f"{name}.png")


@pytest.mark.parametrize("n_bits", [1, 3, 5, 8])
def test_quantize_gives_the_levels_and_to_uint8_takes_them_back(n_bits: int) -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)

    x = quantize(images, n_bits)

    assert x.dtype == torch.float32
    assert float(x.min()) == -0.5
    assert float(x.max()) < 0.5
    assert len(x.unique()) == 2**n_bits
    assert torch.equal(quantize(to_uint8(x, n_bits), n_bits), x)


def test_dequantize_stays_within_the_level_and_follows_its_generator() -> None:
    x = quantize(torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16), 5)

    first, second = (dequantize(x, 5, torch.Generator().manual_seed(1)) for _ in range(2))

    assert torch.equal(first, second)
    assert bool((first >= x).all())
    assert bool((first < x + 1 / 32).all())
    assert torch.equal(quantize(to_uint8(first, 5), 5), x)


def test_quantize_refuses_floats_and_odd_depths() -> None:
    with pytest.raises(ImageError, match="uint8"):
        quantize(torch.zeros(1), 5)
    with pytest.raises(ImageError, match="n_bits"):
        quantize(torch.zeros(1, dtype=torch.uint8), 9)


@pytest.mark.parametrize(("family", "at_once"), [("glow", 32), ("iaf", 500)])
def test_images_are_evaluated_in_parts_unless_each_part_costs_as_many_passes_as_all(family: str, at_once: int) -> None:
    flow, x = FLOWS[family].model, torch.zeros(1000, 1, 32, 32)

    assert evaluation_batch(flow, x, torch.device("cpu"), 500) == at_once
    assert evaluation_batch(flow, x, torch.device("cpu"), 5) == 5
    assert evaluation_batch(flow, x, torch.device("cuda"), 500) == 500
