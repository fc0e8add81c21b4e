"""The plan as a cache: what is replaced is noticed; what is read, how, and at which cost."""

from __future__ import annotations

import contextlib

import pytest
import torch
from families import CLASSES, OPTIMIZERS, stock
from support.cases import BACKEND, bits_equal
from support.training import assert_close, backward, model, train, with_values

import precond
from precond import _C
from precond._core import backend as _backend
from precond._core.plan import StepPlan
from precond._core.rows import Control, Step, entries_of

rows = pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
classes = pytest.mark.parametrize("row", CLASSES, ids=lambda row: row.cls.__name__)


@rows
def test_replaced_tensors_are_noticed(row):
    """Parameters, gradients and states whose memory, dtype or layout changes between steps."""
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6)) for _ in range(2))
    a = row.cls([ours], **row.kwargs)
    b = row.cls([theirs], **row.kwargs, backend="reference")
    for i in range(8):
        torch.manual_seed(i)
        g = torch.randn(4, 6)
        ours.grad, theirs.grad = g.clone(), g.clone()
        if i == 2:
            ours.data = ours.data.clone()
        if i == 3:
            ours.data = ours.data.t().contiguous().t()
        if i == 4:
            ours.grad = g.t().contiguous().t()
        if i == 5:
            for key in a.states.names(row.rule):
                a.state[ours][key] = a.state[ours][key].clone()
        if i == 6:
            for key in a.states.names(row.rule):
                a.state[ours][key].data = a.state[ours][key].data.t().contiguous().t()
        if i == 7 and "step" in a.state.get(ours, {}):
            a.state[ours]["step"] = a.state[ours]["step"].clone()
        a.step()
        b.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@classes
def test_a_parameter_cast_to_another_dtype_goes_on(row):
    p = torch.nn.Parameter(torch.randn(40))
    optimizer = row.cls([p], **row.kwargs)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        p.data = p.data.to(dtype)
        p.grad = None
        p.grad = torch.randn(40, dtype=dtype)
        before = p.detach().clone()
        optimizer.step()
        assert not torch.equal(p, before)


@classes
def test_cleared_state_starts_anew(row):
    net, fresh = model(), model()
    optimizer = row.cls(net.parameters(), **row.kwargs)
    train(net, optimizer, 3)
    optimizer.state.clear()
    with_values(fresh, [p.detach() for p in net.parameters()])
    train(net, optimizer, 2, start=3)
    train(fresh, row.cls(fresh.parameters(), **row.kwargs), 2, start=3)
    assert all(bits_equal(p, q) for p, q in zip(net.parameters(), fresh.parameters(), strict=True))


@classes
def test_groups_may_be_stepped_one_at_a_time(row):
    """As DeepSpeed does: param_groups cut to one group for a step."""
    ours, theirs = model(), model()

    def groups(net):
        return [{"params": list(part.parameters())} for part in (net[0], net[2])]

    a, b = row.cls(groups(ours), **row.kwargs), stock(row)(groups(theirs), **row.kwargs)
    for i in range(4):
        for net, optimizer in ((ours, a), (theirs, b)):
            backward(net, i)
            whole = optimizer.param_groups
            for group in whole:
                optimizer.param_groups = [group]
                optimizer.step()
            optimizer.param_groups = whole
    assert_close(ours, theirs)
    assert len(a.engine.plans) == 2


@classes
def test_one_optimizer_per_parameter_in_backward(row):
    ours, theirs = model(), model()
    optimizers = {p: row.cls([p], **row.kwargs) for p in ours.parameters()}

    def hook(p):
        optimizers[p].step()
        p.grad = None

    for p in ours.parameters():
        p.register_post_accumulate_grad_hook(hook)
    b = stock(row)(theirs.parameters(), **row.kwargs)
    for i in range(3):
        backward(ours, i)
        backward(theirs, i)
        b.step()
    assert_close(ours, theirs)


@rows
def test_another_buffer_may_stand_in_for_the_gradient(row):
    """Matrix methods hand over rotated gradients; `.grad` is then not read."""
    a, b, c = (torch.nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(3))
    g = torch.randn(50)
    one, two = row.cls([a, c], **row.kwargs), row.cls([b], **row.kwargs)
    a.grad = torch.full((50,), float("nan"))
    b.grad = g
    with torch.no_grad():
        rows = [one._row(group) for group in one.param_groups]
        one.engine.run(Step(one.param_groups, one.state, {a: g}, rows, Control()))
    two.step()
    assert bits_equal(a, b)
    assert torch.equal(c, torch.linspace(-1, 1, 50))


@classes
def test_no_temporary_tensors(row):
    """The step allocates nothing of the size of a parameter."""
    from torch.profiler import ProfilerActivity, profile

    p = torch.nn.Parameter(torch.randn(1 << 20))
    optimizer = row.cls([p], **row.kwargs)
    p.grad = torch.randn(1 << 20)
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step()
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profiler.key_averages()) < 4096


def test_the_gil_is_released():
    import threading
    import time

    p = torch.nn.Parameter(torch.randn(1 << 24))
    optimizer = precond.AdamW([p])
    p.grad = torch.randn(1 << 24)
    optimizer.step()
    _C.select_isa("baseline")
    ticks = []
    stop = threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-3)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        start = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
    finally:
        _C.select_isa("")
        stop.set()
        thread.join()
    inside = [t for t in ticks if start < t < end]
    assert len(inside) >= (end - start) / 0.1, "another Python thread must run during the update"


@pytest.mark.parametrize("use_exchange", ["0", "1"])
def test_both_ways_to_read_tensors(use_exchange, monkeypatch):
    monkeypatch.setenv("PRECOND_DLPACK", use_exchange)
    _backend.reader.cache_clear()
    try:
        assert _backend.reader().uses_exchange == (use_exchange == "1")
        ours, theirs = model(), model()
        train(ours, precond.AdamW(ours.parameters()))
        train(theirs, torch.optim.AdamW(theirs.parameters()))
        assert_close(ours, theirs)
    finally:
        _backend.reader.cache_clear()


def test_torch_set_num_threads_is_honoured():
    """The extension shares torch's OpenMP runtime, so both see one setting."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 3)
        assert _C.openmp_threads() == before + 3
    finally:
        torch.set_num_threads(before)


def odd_ones(optimizer, params):
    """Parameters that must be looked at, each for another reason, and gradients that come and go."""
    state = optimizer.state
    params[0].grad = None
    params[1].grad = params[1].grad.t().contiguous().t()
    params[2].grad = params[2].grad.to_sparse()
    state[params[3]]["mine"] = torch.zeros(3)
    state[params[4]].clear()
    for key, t in state[params[5]].items():
        state[params[5]][key] = t.to(torch.bfloat16) if t.dim() else t.long()
    for key, t in state[params[6]].items():
        state[params[6]][key] = torch.stack([t, t])[1]
    params[7].data = params[7].data.double()
    params[7].grad = None
    params[8].grad = torch._neg_view(params[8].grad)
    params[9].data = params[9].data.to(torch.complex64)
    params[9].grad = None


@pytest.mark.skipif(BACKEND != "cpu", reason="parameters of the host are another backend's")
@classes
def test_what_is_found_in_one_call_is_what_looking_at_each_finds(row, monkeypatch):
    """Parameters that a new plan takes as they are have the home, formats and states that every check gives them."""
    found = StepPlan._homes_of_ready
    taken = []

    def checked(self, step, count, tensors, owners):
        homes = found(self, step, count, tensors, owners)
        written = []
        for entry, home in zip(entries_of(step), homes, strict=True):
            if home is None:
                continue
            taken.append(entry.number)
            p, group, asked = entry.param(step), step.groups[entry.group], step.rows[entry.group]
            assert self._home(step, entry) == home
            assert self._layout(step, entry).plain
            assert self._has_states(step, entry)
            before = dict(step.state.get(p, {}))
            assert not self.states.ensure("p", p, group, asked)
            assert before.keys() == step.state.get(p, {}).keys()
            assert all(step.state[p][key] is t for key, t in before.items())
            written += [(entry.number, key, t) for key, t in self._written(step, entry, home)]
        given = [(number, key, t) for (number, key), t in zip(owners, tensors, strict=True)]
        assert len(given) == len(written)
        assert all(a[:2] == b[:2] and a[2] is b[2] for a, b in zip(given, written, strict=True))
        return homes

    monkeypatch.setattr(StepPlan, "_homes_of_ready", checked)
    params = [torch.nn.Parameter(torch.randn(4, 5)) for _ in range(12)]
    optimizer = row.cls([{"params": params[:10]}, {"params": params[10:]}], **row.kwargs)
    for p in params:
        p.grad = torch.randn(4, 5)
    there = bool(optimizer.state)  # Adagrad's are made with the optimizer
    optimizer.step()
    assert taken == ([*range(12)] if there else [])
    taken.clear()
    optimizer.engine.forget_plans()
    optimizer.step()
    assert taken == [*range(12)]
    taken.clear()
    counts = "step" in optimizer.state.get(params[5], ())
    odd_ones(optimizer, params)
    optimizer.engine.forget_plans()
    with contextlib.suppress(RuntimeError, TypeError):  # of sparse gradients, and of states that are missing
        optimizer.step()
    assert taken == [0, 1, *([] if counts else [5]), 6, 10, 11]
