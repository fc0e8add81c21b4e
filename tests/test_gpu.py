"""On a CUDA device: the same bits as the CPU, graphs, streams, large tensors.

On a GPU (``.ci/gpu``), and on every push on the emulated device of tests/cuda_on_host, by test_cuda_on_host.py. What is marked
``gpu`` needs what the emulation has not.
"""

from __future__ import annotations

import contextlib
import gc
import os

import pytest
import torch
from families import ALL_RULES, BY_STATES, CLASSES
from support import device
from support.cases import LAYOUTS, bits_equal, gradient, guarded, nasty_values, random_values

import precond
from precond._core import backend as _backend

CUDA = device.device()
EMULATED = CUDA is None or CUDA.emulated
if CUDA is None:
    pytest.skip("needs a CUDA device: run by tests/test_cuda_on_host.py and .ci/gpu", allow_module_level=True)


def needs(hardware):
    """A mark for what the emulated device has not."""

    def mark(test):
        return pytest.mark.gpu(pytest.mark.skipif(EMULATED, reason=f"needs {hardware}")(test))

    return mark


backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(bool(_backend.why_not(name)), reason=name))
        for name in ("cuda", "triton")
    ]
    if not EMULATED and os.environ.get("TRITON_INTERPRET") == "0"
    else ["cuda"],
)
# The emulation runs a block's threads one after the other.
STEPS = 3 if EMULATED else 20
SIZES = [1, 3, 64, 255, 1023, 1024, 1025, 8191, 8192, 8193, 100_003]


def steps(row, backend, dtype, make, count=STEPS):
    torch.manual_seed(7)
    where = "cpu" if backend == "cpu" else CUDA.name
    values = [make(n).to(dtype) for n in SIZES]
    params = [torch.nn.Parameter(v.to(where, copy=True)) for v in values]
    optimizer = row.cls(params, **row.kwargs, backend=backend)
    for _ in range(count):
        for p in params:
            p.grad = make(p.numel()).to(dtype).to(where)
        optimizer.step()
    return [t.cpu() for p in params for t in (p.detach(), *optimizer.states.present(p, row.rule).values())]


# For every rule on the emulated device: test_same_bits.py.
@pytest.mark.parametrize("row", BY_STATES if EMULATED else ALL_RULES, ids=str)
@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda n: random_values((n,)), nasty_values], ids=["random", "nasty"])
def test_the_bits_of_the_cpu(row, backend, dtype, make):
    ours, theirs = steps(row, backend, dtype, make), steps(row, "cpu", dtype, make)
    assert all(bits_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("row", BY_STATES, ids=str)
@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(row, backend, layout):
    values, grads = random_values((4, 6, 5, 7)), [random_values((4, 6, 5, 7)) for _ in range(3)]
    results = []
    for name, where in ((backend, CUDA.name), ("cpu", "cpu")):
        p = guarded(values, layout).tensor
        last = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
        begin = 1 if layout == "offset" else 0  # memory from an allocator is aligned
        memory = torch.empty(begin + last + 1, device=where)
        p = memory.as_strided(p.shape, p.stride(), begin).copy_(p).requires_grad_()
        optimizer = row.cls([p], **row.kwargs, backend=name)
        for g in grads:
            p.grad = gradient(g, "transposed", p).to(where)
            optimizer.step()
        results.append(p.detach().cpu())
    assert bits_equal(*results)


def warmed_up(step):
    """Three steps on a stream of their own, as torch asks for before a capture."""
    stream = CUDA.new_stream()
    with CUDA.on(stream):
        for _ in range(3):
            step()


@pytest.mark.capture
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (precond.AdamW, {}),
        (precond.NAdam, {}),
        (precond.RAdam, {}),
        (precond.AdamW, dict(ema_decay="equal", ema_start=1, cautious="both")),
        (precond.ScheduleFreeAdamW, dict(warmup_steps=4)),
    ],
)
def test_a_captured_graph_replays_with_a_changing_lr(cls, options):
    values, target = torch.randn(3000), torch.randn(3000)
    lr = torch.tensor(0.01, device=CUDA.name)
    p = torch.nn.Parameter(values.to(CUDA.name, copy=True))
    q = torch.nn.Parameter(values.clone())
    optimizer = cls([p], lr=lr, capturable=True, backend="cuda", **options)
    eager = cls([q], lr=0.01, backend="cpu", **options)
    target_there = target.to(CUDA.name)
    p.grad = torch.zeros_like(p)

    def give_gradient():
        p.grad.copy_((p - target_there).detach())

    warmed_up(lambda: (give_gradient(), optimizer.step()))
    replay = CUDA.capture(optimizer.step)
    rates = [0.01] * 3 + [0.02, 0.005, 0.03]
    for rate in rates[3:]:
        lr.fill_(rate)
        give_gradient()
        replay()
    for rate in rates:
        eager.param_groups[0]["lr"] = torch.tensor(rate).item()
        q.grad = (q - target).detach()
        eager.step()
    CUDA.synchronize()
    assert optimizer.state[p]["step"].item() == len(rates)
    assert bits_equal(p.detach().cpu(), q.detach())
    for name, state in eager.state[q].items():
        assert bits_equal(optimizer.state[p][name].cpu(), state)


@pytest.mark.capture
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipped"])
def test_a_graph_outlives_the_plan_that_it_was_captured_from(options):
    values, g = torch.randn(3000), torch.randn(3000)
    p, q = (torch.nn.Parameter(values.to(where, copy=True)) for where in (CUDA.name, "cpu"))
    optimizer = precond.AdamW([p], capturable=True, backend="cuda", **options)
    eager = precond.AdamW([q], backend="cpu", **options)
    p.grad, q.grad = g.to(CUDA.name, copy=True), g.clone()
    warmed_up(optimizer.step)
    replay = CUDA.capture(optimizer.step)
    states = list(optimizer.state[p].values())  # what the graph writes; loading makes others
    optimizer.load_state_dict(optimizer.state_dict())
    gc.collect()
    # A step of another optimizer frees what the process needs no more, and takes memory of its own.
    r = torch.nn.Parameter(torch.randn(5000, device=CUDA.name))
    r.grad = torch.randn_like(r)
    other = precond.AdamW([r], backend="cuda")
    for _ in range(3):
        other.step()
    for _ in range(2):
        replay()
    for _ in range(5):
        eager.step()
    CUDA.synchronize()
    assert bits_equal(p.detach().cpu(), q.detach())
    assert states[0].item() == 5.0


@pytest.mark.capture
@pytest.mark.parametrize("granularity", ["entry", "tensor", "global"])
def test_every_plan_that_a_graph_was_captured_from_is_kept(granularity):
    params = [torch.nn.Parameter(torch.ones(300, device=CUDA.name)) for _ in range(3)]
    optimizer = precond.DualDescent(params, lr=0.1, granularity=granularity, backend="cuda")
    for p in params:
        p.grad = torch.ones_like(p)
    warmed_up(optimizer.step)
    CUDA.capture(optimizer.step)
    plans = [
        *optimizer.engine.plans.values(),
        *(plan for each in optimizer._passes.values() for plan in each.engine.plans.values()),
    ]
    captured = [compiled.plan for plan in plans for compiled in plan.compiled if compiled.plan.was_captured]
    assert captured
    assert {id(plan) for plan in captured} <= {id(plan) for plan in optimizer.engine.captured}


def muon_beside_adamw(matrices, vectors, **settings):
    groups = [
        dict(params=matrices, optimizer=precond.Muon, lr=0.02),
        dict(params=vectors, optimizer=precond.AdamW, lr=0.01, capturable=settings["backend"] == "cuda"),
    ]
    return precond.Grouped(groups, max_grad_norm=1.0, nonfinite="skip", **settings)


@pytest.mark.capture
@pytest.mark.parametrize("grouped", [False, True])
def test_muon_is_captured_with_its_norm_and_replayed(grouped):
    """Between its passes the products, and before them the norm, all on the device; one replay skips a step."""

    def make(where, backend):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape).to(where)) for shape in ((6, 10), (10, 6), (6, 10), (7,))]
        for p in params:
            p.grad = torch.zeros_like(p)
        if grouped:
            return params, muon_beside_adamw(params[:3], params[3:], backend=backend, statistics=True)
        options = dict(max_grad_norm=1.0, nonfinite="skip", statistics=True)
        return params[:3], precond.Muon(params[:3], lr=0.02, **options, backend=backend)

    def feed(params, i):
        generator = torch.Generator().manual_seed(i)
        for p in params:
            p.grad.copy_(torch.randn(p.shape, generator=generator))
        if i == 5:
            params[0].grad[0, 0] = float("inf")

    ours, optimizer = make(CUDA.name, "cuda")
    theirs, eager = make("cpu", "cpu")
    count = iter(range(3))
    warmed_up(lambda: (feed(ours, next(count)), optimizer.step()))
    before = [p.detach().clone() for p in ours]
    with CUDA.waiting_is_an_error():
        replay = CUDA.capture(optimizer.step)
    for p, q in zip(ours, before, strict=True):
        p.data.copy_(q)
    for i in range(3, 7):
        feed(ours, i)
        replay()
    for i in range(7):
        feed(theirs, i)
        eager.step()
    CUDA.synchronize()
    assert optimizer.skipped_steps.item() == eager.skipped_steps.item() == 1
    assert optimizer.grad_norm.item() == pytest.approx(eager.grad_norm.item(), rel=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        # Products on a GPU are rounded otherwise; on the emulated device they are the CPU's.
        torch.testing.assert_close(p.cpu(), q, rtol=0, atol=0 if EMULATED else 0.02)
    found, expected = optimizer.statistics.values.cpu(), eager.statistics.values
    assert not found.isnan().any()
    torch.testing.assert_close(found, expected, rtol=0 if EMULATED else 0.02, atol=0 if EMULATED else 0.02)


@pytest.mark.capture
def test_an_optimizer_that_is_collected_during_a_capture_leaves_it_alone():
    p, q = (torch.nn.Parameter(torch.ones(3000, device=CUDA.name)) for _ in range(2))
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer = precond.SGD([p], lr=0.25, backend="cuda")
    others = [precond.SGD([q], lr=0.25, backend="cuda")]
    others[0].step()
    warmed_up(optimizer.step)

    def step():
        others.clear()
        gc.collect()
        optimizer.step()

    CUDA.capture(step)()
    CUDA.synchronize()
    assert p.tolist() == [0.0] * 3000


# The whole product of rules and formats: tests/test_formats_cuda.py, which `make gpu` runs too. Here long enough for states to
# live from their own codes, and in several chunks.
@pytest.mark.parametrize("row", BY_STATES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("weight_format", "state_format"),
    [("split24", "int8"), ("split32", "int8"), ("stochastic", "int4"), (None, "bf16")],
)
def test_the_bits_of_the_cpu_in_formats_of_few_bits(row, dtype, weight_format, state_format):
    torch.manual_seed(9)
    values = [random_values(shape, dtype) for shape in ((300, 640), (65, 64), (33, 129), (5,))]
    grads = [[random_values(v.shape, dtype) for v in values] for _ in range(STEPS)]
    results = []
    for backend, where in (("cuda", CUDA.name), ("cpu", "cpu")):
        params = [torch.nn.Parameter(v.to(where, copy=True)) for v in values]
        group = {"params": params, "weight_format": weight_format, "state_format": state_format}
        optimizer = row.cls([group], **row.kwargs, backend=backend)
        for step in grads:
            for p, g in zip(params, step, strict=True):
                p.grad = g.to(where)
            optimizer.step()
        states = [v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
        results.append([t.detach().cpu() for t in (*params, *states)])
    for ours, theirs in zip(*results, strict=True):
        same = bits_equal(ours, theirs) if ours.is_floating_point() else torch.equal(ours, theirs)
        assert same, (tuple(ours.shape), ours.dtype)


@pytest.mark.capture
def test_a_captured_graph_draws_anew_at_each_replay():
    values, g = torch.randn(128, 640).bfloat16(), torch.randn(128, 640).bfloat16()
    params = [torch.nn.Parameter(values.to(where, copy=True)) for where in (CUDA.name, "cpu")]
    p, q = params
    optimizers = []
    for param, options in ((p, {"capturable": True, "backend": "cuda"}), (q, {"backend": "cpu"})):
        group = {"params": [param], "weight_format": "stochastic", "state_format": "int8"}
        optimizers.append(precond.AdamW([group], lr=1e-3, **options))
        param.grad = g.to(param.device, copy=True)
    optimizer, eager = optimizers
    warmed_up(optimizer.step)
    replay = CUDA.capture(optimizer.step)
    for _ in range(5):
        replay()
    for _ in range(8):
        eager.step()
    CUDA.synchronize()
    assert optimizer.state[p]["step"].item() == 8
    assert bits_equal(p.detach().cpu(), q.detach())
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[p][name].cpu(), eager.state[q][name])


@pytest.mark.capture
def test_capture_without_capturable_is_an_error():
    p = torch.nn.Parameter(torch.randn(10, device=CUDA.name))
    optimizer = precond.AdamW([p], backend="cuda")
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable must be True"):
        CUDA.capture(optimizer.step)


@pytest.mark.capture
@needs("kernels that Triton compiles for a GPU")
def test_triton_refuses_to_be_captured():
    p = torch.nn.Parameter(torch.randn(10, device="cuda"))
    optimizer = precond.AdamW([p], capturable=True, backend="triton")
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="must not be captured"):
        CUDA.capture(optimizer.step)


@pytest.mark.parametrize("row", CLASSES, ids=lambda row: row.cls.__name__)
def test_a_step_runs_on_the_current_stream(row):
    n = 9000 if EMULATED else 1 << 22
    p = torch.nn.Parameter(torch.randn(n, device=CUDA.name))
    q = torch.nn.Parameter(p.detach().cpu().clone())
    a, b = row.cls([p], **row.kwargs, backend="cuda"), row.cls([q], **row.kwargs, backend="cpu")
    stream = CUDA.new_stream()
    with CUDA.on(stream):
        for _ in range(5):
            g = torch.randn(n, device=CUDA.name)
            p.grad = g * 2
            q.grad = (g * 2).cpu()
            a.step()
            b.step()
    CUDA.synchronize()
    assert bits_equal(p.detach().cpu(), q.detach())
    if EMULATED:  # where the order of streams changes nothing
        assert CUDA.enqueued(stream) >= 5


@pytest.mark.parametrize("row", CLASSES, ids=lambda row: row.cls.__name__)
@backends
def test_a_scaler_skips_without_a_sync(row, backend):
    p = torch.nn.Parameter(torch.ones(1000, device=CUDA.name))
    optimizer = row.cls([p], **row.kwargs, fused=True, backend=backend)
    scaler = torch.amp.GradScaler(CUDA.name, init_scale=1024.0)
    for overflow in (False, True, False):
        optimizer.zero_grad()
        scaler.scale((p * p).sum()).backward()
        if overflow:
            p.grad[0] = float("inf")
        before = p.detach().clone()
        # Whether the undampened first step is skipped the host must know, once.
        waits = not optimizer.state and row.kwargs.get("dampening", 0.0) != 0.0
        with contextlib.nullcontext() if waits else CUDA.waiting_is_an_error():
            # unscale_ of torch reads no value on the host either; step() must not.
            scaler.step(optimizer)
        scaler.update()
        assert torch.equal(p, before) == overflow


@needs("12 GB of memory")
def test_more_than_two_to_the_31_elements():
    n = (1 << 31) + 4097
    p = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    precond.SGD([p], lr=0.5, backend="cuda").step()
    assert p[:10].tolist() == [0.5] * 10
    assert p[-5000:].tolist() == [0.5] * 5000
    assert (p == 0.5).all().item()


@pytest.mark.parametrize("limit", [None, 0.05])
def test_gradients_are_released_on_the_device(limit):
    """In the backward pass's streams; clipped by the norm of the step before, which the host does not read."""

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8)).to(CUDA.name)

    def backward(net, step):
        torch.manual_seed(step)
        net(torch.randn(16, 64).to(CUDA.name)).square().mean().backward()

    net, twin = model(), model()
    options = dict(lr=0.1, momentum=0.9, statistics=True)
    optimizer = precond.SGD(net.parameters(), max_grad_norm=limit, **options)
    plain = precond.SGD(twin.parameters(), **options)
    precond.release_gradients(net, optimizer, clip=None if limit is None else "previous")
    before = None
    for step in range(STEPS):
        backward(net, step)
        assert all(p.grad is None for p in net.parameters())
        optimizer.step()
        backward(twin, step)
        norm = torch.cat([p.grad.double().flatten() for p in twin.parameters()]).norm().item()
        if limit is not None and before is not None:
            for p in twin.parameters():
                p.grad *= min(1.0, limit / (before + 1e-6))
        before = norm
        plain.step()
        plain.zero_grad()
    assert limit is None or optimizer.clip_coef < 1
    pairs = [
        *zip(net.parameters(), twin.parameters(), strict=True),
        (optimizer.statistics.values, plain.statistics.values),
    ]
    if limit is None:
        assert all(bits_equal(a, b) for a, b in pairs)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
