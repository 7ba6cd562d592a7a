"""Images at the door: what is kept of them, what is refused, and that nothing stays behind."""

from __future__ import annotations

import io
import os
import socket
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

import api.image_sets
from api.app import create_app
from services import object_keys
from services.database import Database
from services.settings import Settings
from services.storage import ObjectStorage
from services.tables import ImageSet
from services.tenancy import Caller, NewKey

CANARY = "Ada-Lovelace-51.5074N"
PATIENCE_SECONDS = 10.0
ALLOWED_GROWTH = 12 * 2**20  # one image of 1 MiB and its PNG at a time, and the allocator's slack

Files = Callable[..., Any]


def picture(format: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (12, 10), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert(mode).save(file, format, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims that size, with next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def animated(format: str) -> bytes:
    file = io.BytesIO()
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    first.save(file, format, save_all=True, append_images=[second])
    return file.getvalue()


def noise(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 80).save(file, "PNG")
    return file.getvalue()


def incompressible(side: int) -> bytes:
    """A PNG that is as large as its pixels."""
    file = io.BytesIO()
    Image.frombytes("L", (side, side), os.urandom(side * side)).save(file, "PNG", compress_level=0)
    return file.getvalue()


BAD = {
    "empty": (b"", "empty"),
    "text": (b"not an image at all", "unknown_format"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unknown_format"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unknown_format"),
    "GIF": (picture("GIF", "L"), "unknown_format"),
    "BMP": (picture("BMP"), "unknown_format"),
    "TIFF": (picture("TIFF"), "unknown_format"),
    "one pixel": (picture(size=(1, 1)), "too_small"),
    "one pixel wide": (picture(size=(1, 9)), "too_small"),
    "50 megapixels": (bomb(10_000, 5_000), "too_many_pixels"),
    "4 gigapixels": (bomb(65_000, 65_000), "too_many_pixels"),
    "truncated JPEG": (picture("JPEG", size=(64, 64))[:-200], "damaged"),
    "truncated PNG": (noise((64, 64))[:-500], "damaged"),
    "PNG without its end": (picture()[:-12], "damaged"),
    "truncated WebP": (picture("WEBP", size=(64, 64))[:-20], "unknown_format"),
    "only a JPEG's head": (picture("JPEG")[:20], "unknown_format"),
    "PNG that ends early inside": (bomb(500, 500), "damaged"),
    "animated PNG": (animated("PNG"), "animated"),
    "animated WebP": (animated("WEBP"), "animated"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_image_refuses_the_set_by_index_and_leaves_nothing(
    client: httpx.Client, image_files: Files, storage: ObjectStorage, caller: Caller, database: Database, kind: str
) -> None:
    data, reason = BAD[kind]

    answer = client.post("/image-sets", files=[("images", (f"{CANARY}.png", item)) for item in (picture(), data)])

    problem = answer.json()
    assert (answer.status_code, problem["type"]) == (422, "urn:forgetd:problem:image-refused")
    assert (problem["index"], problem["reason"]) == (1, reason)
    assert CANARY not in answer.text
    assert storage.keys(f"{object_keys.tenant_prefix(caller.tenant_id)}image-sets/") == []
    with database.transaction() as session:
        assert session.scalars(select(ImageSet).where(ImageSet.tenant_id == caller.tenant_id)).all() == []


@pytest.mark.parametrize(
    ("format", "mode", "stored"),
    [
        ("PNG", "1", "L"),
        ("PNG", "L", "L"),
        ("PNG", "LA", "L"),
        ("PNG", "P", "RGB"),
        ("PNG", "RGB", "RGB"),
        ("PNG", "RGBA", "RGB"),
        ("PNG", "I;16", "L"),
        ("JPEG", "L", "L"),
        ("JPEG", "RGB", "RGB"),
        ("JPEG", "CMYK", "RGB"),
        ("WEBP", "RGB", "RGB"),
        ("WEBP", "RGBA", "RGB"),
    ],
)
def test_every_kind_of_picture_becomes_a_plain_png(
    client: httpx.Client,
    image_files: Files,
    storage: ObjectStorage,
    caller: Caller,
    format: str,
    mode: str,
    stored: str,
) -> None:
    answer = client.post("/image-sets", files=image_files(picture(format, mode)))

    assert answer.status_code == 201, answer.text
    kept = Image.open(io.BytesIO(storage.read(object_keys.image(caller.tenant_id, answer.json()["id"], 0))))
    assert (kept.format, kept.mode, kept.size) == ("PNG", stored, (12, 10))
    assert answer.json()["modes"] == {stored: 1}


def test_sixteen_bits_keep_their_high_byte(
    client: httpx.Client, image_files: Files, storage: ObjectStorage, caller: Caller
) -> None:
    file = io.BytesIO()
    Image.new("I;16", (4, 4), 0x8040).save(file, "PNG")

    answer = client.post("/image-sets", files=image_files(file.getvalue()))

    kept = Image.open(io.BytesIO(storage.read(object_keys.image(caller.tenant_id, answer.json()["id"], 0))))
    assert kept.getpixel((0, 0)) == 0x80


def test_transparency_lies_over_white(
    client: httpx.Client, image_files: Files, storage: ObjectStorage, caller: Caller
) -> None:
    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(file, "PNG")

    answer = client.post("/image-sets", files=image_files(file.getvalue()))

    kept = Image.open(io.BytesIO(storage.read(object_keys.image(caller.tenant_id, answer.json()["id"], 0))))
    assert kept.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_metadata_is_stripped_and_the_picture_turned_upright(
    client: httpx.Client, storage: ObjectStorage, caller: Caller, format: str
) -> None:
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = CANARY, 6  # description; turned by a quarter
    more: dict[str, Any] = {}
    if format == "PNG":
        more["pnginfo"] = PngInfo()
        more["pnginfo"].add_text("Author", CANARY)
    if format == "JPEG":
        more["comment"] = CANARY
    data = picture(format, exif=exif, **more)
    assert CANARY.encode() in data

    answer = client.post("/image-sets", files=[("images", (f"{CANARY}.jpg", data))])

    kept = storage.read(object_keys.image(caller.tenant_id, answer.json()["id"], 0))
    image = Image.open(io.BytesIO(kept))
    image.load()
    assert CANARY.encode() not in kept
    assert (image.size, image.info, dict(image.getexif())) == ((10, 12), {}, {})


def test_a_phones_two_picture_jpeg_counts_as_its_first(client: httpx.Client, image_files: Files) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 12), "red").save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 6), "blue")])

    answer = client.post("/image-sets", files=image_files(file.getvalue()))

    assert (answer.status_code, answer.json()["largest"]) == (201, [16, 12])


def test_same_photo_twice_is_kept_once_and_counted(
    client: httpx.Client, image_files: Files, storage: ObjectStorage, caller: Caller
) -> None:
    same = picture("PNG", compress_level=9)
    assert same != picture()

    answer = client.post("/image-sets", files=image_files(picture(), same, picture(mode="L")))

    resource = answer.json()
    assert (resource["count"], resource["duplicates_dropped"]) == (2, 1)
    assert len(storage.keys(object_keys.image_set_prefix(caller.tenant_id, resource["id"]))) == 2


def test_answer_describes_the_set_and_shows_no_digest_or_name(client: httpx.Client) -> None:
    answer = client.post("/image-sets", files=[("images", (f"{CANARY}.png", picture(size=(20, 30))))])

    resource = answer.json()
    assert answer.headers["location"] == f"/image-sets/{resource['id']}"
    assert (resource["smallest"], resource["largest"], resource["erased_at"]) == ([20, 30], [20, 30], None)
    assert client.get(answer.headers["location"]).json() == resource | {"duplicates_dropped": None}
    assert CANARY not in answer.text


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"x", "application/octet-stream", 415),
        (b"x", "multipart/form-data", 415),
        (b"", "multipart/form-data; boundary=b", 422),
        (b"--b--\r\n", "multipart/form-data; boundary=b", 422),
        (b"nonsense", "multipart/form-data; boundary=b", 422),
        (
            b'--b\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\nabc',
            "multipart/form-data; boundary=b",
            422,
        ),
        (
            b'--b\r\nContent-Disposition: form-data; name="other"\r\n\r\nabc\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            422,
        ),
        (b"--b\r\nX: " + b"y" * 10_000 + b"\r\n\r\nabc\r\n--b--\r\n", "multipart/form-data; boundary=b", 422),
        (b"--b\r\n\r\nabc\r\n--b--\r\n", "multipart/form-data; boundary=b", 422),
    ],
)
def test_malformed_form_is_a_problem(client: httpx.Client, content: bytes, content_type: str, status: int) -> None:
    answer = client.post("/image-sets", content=content, headers={"Content-Type": content_type})

    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_file_past_the_cap_is_413_by_index(client: httpx.Client, image_files: Files) -> None:
    answer = client.post("/image-sets", files=image_files(picture(), b"\0" * (4 * 2**20 + 1)))

    assert (answer.status_code, answer.json()["index"]) == (413, 1)


def test_set_past_the_cap_is_413(client: httpx.Client, image_files: Files) -> None:
    answer = client.post("/image-sets", files=image_files(*[b"\0" * (4 * 2**20 - 1)] * 17))

    assert answer.status_code == 413


def test_too_many_images_are_413(
    client: httpx.Client, image_files: Files, storage: ObjectStorage, caller: Caller
) -> None:
    answer = client.post("/image-sets", files=image_files(*(picture(size=(10, 10 + n)) for n in range(51))))

    assert answer.status_code == 413
    assert storage.keys(f"{object_keys.tenant_prefix(caller.tenant_id)}image-sets/") == []


def test_memory_holds_one_image_at_a_time(client: httpx.Client, image_files: Files, gateway: Any) -> None:
    files = image_files(*(incompressible(1024) for _ in range(18)))
    client.post("/image-sets", files=files[:2])
    before = psutil.Process(gateway.pid).memory_info().rss

    answer = client.post("/image-sets", files=files)

    assert answer.status_code == 201
    assert answer.json()["total_bytes"] > 1.4 * ALLOWED_GROWTH
    assert psutil.Process(gateway.pid).memory_info().rss - before < ALLOWED_GROWTH


def test_caller_who_hangs_up_leaves_nothing(
    gateway: Any, api_key: NewKey, storage: ObjectStorage, caller: Caller, database: Database
) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    head = (
        f"POST /image-sets HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api_key.secret}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000\r\n\r\n"
    ).encode()
    prefix = f"{object_keys.tenant_prefix(caller.tenant_id)}image-sets/"

    def rows() -> int:
        with database.transaction() as session:
            return len(session.scalars(select(ImageSet).where(ImageSet.tenant_id == caller.tenant_id)).all())

    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as line:
        line.sendall(head + part + picture() + b"\r\n" + part)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not storage.keys(prefix) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert storage.keys(prefix)
    while (rows() or storage.keys(prefix)) and time.monotonic() < deadline:
        time.sleep(0.05)

    assert (rows(), storage.keys(prefix)) == (0, [])


def test_set_being_filled_is_nobodys_to_see_yet_and_has_its_cap(
    client: httpx.Client, database: Database, caller: Caller
) -> None:
    from services import image_sets
    from services.ids import new_id

    image_set_id = new_id("imgs")
    with database.transaction() as session:
        image_sets.begin(session, caller, image_set_id, hours=1)

    with database.transaction() as session:
        row = session.get_one(ImageSet, image_set_id)
    assert client.get(f"/image-sets/{image_set_id}").status_code == 404
    assert row.expires_at > row.created_at


def test_idempotency_key_keeps_one_set(
    client: httpx.Client, image_files: Files, storage: ObjectStorage, caller: Caller
) -> None:
    first = client.post("/image-sets", files=image_files(picture()), headers={"Idempotency-Key": "k"})
    again = client.post("/image-sets", files=image_files(picture()), headers={"Idempotency-Key": "k"})
    other = client.post("/image-sets", files=image_files(picture(mode="L")), headers={"Idempotency-Key": "k"})

    assert again.content == first.content
    assert other.json()["type"] == "urn:forgetd:problem:idempotency-key-reused"
    assert len(storage.keys(f"{object_keys.tenant_prefix(caller.tenant_id)}image-sets/")) == 1


@pytest.mark.parametrize("committed", [True, False])
def test_set_goes_after_a_database_error_only_if_it_is_not_complete(
    settings: Settings,
    api_key: NewKey,
    image_files: Files,
    storage: ObjectStorage,
    caller: Caller,
    serve: Callable[..., httpx.Client],
    monkeypatch: pytest.MonkeyPatch,
    committed: bool,
) -> None:
    complete = api.image_sets._complete

    def unlucky(*arguments: Any) -> Any:
        if committed:
            complete(*arguments)
        raise OperationalError("COMMIT", {}, Exception("the connection is lost"))

    monkeypatch.setattr(api.image_sets, "_complete", unlucky)

    answer = serve(create_app(settings), api_key).post("/image-sets", files=image_files(picture()))

    assert answer.status_code >= 500
    assert len(storage.keys(f"{object_keys.tenant_prefix(caller.tenant_id)}image-sets/")) == committed


def test_erasing_takes_every_image_now_and_twice_is_as_once(
    client: httpx.Client, image_set: str, storage: ObjectStorage, caller: Caller
) -> None:
    first = client.delete(f"/image-sets/{image_set}")
    again = client.delete(f"/image-sets/{image_set}")

    assert (first.status_code, again.status_code) == (200, 200)
    assert first.json()["erased_at"] is not None
    assert first.json() == again.json() == client.get(f"/image-sets/{image_set}").json()
    assert storage.keys(object_keys.image_set_prefix(caller.tenant_id, image_set)) == []


def test_images_that_an_open_job_reads_are_not_erased(
    client: httpx.Client, job_id: str, body: dict[str, Any], storage: ObjectStorage, caller: Caller
) -> None:
    image_set = body["target"]["images"]

    refused = client.delete(f"/image-sets/{image_set}")
    client.post(f"/jobs/{job_id}/cancel")
    done = client.delete(f"/image-sets/{image_set}")

    assert (refused.status_code, refused.json()["type"]) == (409, "urn:forgetd:problem:image-set-in-use")
    assert done.status_code == 200


def test_unchanged_set_is_304(client: httpx.Client, image_set: str) -> None:
    tag = client.get(f"/image-sets/{image_set}").headers["etag"]

    answer = client.get(f"/image-sets/{image_set}", headers={"If-None-Match": tag})

    assert answer.status_code == 304
