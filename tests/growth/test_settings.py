"""Settings: each told once, and refused with its name, what it may be and what was found."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Annotated, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from growing import growing, wrapped

from esper.growth.grower import Grower
from esper.growth.options import PARTS, GrowerOptions, check_options
from esper.growth.settings import GrowthSettings, SettingOptions

NAMES = [field.name for field in fields(GrowthSettings)]
JUST_INSIDE = {
    "horizon": [1, None],
    "goal": ["min", "max"],
    "evaluate_every": [1, None],
    "overhead": [0.0, 0, 1000.0, None],
    "pass_s": [0.001, 1, None],
    "trial": ["twin", "shadow"],
    "record_updates": [1],
    "trial_updates": [50],
    "tries": [1],
    "spread": [1.0, 1],
    "nulls": [0, 3],
    "attribution": ["trial", "run", "none"],
    "pays": ["updates", "flops"],
    "min_effect": [0.0, 1e9],
    "warmup_updates": [0],
    "lr_new": [0.0, 1.0, 1],
    "hold_updates": [0],
    "audition_updates": [1],
    "ramp_updates": [1],
    "random_seed": [-1, 2**40],
}
JUST_OUTSIDE = {
    "horizon": [0],
    "goal": ["mean"],
    "evaluate_every": [0],
    "overhead": [-0.001, float("nan"), float("inf")],
    "pass_s": [0.0, -1, float("inf")],
    "trial": ["hope"],
    "record_updates": [0],
    "trial_updates": [49],
    "tries": [0],
    "spread": [0.999, float("inf")],
    "nulls": [-1],
    "attribution": ["all"],
    "pays": ["never"],
    "min_effect": [-0.001, float("inf")],
    "warmup_updates": [-1],
    "lr_new": [-0.001, 1.001, float("inf")],
    "hold_updates": [-1],
    "audition_updates": [0],
    "ramp_updates": [0],
    "random_seed": [],
}
WRONG_TYPE = (
    {name: ["3", 2.5, True] for name in NAMES}
    | {name: [1, None] for name in ("goal", "trial", "attribution", "pays")}
    | {name: ["0.1", None, False] for name in ("spread", "lr_new", "min_effect")}
    | {name: ["0.1", False] for name in ("overhead", "pass_s")}
)


def each(table):
    return [(name, value) for name in NAMES for value in table[name]]


@pytest.mark.parametrize(("name", "value"), each(JUST_INSIDE))
def test_every_bound_is_inside_or_outside_as_told(name, value):
    """What lies at a bound that is included is taken as it is."""
    assert getattr(GrowthSettings(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), each(JUST_OUTSIDE))
def test_a_value_out_of_range_is_named(name, value):
    """The error has the argument, what it may be, and what was found."""
    with pytest.raises(ValueError, match=rf"^{name} is .*; got .?{value}.?$"):
        GrowthSettings(**{name: value})


@pytest.mark.parametrize(("name", "value"), each(WRONG_TYPE))
def test_a_value_of_the_wrong_type_is_named(name, value):
    """A bool is no number, a float no count and a string neither; the type found is told."""
    with pytest.raises(TypeError, match=rf"^{name} is .*; got .* \(a {type(value).__name__}\)$"):
        GrowthSettings(**{name: value})


def test_numbers_of_numpy_become_plain_ones():
    """They are what a user's arithmetic ends in, and JSON would not take them."""
    settings = GrowthSettings(horizon=np.int64(100), overhead=np.float32(0.5))
    assert (type(settings.horizon), type(settings.overhead)) == (int, float)
    assert (settings.horizon, settings.overhead) == (100, 0.5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("trial_update", "did you mean trial_updates"),
        ("rregistry", "did you mean registry"),
        ("hold_update", "did you mean hold_updates"),
        ("learning_rate_of_the_host", "they are attribution, audition_updates, budget, "),
    ],
)
def test_a_misspelt_name_gets_the_nearest_one(name, words):
    """At the Grower's own door."""
    with pytest.raises(TypeError, match=f"'{name}' is none of the Grower's arguments; {words}"):
        growing(*wrapped(), **{name: 1})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("verify", "attribution="),
        ("looks", "read once"),
        ("candidates", "as a package"),
        ("embargo", "tries="),
    ],
)
def test_an_argument_of_before_is_refused_with_what_took_its_place(name, words):
    """By name, and not by one that happens to be spelt alike."""
    with pytest.raises(TypeError, match=f"'{name}' is none .* any more; .*{words}"):
        growing(*wrapped(), **{name: 1})


@pytest.mark.parametrize("nulls", [1, 2])
def test_fewer_than_three_equal_twins_are_refused(nulls):
    """One pair is one degree of freedom, and tells no spread."""
    with pytest.raises(ValueError, match="nulls is 0 or at least 3"):
        GrowthSettings(nulls=nulls)


def test_settings_are_given_one_by_one():
    """An object with all of them is refused with how to hand it over, and so it is taken."""
    settings = GrowthSettings(nulls=3)
    with pytest.raises(TypeError, match=r"\*\*settings\.as_options\(\)"):
        growing(*wrapped(), settings=settings)
    assert check_options(settings.as_options()) == settings


@pytest.mark.parametrize(
    ("name", "part", "words"),
    [
        ("compute_loss", 3, r"compute_loss is a function; got 3 \(a int\)"),
        ("evaluate", "loss", "evaluate is a function"),
        ("budget", {"packages": 3}, r"budget is an esper\.Budget"),
        ("run_dir", 3, "run_dir is a path"),
        ("policy", object(), r"policy has the method observe\(\); object has none"),
        ("registry", 3, r"has none; esper\.open_registry\(address\) opens one"),
        ("clock", GrowthSettings, "clock is an object, got the class GrowthSettings"),
    ],
)
def test_a_part_that_cannot_do_its_work_is_refused(name, part, words):
    """Before anything is trained, not when it is first asked."""
    with pytest.raises(TypeError, match=words):
        check_options({name: part})


def test_settings_are_those_among_the_options():
    """Parts are passed over, and what is missing is at its default."""
    settings = check_options({"nulls": 3, "budget": None, "run_dir": "somewhere"})
    assert settings == GrowthSettings(nulls=3)


def test_a_type_checker_is_told_the_same_settings():
    """The TypedDict has the names and types of the dataclass, which it cannot be derived from."""
    told = {name: without_bounds(hint) for name, hint in hints(GrowthSettings).items()}
    assert get_type_hints(SettingOptions) == told


def hints(cls):
    return get_type_hints(cls, include_extras=True)


def without_bounds(hint):
    if get_origin(hint) is Annotated:
        return get_args(hint)[0]
    alternatives = get_args(hint)
    if type(None) in alternatives:
        return get_args(alternatives[0])[0] | None
    return hint


def test_help_shows_every_option_with_its_default():
    """What a user sees in ``help(Grower)`` are the names, as if each were written there."""
    shown = inspect.signature(Grower).parameters
    assert list(shown) == ["model", "optimizer", *PARTS, *NAMES]
    assert {name: shown[name].default for name in NAMES} == GrowthSettings().as_options()
    assert all(shown[name].default is None for name in PARTS)
    assert shown["nulls"].annotation == "int"
    assert shown["horizon"].annotation == "int | None"


def test_every_option_is_documented():
    """Each part and each number is in the Grower's groups, and each number among the settings."""
    assert set(GrowerOptions.__annotations__) == {*PARTS, *NAMES}
    assert [name for name in PARTS if f"``{name}``:" not in Grower.__doc__] == []
    assert [name for name in NAMES if f"*{name}*" not in Grower.__doc__] == []
    assert [name for name in NAMES if f"\n        {name}: " not in GrowthSettings.__doc__] == []


@pytest.mark.parametrize("random_seed", [-1, 2**70])
def test_any_whole_number_starts_every_generator(random_seed):
    """It is kept as given, and folded to where each of them takes it."""
    settings = GrowthSettings(random_seed=random_seed)
    assert settings.random_seed == random_seed
    torch.Generator().manual_seed(settings.generator_seed * 1_000_003 + 10**9)
    assert GrowthSettings(random_seed=7).generator_seed == 7


@pytest.mark.parametrize("name", ["horizon", "overhead", "lr_new"])
def test_a_number_beyond_every_float_is_refused_or_kept(name):
    """It is compared, and raises nothing of Python's own."""
    if name == "horizon":
        assert GrowthSettings(horizon=10**400).horizon == 10**400
    else:
        with pytest.raises(ValueError, match=f"{name} is a (share|ratio)"):
            GrowthSettings(**{name: 10**400})
