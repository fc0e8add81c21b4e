"""Step counters as users and old checkpoints bring them: advanced in place, shared, and past what float32 counts."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from families import BY_RULE, CLASSES, DROP_INS
from support.cases import BACKEND, bits_equal

import precond

pytestmark = pytest.mark.usefixtures("triton_interpreter")
backends = pytest.mark.parametrize("backend", [BACKEND, "triton", "reference"])
COUNTING = [row for row in CLASSES if row.counts_steps]
SOME = [row for row in COUNTING if row.cls in (precond.AdamW, precond.NAdam, precond.Adagrad)]
DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)
KINDS = [(torch.float32, (1,)), (torch.float64, ()), (torch.int32, (1, 1)), (torch.int64, (1,))]
#: Triton's interpreter is slow, and what counts on the host is the same for all of its rules.
ON_BACKENDS = [(row, name) for row in COUNTING for name in (BACKEND, "reference")] + [(row, "triton") for row in SOME]
F32_LIMIT = 2.0**24


def gradient(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(optimizer, params, seeds):
    for seed in seeds:
        for i, p in enumerate(params):
            p.grad = gradient(p.shape, 100 * seed + i).to(p.dtype)
        optimizer.step()


def params_of(count=1, dtype=torch.float32):
    return [torch.nn.Parameter(torch.linspace(-1, 1, 20 + i).to(dtype)) for i in range(count)]


def brought(state, dtype, shape):
    """The numbers of a parameter's state in another dtype and shape; those that are no integers stay floats."""
    made = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and (name == "step" or value.dim() == 0):
            kind = dtype if name == "step" or dtype.is_floating_point else torch.float32
            made[name] = value.to(kind).reshape(shape).clone()
    return made


@pytest.mark.parametrize(("row", "backend"), ON_BACKENDS, ids=str)
@pytest.mark.parametrize(("dtype", "shape"), KINDS, ids=str)
def test_any_counter_is_advanced_in_place_and_changes_no_bit(row, dtype, shape, backend):
    params, others = params_of(), params_of()
    optimizer, plain = (row.cls(ps, **row.kwargs, backend=backend) for ps in (params, others))
    stepped(optimizer, params, [0])
    stepped(plain, others, [0])
    numbers = brought(optimizer.state[params[0]], dtype, shape)
    optimizer.state[params[0]].update(numbers)
    stepped(optimizer, params, range(1, 4))
    stepped(plain, others, range(1, 4))
    for name, number in numbers.items():
        assert optimizer.state[params[0]][name] is number
        assert number.item() == pytest.approx(plain.state[others[0]][name].item(), rel=1e-6)
    assert numbers["step"].item() == 4
    own = {name: number.dtype for name, number in plain.state[others[0]].items() if name in numbers}
    if all(numbers[name].dtype == kept for name, kept in own.items() if name != "step"):  # one in float64 keeps more
        assert bits_equal(params[0].detach(), others[0].detach())
    torch.testing.assert_close(params[0], others[0])


@pytest.mark.parametrize("row", [row for row in DROP_INS if row.counts_steps], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [BACKEND, "reference"])
def test_a_counter_that_the_user_made_gives_torchs_results(row, dtype, backend):
    ours, theirs = params_of(), params_of()
    a, b = row.cls(ours, **row.kwargs, backend=backend), row.peer(theirs, **row.kwargs, foreach=False)
    stepped(b, theirs, [0])
    stepped(a, ours, [0])
    for optimizer, p in ((a, ours[0]), (b, theirs[0])):
        optimizer.state[p]["step"] = torch.full((1,), 3, dtype=dtype)
    counter = a.state[ours[0]]["step"]
    for seed in range(1, 4):
        stepped(a, ours, [seed])
        stepped(b, theirs, [seed])
        assert counter.item() == b.state[theirs[0]]["step"].item() == 3 + seed
    assert a.state[ours[0]]["step"] is counter
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "cls", [precond.SOAP, functools.partial(precond.GaussNewton, curvature="gradient")], ids=["SOAP", "GaussNewton"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_methods_of_several_passes_advance_it_in_place_too(cls, dtype):
    params, others = ([torch.nn.Parameter(torch.linspace(-1, 1, 48).view(6, 8))] for _ in range(2))
    optimizer, plain = (cls(ps, backend=BACKEND) for ps in (params, others))
    stepped(optimizer, params, [0, 1])
    stepped(plain, others, [0, 1])
    counter = optimizer.state[params[0]]["step"].to(dtype).reshape(1).clone()
    optimizer.state[params[0]]["step"] = counter
    stepped(optimizer, params, range(2, 5))
    stepped(plain, others, range(2, 5))
    assert optimizer.state[params[0]]["step"] is counter
    assert counter.item() == plain.state[others[0]]["step"].item()
    assert bits_equal(params[0].detach(), others[0].detach())


@pytest.mark.parametrize(("row", "backend"), ON_BACKENDS, ids=str)
def test_counters_of_16_bits_make_way_for_one_that_counts(row, backend):
    (p,) = params_of()
    optimizer = row.cls([p], **row.kwargs, backend=backend)
    stepped(optimizer, [p], [0])
    optimizer.state[p]["step"] = torch.tensor([256.0], dtype=torch.bfloat16)
    stepped(optimizer, [p], range(1, 4))
    assert (optimizer.state[p]["step"].dtype, optimizer.state[p]["step"].item()) == (torch.float32, 259.0)


@pytest.mark.parametrize(("row", "name"), [*((row, "step") for row in SOME), (BY_RULE["nadam"], "mu_product")], ids=str)
@backends
def test_a_counter_of_several_elements_is_an_error_that_names_it(row, backend, name):
    params = params_of(2)
    optimizer = row.cls([{"params": params[:1]}, {"params": params[1:]}], **row.kwargs, backend=backend)
    stepped(optimizer, params, [0])
    optimizer.state[params[1]][name] = torch.ones(2)
    before = [p.detach().clone() for p in params]
    with pytest.raises(
        RuntimeError, match=rf"^{name} of parameter 0 of group 1 must have one element, got shape \(2,\)"
    ):
        stepped(optimizer, params, [1])
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("row", [row for row in DROP_INS if row.counts_steps], ids=str)
@backends
def test_parameters_that_share_a_counter_count_one_after_the_other_as_in_torch(row, backend):
    ours, theirs = params_of(3), params_of(3)
    a, b = row.cls(ours, **row.kwargs, backend=backend), row.peer(theirs, **row.kwargs, foreach=False)
    stepped(a, ours, [0])
    stepped(b, theirs, [0])
    shared = {}
    for optimizer, params in ((a, ours), (b, theirs)):
        numbers = brought(optimizer.state[params[0]], torch.float32, (1,))
        for p in params:
            optimizer.state[p].update(numbers)
        shared[optimizer] = numbers
    stepped(a, ours, range(1, 4))
    stepped(b, theirs, range(1, 4))
    ours[1].grad = theirs[1].grad = None
    for optimizer in (a, b):
        optimizer.step()
    assert shared[a]["step"].item() == shared[b]["step"].item() == 1 + 3 * 3 + 2
    for name, number in shared[a].items():
        assert number.item() == pytest.approx(shared[b][name].item(), rel=1e-5)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("row", "backend"), ON_BACKENDS, ids=str)
def test_a_checkpoint_keeps_the_dtype_of_a_counter_and_its_number(row, backend):
    (p,) = params_of()
    optimizer = row.cls([p], **row.kwargs, backend=backend)
    stepped(optimizer, [p], [0])
    optimizer.state[p]["step"] = torch.tensor([7], dtype=torch.int64)
    (q,) = params_of()
    other = row.cls([q], **row.kwargs, backend=backend)
    with torch.no_grad():
        q.copy_(p)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(other.state[q]["step"], torch.tensor([7]))
    stepped(optimizer, [p], [1])
    stepped(other, [q], [1])
    assert bits_equal(p.detach(), q.detach())
    assert torch.equal(other.state[q]["step"], torch.tensor([8]))


def after(start, steps, dtype):
    """A counter that never stands still."""
    value = torch.tensor(start, dtype=dtype)
    for _ in range(steps):
        moved = value + 1
        value = torch.nextafter(value, torch.full_like(value, math.inf)) if moved == value else moved
    return value.item()


@pytest.mark.parametrize(
    ("dtype", "start"),
    [
        *((torch.float32, start) for start in (F32_LIMIT - 2, F32_LIMIT + 2, 2.0**25, 2.0**31, 2.0**33, 2.0**70)),
        *((torch.float64, start) for start in (F32_LIMIT, 2.0**53)),
        *((torch.int64, start) for start in (F32_LIMIT, 2.0**40)),
    ],
    ids=str,
)
@pytest.mark.parametrize("row", SOME, ids=str)
@backends
def test_no_counter_stands_still(row, dtype, start, backend):
    (p,) = params_of()
    optimizer = row.cls([p], **row.kwargs, backend=backend)
    stepped(optimizer, [p], [0])
    optimizer.state[p]["step"] = torch.tensor(start, dtype=dtype)
    expected = int(start) + 4 if dtype == torch.int64 else after(start, 4, dtype)
    seen = []
    for seed in range(1, 5):
        stepped(optimizer, [p], [seed])
        seen.append(optimizer.state[p]["step"].item())
    assert seen == sorted(set(seen))
    assert seen[0] > start
    assert seen[-1] == expected
    assert p.isfinite().all()


def test_an_int32_counter_stays_at_its_last_number():
    for backend in (BACKEND, "triton", "reference"):
        (p,) = params_of()
        optimizer = precond.AdamW([p], backend=backend)
        stepped(optimizer, [p], [0])
        optimizer.state[p]["step"] = torch.tensor(2**31 - 2, dtype=torch.int32)
        stepped(optimizer, [p], range(1, 4))
        assert optimizer.state[p]["step"].item() == 2**31 - 1


def drawn(start, dtype, backend, steps=32):
    """What stochastic rounding makes of steps of a quarter of a bfloat16 ulp."""
    w = torch.nn.Parameter(torch.ones(1024, dtype=torch.bfloat16))
    optimizer = precond.SGD([w], lr=2.0**-9, weight_format="stochastic", backend=backend)
    w.grad = torch.full_like(w, 0.5)
    optimizer.step()
    optimizer.state[w]["step"] = torch.tensor(start, dtype=dtype)
    with torch.no_grad():
        w.fill_(1.0)
    for _ in range(steps):
        w.grad = torch.full_like(w, 0.5)
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize(
    ("dtype", "start"),
    [*((torch.float32, start) for start in (0.0, F32_LIMIT, 2.0**31, 2.0**33)), (torch.int64, F32_LIMIT)],
    ids=str,
)
def test_random_bits_do_not_repeat_and_are_the_same_everywhere(dtype, start):
    results = [drawn(start, dtype, backend) for backend in (BACKEND, "triton", "reference")]
    assert all(bits_equal(results[0], other) for other in results[1:])
    # 32 steps of 2^-10: a binomial number of steps of 2^-8. Bits that repeat move an element at every step or at none, which
    # is a deviation of 0.05.
    assert abs(results[0].float().mean().item() - (1 - 2.0**-5)) < 0.002
    assert 0.005 < results[0].float().std().item() < 0.015


@pytest.mark.parametrize("formats", [("split24", "int8"), ("stochastic", "int4"), ("stochastic", "bf16")], ids=str)
@pytest.mark.parametrize("start", [F32_LIMIT, 2.0**33])
def test_every_format_draws_anew_past_what_float32_counts(formats, start):
    found = []
    for backend in (BACKEND, "triton"):
        p = torch.nn.Parameter(gradient((64, 64), 0).bfloat16())
        group = {"params": [p], "weight_format": formats[0], "state_format": formats[1]}
        optimizer = precond.AdamW([group], lr=1e-3, backend=backend)
        stepped(optimizer, [p], [0])
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[p][name].zero_()
        optimizer.state[p]["step"].fill_(start)
        kept = {name: t.clone() for name, t in optimizer.state[p].items() if isinstance(t, torch.Tensor)}
        weight, ends = p.detach().clone(), []
        for _ in range(2):  # the same step, but for its number
            optimizer.state[p].update({name: t.clone() for name, t in kept.items() if name != "step"})
            with torch.no_grad():
                p.copy_(weight)
            stepped(optimizer, [p], [1])
            ends.append([p.detach().clone(), *(optimizer.state[p][name].clone() for name in kept)])
        assert not torch.equal(ends[0][1 + list(kept).index("exp_avg_sq")], ends[1][1 + list(kept).index("exp_avg_sq")])
        found += [ends]
    for ours, others in zip(*found, strict=True):
        for a, b in zip(ours, others, strict=True):
            assert bits_equal(a, b) if a.is_floating_point() else torch.equal(a, b)
