"""The first look at a checkpoint file, before anything is kept: could these bytes be one at all?"""

from __future__ import annotations

import struct

from services.errors import NotACheckpoint, UnsupportedMediaType

__all__ = ["inspect", "require_media_type"]

MEDIA_TYPE = "application/octet-stream"
SAFETENSORS_HEADER_BYTES = 100_000_000  # the format's own cap
ZIP = b"PK\x03\x04"  # torch.save since 1.6
PICKLE_PROTOCOLS = range(2, 6)  # torch.save before; refused
TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
WANTED = (
    "Send a safetensors file, a state dict as torch.save writes it, or a diffusers folder as a plain tar: tar -cf "
    "model.tar -C FOLDER ."
)


def require_media_type(content_type: str | None) -> None:
    """Raise unless the body is announced as plain bytes, or as nothing."""
    if content_type and content_type.partition(";")[0].strip().lower() != MEDIA_TYPE:
        raise UnsupportedMediaType(f"Send the file itself as the body, with Content-Type: {MEDIA_TYPE}.")


def inspect(head: bytes, length: int | None) -> None:
    """Look at the first bytes of a file of that length (None: not announced).

    Raises:
        NotACheckpoint: It is no safetensors, state dict or tar. The converter looks closer, and runs no code of it.
    """
    if head.startswith(ZIP) or (head[8:9] != b"{" and head.startswith(TAR_MAGIC, TAR_MAGIC_AT)):
        return
    for magic, unpack in COMPRESSED.items():
        if head.startswith(magic) and head[8:9] != b"{":
            raise NotACheckpoint(
                f"This file is compressed, and weights gain next to nothing by it: unpack it ({unpack}), and send the "
                "plain tar or file."
            )
    if head[:1] == b"\x80" and len(head) > 1 and head[1] in PICKLE_PROTOCOLS and head[8:9] != b"{":
        raise NotACheckpoint(
            "This is a bare pickle, as torch.save wrote it before 1.6: save it again with torch >= 1.6 (zip format) "
            "or as safetensors."
        )
    if len(head) < 10 or head[8:9] != b"{":
        raise NotACheckpoint(WANTED)
    header = struct.unpack("<Q", head[:8])[0]
    if not 2 <= header <= SAFETENSORS_HEADER_BYTES or (length is not None and 8 + header > length):
        raise NotACheckpoint(
            f"The file's safetensors header claims {header} bytes, more than the file or the format holds; "
            "it is damaged or cut short."
        )
