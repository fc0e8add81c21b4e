"""On a real GPU: the same bits as the CPU, graphs, streams, large tensors. Run by ``make gpu``; nothing here runs without one."""

from __future__ import annotations

import os

import pytest
import torch
from cases import LAYOUTS, bits_equal, gradient, guarded, nasty_values, random_values
from optimizers import ALL_RULES, BY_STATES, CLASSES, OPTIMIZERS

import precond
from precond import _backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
rows = pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(bool(_backend.why_not(name)), reason=name))
        for name in ("cuda", "triton")
    ]
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "0"
    else ["cuda"],
)
SIZES = [1, 3, 64, 255, 1023, 1024, 1025, 8191, 8192, 8193, 100_003]


def steps(row, backend, dtype, make, count=20):
    torch.manual_seed(7)
    device = "cpu" if backend == "cpu" else "cuda"
    values = [make(n).to(dtype) for n in SIZES]
    params = [torch.nn.Parameter(v.to(device, copy=True)) for v in values]
    optimizer = row.cls(params, **row.kwargs, backend=backend)
    for _ in range(count):
        for p in params:
            p.grad = make(p.numel()).to(dtype).to(device)
        optimizer.step()
    return [t.cpu() for p in params for t in (p.detach(), *optimizer._states(p, row.rule).values())]


@pytest.mark.parametrize("row", ALL_RULES, ids=str)
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
    for name, device in ((backend, "cuda"), ("cpu", "cpu")):
        p = guarded(values, layout).tensor
        last = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
        begin = 1 if layout == "offset" else 0  # memory from an allocator is aligned
        memory = torch.empty(begin + last + 1, device=device)
        p = memory.as_strided(p.shape, p.stride(), begin).copy_(p).requires_grad_()
        optimizer = row.cls([p], **row.kwargs, backend=name)
        for g in grads:
            p.grad = gradient(g, "transposed", p).to(device)
            optimizer.step()
        results.append(p.detach().cpu())
    assert bits_equal(*results)


def test_a_captured_graph_replays_with_a_changing_lr():
    values = torch.randn(3000)
    lr = torch.tensor(0.01, device="cuda")
    p = torch.nn.Parameter(values.cuda())
    q = torch.nn.Parameter(values.clone())
    optimizer = precond.AdamW([p], lr=lr, capturable=True, backend="cuda")
    eager = precond.AdamW([q], lr=0.01, backend="cpu")
    target = torch.randn(3000)
    target_gpu = target.cuda()

    def loss_and_step():
        p.grad = (p - target_gpu).detach()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            loss_and_step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss_and_step()
    rates = [0.01] * 3 + [0.02, 0.005, 0.03]
    for rate in rates[3:]:
        lr.fill_(rate)
        graph.replay()
    for rate in rates:
        eager.param_groups[0]["lr"] = torch.tensor(rate).item()
        q.grad = (q - target).detach()
        eager.step()
    torch.cuda.synchronize()
    assert optimizer.state[p]["step"].item() == len(rates)
    assert bits_equal(p.detach().cpu(), q.detach())


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
    grads = [[random_values(v.shape, dtype) for v in values] for _ in range(20)]
    results = []
    for backend, device in (("cuda", "cuda"), ("cpu", "cpu")):
        params = [torch.nn.Parameter(v.to(device, copy=True)) for v in values]
        group = {"params": params, "weight_format": weight_format, "state_format": state_format}
        optimizer = row.cls([group], **row.kwargs, backend=backend)
        for step in grads:
            for p, g in zip(params, step, strict=True):
                p.grad = g.to(device)
            optimizer.step()
        states = [v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
        results.append([t.detach().cpu() for t in (*params, *states)])
    for ours, theirs in zip(*results, strict=True):
        same = bits_equal(ours, theirs) if ours.is_floating_point() else torch.equal(ours, theirs)
        assert same, (tuple(ours.shape), ours.dtype)


def test_a_captured_graph_draws_anew_at_each_replay():
    values, g = torch.randn(128, 640).bfloat16(), torch.randn(128, 640).bfloat16()
    params = [torch.nn.Parameter(values.to(device, copy=True)) for device in ("cuda", "cpu")]
    p, q = params
    optimizers = []
    for param, options in ((p, {"capturable": True, "backend": "cuda"}), (q, {"backend": "cpu"})):
        group = {"params": [param], "weight_format": "stochastic", "state_format": "int8"}
        optimizers.append(precond.AdamW([group], lr=1e-3, **options))
        param.grad = g.to(param.device, copy=True)
    optimizer, eager = optimizers
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(5):
        graph.replay()
    for _ in range(8):
        eager.step()
    torch.cuda.synchronize()
    assert optimizer.state[p]["step"].item() == 8
    assert bits_equal(p.detach().cpu(), q.detach())
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[p][name].cpu(), eager.state[q][name])


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_without_capturable_is_an_error():
    p = torch.nn.Parameter(torch.randn(10, device="cuda"))
    optimizer = precond.AdamW([p], backend="cuda")
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable must be True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.skipif(bool(_backend.why_not("triton")) or _backend.interpreting(), reason="needs compiled Triton")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_triton_refuses_to_be_captured():
    p = torch.nn.Parameter(torch.randn(10, device="cuda"))
    optimizer = precond.AdamW([p], capturable=True, backend="triton")
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="must not be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.parametrize("row", CLASSES, ids=lambda row: row.cls.__name__)
def test_a_step_runs_on_the_current_stream(row):
    p = torch.nn.Parameter(torch.randn(1 << 22, device="cuda"))
    q = torch.nn.Parameter(p.detach().cpu())
    a, b = row.cls([p], **row.kwargs, backend="cuda"), row.cls([q], **row.kwargs, backend="cpu")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):
            g = torch.randn(1 << 22, device="cuda")
            p.grad = g * 2
            q.grad = (g * 2).cpu()
            a.step()
            b.step()
    stream.synchronize()
    assert bits_equal(p.detach().cpu(), q.detach())


@rows
@backends
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_a_scaler_skips_without_a_sync(row, backend):
    p = torch.nn.Parameter(torch.ones(1000, device="cuda"))
    optimizer = row.cls([p], **row.kwargs, fused=True, backend=backend)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for overflow in (False, True, False):
        optimizer.zero_grad()
        scaler.scale((p * p).sum()).backward()
        if overflow:
            p.grad[0] = float("inf")
        before = p.detach().clone()
        torch.cuda.set_sync_debug_mode("error")
        try:
            # unscale_ of torch reads no value on the host either; step() must not.
            scaler.step(optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scaler.update()
        assert torch.equal(p, before) == overflow


def test_more_than_two_to_the_31_elements():
    n = (1 << 31) + 4097
    p = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    precond.SGD([p], lr=0.5, backend="cuda").step()
    assert p[:10].tolist() == [0.5] * 10
    assert p[-5000:].tolist() == [0.5] * 5000
    assert (p == 0.5).all().item()
