"""Statistics of a step, taken in its pass: ``statistics`` of an optimizer."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from families import BY_RULE, BY_STATES, CLASSES
from support.cases import BACKEND, bits_equal, nasty_values, random_values

import precond
from precond._core import formats as _formats
from precond.reference.statistics import SUMS

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
pytestmark = [
    pytest.mark.usefixtures("_codes_for_small_tensors"),
    pytest.mark.filterwarnings("ignore::precond.PrecisionWarning", "ignore:.*encountered in.*:RuntimeWarning"),
]
FORMATS = [
    (F32, None, None),
    (F32, None, "int8"),
    (BF16, None, None),
    (F16, None, "int8"),
    (BF16, "stochastic", "fp32"),
    (BF16, "split24", "int8"),
    (F16, "split32", "bf16"),
]
in_formats = pytest.mark.parametrize("formats", FORMATS, ids=lambda f: "-".join(map(str, f)).replace("torch.", ""))
#: One element, a row of lanes and one more, more than a block, several blocks.
SHAPES = [(1,), (257,), (64, 130), (3, 7000)]
#: For Triton's interpreter: an end of a block, and one element of the next.
SMALL = [(1,), (8193,)]
PARTS = [{}, {"cautious": "update", "ema_decay": 0.5, "ema_format": "bf16"}]


@pytest.fixture
def _codes_for_small_tensors(monkeypatch):
    monkeypatch.setattr(_formats.layout, "SMALLEST_CODED", 1)


def made(row, formats=FORMATS[0], backend=BACKEND, values=random_values, shapes=SHAPES, **options):
    dtype, weight_format, state_format = formats
    torch.manual_seed(0)
    params = [values((math.prod(shape),)).view(shape).to(dtype).requires_grad_() for shape in shapes]
    group = {"params": params, "weight_format": weight_format, "state_format": state_format}
    return params, row.cls([group], **{**row.kwargs, **options}, backend=backend)


def train(params, optimizer, steps=3, start=0, values=random_values):
    for step in range(start, start + steps):
        torch.manual_seed(100 + step)
        for p in params:
            p.grad = values((p.numel(),)).view(p.shape).to(p.dtype)
        optimizer.step()


def run(row, formats=FORMATS[0], backend=BACKEND, steps=3, values=random_values, statistics=True, **options):
    params, optimizer = made(row, formats, backend, values, statistics=statistics, **options)
    train(params, optimizer, steps, values=values)
    return params, optimizer


def sums(optimizer):
    return optimizer.engine.report.sums


def everything(params, optimizer):
    found = {(i, "p"): p.detach() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        found |= {(i, k): v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
    return found


# What they are.


@pytest.mark.parametrize("row", CLASSES, ids=str)
def test_columns_are_what_they_say(row):
    """In float64, where an update is the difference of two parameters."""
    torch.manual_seed(1)
    p = torch.randn(500, dtype=torch.float64, requires_grad=True)
    still = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = row.cls([p, still], **row.kwargs, statistics=True)
    for _ in range(3):
        before = p.detach().clone()
        p.grad = torch.randn(500, dtype=torch.float64)
        optimizer.step()
    g = -p.grad if optimizer.param_groups[0].get("maximize") else p.grad
    u = before - p.detach()
    expected = {
        "grad_rms": g.square().mean().sqrt(),
        "param_rms": before.square().mean().sqrt(),
        "update_rms": u.square().mean().sqrt(),
        "update_ratio": u.norm() / before.norm(),
        "cosine": torch.nn.functional.cosine_similarity(u, g, dim=0, eps=0),
        "nonfinite": torch.zeros(()),
        "lost": torch.zeros(()),
        "arrived": torch.ones(()),
        "largest_update": u.abs().max(),
    }
    found = optimizer.statistics
    assert found.columns == tuple(expected)
    assert found.values.shape == (2, len(expected))
    assert found.values.dtype == torch.float64
    torch.testing.assert_close(
        found.values[0], torch.stack([x.double() for x in expected.values()]), rtol=1e-9, atol=1e-12
    )
    assert found.values[1].isnan().all()  # it had no gradient
    assert torch.equal(found.values[0], found.total)


@in_formats
@pytest.mark.parametrize("row", CLASSES, ids=str)
def test_the_kernels_take_those_of_the_reference(row, formats):
    """Of the first step: later ones round differently. A share of elements that rounding decides about may differ a little."""
    kernel, reference = (run(row, formats, backend, steps=1)[1].statistics for backend in (BACKEND, "reference"))
    torch.testing.assert_close(kernel.values, reference.values, rtol=2e-3, atol=2e-3)


def test_stand_still_is_seen():
    """An update below half of the last digit is lost by rounding to nearest, and arrives by what keeps more."""
    found = {}
    for weight_format in (None, "stochastic", "split24"):
        p = torch.ones(20000, dtype=BF16, requires_grad=True)
        optimizer = precond.SGD([{"params": [p], "weight_format": weight_format}], lr=2**-12, statistics=True)
        p.grad = torch.ones_like(p)
        optimizer.step()
        lost, arrived = optimizer.statistics.values[0, 6:8].tolist()
        found[weight_format] = lost, arrived
    assert found[None] == (1.0, 0.0)
    assert found["split24"] == (0.0, 1.0)
    assert found["stochastic"][0] == pytest.approx(1 - 2**-4, abs=0.01)  # below 1 numbers are 2^-8 apart
    assert found["stochastic"][1] == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("backend", [BACKEND, "triton", "reference"])
def test_numbers_that_are_not_finite_are_counted(backend, triton_interpreter):
    params, optimizer = made(BY_RULE["sgd"], backend=backend, shapes=[(300,), (5,)], statistics=True)
    for p in params:
        p.grad = torch.ones_like(p)
    params[0].grad[7], params[0].grad[299] = math.inf, math.nan
    optimizer.step()
    found = optimizer.statistics
    assert found.values[:, 5].tolist() == [2.0, 0.0]
    assert found.total[5] == 2.0
    assert found.values[0, 0].isnan()
    assert found.values[0, 8].isnan(), "NaN is the largest"
    assert found.values[1].isfinite().all()


# What they cost.


@in_formats
@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("row", BY_STATES, ids=str)
def test_they_change_nothing_else(row, formats, parts):
    """Not a bit of parameters, remainders and states."""
    plain, measured = (everything(*run(row, formats, statistics=k, **parts)) for k in (False, 2))
    assert plain.keys() == measured.keys()
    assert [key for key in plain if not bits_equal(plain[key], measured[key])] == []


# The same bits.


@in_formats
@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("row", BY_STATES, ids=str)
def test_backends_agree_bit_for_bit(row, formats, parts, triton_interpreter):
    params, optimizer = run(row, formats, steps=2, shapes=SMALL, **parts)
    others, other = run(row, formats, "triton", steps=2, shapes=SMALL, **parts)
    assert [
        key for key, t in everything(params, optimizer).items() if not bits_equal(t, everything(others, other)[key])
    ] == []
    assert bits_equal(sums(optimizer), sums(other))


@pytest.mark.parametrize("row", CLASSES, ids=str)
def test_backends_agree_bit_for_bit_also_on_nans_and_infinities(row, triton_interpreter):
    nasty = {"values": lambda shape: nasty_values(math.prod(shape)), "shapes": [(700,)]}
    found = [sums(run(row, backend=backend, **nasty)[1]) for backend in (BACKEND, "triton")]
    assert bits_equal(*found)


def in_order(x: np.ndarray) -> float:
    """csrc/plan/statistics.h: blocks of 8192, lanes by the index modulo 256, added by halves; the blocks in the same way."""

    def lanes_of(terms):
        lanes = np.zeros(256)
        for i in range(0, len(terms), 256):
            row = terms[i : i + 256]
            lanes[: len(row)] += row
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        return lanes[0]

    return lanes_of(np.array([lanes_of(x[i : i + 8192]) for i in range(0, len(x), 8192)]))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sums_are_added_in_one_order(threads, isa):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        params, optimizer = made(BY_RULE["sgd"], shapes=[(3,), (300 * 8192 + 77,)], statistics=True)
        start = [p.detach().clone() for p in params]
        train(params, optimizer, 1)
    finally:
        torch.set_num_threads(before)
    for p, old, row in zip(params, start, sums(optimizer), strict=True):
        g, x = p.grad.double().numpy(), old.double().numpy()
        assert row[0].item() == in_order(g * g)
        assert row[1].item() == in_order(x * x)
        assert row[SUMS.index("elements")] == p.numel()


def test_chunks_and_layouts_change_no_bit(monkeypatch):
    """A tensor that is not dense, and one that is clipped by value, go through tiles."""
    found = []
    for chunk in (0, 8192):
        monkeypatch.setattr("precond._core.executors._CHUNK", chunk)
        _, optimizer = run(BY_RULE["adamw"])
        found.append(sums(optimizer))
    params, optimizer = made(BY_RULE["adamw"], statistics=True)
    for p in params:
        wide = torch.empty(*p.shape, 2)
        wide[..., 0] = p.detach()
        p.data = wide[..., 0]
    train(params, optimizer)
    found.append(sums(optimizer))
    _, optimizer = run(BY_RULE["adamw"], clip_grad_value=1e9)
    found.append(sums(optimizer))
    assert all(bits_equal(found[0], other) for other in found[1:])


# What a user asks for.


def test_every_kth_step_from_the_first_on():
    params, optimizer = made(BY_RULE["adamw"], statistics=3)
    assert optimizer.statistics is None
    seen = []
    for step in range(7):
        train(params, optimizer, 1, step)
        seen.append(optimizer.statistics.values.clone())
    assert [torch.equal(a, b) for a, b in itertools.pairwise(seen)] == [True, True, False, True, True, False]
    assert len(optimizer.engine.plans) == 2, "one with statistics and one without"


def test_clipping_is_seen():
    params, optimizer = run(BY_RULE["sgd"], max_grad_norm=0.5)
    values = optimizer.statistics.values[:, 0]
    norm = math.sqrt(sum(p.numel() * value**2 for p, value in zip(params, values.tolist(), strict=True)))
    assert norm == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("backend", [BACKEND, "triton", "reference"])
def test_a_step_that_is_skipped_takes_none(backend, triton_interpreter):
    options = dict(max_grad_norm=1.0, nonfinite="skip", fused=True, statistics=True, shapes=SMALL)
    params, optimizer = made(BY_RULE["adamw"], backend=backend, **options)
    train(params, optimizer, 1)
    before = optimizer.statistics
    params[0].grad[0] = math.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(optimizer.statistics.values, before.values)
    for p in params:
        p.grad = None
    optimizer.step()  # nor does one without a gradient
    assert torch.equal(optimizer.statistics.values, before.values)


def test_rows_are_those_of_the_step():
    """Groups may be others when they are read; a parameter that lost its gradient has none, whatever its backend."""
    a, b = torch.ones(3, requires_grad=True), torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = precond.SGD([("a", a), ("b", b)], lr=0.1, statistics=True)
    a.grad, b.grad = torch.ones_like(a), 2 * torch.ones_like(b)
    optimizer.step()
    optimizer.add_param_group({"params": [("c", torch.ones(1, requires_grad=True))]})
    assert optimizer.statistics.params == ("a", "b")
    lines = optimizer.statistics.table("grad_rms").splitlines()
    assert [line.split() for line in lines[1:]] == [["a", "1"], ["b", "2"], ["all", "1.48"]]
    b.grad = None
    optimizer.step()
    found = optimizer.statistics
    assert found.params == ("a", "b", "c")
    assert found.values[:, 0].isnan().tolist() == [False, True, True]
    assert found.total[0] == 1.0


@pytest.mark.parametrize("classes", [1, 2])
def test_rows_are_parameters_whoever_updates_them(classes):
    """float64 ones run on the reference backend; Muon's are updated by a pass of its own."""
    wide = torch.ones(5, dtype=torch.float64, requires_grad=True)
    narrow, last = (torch.full((n,), 2.0, requires_grad=True) for n in (3, 4))
    groups = [{"params": [("wide", wide), ("narrow", narrow)]}, {"params": [("last", last)]}]
    if classes == 1:
        optimizer = precond.SGD(groups, lr=0.5, statistics=True)
    else:
        matrix = torch.ones(4, 4, requires_grad=True)
        matrix.grad = 3 * torch.ones(4, 4)
        groups.insert(1, {"params": [("matrix", matrix)], "optimizer": precond.Muon, "lr": 0.1})
        optimizer = precond.Grouped(groups, optimizer=precond.SGD, lr=0.5, statistics=True)
    wide.grad, last.grad = 2 * torch.ones(5, dtype=torch.float64), 4 * torch.ones(4)
    optimizer.step()
    found = optimizer.statistics
    rows = dict(zip(found.params, found.values[:, 0].tolist(), strict=True))
    assert list(rows) == [name for group in optimizer.param_groups for name in group["param_names"]]
    assert (rows["wide"], rows["last"]) == (2.0, 4.0)
    assert math.isnan(rows["narrow"])
    assert rows.get("matrix", 3.0) == 3.0
    elements = {"wide": 5, "last": 4, "matrix": 16}
    squares = sum(n * rows.get(name, 0.0) ** 2 for name, n in elements.items())
    assert found.total[0] == pytest.approx(math.sqrt(squares / sum(n for name, n in elements.items() if name in rows)))


def test_a_table_and_scalars():
    params, optimizer = run(BY_RULE["sgd"])
    assert optimizer.statistics.params == ("0.0", "0.1", "0.2", "0.3")
    found = optimizer.statistics
    scalars = found.scalars("optimizer/")
    assert scalars["optimizer/grad_rms/0.2"] == found.values[2, 0].item()
    assert scalars["optimizer/lost/all"] == found.total[6].item()
    assert len(scalars) == (len(params) + 1) * len(found.columns)
    lines = found.table(["lost", "cosine"]).splitlines()
    assert [line.split()[0] for line in lines] == ["parameter", "0.0", "0.1", "0.2", "0.3", "all"]
    assert lines[0].split() == ["parameter", "lost", "cosine"]
    with pytest.raises(ValueError, match=r"columns must be among grad_rms, .*, got 'loss'"):
        found.table(["loss"])
    params[1].grad = None
    optimizer.step()
    assert not [name for name in optimizer.statistics.scalars() if name.endswith("/0.1")]


@pytest.mark.parametrize("value", [-1, 1.5, "yes", None])
def test_what_it_may_be(value):
    with pytest.raises(ValueError, match="statistics must be False, True or an integer >= 1, got "):
        precond.SGD([torch.ones(1, requires_grad=True)], lr=0.1, statistics=value)


def test_copies_begin_anew_and_the_setting_stays():
    params, optimizer = run(BY_RULE["adamw"])
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.statistics is None
        others = copied.param_groups[0]["params"]
        train(others, copied, 1, 7)
        assert copied.statistics is not None
    assert pickle.loads(pickle.dumps(optimizer.statistics)).params == optimizer.statistics.params
    assert "statistics" not in optimizer.state_dict()["param_groups"][0]
    del params


def test_it_does_not_read_the_device(monkeypatch):
    """Until a number is asked for."""
    _, optimizer = run(BY_RULE["adamw"])

    def waits(*_):
        raise AssertionError("a sync")

    for name in ("item", "tolist", "__bool__", "__float__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    found = optimizer.statistics
    monkeypatch.undo()
    assert found.values.isfinite().all()
