"""An average of the weights, made in the pass of the step: ``ema_decay``, ``ema_start`` and ``ema_format`` of a group."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from families import BY_STATES, CLASSES
from support.cases import BACKEND, bits_equal, random_values
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_avg_fn

import precond
from precond._core import formats as _formats

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
pytestmark = [
    pytest.mark.usefixtures("_codes_for_small_tensors"),
    pytest.mark.filterwarnings("ignore::precond.PrecisionWarning", "ignore:.*encountered in.*:RuntimeWarning"),
]
#: A parameter's dtype, weight_format, state_format and ema_format.
FORMATS = [
    (F32, None, None, None),
    (F32, None, "int8", "int8"),
    (F32, None, None, "bf16"),
    (BF16, None, None, None),
    (BF16, "stochastic", "fp32", "bf16"),
    (BF16, "split24", "int8", "fp32"),
    (BF16, "split32", "fp32", "int4"),
    (F16, "split24", "bf16", "fp16"),
    (F16, "stochastic", None, torch.float32),
]
in_formats = pytest.mark.parametrize("formats", FORMATS, ids=lambda f: "-".join(map(str, f)).replace("torch.", ""))
SHAPES = [(3,), (5, 64), (40, 128)]


@pytest.fixture
def _codes_for_small_tensors(monkeypatch):
    monkeypatch.setattr(_formats.layout, "SMALLEST_CODED", 1)


def made(row, formats=FORMATS[0], backend=BACKEND, **options):
    dtype, weight_format, state_format, ema_format = formats
    torch.manual_seed(0)
    params = [random_values(shape).to(dtype).requires_grad_() for shape in SHAPES]
    group = {"params": params, "weight_format": weight_format, "state_format": state_format}
    if options.get("ema_decay") is not None:
        group["ema_format"] = ema_format
    return params, row.cls([group], **{**row.kwargs, **options}, backend=backend)


def train(params, optimizer, steps, start=0):
    for step in range(start, start + steps):
        torch.manual_seed(100 + step)
        for p in params:
            p.grad = random_values(p.shape).to(p.dtype)
        optimizer.step()


def everything(params, optimizer):
    """All tensors of a run, by what they are."""
    found = {(i, "p"): p.detach().clone() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        states = optimizer.state[p].items()
        found |= {(i, name): value.clone() for name, value in states if isinstance(value, torch.Tensor)}
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not bits_equal(a[key], b[key])] == []


# What the average is.


@pytest.mark.parametrize("row", [row for row in CLASSES if not row.rule.startswith("schedule_free")], ids=str)
@pytest.mark.parametrize("start", [0, 4])
def test_it_is_that_of_torchs_averaged_model(row, start):
    params, optimizer = made(row, ema_decay=0.9, ema_start=start)
    model = torch.nn.ParameterList(params)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(12):
        train(params, optimizer, 1, step)
        if step >= start:
            averaged.update_parameters(model)
        for p, expected in zip(params, averaged.parameters(), strict=True):
            if step >= start:
                size = torch.maximum(p.detach().abs(), expected.abs()).clamp(min=1e-3)
                assert torch.all((optimizer.state[p]["ema"] - expected).abs() <= 4 * torch.finfo(F32).eps * size)
            else:
                assert bits_equal(optimizer.state[p]["ema"], p.detach())  # not yet an average


def test_equal_weights_are_those_of_torchs_tail_average():
    params, optimizer = made(BY_STATES[2], ema_decay="equal", ema_start=3)
    model = torch.nn.ParameterList(params)
    averaged = AveragedModel(model, avg_fn=get_swa_avg_fn())
    for step in range(20):
        train(params, optimizer, 1, step)
        if step >= 3:
            averaged.update_parameters(model)
    for p, expected in zip(params, averaged.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[p]["ema"], expected, rtol=2e-6, atol=2e-6)


@in_formats
@pytest.mark.parametrize("row", BY_STATES, ids=str)
def test_it_changes_nothing_else(row, formats):
    """Not a bit of parameters, remainders and the rule's states."""
    runs = []
    for decay in (None, 0.9):
        params, optimizer = made(row, formats, ema_decay=decay)
        train(params, optimizer, 4)
        runs.append(everything(params, optimizer))
    plain, averaged = runs
    # Only a rule that neither counts nor draws has no step of its own.
    assert {name for _, name in averaged.keys() - plain.keys()} <= {"ema", "ema_scale", "step"}
    assert_same(plain, {key: averaged[key] for key in plain})


@in_formats
@pytest.mark.parametrize("row", BY_STATES, ids=str)
def test_backends_agree_bit_for_bit(row, formats, triton_interpreter):
    runs = []
    for backend in (BACKEND, "triton"):
        params, optimizer = made(row, formats, backend, ema_decay=0.75, ema_start=1)
        train(params, optimizer, 4)
        runs.append(everything(params, optimizer))
    assert_same(*runs)


@in_formats
@pytest.mark.parametrize("row", BY_STATES, ids=str)
def test_the_reference_text_is_near(row, formats):
    """Stored values: one step of the format apart at most, where the float32 before rounding is an ulp apart."""
    found = []
    for backend in (BACKEND, "reference"):
        params, optimizer = made(row, formats, backend, ema_decay=0.75)
        train(params, optimizer, 1)
        group = optimizer.param_groups[0]
        found.append([optimizer.averages(p, group) for p in params])
    tolerance = {None: 1e-5, "fp32": 1e-5, F32: 1e-5, "bf16": 2**-7, "fp16": 2**-9, "int8": 0.1, "int4": 0.7}[
        formats[3]
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=max(tolerance, 1e-5 if formats[0] is F32 else 0.02), atol=1e-3)


def test_short_averages_move_although_a_step_is_below_half_of_their_last_bit():
    """By stochastic rounding. To nearest a bfloat16 average with 0.999 would stand still forever."""
    p = torch.ones(64, 64, requires_grad=True)
    optimizer = precond.SGD([p], lr=1.0, ema_decay=0.999, ema_format="bf16", backend=BACKEND)
    p.grad = torch.full_like(p, 0.0)
    optimizer.step()
    with torch.no_grad():
        p.fill_(2.0)
    for _ in range(100):
        optimizer.step()
    expected = 2.0 - 0.999**100
    assert abs(optimizer.state[p]["ema"].float().mean().item() - expected) < 0.01


def test_infinite_weights_and_nans_pass_through():
    p = torch.tensor([float("inf"), float("nan"), 1.0, -0.0], requires_grad=True)
    optimizer = precond.SGD([p], lr=1.0, ema_decay=0.5, backend=BACKEND)
    p.grad = torch.zeros(4)
    optimizer.step()
    assert bits_equal(optimizer.state[p]["ema"], p.detach())


# Being switched on, off and on.


def test_one_that_begins_in_the_middle_begins_with_the_master_weights():
    p = torch.nn.Parameter(random_values((4, 64)).to(BF16))
    optimizer = precond.AdamW([{"params": [p], "weight_format": "split32"}], lr=1e-5, backend=BACKEND)
    train([p], optimizer, 3)
    before = precond.master_weights(optimizer, torch.nn.ParameterList([p]))["0"].clone()
    optimizer.param_groups[0]["ema_decay"] = 0.5
    train([p], optimizer, 1, 3)
    after = precond.master_weights(optimizer, torch.nn.ParameterList([p]))["0"]
    torch.testing.assert_close(optimizer.state[p]["ema"], (before + after) / 2, rtol=1e-6, atol=0)
    optimizer.param_groups[0]["ema_decay"] = None
    train([p], optimizer, 1, 4)
    assert "ema" not in optimizer.state[p]  # one that misses steps is no average
    optimizer.param_groups[0]["ema_decay"] = 0.5
    train([p], optimizer, 1, 5)
    assert (optimizer.state[p]["ema"] - p).abs().max() < 1e-4


def test_an_equal_average_that_begins_in_the_middle_must_say_so():
    p = torch.ones(4, requires_grad=True)
    optimizer = precond.AdamW([p], backend=BACKEND)
    train([p], optimizer, 3)
    optimizer.param_groups[0]["ema_decay"] = "equal"
    before = everything([p], optimizer)
    with pytest.raises(ValueError, match=r"ema_start must be at least 3, .* got 0"):
        train([p], optimizer, 1)
    assert_same(before, everything([p], optimizer))
    optimizer.param_groups[0]["ema_start"] = 3
    train([p], optimizer, 1)
    assert bits_equal(optimizer.state[p]["ema"], p.detach())


def test_a_format_may_change_between_steps():
    params, optimizer = made(BY_STATES[2], ema_decay=0.9)
    train(params, optimizer, 2)
    before = optimizer.averages(params[2], optimizer.param_groups[0]).clone()
    optimizer.param_groups[0]["ema_format"] = "int8"
    train(params, optimizer, 1, 2)
    assert optimizer.state[params[2]]["ema"].dtype == torch.int8
    found = optimizer.averages(params[2], optimizer.param_groups[0])
    assert (found - before).abs().max() < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ema_decay=1.0), r"ema_decay must be None, a number in \[0, 1\) or 'equal', got 1.0"),
        (dict(ema_decay=float("nan")), "ema_decay must be .* got nan"),
        (dict(ema_decay="mean"), "ema_decay must be .* got 'mean'"),
        (dict(ema_decay=True), "ema_decay must be .* got True"),
        (dict(ema_decay=0.9, ema_start=-1), "ema_start must be an integer >= 0, got -1"),
        (dict(ema_decay=0.9, ema_start=1.5), "ema_start must be an integer >= 0, got 1.5"),
        (dict(ema_decay=0.9, ema_format="fp8"), "ema_format must be None, .* got 'fp8'"),
    ],
)
def test_errors_say_what_is_expected(options, message):
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        precond.AdamW([p], **options)
    with pytest.raises(ValueError, match=message):
        precond.AdamW([{"params": [p], **options}])


def test_options_stand_in_groups_only_where_they_are_not_the_default():
    p = torch.ones(2, requires_grad=True)
    assert not precond.AdamW([p]).param_groups[0].keys() & {"ema_decay", "ema_start", "ema_format"}
    group = precond.AdamW([p], ema_decay=0.99).param_groups[0]
    assert {name: group[name] for name in group if name.startswith("ema")} == {"ema_decay": 0.99}


# Checkpoints and copies.


@in_formats
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_a_resumed_run_is_the_uninterrupted_one(formats, way):
    params, optimizer = made(BY_STATES[2], formats, ema_decay=0.9)
    train(params, optimizer, 3)
    if way == "state_dict":
        saved = copy.deepcopy(optimizer.state_dict())
        weights = [p.detach().clone() for p in params]
        others, resumed = made(BY_STATES[2], formats, ema_decay=0.9)
        resumed.load_state_dict(saved)
        with torch.no_grad():
            for p, w in zip(others, weights, strict=True):
                p.copy_(w)
        resumed.load_state_dict(saved)  # after the weights, as trainers do
    else:
        resumed = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        others = list(itertools.chain.from_iterable(group["params"] for group in resumed.param_groups))
    for run in ((params, optimizer), (others, resumed)):
        train(*run, 3, 3)
    assert_same(everything(params, optimizer), everything(others, resumed))


def test_torch_loads_a_checkpoint_with_an_average():
    params, optimizer = made(BY_STATES[2], ema_decay=0.9)
    train(params, optimizer, 2)
    stock = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in params])
    stock.load_state_dict(precond.to_torch_state_dict(optimizer))
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in stock.state.values())


# The average in the parameters.


@in_formats
@pytest.mark.parametrize("row", BY_STATES, ids=str)
def test_averaged_shows_it_and_gives_every_bit_back(row, formats):
    params, optimizer = made(row, formats, ema_decay=0.9)
    other, twin = made(row, formats, ema_decay=0.9)
    for run in ((params, optimizer), (other, twin)):
        train(*run, 3)
    before = everything(params, optimizer)
    group = optimizer.param_groups[0]
    with optimizer.averaged():
        for p in params:
            # A split weight takes its remainder too, and the two are rounded together.
            step = torch.finfo(p.dtype).eps if formats[1] in ("split24", "split32") else 0.0
            torch.testing.assert_close(p.detach(), optimizer.averages(p, group).to(p.dtype), rtol=step, atol=0.0)
        with pytest.raises(RuntimeError, match="step"):
            optimizer.step()
    assert_same(before, everything(params, optimizer))
    for run in ((params, optimizer), (other, twin)):
        train(*run, 2, 3)
    assert_same(everything(params, optimizer), everything(other, twin))


def test_averaged_gives_the_weights_back_after_an_error_and_leaves_parameters_without_one_alone():
    a, b = (torch.zeros(2, requires_grad=True) for _ in range(2))
    optimizer = precond.SGD([{"params": [a], "ema_decay": 0.5}, {"params": [b]}], lr=1.0, backend=BACKEND)
    for p in (a, b):
        p.grad = torch.ones(2)
    optimizer.step()
    optimizer.step()
    with optimizer.averaged():
        assert (a.tolist(), b.tolist()) == ([-1.5, -1.5], [-2.0, -2.0])
    with pytest.raises(ZeroDivisionError), optimizer.averaged():
        _ = 1 / 0
    assert (a.tolist(), b.tolist()) == ([-2.0, -2.0], [-2.0, -2.0])


def test_averaged_needs_an_average():
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="ema_decay"), precond.AdamW([p]).averaged():
        pass


def test_averaged_state_dict_is_the_models_with_averages():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = precond.AdamW(model.parameters(), lr=0.1, ema_decay=0.5, backend=BACKEND)
    reference = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5))
    for step in range(4):
        torch.manual_seed(step)
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        reference.update_parameters(model)
    weights = copy.deepcopy(model.state_dict())
    found = precond.averaged_state_dict(optimizer, model)
    assert found.keys() == weights.keys()
    assert all(bits_equal(value, model.state_dict()[name]) for name, value in weights.items())
    for name, p in reference.module.named_parameters():
        torch.testing.assert_close(found[name], p.detach(), rtol=1e-6, atol=1e-7)
    assert found["1.running_mean"].data_ptr() != model[1].running_mean.data_ptr()
