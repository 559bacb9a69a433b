from typing import Any

import pytest

from uni_x.errors import ConfigError
from uni_x.model.plan import LayerSpec, build_plan, plan_from_dicts, plan_to_dicts, read_preset


def test_uni_x_separates_both_ends_and_shares_the_middle() -> None:
    plan = build_plan("uni-x", 6, {"first": 2, "last": 1})
    assert [spec.splits_completely for spec in plan] == [True, True, False, False, False, True]
    assert plan[2] == LayerSpec()


def test_moe_separates_the_ffn_of_every_step_th_layer() -> None:
    plan = build_plan("moe", 5, {"step": 2})
    assert [spec.ffn for spec in plan] == ["shared", "separate", "shared", "separate", "shared"]


@pytest.mark.parametrize(
    ("preset", "arguments"),
    [
        ("shared", {}),
        ("uni-x", {"first": 1, "last": 2}),
        ("moe", {"step": 3}),
        ("mot", {"image_ffn_size": 8}),
        ("uni-share", {"first": 1, "last": 1, "image_ffn_size": 0, "shared_ffn_size": 8}),
    ],
)
def test_plans_survive_json(preset: str, arguments: dict[str, int]) -> None:
    plan = build_plan(preset, 4, arguments)
    assert plan_from_dicts(plan_to_dicts(plan), 4) == plan


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shared", ("shared", {})),
        ("uni-x(12, 6)", ("uni-x", {"first": 12, "last": 6})),
        (" uni-x( 1, last=2, ends_see='all') ", ("uni-x", {"first": 1, "last": 2, "ends_see": "all"})),
        ("moe(step=2)", ("moe", {"step": 2})),
    ],
)
def test_presets_are_read_as_people_write_them(text: str, expected: tuple[str, dict[str, Any]]) -> None:
    assert read_preset(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uni-x(12", "is not a plan"),
        ("uni-x(open('x'))", "is not a plan"),
        ("unix(1, 2)", "the nearest known one is 'uni-x'"),
        ("moe(1, 2)", "2 arguments are too many; it takes step"),
    ],
)
def test_unreadable_presets_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_preset(text)
    assert message in str(caught.value)


def test_a_plan_by_range_is_the_preset_it_spells_out() -> None:
    end = {"norms": "separate", "qkv": "separate", "output": "separate", "ffn": "separate", "sees": "own"}
    entries = [{"layers": "4-5", **end}, {"layers": 0, **end}]
    assert plan_from_dicts(entries, 6) == build_plan("uni-x", 6, {"first": 1, "last": 2})
    assert plan_from_dicts([{"layers": "2-2", "ffn": "separate"}], 3) == (
        LayerSpec(),
        LayerSpec(),
        LayerSpec(ffn="separate"),
    )


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"layers": "0-1"}, {"ffn": "separate"}], "either every entry says its layers"),
        ([{"layers": "first"}], "layers is a number or a range such as 0-11, not 'first'"),
        ([{"layers": "2-4"}], "layers 2-4 do not lie within 0-3"),
        ([{"layers": "2-1"}], "layers 2-1 do not lie within 0-3"),
        ([{"layers": "0-2"}, {"layers": 2}], "layer 2 is named twice, the second time by layers 2"),
        ([{"layers": 3, "qvk": "separate"}], "layer 3: unknown key 'qvk'"),
    ],
)
def test_impossible_ranges_are_named(entries: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_from_dicts(entries, 4)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "arguments", "message"),
    [
        ("unix", {}, "unknown plan 'unix'; the nearest known one is 'uni-x'"),
        ("uni-x", {"first": 3, "last": 2}, "3 first and 2 last layers do not fit into 4"),
        ("uni-x", {"first": 1}, "missing 1 required positional argument: 'last'"),
        ("uni-x", {"first": 1, "last": 1, "middle": 2}, "unexpected keyword argument 'middle'"),
        ("moe", {"step": 0}, "step is 1 or more"),
    ],
)
def test_impossible_presets_are_named(preset: str, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_plan(preset, 4, arguments)
    assert message in str(caught.value)


def test_impossible_layers_are_named() -> None:
    with pytest.raises(ConfigError, match="the plan has 1 layers, num_hidden_layers is 2"):
        plan_from_dicts([{}], 2)
    with pytest.raises(ConfigError, match="layer 1: unknown key 'qvk'; the nearest known one is 'qkv'"):
        plan_from_dicts([{}, {"qvk": "separate"}], 2)
    with pytest.raises(ConfigError, match="sees is one of all, own, not 'none'"):
        plan_from_dicts([{"sees": "none"}], 1)
    with pytest.raises(ConfigError, match="cannot both be 0"):
        plan_from_dicts([{"ffn": "separate", "image_ffn_size": 0}], 1)
