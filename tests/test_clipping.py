"""Clipping inside the pass, against torch's functions before a step without it; and the norm: its bits, its report, its group."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from families import BY_RULE, BY_STATES, CLASSES
from support.cases import BACKEND, bits_equal, gradient, nasty_values, random_values
from support.device import NoHostReads
from support.ranks import on_two_ranks
from torch.utils._python_dispatch import TorchDispatchMode

import precond
from precond import _C
from precond._core import executors

classes = pytest.mark.parametrize("row", CLASSES, ids=lambda row: row.cls.__name__)
KERNEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.complex64]
kernel_dtypes = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
# float64 runs on the reference backend, whatever the other is.
DTYPES = [*KERNEL_DTYPES, *([torch.float64] if BACKEND == "cpu" else [])]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
#: All classes where Python decides, and of each number of states one where Triton's interpreter, which is slow, does the rest.
rows_and_backends = pytest.mark.parametrize(
    ("row", "backend"),
    [(row, backend) for backend in (BACKEND, "reference") for row in CLASSES] + [(row, "triton") for row in BY_STATES],
    ids=str,
)
norm_types = pytest.mark.parametrize("norm_type", [2.0, math.inf])
triton_bits = pytest.mark.usefixtures("triton_interpreter")
cpu_only = pytest.mark.skipif(BACKEND != "cpu", reason="the CPU's own promise")
SIZES = [1, 300, 1025, 8193]
ADAMW = BY_RULE["adamw"]
#: Whoever decides to skip counts the step too: on a device, beside the parameters.
FUSED = {} if BACKEND == "cpu" else {"fused": True}


def backend_of(dtype):
    """float64 runs on the reference backend alone."""
    return None if dtype == torch.float64 else BACKEND


@pytest.fixture(autouse=True)
def _skipped_where_it_cannot_run(request):
    chosen = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if chosen.get("backend") == "triton":
        request.getfixturevalue("triton_interpreter")


def made(dtype=torch.float32, sizes=SIZES, make=random_values, seed=1):
    """Parameters with gradients; those of a seed are the same."""
    torch.manual_seed(seed)
    params = []
    for n in sizes:
        shape = (n, 2) if dtype.is_complex else (n,)
        values, g = (random_values(shape) for _ in range(2))
        if make is nasty_values:
            g = nasty_values(n)
        if dtype.is_complex:
            values, g = torch.view_as_complex(values), torch.view_as_complex(g)
        params.append(torch.nn.Parameter(values.to(dtype)))
        params[-1].grad = g.to(dtype)
    return params


def results(optimizer, params):
    """Parameters and states."""
    return [t for p in params for t in (p.detach(), *optimizer.state.get(p, {}).values())]


def same(a, b):
    pairs = [[torch.view_as_real(t) if t.is_complex() else t for t in pair] for pair in zip(a, b, strict=True)]
    return all(bits_equal(x, y) for x, y in pairs)


def copies(params):
    return copy.deepcopy(params)


@classes
@dtypes
@norm_types
@pytest.mark.parametrize("max_norm", [0.5, 1e9, math.inf])
def test_it_steps_as_after_torchs_clip_grad_norm(row, dtype, norm_type, max_norm):
    ours, theirs = made(dtype), made(dtype)
    kwargs = row.kwargs | dict(backend=backend_of(dtype))
    a = row.cls(ours, **kwargs, max_grad_norm=max_norm, norm_type=norm_type)
    b = row.cls(theirs, **kwargs)
    for seed in (1, 2):
        fresh = made(dtype, seed=seed)
        for p, q, new in zip(ours, theirs, fresh, strict=True):
            p.grad, q.grad = new.grad.clone(), new.grad.clone()
        a.step()
        # In float32, where a gradient of 16 bits is not rounded again.
        wide = torch.promote_types(dtype, torch.float32)
        clipped = [torch.nn.Parameter(p.detach().to(wide)) for p in fresh]
        for p, q in zip(clipped, fresh, strict=True):
            p.grad = q.grad.to(wide)
        # The largest part of a complex gradient, not its largest modulus.
        if dtype.is_complex:
            norm = torch.nn.utils.get_total_norm([torch.view_as_real(p.grad) for p in clipped], norm_type)
            torch.nn.utils.clip_grads_with_norm_(clipped, max_norm, norm)
        else:
            norm = torch.nn.utils.clip_grad_norm_(clipped, max_norm, norm_type)
        torch.testing.assert_close(a.grad_norm, norm.float(), rtol=2e-6, atol=0)
        assert a.clip_coef.item() == pytest.approx(min(1.0, max_norm / (norm.item() + 1e-6)), rel=3e-6)
        for q, wanted in zip(theirs, clipped, strict=True):
            q.grad_dtype = None
            q.grad = q.grad.to(wide) * a.clip_coef
            torch.testing.assert_close(q.grad, wanted.grad, rtol=4e-6, atol=0)
        b.step()
        assert same(results(a, ours), results(b, theirs))


@classes
@pytest.mark.parametrize(
    "dtype", [dtype for dtype in DTYPES if not dtype.is_complex], ids=str
)  # torch clamps no complex gradient
def test_it_steps_as_after_torchs_clip_grad_value(row, dtype):
    make = random_values if row.cls is precond.Lion and dtype == torch.float64 else nasty_values
    ours, theirs = made(dtype, make=make), made(dtype, make=make)
    kwargs = row.kwargs | dict(backend=backend_of(dtype))
    a, b = row.cls(ours, **kwargs, clip_grad_value=0.37), row.cls(theirs, **kwargs)
    a.step()
    wide = torch.promote_types(dtype, torch.float32)
    for q in theirs:
        q.grad_dtype = None
        q.grad = q.grad.to(wide)
        torch.nn.utils.clip_grad_value_([q], 0.37 if wide == torch.float64 else torch.tensor(0.37).item())
    b.step()
    assert same(results(a, ours), results(b, theirs))
    assert a.grad_norm is None


def test_the_parts_of_a_complex_gradient_are_clamped_each():
    p, q = made(torch.complex64, [300])[0], made(torch.complex64, [300])[0]
    torch.view_as_real(q.grad).clamp_(-0.3, 0.3)
    a, b = precond.SGD([p], lr=1.0, clip_grad_value=0.3, backend=BACKEND), precond.SGD([q], lr=1.0, backend=BACKEND)
    a.step()
    b.step()
    assert same([p.detach()], [q.detach()])


@classes
def test_a_nan_stays_one_when_it_is_clamped(row):
    p = torch.nn.Parameter(torch.ones(40))
    p.grad = torch.tensor([math.nan, math.inf, -math.inf, 1.0] * 10)
    row.cls([p], **row.kwargs, clip_grad_value=1.0, backend=BACKEND).step()
    assert torch.isnan(p).tolist() == [True, False, False, False] * 10


@dtypes
@norm_types
@pytest.mark.parametrize("how", ["norm", "value"])
def test_gradients_are_never_written(dtype, norm_type, how):
    params = made(dtype)
    before = [p.grad.clone() for p in params]
    versions = [p.grad._version for p in params]
    setting = {"max_grad_norm": 0.1} if how == "norm" else {"clip_grad_value": 0.1}
    precond.AdamW(params, **setting, norm_type=norm_type, backend=backend_of(dtype)).step()
    assert same([p.grad for p in params], before)
    assert [p.grad._version for p in params] == versions


# The bits of the norm.

LONG = [0, 1, 7, 1023, 1024, 1025, 8191, 8192, 8193, 70_000, 300_001]


def total_of(params, backend=BACKEND, norm_type=2.0, **settings):
    optimizer = precond.SGD(params, lr=0.0, max_grad_norm=1.0, norm_type=norm_type, backend=backend, **settings)
    optimizer.step()
    return optimizer.engine.report.found.total.clone(), optimizer.grad_norm.clone(), optimizer.clip_coef.clone()


@kernel_dtypes
@norm_types
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_thread_counts_agree(dtype, norm_type, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = total_of(made(dtype, LONG), norm_type=norm_type)
        torch.set_num_threads(threads)
        assert same(total_of(made(dtype, LONG), norm_type=norm_type), expected)
    finally:
        torch.set_num_threads(before)


@norm_types
@pytest.mark.parametrize("chunk", [1, 1000, 1 << 20])
def test_chunk_sizes_agree(norm_type, chunk, monkeypatch):
    expected = total_of(made(sizes=LONG), norm_type=norm_type)
    monkeypatch.setattr(executors, "_CHUNK", chunk)
    assert same(total_of(made(sizes=LONG), norm_type=norm_type), expected)


@norm_types
def test_instruction_sets_agree(norm_type, isa):
    expected = total_of(made(sizes=LONG), norm_type=norm_type)
    _C.select_isa("")
    assert same(total_of(made(sizes=LONG), norm_type=norm_type), expected)


if BACKEND != "cpu":

    @kernel_dtypes
    @norm_types
    def test_this_backend_agrees_with_the_cpu(dtype, norm_type):
        for sizes in (LONG, [1] * 8200):  # the second has more blocks than one block of sums takes
            params = made(dtype, sizes)
            assert same(total_of(params, norm_type=norm_type), total_of(params, "cpu", norm_type))


@triton_bits
@kernel_dtypes
@norm_types
def test_triton_agrees_with_the_cpu(dtype, norm_type):
    params = made(dtype, [1, 300, 1025, 8193])
    assert same(total_of(params, "triton", norm_type), total_of(params, "cpu", norm_type))


@triton_bits
@norm_types
def test_triton_adds_sums_in_more_than_one_round(norm_type, monkeypatch):
    from precond.triton_kernels import norms, tables

    for name, value in (("BLOCK", 64), ("LANES", 16), ("_LEVELS", 4)):
        monkeypatch.setattr(norms, name, value)
    monkeypatch.setattr(tables, "_tables", {})
    g = torch.randn(64 * 64 + 70)
    found = norms.norm([(g, g, 0)], 1, norm_type == math.inf)
    expected = g.double().square().sum() if norm_type == 2.0 else g.double().abs().max()
    torch.testing.assert_close(found[0], expected, rtol=1e-14, atol=0)


@norm_types
@pytest.mark.parametrize("backend", [BACKEND, "triton"])
def test_gradient_layouts_agree(norm_type, backend):
    values, g = random_values((12, 5, 4, 6)), random_values((12, 5, 4, 6))

    def total(layout):
        p = torch.nn.Parameter(values.clone())
        p.grad = gradient(g, layout, p)
        return total_of([p], backend, norm_type)

    for layout in ("transposed", "channels_last", "strided"):
        assert same(total(layout), total("contiguous"))


@norm_types
@pytest.mark.parametrize("backend", [BACKEND, "triton", "reference"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, -math.nan])
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy's, in the interpreter
def test_a_nan_wins_over_infinity(norm_type, backend, bad):
    params = made(sizes=[300, 1025])
    params[1].grad[1000] = bad
    _, norm, _ = total_of(params, backend, norm_type)
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    params[0].grad[1] = math.inf
    params[0].grad[2] = math.copysign(math.nan, -1.0)
    assert math.isnan(total_of(params, backend, norm_type)[1])


@cpu_only
@norm_types
def test_denormals_count_whatever_the_callers_mode(norm_type):
    def total(flush):
        p = torch.nn.Parameter(torch.zeros(40_000))
        p.grad = torch.full_like(p, 1e-42)
        torch.set_flush_denormal(flush)
        try:
            return total_of([p], norm_type=norm_type)
        finally:
            torch.set_flush_denormal(False)

    assert total(False)[0] > 0
    assert same(total(True), total(False))


@norm_types
def test_squares_beyond_fp32_are_no_infinity(norm_type):
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1e30, 2e30, 2e30])
    assert total_of([p], norm_type=norm_type)[1].item() == pytest.approx(3e30 if norm_type == 2.0 else 2e30)


# What the step does with it.


@classes
def test_watching_changes_no_bit(row):
    ours, theirs = made(make=nasty_values), made(make=nasty_values)
    a = row.cls(ours, **row.kwargs, max_grad_norm=math.inf, backend=BACKEND)
    b = row.cls(theirs, **row.kwargs, backend=BACKEND)
    assert a.grad_norm is None
    assert a.clip_coef is None
    for _ in range(2):
        a.step()
        b.step()
    assert same(results(a, ours), results(b, theirs))
    assert math.isnan(a.grad_norm)
    assert a.clip_coef == 1
    assert (a.grad_norm.dtype, a.clip_coef.dtype, a.skipped_steps.dtype) == (torch.float32, torch.float32, torch.int64)


@pytest.mark.parametrize("backend", [BACKEND, "triton", "reference"])
def test_without_gradients_the_norm_is_zero(backend):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = precond.SGD([p], lr=1.0, max_grad_norm=1.0, backend=backend)
    for g, norm in ((None, 0.0), (torch.tensor([3.0, 0.0, 4.0]), 5.0), (None, 0.0)):
        p.grad = g
        optimizer.step()
        assert optimizer.grad_norm == norm
        assert optimizer.clip_coef.item() == pytest.approx(min(1.0, 1.0 / (norm + 1e-6)))


def test_all_groups_have_one_norm_and_missing_gradients_none():
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    optimizer = precond.SGD([{"params": params[:2], "lr": 1.0}, {"params": params[2:], "lr": 2.0}],
                            max_grad_norm=1.0, backend=BACKEND)  # fmt: skip
    params[0].grad, params[3].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    optimizer.step()
    assert optimizer.grad_norm == 5
    torch.testing.assert_close(params[0].detach(), torch.tensor([-0.6, 0.0]))
    torch.testing.assert_close(params[3].detach(), torch.tensor([0.0, -1.6]))
    report = optimizer.grad_norm
    params[0].grad = None
    params[2].grad = torch.tensor([0.0, 3.0])
    optimizer.step()
    assert optimizer.grad_norm == 5
    params[2].grad = None
    optimizer.step()
    assert optimizer.grad_norm == 4
    assert optimizer.grad_norm is report
    params[3].grad = None
    optimizer.step()
    assert optimizer.grad_norm == 0
    assert optimizer.clip_coef == 1


@cpu_only
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_backends_that_share_a_step_share_the_norm():
    params = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)),
              torch.nn.Parameter(torch.zeros(3, 2))]  # fmt: skip
    optimizer = precond.SGD(params, lr=1.0, max_grad_norm=1.0)
    params[0].grad = torch.tensor([2.0, 0.0])
    params[1].grad = torch.tensor([0.0, 4.0], dtype=torch.float64)
    # The same row twice: 1 + 3.
    params[2].grad = torch.sparse_coo_tensor([[1, 1]], torch.tensor([[1.0, 0.0], [3.0, 0.0]]), (3, 2))
    optimizer.step()
    assert optimizer.grad_norm == 6
    for p, value in zip(params, (2.0, 4.0, 4.0), strict=True):
        assert p.detach().abs().max().item() == pytest.approx(value / 6, rel=1e-6)


@cpu_only
def test_a_float64_gradient_is_clamped_in_float64():
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    p.grad = torch.tensor([5.0, -5.0], dtype=torch.float64)
    precond.SGD([p], lr=1.0, clip_grad_value=0.1).step()
    assert p.tolist() == [-0.1, 0.1]


@rows_and_backends
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy's, in the interpreter
def test_a_norm_that_is_not_finite_skips_the_step_where_that_was_asked_for(row, bad, backend):
    fused = {"fused": True} if backend == "triton" else FUSED if backend == BACKEND else {}
    settings = row.kwargs | fused | dict(backend=backend, max_grad_norm=1.0)
    ours, theirs = made(sizes=[5, 1025]), made(sizes=[5, 1025])
    a, b = row.cls(ours, **settings, nonfinite="skip"), row.cls(theirs, **settings)
    for seed in (1, 2, 3, 4):
        for p, q, new in zip(ours, theirs, made(sizes=[5, 1025], seed=seed), strict=True):
            p.grad, q.grad = new.grad.clone(), new.grad
        if seed % 2 == 0:
            ours[0].grad[2] = bad
            before = copies(results(a, ours))
            a.step()
            assert same(results(a, ours), before)
            assert not a.grad_norm.isfinite()
        else:
            a.step()
            b.step()
            assert same(results(a, ours), results(b, theirs))
    assert a.skipped_steps == 2


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"] if BACKEND == "cpu" else [BACKEND])
def test_a_first_step_that_is_skipped_leaves_no_state_behind(backend):
    """Also where the device decides: the first step of SGD is undampened, so the host asks."""
    row = BY_RULE["sgd_momentum"]
    assert row.kwargs["dampening"] != 0.0
    ours, theirs = made(), made()
    a = row.cls(ours, **row.kwargs, max_grad_norm=1.0, nonfinite="skip", backend=backend)
    b = row.cls(theirs, **row.kwargs, max_grad_norm=1.0, backend=backend)
    good = ours[1].grad.clone()
    ours[1].grad[0] = math.nan
    a.step()
    assert not a.state
    ours[1].grad = good
    a.step()
    b.step()
    assert same(results(a, ours), results(b, theirs))


@pytest.mark.skipif(BACKEND != "cuda", reason="the host counts the CPU's steps itself")
def test_counters_on_the_host_cannot_follow_a_device_that_skips():
    params = made()
    before = copies(params)
    optimizer = precond.AdamW(params, max_grad_norm=1.0, nonfinite="skip", backend=BACKEND)
    with pytest.raises(RuntimeError, match=r"fused must be True in every group .* for nonfinite='skip'"):
        optimizer.step()
    assert same([p.detach() for p in params], [p.detach() for p in before])


@rows_and_backends
@norm_types
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy's, in the interpreter
def test_a_norm_that_is_not_finite_raises_before_anything_changed(row, norm_type, backend):
    params = made(sizes=[5, 1025])
    settings = row.kwargs | dict(backend=backend, max_grad_norm=1.0, norm_type=norm_type)
    optimizer, other = row.cls(params, **settings, nonfinite="raise"), row.cls(copies(params), **settings)
    gradients = [p.grad for p in params]
    params[1].grad = torch.full_like(gradients[1], math.nan)
    state = copy.deepcopy(optimizer.state_dict())
    before = copies(params)
    with pytest.raises(RuntimeError, match=rf"total norm of order {norm_type} for the gradients is non-finite, so it"):
        optimizer.step()
    assert same([p.detach() for p in params], [p.detach() for p in before])
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    for p, q, g in zip(params, other.param_groups[0]["params"], gradients, strict=True):
        p.grad, q.grad = g, g.clone()
    optimizer.step()
    other.step()
    assert same(results(optimizer, params), results(other, other.param_groups[0]["params"]))


def test_a_norm_that_is_not_finite_goes_on_by_default_as_in_torch():
    ours, theirs = made(), made()
    for params in (ours, theirs):
        params[0].grad[0] = math.inf
    precond.SGD(ours, lr=1.0, max_grad_norm=1.0, backend=BACKEND).step()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.optim.SGD(theirs, lr=1.0).step()
    assert same([p.detach() for p in ours], [p.detach() for p in theirs])
    assert ours[0].isnan().all()


class NoOperations(TorchDispatchMode):
    """An error where torch computes anything."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace == "profiler", f"torch ran {func}"
        return func(*args, **(kwargs or {}))


def test_between_the_norm_and_the_update_torch_has_nothing_to_do():
    params = made()
    optimizer = precond.AdamW(params, max_grad_norm=1.0, backend=BACKEND)
    optimizer.step()
    with NoOperations():
        optimizer.step()


def test_tensors_of_an_inference_mode_serve_outside_of_it():
    params = made()
    optimizer = precond.AdamW(params, max_grad_norm=1.0, backend=BACKEND)
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    assert not optimizer.grad_norm.is_inference()


@cpu_only
@classes
@norm_types
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
def test_a_loss_scaler_composes(row, norm_type, nonfinite):
    settings = row.kwargs | dict(max_grad_norm=0.1, norm_type=norm_type, nonfinite=nonfinite)
    ours, theirs = made(), made()
    a, b = row.cls(ours, **settings, fused=True), row.cls(theirs, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for seed, overflow in ((1, False), (2, True), (3, False)):
        for p, q, new in zip(ours, theirs, made(seed=seed), strict=True):
            p.grad, q.grad = scaler.get_scale() * new.grad, new.grad
        if overflow:
            ours[0].grad[0] = math.inf
        before = copies(results(a, ours))
        scaler.step(a)
        scaler.update()
        if overflow:
            assert same(results(a, ours), before)
            continue
        b.step()
        assert bits_equal(a.grad_norm, b.grad_norm)
        assert same(results(a, ours), results(b, theirs))
    assert a.skipped_steps == 1


@cpu_only
def test_a_scaled_gradient_is_clamped_after_it_was_unscaled():
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = precond.SGD([p], lr=1.0, clip_grad_value=0.5, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    p.grad = torch.tensor([2.0, 40.0])
    optimizer.step()
    assert p.tolist() == [-0.25, -0.5]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_the_settings(how):
    settings = dict(max_grad_norm=0.5, norm_type=math.inf, nonfinite="raise", backend=BACKEND)
    params = made()
    optimizer = precond.AdamW(params, **settings)
    optimizer.step()
    pair = (params, optimizer)
    params, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other._own == optimizer._own
    assert other.grad_norm is None
    assert other.skipped_steps == 0
    for p, q in zip(*(o.param_groups[0]["params"] for o in (*pair[1:], other)), strict=True):
        q.grad = p.grad
    optimizer.step()
    other.step()
    assert bits_equal(other.grad_norm, optimizer.grad_norm)
    assert same(results(optimizer, pair[0]), results(other, params))


@classes
def test_settings_are_in_no_group_and_no_checkpoint(row):
    params = made()
    optimizer = row.cls(params, **row.kwargs, max_grad_norm=1.0, norm_type=2, nonfinite="skip")
    plain = row.cls(params, **row.kwargs)
    assert optimizer.param_groups[0].keys() == plain.param_groups[0].keys()
    assert optimizer.defaults.keys() == plain.defaults.keys()
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer._own["max_grad_norm"] == 1.0


@classes
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(max_grad_norm=1.0, clip_grad_value=1.0), ValueError, "must not both be given, got 1.0 and 1.0"),
        (dict(max_grad_norm=-1.0), ValueError, "max_grad_norm must be None or >= 0, got -1.0"),
        (dict(max_grad_norm=math.nan), ValueError, "max_grad_norm must be None or >= 0, got nan"),
        (dict(clip_grad_value=-1.0), ValueError, "clip_grad_value must be None or >= 0, got -1.0"),
        (dict(max_grad_norm=1.0, norm_type=1), ValueError, "norm_type must be 2 or inf, got 1.0"),
        (dict(max_grad_norm=1.0, nonfinite="stop"), ValueError, "nonfinite must be 'propagate', .* got 'stop'"),
        (dict(nonfinite="skip"), ValueError, "nonfinite='skip' is about a norm and needs max_grad_norm, got None"),
        (dict(max_norm=1.0), TypeError, r"__init__\(\) got an unexpected keyword argument 'max_norm'"),
    ],
)
def test_errors_say_what_was_expected(row, settings, error, message):
    with pytest.raises(error, match=message):
        row.cls(made(), **row.kwargs, **settings)


# Processes.


@cpu_only
def test_sharded_parameters_have_the_norm_of_whole_ones(tmp_path):
    code = """
for norm_type, bad in ((2.0, 1.0), (math.inf, 1.0), (2.0, math.nan), (math.inf, math.nan)):
    values = [torch.randn(n, 3) for n in (5, 1, 300, 4)]
    gradients = [torch.randn(v.shape) for v in values]
    gradients[0][4, 1] = bad  # on rank 1 alone
    whole = [torch.nn.Parameter(v.clone()) for v in values]
    placements = [Shard(0)], [Shard(0)], [Shard(1)], [Replicate()]
    pieces = [torch.nn.Parameter(distribute_tensor(v, mesh, where)) for v, where in zip(values, placements)]
    pieces.append(torch.nn.Parameter(torch.zeros(7)))
    whole.append(torch.nn.Parameter(torch.zeros(7)))
    whole[-1].grad, pieces[-1].grad = torch.ones(7), torch.ones(7)
    for p, q, g, where in zip(whole, pieces, gradients, placements):
        p.grad, q.grad = g, distribute_tensor(g, mesh, where)
    # A partial sum of a whole parameter: counted once.
    half = gradients[3] / 2
    pieces[3].grad = DTensor.from_local(half.clone(), mesh, [Partial()])
    settings = dict(lr=1.0, max_grad_norm=1.0, norm_type=norm_type)
    a, b = precond.SGD(whole, **settings), precond.SGD(pieces, **settings)
    for _ in range(2):
        a.step()
        b.step()
        torch.testing.assert_close(a.grad_norm, b.grad_norm, equal_nan=True, rtol=1e-7, atol=0)
        for p, q in zip(whole, pieces):
            q = q.full_tensor() if isinstance(q, DTensor) else q
            torch.testing.assert_close(p, q, equal_nan=True, rtol=1e-6, atol=1e-7)
    c = precond.SGD(pieces, **settings, nonfinite="skip")
    c.step()
    assert c.skipped_steps.item() == math.isnan(bad), c.skipped_steps
"""
    on_two_ranks(code, tmp_path)


@cpu_only
def test_flat_shards_have_the_norm_of_their_process_group(tmp_path):
    code = """
class FlatParameter(torch.nn.Parameter):
    _is_flat_param = True

for norm_type in (2.0, math.inf):
    g = torch.randn(1000)
    whole = torch.nn.Parameter(torch.zeros(1000))
    shard = torch.nn.Parameter(torch.zeros(400 if rank == 0 else 600))
    whole.grad, shard.grad = g, (g[:400] if rank == 0 else g[400:]).clone()
    settings = dict(lr=1.0, max_grad_norm=1.0, norm_type=norm_type)
    a, b = precond.SGD([whole], **settings), precond.SGD([shard], **settings, norm_process_group=dist.group.WORLD)
    a.step()
    b.step()
    torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-7, atol=0)
    torch.testing.assert_close(shard.detach(), (whole[:400] if rank == 0 else whole[400:]).detach())
    other = copy.deepcopy(b)
    other.param_groups[0]["params"][0].grad = shard.grad
    try:
        other.step()
    except RuntimeError as error:
        assert "norm_process_group must be set again" in str(error), error
    else:
        raise AssertionError("a copy without its group took a local norm for the global one")
    other.norm_process_group = dist.group.WORLD
    other.step()
    assert torch.equal(other.grad_norm, b.grad_norm)

flat = FlatParameter(torch.zeros(4))
flat.grad = torch.ones(4)
try:
    precond.SGD([flat], max_grad_norm=1.0).step()
except RuntimeError as error:
    assert "norm_process_group must be given" in str(error), error
else:
    raise AssertionError("a local norm passed for the global one")
optimizer = precond.SGD([flat], max_grad_norm=1.0, norm_process_group=dist.group.WORLD)
optimizer.step()
assert optimizer.grad_norm.item() == torch.tensor(8.0).sqrt().item()
"""
    on_two_ranks(code, tmp_path)


@triton_bits
def test_triton_does_without_the_host():
    params = made(sizes=[5, 1025])
    optimizer = precond.AdamW(params, max_grad_norm=1.0, nonfinite="skip", fused=True, backend="triton")
    optimizer.step()
    with NoHostReads():
        optimizer.step()
    assert optimizer.grad_norm > 1


def test_a_skipped_step_keeps_states_that_were_made_for_a_checkpoint():
    """torch.distributed.checkpoint has states made by a step at lr 0 on zeros, and fills them in place."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = precond.AdamW([p], lr=0.0, max_grad_norm=1.0, nonfinite="skip", backend=BACKEND, **FUSED)
    p.grad = torch.zeros(3)
    optimizer.step()
    optimizer.state[p]["exp_avg"].fill_(0.5)
    optimizer.param_groups[0]["lr"] = 0.1
    p.grad = torch.full((3,), torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    assert optimizer.state[p]["exp_avg"].tolist() == [0.5] * 3
