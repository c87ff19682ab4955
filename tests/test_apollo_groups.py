"""Parameter groups: each tensor gets its own settings, and what cannot be is refused by name."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from apollo.optim.optimizer import Apollo
from apollo.optim.projection import draw_projection, projection_seed
from apollo.optim.routing import Plan, make_plan, role_of

ROWS, COLUMNS = 16, 40


def noise(seed: int, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_param(seed: int = 0, dtype: torch.dtype = torch.float32) -> Parameter:
    return Parameter(noise(seed).to(dtype))


def take_steps(optimizer: Apollo) -> None:
    """Twenty: gradients that cancel each other, then some that agree, so that updates grow."""
    for step in range(20):
        for group in optimizer.param_groups:
            for param in group["params"]:
                sign = -1 if step < 6 and step % 2 else 1
                param.grad = (sign * (noise(99) + 0.1 * noise(step))).to(param.dtype)
        optimizer.step()


OVERRIDES: list[dict[str, Any]] = [
    {"lr": 3e-2},
    {"mode": "adamw"},
    {"mode": "scale"},
    {"mode": "scale", "role": "embedding"},
    {"betas": (0.5, 0.9)},
    {"eps": 0.1},
    {"rank": 2},
    {"rank": ROWS},
    {"update_proj_gap": 2},
    {"scale": 0.25},
    {"clip": 1.0},
    {"norm_growth": 1.01},
    {"weight_decay": 0.5},
    {"rounding": "nearest"},
    {"rounding": "corrected"},
]


@pytest.mark.parametrize("override", OVERRIDES, ids=str)
def test_a_group_follows_its_own_setting_and_leaves_the_others_to_theirs(
    override: dict[str, Any],
) -> None:
    """Each tensor moves as it does alone, in an optimizer with those settings for all."""
    common: dict[str, Any] = {"lr": 1e-2, "rank": 4, "update_proj_gap": 50, "seed": 5}
    dtype = torch.bfloat16 if "rounding" in override else torch.float32
    first, second = make_param(1, dtype), make_param(2, dtype)
    groups: list[dict[str, Any]] = [{"params": [("a", first)]}]
    groups.append({"params": [("b", second)], **override})
    grouped = Apollo(groups, **common)
    take_steps(grouped)
    alone_first, alone_second = make_param(1, dtype), make_param(2, dtype)
    take_steps(Apollo([("a", alone_first)], **common))
    take_steps(Apollo([("b", alone_second)], **{**common, **override}))
    assert torch.equal(first, alone_first)
    assert torch.equal(second, alone_second)
    # The setting matters: without it the second tensor ends elsewhere.
    without = make_param(2, dtype)
    take_steps(Apollo([("b", without)], **common))
    assert not torch.equal(second, without)


def test_every_setting_but_the_seed_is_tried_above() -> None:
    known = set(Apollo([("a", make_param())]).defaults) - {"seed", "num_steps"}
    assert known == {key for override in OVERRIDES for key in override}


def test_a_learning_rate_at_begin_step_holds_for_every_group_from_then_on() -> None:
    optimizer = Apollo([{"params": [("a", make_param())]}])
    optimizer.add_param_group({"params": [("b", make_param())], "lr": 1.0})
    optimizer.begin_step(0.25)
    optimizer.end_step()
    optimizer.begin_step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert optimizer.num_steps == 2


@pytest.mark.parametrize("key", ["learning_rate", "update_proj_gaps", "kernels", "param_names"])
def test_unknown_key_of_a_group_is_refused_by_name_with_the_known_ones(key: str) -> None:
    known = "known are betas, clip, eps, lr, mode, norm_growth, rank, role, rounding, scale, "
    with pytest.raises(ValueError, match=f"unknown setting '{key}' in a parameter group; {known}"):
        Apollo([{"params": [("a", make_param())], key: 1}])
    optimizer = Apollo([("a", make_param())])
    with pytest.raises(ValueError, match=f"unknown setting '{key}'"):
        optimizer.add_param_group({"params": [("b", make_param())], key: 1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("key", ["seed", "num_steps"])
def test_what_is_set_for_all_is_refused_in_a_group(key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key} is set for the whole optimizer"):
        Apollo([{"params": [("a", make_param())], key: 1}])


def test_unknown_argument_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="weight_decya"):
        Apollo([("a", make_param())], weight_decya=0.1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "params",
    [
        lambda: [make_param()],
        lambda: [("a", make_param(1)), make_param(2)],
        lambda: [{"params": [make_param()]}],
        lambda: [{"params": make_param()}],
    ],
)
def test_parameters_without_names_are_refused_with_what_to_pass(params: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"parameters need names.*model\.named_parameters\(\)"):
        Apollo(params())


def test_a_name_or_a_tensor_that_occurs_twice_is_refused_also_across_groups() -> None:
    tied = make_param()
    seconds: list[tuple[str, Parameter]] = [("a", make_param(2)), ("b", tied)]
    for second in seconds:
        with pytest.raises(ValueError, match=f"^{second[0]} occurs twice"):
            Apollo([("a", tied), second])
        with pytest.raises(ValueError, match=f"^{second[0]} occurs twice"):
            Apollo([{"params": [("a", tied)]}]).add_param_group({"params": [second], "lr": 1.0})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_weights_of_another_type_are_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"^odd is {dtype}; use float32 or bfloat16"):
        Apollo([("a", make_param()), ("odd", make_param(dtype=dtype))])


BAD: list[tuple[str, Any]] = [
    *[("lr", value) for value in (-1.0, math.nan, math.inf, "1e-5", None)],
    *[("mode", value) for value in ("galore", "Apollo", None)],
    *[("betas", value) for value in ((0.9,), (0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9))],
    *[("eps", value) for value in (0.0, -1e-10, math.nan)],
    *[("rank", value) for value in (0, -1, math.nan)],
    *[("update_proj_gap", value) for value in (0, -200)],
    *[("scale", value) for value in (0.0, -1.0, math.nan, math.inf, "Auto", None)],
    *[("clip", value) for value in (0.99, 0.0, -1.0, math.nan, math.inf, "3")],
    *[("norm_growth", value) for value in (1.0, 0.5, math.nan, math.inf, "1.01")],
    *[("weight_decay", value) for value in (-0.1, math.nan)],
    *[("rounding", value) for value in ("up", "none", None)],
    *[("role", value) for value in ("output", "Head", None)],
]


@pytest.mark.parametrize(("setting", "value"), BAD)
def test_bad_value_is_refused_by_name_and_value_for_all_and_for_a_group(
    setting: str, value: Any
) -> None:
    start = f"{setting}={value!r}: must be "
    pairs = [("a", make_param())]
    with pytest.raises(ValueError) as refused:
        Apollo(pairs, **{setting: value})
    assert str(refused.value).startswith(start)
    with pytest.raises(ValueError) as refused:
        Apollo([{"params": pairs, setting: value}])
    assert str(refused.value).startswith(start)


GOOD: list[tuple[str, Any]] = [
    ("lr", 0.0),
    ("lr", 1),
    ("betas", [0.0, 0.0]),
    ("rank", 1),
    ("rank", 10**6),
    ("update_proj_gap", 1),
    ("scale", 128),
    ("clip", 1),
    ("clip", None),
    ("norm_growth", 1.01),
    ("norm_growth", None),
    ("weight_decay", 0),
]


@pytest.mark.parametrize(("setting", "value"), GOOD)
def test_value_at_the_edge_is_taken_and_steps(setting: str, value: Any) -> None:
    param = make_param()
    optimizer = Apollo([("a", param)], **{setting: value})
    take_steps(optimizer)
    assert param.isfinite().all()
    assert optimizer.skipped == ()


DEFAULTS: dict[str, Any] = Apollo([("a", Parameter(torch.zeros(1)))]).defaults


def plan_of(name: str, *shape: int, **settings: Any) -> Plan:
    return make_plan(name, shape, False, {**DEFAULTS, **settings})


@pytest.mark.parametrize(
    ("mode", "shape", "rule", "side", "num_channels"),
    [
        ("apollo", (576, 1536), "projected", 576, 1536),
        ("apollo", (1536, 576), "projected", 576, 1536),
        ("apollo", (576, 576), "projected", 576, 576),
        ("apollo", (8, 512, 300), "projected", 300, 8 * 512),  # experts
        ("apollo", (8, 512, 256), "adam", None, None),  # a side that is not above the rank
        ("apollo", (256, 1536), "adam", None, None),
        ("apollo", (257, 1536), "projected", 257, 1536),
        ("apollo", (1536,), "adam", None, None),
        ("apollo", (6144, 1, 4), "adam", None, None),  # conv1d
        ("scale", (576, 1536), "neuron", 1536, 576),
        ("scale", (8, 512, 300), "neuron", 300, 8 * 512),
        ("scale", (8, 9, 9), "neuron", 9, 72),
        ("scale", (6144, 9, 8), "adam", None, None),
        ("scale", (6144, 1, 4), "adam", None, None),
        ("scale", (1536,), "adam", None, None),
        ("adamw", (576, 1536), "adam", None, None),
    ],
)
def test_rule_follows_from_mode_and_shape(
    mode: str, shape: tuple[int, ...], rule: str, side: int | None, num_channels: int | None
) -> None:
    plan = plan_of("layers.0.proj.weight", *shape, mode=mode)
    assert plan.rule == rule
    assert plan.rows * plan.columns == math.prod(shape)
    if side is not None and num_channels is not None:
        assert (plan.side, plan.num_channels) == (side, num_channels)
        length = side / 256 if rule == "projected" else side
        assert plan.alpha == pytest.approx(math.sqrt(length))
        assert plan_of("layers.0.proj.weight", *shape, mode=mode, scale=0.5).alpha == 0.5


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("lm_head.weight", "head"),
        ("model.lm_head.weight", "head"),
        ("embed_out.weight", "head"),
        ("output_projection.weight", "head"),
        ("model.embed_tokens.weight", "embedding"),
        ("model.language_model.embed_tokens.weight", "embedding"),
        ("backbone.embeddings.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("transformer.wpe.weight", "embedding"),
        ("model.layers.0.self_attn.q_proj.weight", "hidden"),
        ("model.layers.11.mlp.down_proj.weight", "hidden"),
        ("visual.patch_embed.proj.weight", "hidden"),
        ("weight", "hidden"),
    ],
)
def test_role_follows_from_the_name_unless_it_is_given(name: str, role: str) -> None:
    assert role_of(name) == role
    expected = {"head": (1, True), "embedding": (0, False), "hidden": (1, False)}
    plan = plan_of(name, 576, 1536, mode="scale")
    assert (plan.axis, plan.has_momentum) == expected[role]
    for given in expected:
        plan = plan_of(name, 576, 1536, mode="scale", role=given)
        assert (plan.axis, plan.has_momentum) == expected[given]


def test_only_matrices_decay() -> None:
    vector, matrix = Parameter(torch.ones(COLUMNS)), Parameter(torch.ones(ROWS, COLUMNS))
    params: list[tuple[str, Parameter]] = [("norm.weight", vector), ("proj.weight", matrix)]
    optimizer = Apollo(params, 0.1, rank=4, weight_decay=0.5)
    for _ in range(2):
        for _, param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert (vector == 1).all()
    torch.testing.assert_close(matrix.detach(), torch.full_like(matrix, 0.95**2))


def test_a_group_that_comes_later_is_projected_as_of_the_step_it_comes_in() -> None:
    """Its first update is alpha sqrt(r) g / |P g| a channel, with the P that is in force."""
    rank, late = 4, Parameter(torch.zeros(ROWS, COLUMNS))
    optimizer = Apollo([("a", make_param())], 1.0, rank=rank, update_proj_gap=2, seed=1)
    take_steps(optimizer)
    optimizer.add_param_group({"params": [("b", late)]})
    late.grad = noise(9)
    optimizer.step()  # the 21st, so the eleventh projection
    assert optimizer.num_steps == 21
    projection = draw_projection(projection_seed(1, "b", 10), rank, ROWS, torch.device("cpu"))
    expected = math.sqrt(ROWS) * noise(9) / (projection @ noise(9)).norm(dim=0)
    torch.testing.assert_close(-late.detach(), expected)
