"""The files of a folder, or of a tar of one, by their path in it: where they lie, without anything being unpacked.

A tar may come from a stranger: links, devices, paths that lead out of it, and sizes beyond the file are refused.
"""

import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from models.errors import CheckpointFormatError, UnsafeCheckpointError
from models.tensor_files import Extent, quoted

__all__ = ["files_of_folder", "files_of_tar", "is_tar"]

MAX_MEMBERS = 10_000
MAX_PATH_CHARACTERS = 1024
MAGIC_AT, MAGIC = 257, b"ustar"
DEPTH = 2
"""Levels of folders that a pipeline has: its own, and those of its parts."""


def is_tar(path: Path | str) -> bool:
    """Whether the file is a tar that is not compressed."""
    with Path(path).open("rb") as file:
        file.seek(MAGIC_AT)
        return file.read(len(MAGIC)) == MAGIC


def files_of_tar(path: Path | str, root: str) -> dict[str, Extent]:
    """The files beside and below the one named `root`, which may lie one folder deep, by their path from there.

    Raises:
        UnsafeCheckpointError: a member is no plain file or folder, or its path leads elsewhere.
        CheckpointFormatError: the tar is damaged or cut short, or `root` is not in it.
    """
    whole, found = Extent.whole(path), dict[str, Extent]()
    try:
        with tarfile.open(whole.path, "r:") as tar:
            for count, member in enumerate(tar, 1):
                if count > MAX_MEMBERS:
                    raise UnsafeCheckpointError(f"the tar has more than {MAX_MEMBERS:,} members; pack the folder alone")
                name = _checked_name(member)
                if member.isdir():
                    continue
                if not 0 <= member.size <= whole.size - member.offset_data:
                    raise CheckpointFormatError(f"the tar ends within {quoted(name)}; was the upload cut short?")
                if name in found:
                    raise UnsafeCheckpointError(f"{quoted(name)} stands twice in the tar; pack the folder once")
                found[name] = Extent(whole.path, member.offset_data, member.size)
    except RecursionError as error:  # tarfile reads a header that describes the next one by calling itself
        raise UnsafeCheckpointError(
            "the tar has hundreds of headers in front of one member; pack the folder again with tar"
        ) from error
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, CheckpointFormatError | UnsafeCheckpointError):
            raise
        raise CheckpointFormatError(f"the tar is damaged or cut short ({type(error).__name__})") from error
    return _below(found, root)


def files_of_folder(folder: Path | str, root: str) -> dict[str, Extent]:
    """The same of a folder on this machine; links in it are followed.

    Raises:
        CheckpointFormatError: `root` is not in it.
    """
    folder = Path(folder)
    paths = [path for depth in range(1, DEPTH + 1) for path in folder.glob("/".join("*" * depth)) if path.is_file()]
    return _below({path.relative_to(folder).as_posix(): Extent.whole(path) for path in sorted(paths)}, root)


def _checked_name(member: tarfile.TarInfo) -> str:
    """The member's path, without a leading "./"."""
    name = member.name
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) or member.sparse is not None:
        raise UnsafeCheckpointError(
            f"{quoted(name)} in the tar is a link, a device or a sparse file; pack plain files (tar --dereference)"
        )
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or len(name) > MAX_PATH_CHARACTERS or "\0" in name:
        raise UnsafeCheckpointError(f"the path {quoted(name)} in the tar leads out of it; pack the folder from within")
    return path.as_posix()


def _below(found: Mapping[str, Extent], root: str) -> dict[str, Extent]:
    found = {name: file for name, file in found.items() if not PurePosixPath(name).name.startswith("._")}  # of macOS
    roots = [name for name in found if PurePosixPath(name).name == root and name.count("/") <= 1]
    if len(roots) != 1:
        raise CheckpointFormatError(
            f"the folder has {len(roots)} files {root}, and one is needed: give what the pipeline's save_pretrained "
            "wrote, by itself"
        )
    prefix = roots[0].removesuffix(root)
    return {name.removeprefix(prefix): file for name, file in found.items() if name.startswith(prefix)}
