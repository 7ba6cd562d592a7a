"""What tests of this room share: one thread, as tiny tensors on many threads only wait for each other; a pipeline."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny Stable Diffusion model; not to be changed."""
    from models.diffusers_folder import write_folder  # here, since diffusers takes seconds to load
    from tests.models.sd_cases import tiny

    folder = tmp_path_factory.mktemp("written")
    write_folder(tiny(), folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(written, tmp_path / "folder"))
