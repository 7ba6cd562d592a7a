"""`python -m models.train`: every family from a folder of images to a checkpoint, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from models.checkpoints import load_conditional, load_flow, read_manifest
from models.families import FLOWS
from models.image_folder import hold_out, read_folder
from models.probe import probe
from models.recipes import TRAINABLE
from models.train import DONE, FAILED, USAGE, Stopped, _parser, _Stop, main, train
from tests.models.flow_table import generator

SMALL = {
    "glow": ["n_flow=2", "hidden=8"], "realnvp": ["n_flow=2", "hidden=8"], "maf": ["n_flow=2", "hidden=16"],
    "iaf": ["n_flow=2", "hidden=16"], "tarflow": ["width=16", "n_block=2", "n_layer=1"],
    "class-prior": ["width=16", "n_block=2", "n_layer=1"], "vae": ["hidden=16,8", "latent=2"],
    "ddpm": ["channels=8,16", "norm_groups=4"],
}  # fmt: skip
"""Settings of a tiny model of each family."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small pictures in two sub-folders, dark and light, of three formats, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    draws = generator(5)
    for name, level in (("dark", 60), ("light", 190)):
        (folder / name).mkdir()
        for number in range(20):
            pixels = (level + 20 * torch.randn(9, 8, 3, generator=draws)).clamp(0, 255).to(torch.uint8)
            suffix = ("png", "jpg", "webp")[number % 3]
            Image.fromarray(pixels.numpy()).save(folder / name / f"{number}.{suffix}")
    (folder / "notes.txt").write_text("no picture")
    return folder


def arguments(photos: Path, out: Path, family: str = "glow", *more: str) -> list[str]:
    """A training of a few steps."""
    settings = [f"--set={text}" for text in [*SMALL[family], "batch=8"]]
    return [
        str(photos), "--family", family, "--out", str(out), "--size", "8", "--channels", "1", "--steps", "4",
        *settings, *more,
    ]  # fmt: skip


def test_every_family_has_a_tiny_one_here() -> None:
    assert SMALL.keys() == set(TRAINABLE)


@pytest.mark.parametrize("family", sorted(FLOWS))
def test_every_family_of_flows_is_trained_and_written(family: str, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "base.safetensors"

    code = main(arguments(photos, out, family))

    manifest, flow = read_manifest(out), load_flow(out)
    assert code == DONE
    assert (manifest.family, manifest.image_shape, manifest.extra["steps"]) == (family, (1, 8, 8), 4)
    assert bool(torch.isfinite(flow.log_prob(torch.rand(2, 1, 8, 8, generator=generator()) - 0.5)).all())
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


def test_a_vae_learns_its_classes_and_tells_its_bound(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "base.safetensors"

    code = main([*arguments(photos, out, "vae"), "--steps", "150", "--set=learning_rate=0.01", "--json"])

    lines, manifest = [json.loads(line) for line in capsys.readouterr().out.splitlines()], read_manifest(out)
    assert code == DONE
    assert (manifest.family, manifest.n_bits, manifest.architecture["n_classes"]) == ("vae", 8, 2)
    assert manifest.extra["data"]["classes"] == ["dark", "light"]
    assert lines[-1]["nats_per_image_held_out"] == manifest.extra["nats_per_image_held_out"] < lines[0]["nats"]
    assert (lines[-1]["refused"], "bpd" in lines[0], "bits_per_dim_held_out" in lines[-1]) == (None, False, False)
    dark, light = load_conditional(out).sample(torch.tensor([0, 1]), generator=generator()).float().mean((1, 2, 3))
    assert dark < 100 < light


def test_a_ddpm_is_trained_and_tells_its_squared_error(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "base.safetensors"

    code = main([*arguments(photos, out, "ddpm"), "--steps", "40", "--json"])

    lines, manifest = [json.loads(line) for line in capsys.readouterr().out.splitlines()], read_manifest(out)
    assert code == DONE
    assert (manifest.family, manifest.n_bits, manifest.architecture["channels"]) == ("ddpm", 8, [8, 16])
    assert manifest.extra["recipe"]["label_drop"] == 0.1
    found = lines[-1]["squared_error_per_image_held_out"]
    assert found == manifest.extra["squared_error_per_image_held_out"] < lines[0]["squared_error"]
    assert (lines[-1]["refused"], "nats" in lines[0], "bits_per_dim_held_out" in lines[-1]) == (None, False, False)


def test_a_trained_flow_passes_the_probe_and_has_learnt(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "base.safetensors"

    code = main([*arguments(photos, out), "--steps", "120", "--set=learning_rate=0.01", "--set=affine=false", "--json"])

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == DONE
    assert probe(load_flow(out)) == []
    assert (lines[-1]["warnings"], lines[-1]["refused"]) == ([], None)
    assert lines[-1]["bits_per_dim_held_out"] < lines[0]["bpd"] - 0.2
    assert lines[-1]["bits_per_dim_held_out"] < 5  # the cost of uniform noise


def test_the_checkpoint_tells_how_it_was_made_and_not_where_from(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "base.safetensors"

    main(arguments(photos, out, "tarflow", "--conditional", "--seed", "3", "--hold-out", "0.25"))

    extra = read_manifest(out).extra
    assert extra["data"] == {"images": 30, "held_out": 10, "classes": ["dark", "light"]}
    assert (extra["seed"], extra["recipe"]["batch"], extra["recipe"]["betas"]) == (3, 8, [0.9, 0.95])
    assert str(photos) not in json.dumps(extra)


def test_equal_seeds_write_equal_weights(photos: Path, tmp_path: Path) -> None:
    digests = []
    for seed in ("0", "0", "1"):
        main(arguments(photos, tmp_path / "base.safetensors", "glow", "--seed", seed))
        digests.append(read_manifest(tmp_path / "base.safetensors").tensor_digest)

    assert digests[0] == digests[1] != digests[2]


def test_a_class_prior_learns_which_class_is_which(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "base.safetensors"
    quick = ["--steps", "100", "--set=learning_rate=0.03", "--set=average=0", "--set=warmup=5"]
    main([*arguments(photos, out, "class-prior"), *quick])
    flow = load_flow(out)
    folder = read_folder(photos, image_size=8, channels=1, with_classes=True)

    found = flow.classify(folder.images.float() / 255 - 0.5)  # type: ignore[attr-defined]  # of a flow of classes

    assert float((found == folder.labels).float().mean()) > 0.9


def test_the_weights_of_a_class_prior_are_how_often_classes_occur(photos: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "photos", tmp_path / "base.safetensors"
    for name, count in (("dark", 9), ("light", 3)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shutil.copy(next((photos / name).glob(f"{number}.*")), folder / name)

    main(arguments(folder, out, "class-prior", "--hold-out", "0"))

    assert load_flow(out).class_weights.tolist() == [0.75, 0.25]  # type: ignore[attr-defined]  # of a flow of classes


def test_what_was_stopped_goes_on_to_the_same_weights(photos: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    main(arguments(photos, whole))
    stop = _Stop(gently=True)
    stop(2, None)  # Ctrl-C, before the first step has ended
    with pytest.raises(Stopped):
        train(_parser().parse_args(arguments(photos, broken, "glow", "--resume")), stop)
    left = sorted(path.name for path in tmp_path.iterdir())

    code = main(arguments(photos, broken, "glow", "--resume"))

    assert left == ["broken.safetensors.state", "whole.safetensors"]
    assert code == DONE
    assert read_manifest(broken).tensor_digest == read_manifest(whole).tensor_digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.safetensors", "whole.safetensors"]


@pytest.mark.parametrize("damage", ["other settings", "cut short"])
def test_a_state_that_does_not_fit_is_refused(
    damage: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, state = tmp_path / "base.safetensors", tmp_path / "base.safetensors.state"
    stop = _Stop(gently=True)
    stop(2, None)
    with pytest.raises(Stopped):
        train(_parser().parse_args(arguments(photos, out, "glow", "--resume")), stop)
    if damage == "cut short":
        state.write_bytes(state.read_bytes()[:1000])

    more = ["--seed", "1"] if damage == "other settings" else []
    code = main(arguments(photos, out, "glow", "--resume", *more))

    assert code == USAGE
    assert "delete" in capsys.readouterr().err


def empty(folder: Path) -> None:
    (folder / "notes.txt").write_text("no picture")


def one_image(folder: Path) -> None:
    Image.new("L", (8, 8)).save(folder / "one.png")


def damaged(folder: Path) -> None:
    one_image(folder)
    (folder / "sub").mkdir()
    (folder / "sub" / "broken.png").write_bytes(b"no picture")


def one_class(folder: Path) -> None:
    (folder / "only").mkdir()
    for number in range(3):
        Image.new("L", (8, 8), number).save(folder / "only" / f"{number}.png")


def loose(folder: Path) -> None:
    one_class(folder)
    one_image(folder)


@pytest.mark.parametrize(
    ("make", "family", "code", "message"),
    [
        (empty, "glow", USAGE, "holds no JPEG, PNG or WEBP file (1 other files)"),
        (one_image, "glow", USAGE, "holds one image"),
        (damaged, "glow", FAILED, "broken.png is no JPEG, PNG or WEBP image"),
        (one_class, "class-prior", USAGE, "all images lie in one class, 'only'"),
        (loose, "class-prior", USAGE, "one.png lies in no sub-folder"),
        (one_class, "vae", USAGE, "all images lie in one class, 'only'"),
        (loose, "vae", USAGE, "one.png lies in no sub-folder"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_refused(
    make: Callable[[Path], None], family: str, code: int, message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder)

    found = main(arguments(folder, tmp_path / "base.safetensors", family))

    assert found == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "base.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--family", "gan"], "no family 'gan'"),
        (["--size", "9"], "side of 9 pixels"),
        (["--set", "colour=3"], "no setting 'colour'"),
        (["--set", "n_flow=1000"], "n_flow must be a whole number from 1 to 256"),
        (["--conditional"], "has no classes"),
        (["--out", "/nowhere/base.safetensors"], "no folder /nowhere"),
        (["--out", "/"], "is a folder"),
    ],
)
def test_wrong_usage_is_told(
    more: list[str], message: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(arguments(photos, tmp_path / "base.safetensors", "glow", *more))

    assert code == USAGE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "more", [["--colour"], ["--channels", "2"], ["--steps", "0"], ["--minutes", "x"], ["--hold-out", "1"]]
)
def test_wrong_options_end_with_one_line(
    more: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments(photos, tmp_path / "base.safetensors", "glow", *more))

    assert ended.value.code == USAGE
    assert capsys.readouterr().err.startswith("Error: ")


def test_sub_folders_become_labels_in_the_order_of_their_names(photos: Path) -> None:
    folder = read_folder(photos, image_size=8, channels=1, with_classes=True)

    assert folder.classes == ["dark", "light"]
    assert folder.labels is not None
    assert folder.passed_over == 1
    dark, light = (folder.images[folder.labels == label].float().mean() for label in (0, 1))
    assert dark < 100 < light


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
def test_holding_out_splits_every_class_and_leaves_some_of_each(photos: Path, share: float) -> None:
    folder = read_folder(photos, image_size=8, channels=1, with_classes=True)
    assert folder.labels is not None

    kept, apart = hold_out(folder, share, generator())

    assert sorted([*kept.tolist(), *apart.tolist()]) == list(range(40))
    assert set(folder.labels[kept].tolist()) == {0, 1}
    assert len(apart) == {0.0: 0, 0.01: 1, 0.5: 20, 0.9: 36}[share]
