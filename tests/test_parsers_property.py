"""Parsers of what people type and of plan files, on generated input: a value in range or a `UserError`, never anything else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wanda_fast.errors import UserError
from wanda_fast.plan import LAYOUTS, NORM_POLICIES, PLAN_FORMAT, PruningPlan
from wanda_fast.pruning import parse_budget
from wanda_fast.stats import TARGET_STEPS, parse_target_steps

FAST = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


# ---------------------------------------------------------------------------------------------------------------- ranges


@FAST
@given(total=st.integers(4, 5000), data=st.data())
def test_every_range_inside_the_schedule_is_read(total: int, data: st.DataObject) -> None:
    low = data.draw(st.integers(0, total - 1))
    high = data.draw(st.integers(low + 1, total))
    assert parse_target_steps(f"{low}-{high}", total) == (low, high)
    assert parse_target_steps(f"  {low}-{high} ", total) == (low, high)


@FAST
@given(total=st.integers(4, 5000))
def test_named_ranges_tile_the_schedule(total: int) -> None:
    late, middle, early = (parse_target_steps(n, total) for n in ("late", "middle", "early"))
    assert parse_target_steps("all", total) == (0, total)
    assert late[0] == 0 and late[1] == middle[0] and middle[1] == early[0] and early[1] == total
    # t < 0.3 T and t >= 0.7 T, in whole numbers
    assert all((10 * t < 3 * total) == (t < late[1]) and (10 * t >= 7 * total) == (t >= early[0]) for t in range(total))


@FAST
@given(
    text=st.one_of(
        st.text(max_size=12),
        st.from_regex(r"-?\d{0,5}-{0,2}\d{0,5}[ae]?", fullmatch=True),
        st.sampled_from([*TARGET_STEPS, "5-5", "9-3", "٣-٧"]),
    ),
    total=st.integers(4, 1000),
)
def test_any_text_is_a_range_inside_the_schedule_or_refused(text: str, total: int) -> None:
    try:
        low, high = parse_target_steps(text, total)
    except UserError as error:
        assert "timestep range" in str(error)
    else:
        assert 0 <= low < high <= total


# --------------------------------------------------------------------------------------------------------------- budgets


@FAST
@given(number=st.integers(1, 10**12))
def test_whole_numbers_are_budgets(number: int) -> None:
    assert parse_budget(str(number), 1) == number and parse_budget(number, 1) == number


@FAST
@given(
    digits=st.decimals("0.001", "9999", places=3, allow_nan=False),
    suffix=st.sampled_from([("K", 3), ("M", 6), ("G", 9), ("B", 9), ("T", 12)]),
    lower=st.booleans(),
)
def test_suffixes_scale(digits: Any, suffix: tuple[str, int], lower: bool) -> None:
    letter, power = suffix
    found = parse_budget(f"{digits}{letter.lower() if lower else letter}", 1)
    assert found == pytest.approx(float(digits) * 10**power, abs=1)


@FAST
@given(share=st.floats(0.5, 100), dense=st.integers(1000, 10**11))
def test_shares_are_of_the_dense_size(share: float, dense: int) -> None:
    found = parse_budget(f"{share}%", dense)
    assert 0 < found <= dense and found == pytest.approx(dense * share / 100, abs=1)


@FAST
@given(
    value=st.one_of(
        st.text(max_size=10),
        st.floats(),
        st.integers(-(10**30), 10**30),
        st.from_regex(r"-?\d{0,4}\.?\d{0,3}(e-?\d{1,3})?[KMGBTkmgbt%]{0,2}", fullmatch=True),
    )
)
def test_any_value_is_a_positive_budget_or_refused(value: Any) -> None:
    try:
        found = parse_budget(value, 10**9, "target_macs")
    except UserError as error:
        assert str(error).startswith("target_macs: ")
    else:
        assert type(found) is int and found >= 0 and math.isfinite(found)


# ----------------------------------------------------------------------------------------------------------------- plans


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(st.characters(codec="utf-8"), max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
objects = st.dictionaries(names, json_values, max_size=3)
plans: Any = st.fixed_dictionaries(
    {
        "format": st.just(PLAN_FORMAT),
        "layout": st.sampled_from(LAYOUTS),
        "norm_policy": st.sampled_from(NORM_POLICIES),
        "architecture": st.text("0123456789abcdef", max_size=8),
        "slots": st.dictionaries(names, st.sets(st.integers(0, 600), min_size=1, max_size=9).map(sorted), max_size=4),
        "norm_groups": st.dictionaries(names, st.integers(1, 64), max_size=3),
        "identity_shortcuts": st.lists(names, max_size=3),
        "dense_config": st.dictionaries(names, st.integers() | st.booleans() | st.none(), max_size=3),
        "config": st.none() | st.dictionaries(names, st.integers(), max_size=3),
    }
)


def check(plan: PruningPlan) -> None:
    """What every plan that was read holds."""
    assert plan.layout in LAYOUTS and plan.norm_policy in NORM_POLICIES
    for keep in plan.keep.values():
        assert keep.dtype == torch.int64 and len(keep) >= 1 and int(keep[0]) >= 0 and bool((keep.diff() > 0).all())


@FAST
@given(data=plans, inside=st.booleans())
def test_a_plan_survives_the_file(data: dict[str, Any], inside: bool, tmp_path: Path) -> None:
    plan = PruningPlan.from_dict(data)
    check(plan)
    assert plan.to_dict() == data
    file = tmp_path / "plan.json"
    if inside:  # a pruning.json
        file.write_text(json.dumps({"plan": data, "seed": 0}), encoding="utf-8")
    else:
        plan.save(file)
    assert PruningPlan.load(file).to_dict() == data


@FAST
@given(data=plans, key=st.sampled_from(["format", "layout", "norm_policy", "architecture", "slots", "norm_groups",
    "identity_shortcuts", "dense_config", "config"]), value=json_values, drop=st.booleans())  # fmt: skip
def test_a_changed_plan_is_read_or_refused(data: dict[str, Any], key: str, value: Any, drop: bool) -> None:
    changed = {k: v for k, v in data.items() if k != key} | ({} if drop else {key: value})
    try:
        check(PruningPlan.from_dict(changed, "FILE"))
    except UserError as error:
        assert str(error).startswith("FILE")


@FAST
@given(data=plans, indices=st.lists(st.integers(-3, 5) | st.booleans() | st.floats() | st.none(), max_size=5))
def test_index_lists_are_sorted_unique_and_whole(data: dict[str, Any], indices: list[Any]) -> None:
    data = {**data, "slots": {**data["slots"], "slot": indices}}
    good = all(type(i) is int for i in indices) and len(indices) > 0 and indices == sorted(set(indices)) and indices[0] >= 0
    if good:
        assert PruningPlan.from_dict(data).keep["slot"].tolist() == indices
    else:
        with pytest.raises(UserError, match="slot slot must hold sorted"):
            PruningPlan.from_dict(data)


@FAST
@given(value=json_values)
def test_any_json_is_a_plan_or_refused(value: Any) -> None:
    with pytest.raises(UserError, match="not a pruning plan"):
        PruningPlan.from_dict(value)


@FAST
@given(content=st.binary(max_size=60), cut=st.integers(0, 400), data=plans)
def test_any_file_is_a_plan_or_refused(content: bytes, cut: int, data: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    for written in (content, json.dumps(data).encode()[:cut]):
        file.write_bytes(written)
        try:
            check(PruningPlan.load(file))
        except UserError as error:
            assert str(file) in str(error)
