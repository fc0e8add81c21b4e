"""Infinite parameters: where torch leaves one infinite, so does every rule in every format; and what a remainder cannot do."""

from __future__ import annotations

import math

import pytest
import torch
from families import OPTIMIZERS, WITH_PEER
from support.cases import BACKEND, random_values
from support.formats import F32, MIXES

import precond
from precond._core import formats as _formats

#: Of Triton, whose interpreter is slow, a rule with each decay: rules have no other text that could make one NaN.
DECAYING = ("adam", "adamw", "adamw_l1", "adamw_l1_subgradient", "sgd", "sgdw_l1")


def on_backends(rows):
    return [(row, name) for row in rows for name in (BACKEND, "reference")] + [
        (row, "triton") for row in rows if row.rule in DECAYING
    ]


pytestmark = [
    pytest.mark.usefixtures("triton_interpreter"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # of NumPy, in the interpreter
]
backends = pytest.mark.parametrize("backend", [BACKEND, "triton", "reference"])
DECAYS = pytest.mark.parametrize("weight_decay", [0.0, 0.1])
PLACES = {3: math.inf, 200: -math.inf, 700: math.inf}


def parameter(shape=(64, 64), dtype=F32):
    values = random_values(shape).to(dtype)
    for place, value in PLACES.items():
        values.view(-1)[place] = value
    return torch.nn.Parameter(values)


def gradients(p, seed):
    """Ordinary ones, and none at one of the infinite places."""
    g = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    g.view(-1)[700] = 0.0
    return g.to(p.dtype)


def options(row, weight_decay):
    return {**row.kwargs, "weight_decay": weight_decay}


def coupled(row):
    """Where the decay is a part of the gradient, which is then infinite."""
    return row.peer is not None and row.rule.split("_")[0] in (
        "sgd", "adam", "nadam", "radam", "adamax", "adagrad", "rmsprop", "adadelta"
    )  # fmt: skip


@pytest.mark.parametrize(("row", "backend"), on_backends(WITH_PEER), ids=str)
@DECAYS
def test_infinite_and_nan_parameters_are_where_torch_has_them(row, weight_decay, backend):
    p = parameter((2000,))
    q = torch.nn.Parameter(p.detach().clone())
    ours = row.cls([p], **options(row, weight_decay), backend=backend)
    theirs = row.peer([q], **options(row, weight_decay))
    for seed in range(3):
        p.grad, q.grad = gradients(p, seed), gradients(q, seed)
        ours.step()
        theirs.step()
        infinite = torch.where(p.isinf(), p, 0.0), torch.where(q.isinf(), q, 0.0)
        assert torch.equal(*infinite)
        assert torch.equal(p.isnan(), q.isnan())
        assert p.isnan().any() == (coupled(row) and weight_decay != 0.0)


def stays_infinite_and_finite(p, optimizer):
    """Three steps leave infinite elements as they are, and no other becomes one."""
    before = p.detach().clone()
    for seed in range(3):
        p.grad = gradients(p, seed)
        optimizer.step()
    infinite = before.isinf()
    assert torch.equal(p[infinite], before[infinite])
    assert p[~infinite].isfinite().all()


@pytest.mark.parametrize(("row", "backend"), on_backends([row for row in OPTIMIZERS if not coupled(row)]), ids=str)
@DECAYS
def test_no_intrinsic_decay_makes_one_nan(row, weight_decay, backend):
    p = parameter((2000,))
    stays_infinite_and_finite(p, row.cls([p], **options(row, weight_decay), backend=backend))


@pytest.mark.parametrize(
    "row", [row for row in OPTIMIZERS if row.rule in ("adamw", "adam", "sgdw", "lion_l1")], ids=str
)
@pytest.mark.parametrize(("dtype", "weight_format", "state_format"), MIXES)
@backends
def test_every_format_keeps_them(row, dtype, weight_format, state_format, backend):
    p = parameter(dtype=dtype)
    group = {"params": [p], "weight_format": weight_format, "state_format": state_format}
    weight_decay = 0.0 if row.rule == "adam" else 0.1
    optimizer = row.cls([group], **options(row, weight_decay), backend=backend)
    stays_infinite_and_finite(p, optimizer)
    for name, state in optimizer.state[p].items():
        assert not (isinstance(state, torch.Tensor) and state.is_floating_point() and state.isnan().any()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_format", ["split24", "split32"])
def test_no_remainder_changes_what_an_infinite_nan_or_zero_parameter_is(dtype, weight_format):
    """Such a remainder is another weight's: somebody wrote the weight through ``.data``."""
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, torch.finfo(dtype).tiny])
    if weight_format == "split24":
        remainders = torch.arange(-128, 128).to(torch.int8)[:, None]
    else:
        remainders = torch.arange(-(2**15), 2**15, 37).to(torch.int16).view(-1, 1).view(torch.int8)
    p = torch.nn.Parameter(special.to(dtype)[:, None].expand(-1, len(remainders)).clone())
    found = []
    for backend in (BACKEND, "triton", "reference"):
        q = torch.nn.Parameter(p.detach().clone())
        optimizer = precond.SGDW([q], lr=1.0, weight_decay=0.0, weight_format=weight_format, backend=backend)
        q.grad = torch.zeros_like(q)
        optimizer.step()
        remainder = optimizer.state[q]["remainder"]
        q.data.copy_(p)
        remainder.copy_(remainders.view(remainder.shape[1:]).expand_as(remainder))
        form = _formats.layout_of(q, optimizer.param_groups[0], {}, ()).param
        masters = _formats.decode(q.detach(), remainder.clone(), form, q.shape)
        optimizer.step()
        found.append((q.detach(), remainder))
        assert torch.equal(q.isinf(), p.isinf())
        assert torch.equal(q.isnan(), p.isnan())
        assert (q[:2].abs() <= 2.0**-23).all()
        assert torch.equal(masters.isnan(), p.isnan())
        assert torch.equal(masters[2:4], p[2:4].float())
        assert (masters[:2].abs() <= 2.0**-23).all()
    for q, remainder in found[1:]:
        assert torch.equal(q.nan_to_num(7.0), found[0][0].nan_to_num(7.0))
        assert torch.equal(remainder, found[0][1])


@pytest.mark.parametrize(
    ("row", "backend"), [(row, name) for row, name in on_backends(WITH_PEER) if name != "reference"], ids=str
)
def test_infinite_states_end_as_in_torch(row, backend):
    """A mean of gradients as torch's lerp, inf - inf; the reference text has it in the papers' algebra."""
    p = torch.nn.Parameter(random_values((300,)))
    q = torch.nn.Parameter(p.detach().clone())
    ours, theirs = row.cls([p], **options(row, 0.0), backend=backend), row.peer([q], **options(row, 0.0))
    for seed in range(2):
        p.grad = torch.randn(300, generator=torch.Generator().manual_seed(seed))
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for i, name in enumerate(ours.states.present(p, row.rule)):
        for optimizer, t in ((ours, p), (theirs, q)):
            optimizer.state[t][name][7 * i + 1] = math.inf
    for seed in range(2, 4):
        p.grad = torch.randn(300, generator=torch.Generator().manual_seed(seed))
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(p.isnan(), q.isnan())
    assert torch.equal(torch.where(p.isinf(), p, 0.0), torch.where(q.isinf(), q, 0.0))


@backends
def test_a_nan_that_lion_sees_is_not_a_step_of_0(backend):
    p = torch.nn.Parameter(torch.ones(70))
    optimizer = precond.Lion([p], lr=0.1, backend=backend)
    p.grad = torch.ones(70)
    p.grad[3] = math.nan
    optimizer.step()
    assert p.isnan().nonzero().tolist() == [[3]]
