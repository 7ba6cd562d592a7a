"""Defaults of every family: they can be built at every size, be replaced by name, and refuse what they do not know."""

import pytest
import torch

from models.errors import ArchitectureError
from models.families import FAMILIES
from models.recipes import SettingError, flow_for, plan_for, read_settings
from models.training import TrainingRecipe, TransformerRecipe
from tests.models.flow_table import generator

MOST_DIMENSIONS = {"maf": 4096, "iaf": 4096}
"""Of the families that have such a limit."""
every_family = pytest.mark.parametrize("family", sorted(FAMILIES))


def classes_of(family: str) -> int:
    """As many classes as the family cannot be without."""
    return 3 if family == "class-prior" else 0


@every_family
@pytest.mark.parametrize("side", [8, 16, 28, 32, 48, 64, 96, 128])
@pytest.mark.parametrize("channels", [1, 3])
def test_defaults_build_at_every_size_that_the_family_takes(family: str, side: int, channels: int) -> None:
    if channels * side**2 > MOST_DIMENSIONS.get(family, 10**9):
        with pytest.raises(ArchitectureError, match="dimensions"):
            flow_for(family, (channels, side, side), 5, None)
        return

    with torch.device("meta"):
        flow = flow_for(family, (channels, side, side), 5, None, **classes(family))

    assert flow.image_shape == (channels, side, side)
    assert flow.architecture.keys() == FAMILIES[family].architecture.keys()


def classes(family: str) -> dict[str, int]:
    """The override that gives a flow of classes its classes."""
    return {"n_classes": count} if (count := classes_of(family)) else {}


@every_family
def test_an_override_wins_over_a_default(family: str) -> None:
    name = "hidden" if "hidden" in FAMILIES[family].architecture else "width"

    with torch.device("meta"):
        flow = flow_for(family, (1, 8, 8), 5, None, **{name: 16}, **classes(family))

    assert flow.architecture[name] == 16


@every_family
def test_equal_generators_start_equal_flows(family: str) -> None:
    name = "hidden" if "hidden" in FAMILIES[family].architecture else "width"

    states = [
        flow_for(family, (1, 4, 4), 5, generator(2), **{name: 8}, **classes(family)).state_dict()  # type: ignore[attr-defined]  # a module
        for _ in range(2)
    ]

    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@every_family
def test_an_unknown_argument_is_refused_with_what_there_is(family: str) -> None:
    with pytest.raises(SettingError, match=next(iter(FAMILIES[family].architecture))):
        flow_for(family, (1, 8, 8), 5, None, colour=3, **classes(family))


@every_family
def test_architecture_and_recipe_are_set_by_name(family: str) -> None:
    plan = plan_for(family, (1, 8, 8), n_classes=classes_of(family))
    name, kind = next(iter(FAMILIES[family].architecture.items()))

    architecture, recipe = read_settings(family, [f"{name}=2", "batch=7", "flip=false", "steps=none"], plan.recipe)

    assert architecture == {name: kind(2)}
    assert (recipe.batch, recipe.flip, recipe.steps) == (7, False, None)
    assert recipe.learning_rate == plan.recipe.learning_rate


def test_a_list_may_be_one_value_for_all_blocks() -> None:
    assert read_settings("glow", ["lu=true"], TrainingRecipe())[0] == {"lu": True}
    assert read_settings("glow", ["lu=true,no"], TrainingRecipe())[0] == {"lu": [True, False]}


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
