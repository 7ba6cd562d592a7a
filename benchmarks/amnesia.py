"""Selective Amnesia on digits: what a forgotten condition becomes, what that costs the others, and how long it takes.

    python -m benchmarks.amnesia [--only vae | sd | ddpm] [--quick] [--digit 0] [--threads 2] [--rows FILE]

Three families, each in a module of its own: the conditional VAE of the paper (`amnesia_vae`), Stable Diffusion on
captioned digits (`amnesia_prompts`), and a class-conditional DDPM (`amnesia_classes`). The last two ask the runner, as
the service starts it, and judge its models themselves. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import amnesia_classes, amnesia_prompts, amnesia_vae
from examples.digits import CLASSES

FAMILIES = ("vae", "sd", "ddpm")


def main() -> None:
    """Run it all, or one family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=FAMILIES, help="one family (default: all)")
    parser.add_argument("--digit", type=int, default=0, choices=range(len(CLASSES)), help="that the VAE forgets")
    parser.add_argument("--quick", action="store_true", help="one request each, no ablation, one plain judge")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=Path, help="file to which each row is added as a line of JSON, as it is there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    processor = platform.processor() or platform.machine()
    print(f"{processor}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")

    def log(row: Mapping[str, Any]) -> None:
        if options.rows is not None:
            with options.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")

    found: dict[str, Any] = {}
    for family in (options.only,) if options.only else FAMILIES:
        if family == "vae":
            found |= amnesia_vae.measure(digit=options.digit, quick=options.quick)
        elif family == "sd":
            found |= amnesia_prompts.measure(log, quick=options.quick, threads=options.threads)
        else:
            found |= amnesia_classes.measure(log, quick=options.quick, threads=options.threads)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
