"""The process that decodes foreign images: reads files on standard input, writes plain PNGs on standard output.

Started as a script by ``services.sandbox.images`` and never imported by the service: it needs nothing but Pillow.
Frames both ways: a big-endian length, then that many bytes. In: one image file. Out: a JSON object, then the PNG (empty
where the image was refused, and the object then says why).
"""

from __future__ import annotations

import io
import json
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where our own rooms are: -I leaves it out

from services.sandbox.walls import end_with, grant_seconds, isolate, write_frame

FORMATS = ("JPEG", "PNG", "WEBP")
MIN_SIDE = 2
CPU_SECONDS = 20  # per image


class Refused(Exception):
    """An image that is not let in; the argument is the reason's code."""


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """The pixels of one file as mode L or RGB, upright; raises ``Refused``."""
    if not data:
        raise Refused("empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:
        raise Refused("unknown_format") from error
    if image.width * image.height > max_pixels:
        raise Refused("too_many_pixels")
    if image.width < MIN_SIDE or image.height < MIN_SIDE:
        raise Refused("too_small")
    # A phone's JPEG may carry a second picture for itself (MPO); the first is the photo. Other frames are a film.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise Refused("animated")
    try:
        Image.open(io.BytesIO(data), formats=FORMATS).verify()  # a PNG's checksums, to its last chunk
        image.load()
        return plain(ImageOps.exif_transpose(image))
    except MemoryError as error:
        raise Refused("too_much_memory") from error
    except Exception as error:
        raise Refused("damaged") from error


def plain(image: Image.Image) -> Image.Image:
    """The same picture as 8-bit grey or RGB, transparency over white."""
    if image.mode in ("L", "RGB"):
        return image
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        return sixteen_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        ground.alpha_composite(layer)
        return ground.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
    return image.convert("L" if image.mode in ("1", "LA", "La", "F") else "RGB")


def sixteen_bits(image: Image.Image) -> Image.Image:
    """The high byte of every 16-bit grey value (Pillow's own conversion clips instead)."""
    if image.mode != "I;16":
        image = image.convert("I;16")
    little = sys.byteorder == "little" or image.mode == "I;16"
    return Image.frombytes("L", image.size, image.tobytes()[1 if little else 0 :: 2])


def encode(image: Image.Image) -> bytes:
    """The pixels and nothing else as PNG."""
    bare = Image.new(image.mode, image.size)
    bare.paste(image)
    file = io.BytesIO()
    bare.save(file, "PNG", compress_level=4)
    return file.getvalue()


def answer(data: bytes, max_pixels: int) -> tuple[dict[str, Any], bytes]:
    """What is said about one file."""
    try:
        image = decode(data, max_pixels)
        png = encode(image)
    except Refused as refusal:
        return {"refused": str(refusal)}, b""
    except MemoryError:
        return {"refused": "too_much_memory"}, b""
    return {"width": image.width, "height": image.height, "mode": image.mode}, png


def warm_up() -> None:
    """Load every module and codec that decoding needs, before the files are out of reach."""
    for plugin in (JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin):
        if not plugin.__name__:
            raise ImportError("an image plugin without a name")
    Image.preinit()
    for format in FORMATS:
        file = io.BytesIO()
        Image.new("RGB", (4, 4)).save(file, format, exif=Image.Exif())
        answer(file.getvalue(), 16)
    answer(b"no image", 16)


def main() -> None:
    """Serve until standard input ends."""
    options = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # our own check comes first, and refuses instead of warning
    warm_up()
    isolation = isolate(options["empty_folder"], options["memory_bytes"])
    end_with(options["lifeline"])
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    write_frame(outgoing, json.dumps({"isolation": isolation}).encode())
    outgoing.flush()
    while header := incoming.read(8):
        grant_seconds(CPU_SECONDS)
        facts, png = answer(incoming.read(struct.unpack(">Q", header)[0]), options["max_pixels"])
        write_frame(outgoing, json.dumps(facts).encode())
        write_frame(outgoing, png)
        outgoing.flush()


if __name__ == "__main__":
    main()
