"""Defaults of every family: they can be built at every size, be replaced by name, and refuse what they do not know."""

from typing import cast

import pytest
import torch
from torch import nn

from models.errors import ArchitectureError
from models.families import FAMILIES, FLOWS
from models.recipes import TRAINABLE, SettingError, flow_for, model_for, plan_for, read_settings
from models.training_recipes import AutoencoderRecipe, TrainingRecipe, TransformerRecipe
from tests.models.flow_table import generator

MOST_DIMENSIONS = {"maf": 4096, "iaf": 4096}
"""Of the families that have such a limit."""
every_family = pytest.mark.parametrize("family", TRAINABLE)


def classes_of(family: str) -> int:
    """As many classes as the family cannot be without."""
    return 3 if family in ("class-prior", "vae", "ddpm") else 0


@every_family
@pytest.mark.parametrize("side", [8, 16, 28, 32, 48, 64, 96, 128])
@pytest.mark.parametrize("channels", [1, 3])
def test_defaults_build_at_every_size_that_the_family_takes(family: str, side: int, channels: int) -> None:
    if channels * side**2 > MOST_DIMENSIONS.get(family, 10**9):
        with pytest.raises(ArchitectureError, match="dimensions"):
            model_for(family, (channels, side, side), 5, None)
        return

    with torch.device("meta"):
        model = model_for(family, (channels, side, side), 5, None, **classes(family))

    assert model.image_shape == (channels, side, side)
    assert model.architecture.keys() == FAMILIES[family].architecture.keys()


def classes(family: str) -> dict[str, int]:
    """The override that gives a flow of classes its classes."""
    return {"n_classes": count} if (count := classes_of(family)) else {}


def an_override(family: str, width: int) -> tuple[str, int | list[int]]:
    """What makes a model of that family so wide."""
    known = FAMILIES[family].architecture
    if "channels" in known:
        return "channels", [width]
    return ("hidden", [width] if known["hidden"] is list else width) if "hidden" in known else ("width", width)


@every_family
def test_an_override_wins_over_a_default(family: str) -> None:
    name, value = an_override(family, 16)

    with torch.device("meta"):
        model = model_for(family, (1, 8, 8), 5, None, **{name: value}, **classes(family))

    assert model.architecture[name] == value


@every_family
def test_equal_generators_start_equal_models(family: str) -> None:
    name, value = an_override(family, 8)

    states = [
        cast(nn.Module, model_for(family, (1, 4, 4), 5, generator(2), **{name: value}, **classes(family))).state_dict()
        for _ in range(2)
    ]

    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@every_family
def test_an_unknown_argument_is_refused_with_what_there_is(family: str) -> None:
    with pytest.raises(SettingError, match=next(iter(FAMILIES[family].architecture))):
        model_for(family, (1, 8, 8), 5, None, colour=3, **classes(family))


@every_family
def test_architecture_and_recipe_are_set_by_name(family: str) -> None:
    plan = plan_for(family, (1, 8, 8), n_classes=classes_of(family))
    name, kind = next(iter(FAMILIES[family].architecture.items()))

    architecture, recipe = read_settings(family, [f"{name}=2", "batch=7", "flip=false", "steps=none"], plan.recipe)

    assert architecture == {name: [2] if kind is list else kind(2)}
    assert (recipe.batch, recipe.flip, recipe.steps) == (7, False, None)
    assert recipe.learning_rate == plan.recipe.learning_rate


def test_a_list_may_be_one_value_for_all_blocks() -> None:
    assert read_settings("glow", ["lu=true"], TrainingRecipe())[0] == {"lu": True}
    assert read_settings("glow", ["lu=true,no"], TrainingRecipe())[0] == {"lu": [True, False]}


def test_the_widths_of_a_vae_are_whole_numbers() -> None:
    assert read_settings("vae", ["hidden=64,32"], TrainingRecipe())[0] == {"hidden": [64, 32]}
    with pytest.raises(SettingError, match="whole numbers with a comma between, not '64,wide'"):
        read_settings("vae", ["hidden=64,wide"], TrainingRecipe())


@pytest.mark.parametrize("family", sorted(set(TRAINABLE) - FLOWS.keys()))
def test_who_asks_for_a_flow_gets_one(family: str) -> None:
    with pytest.raises(SettingError, match="is no flow; flows are class-prior, glow"):
        flow_for(family, (1, 8, 8), 5, None, **classes(family))


def test_a_ddpm_halves_the_image_until_it_is_small_and_is_set_by_lists_and_json() -> None:
    widths = [plan_for("ddpm", (1, side, side), n_classes=2).architecture["channels"] for side in (7, 8, 28, 64)]
    texts = ["channels=8,16", "attention=true,no", 'sampling={"steps": 5, "guidance_scale": 1.5}']

    architecture, _ = read_settings("ddpm", texts, TransformerRecipe())

    assert widths == [[32], [32, 64], [32, 64, 128], [32, 64, 128, 256, 256]]
    assert architecture == {
        "channels": [8, 16], "attention": [True, False], "sampling": {"steps": 5, "guidance_scale": 1.5}
    }  # fmt: skip
    for text in ("sampling=5", "sampling={"):
        with pytest.raises(SettingError, match="sampling is a JSON object, not"):
            read_settings("ddpm", [text], TransformerRecipe())


def test_digits_have_the_papers_sizes_and_are_never_mirrored() -> None:
    digits, photos = plan_for("vae", (1, 28, 28), n_classes=10), plan_for("vae", (3, 32, 32), n_classes=10)

    assert digits.architecture == {"hidden": [512, 256], "latent": 8, "n_classes": 10}
    assert (digits.recipe.flip, photos.recipe.flip) == (False, False)
    assert isinstance(digits.recipe, AutoencoderRecipe)
    assert isinstance(photos.recipe, AutoencoderRecipe)
    assert digits.recipe.turn > 0 == photos.recipe.turn


def test_what_is_not_trained_here_is_refused_with_what_is() -> None:
    with pytest.raises(SettingError, match=r"stable-diffusion is not trained here.*class-prior, ddpm, glow"):
        plan_for("stable-diffusion", (3, 64, 64))


def test_a_pair_is_set_by_its_two_numbers() -> None:
    _, recipe = read_settings("tarflow", ["betas=0.8,0.9"], TransformerRecipe())

    assert isinstance(recipe, TransformerRecipe)
    assert recipe.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden", "name=value"),
        ("colour=3", "no setting 'colour'"),
        ("hidden=wide", "a whole number"),
        ("hidden=1.5", "a whole number"),
        ("affine=maybe", "true or false"),
        ("learning_rate=nan", "finite"),
        ("learning_rate=2", "from 1e-08 to 1"),
        ("batch=0", "from 1 to 4096"),
        ("average=1", "from 0 to 0.99999"),
        ("steps=0", "from 1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        read_settings("glow", [text], TrainingRecipe())


def test_decays_that_cannot_be_are_refused() -> None:
    with pytest.raises(SettingError, match="betas takes 2 numbers"):
        read_settings("tarflow", ["betas=0.9"], TransformerRecipe())


def test_an_unknown_family_is_refused_with_those_there_are() -> None:
    with pytest.raises(SettingError, match="glow"):
        plan_for("gan", (1, 8, 8))


def test_classes_are_refused_by_families_without() -> None:
    with pytest.raises(SettingError, match="no classes"):
        plan_for("glow", (1, 8, 8), n_classes=2)


@pytest.mark.parametrize("family", ["glow", "realnvp"])
def test_a_size_that_the_family_cannot_take_is_refused(family: str) -> None:
    with pytest.raises(ArchitectureError, match="27"):
        flow_for(family, (1, 27, 27), 5, None)


def test_attention_reads_few_tokens_by_default() -> None:
    with torch.device("meta"):
        counts = [(side // plan_for("tarflow", (3, side, side)).architecture["patch_size"]) ** 2 for side in (28, 64)]

    assert counts == [49, 256]


def test_only_conditional_tarflows_drop_labels() -> None:
    drops = {name: getattr(plan_for(name, (1, 8, 8), n_classes=2).recipe, "label_drop", None) for name in
             ("tarflow", "class-prior")}  # fmt: skip

    assert drops == {"tarflow": 0.1, "class-prior": 0.0}
