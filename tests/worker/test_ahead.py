"""What a runner loads while its inputs are fetched: the right libraries, no other, and nothing before its walls."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.worker.helpers import ROOT
from worker.runner.__main__ import METHODS

LIBRARIES = ("numpy", "torch", "matplotlib", "diffusers", "transformers")
OF_PROMPTS = ("diffusers.models.autoencoders.autoencoder_kl", "transformers.models.clip.modeling_clip")
"""What Stable Diffusion takes of them beyond a DDPM."""
ASKED = sorted(
    {("forget", method) for method in METHODS if isinstance(method, str)} | {("debias", "selective-amnesia")}
)


def loaded_after(*told: tuple[str, ...]) -> list[set[str]]:
    """Modules of a new process after each thing that it was told ahead."""
    code = (
        "import json, sys\nfrom worker.runner.__main__ import load_ahead\n"
        "for told in json.loads(sys.argv[1]):\n    load_ahead(*told)\n    print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(told)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


def loaded(*told: tuple[str, ...]) -> set[str]:
    """Those after all of it."""
    return loaded_after(*told)[-1]


def test_nothing_is_loaded_for_an_import_nor_for_what_is_unknown() -> None:
    modules = loaded(
        (), ("import",), ("import", "flow-taming", "glow"), ("forget",), ("forget", "unheard-of", "glow"), ("?",) * 9
    )

    assert modules.isdisjoint(LIBRARIES)
    assert not any(name.startswith(("models", "unlearning", "evidence")) for name in modules)


def test_every_method_is_loaded_ahead_and_without_the_libraries_of_other_families() -> None:
    families = ("glow", "realnvp", "maf", "iaf", "tarflow", "class-prior", "vae", "unheard-of")

    modules = loaded(*((*asked, family) for asked in ASKED for family in families))

    assert set(METHODS.values()) <= modules
    assert modules.isdisjoint({"diffusers", "transformers", "matplotlib"})


def test_a_diffusion_models_libraries_are_loaded_with_it() -> None:
    families = ("ddpm", "stable-diffusion", "stable-diffusion-xl")
    ddpm, prompts, every = loaded_after(*(("forget", "selective-amnesia", family) for family in families))

    assert {"worker.runner.amnesia", "models.ddpm", "diffusers"} <= ddpm
    assert {"models.stable_diffusion", *OF_PROMPTS} <= prompts
    assert ddpm.isdisjoint({"models.stable_diffusion", *OF_PROMPTS})
    assert ("models.stable_diffusion_xl" in prompts, "models.stable_diffusion_xl" in every) == (False, True)
    assert "worker.runner.forget" not in every


def test_garbage_is_looked_for_again_once_libraries_are_loaded_or_could_not_be() -> None:
    code = (
        "import gc\nfrom worker.runner.__main__ import _loading\n"
        "with _loading():\n    assert not gc.isenabled()\n"
        "assert gc.isenabled()\n"
        "try:\n    with _loading():\n        raise KeyError\nexcept KeyError:\n    print(gc.isenabled())"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )

    assert done.stdout.strip() == "True"
