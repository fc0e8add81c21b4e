"""What a GPU step keeps on the device: tensor hyper-parameters, step counters, the loss scale.

Runs on the CUDA backend only, on a GPU or on the host (tests/test_cuda_on_host.py).
"""

from __future__ import annotations

import pytest
import torch
from families import CLASSES, OPTIMIZERS
from support.cases import BACKEND, bits_equal

import precond

if BACKEND != "cuda":
    pytest.skip("run by tests/test_cuda_on_host.py and on a GPU", allow_module_level=True)
rows = pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
classes = pytest.mark.parametrize("row", CLASSES, ids=lambda row: row.cls.__name__)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pair(row, **override):
    values = [torch.randn(n) for n in (5, 700, 9000)]
    ours = [torch.nn.Parameter(v.to(DEVICE, copy=True)) for v in values]
    theirs = [torch.nn.Parameter(v.clone()) for v in values]
    return ours, theirs, row.cls(ours, **{**row.kwargs, **override}), row.cls(theirs, **row.kwargs, backend="cpu")


def give(ours, theirs):
    for p, q in zip(ours, theirs, strict=True):
        q.grad = torch.randn(q.shape)
        p.grad = q.grad.to(DEVICE, copy=True)


@rows
def test_tensor_hyper_parameters_are_read_on_the_device(row):
    lr = torch.tensor(0.05, device=DEVICE)
    weight_decay = torch.tensor(0.25, device=DEVICE, dtype=torch.float64)
    # Schedule-free adds up weights that follow lr, so the sum must be where lr is.
    beside = {"capturable": True} if row.rule.startswith("schedule_free") else {}
    ours, theirs, a, b = pair(row, lr=lr, **beside)
    a.param_groups[0]["weight_decay"] = weight_decay
    b.param_groups[0]["weight_decay"] = 0.25
    for value in (0.05, 0.01, 0.2):
        lr.fill_(value)
        b.param_groups[0]["lr"] = lr.item()
        give(ours, theirs)
        a.step()
        b.step()
    assert all(bits_equal(p.cpu(), q) for p, q in zip(ours, theirs, strict=True))
    (compiled,) = next(iter(a.engine.plans.values())).compiled
    assert compiled.plan.launches == 3, "two for the scalars, one for all tensors"


@classes
def test_counters_on_the_device_count_and_a_skipped_step_does_not(row):
    ours, theirs, a, b = pair(row, fused=True)
    scale = torch.tensor(8.0, device=DEVICE)
    for i in range(5):
        give(ours, theirs)
        for p in ours:
            p.grad.mul_(8.0)
        a.grad_scale, a.found_inf = scale, torch.tensor(float(i == 3), device=DEVICE)
        a.step()
        if i != 3:
            b.step()
    assert all(bits_equal(p.cpu(), q) for p, q in zip(ours, theirs, strict=True))
    for p in ours:
        if "step" in a.state.get(p, {}):
            assert a.state[p]["step"].item() == 4.0
            assert a.state[p]["step"].device == p.device


@classes
def test_one_launch_for_all_tensors_of_all_groups(row):
    params = [torch.nn.Parameter(torch.randn(n, device=DEVICE)) for n in (3, 100, 5000, 40_000)]
    optimizer = row.cls([{"params": params[:2]}, {"params": params[2:], "lr": 0.3}], **row.kwargs)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    (compiled,) = next(iter(optimizer.engine.plans.values())).compiled
    assert compiled.plan.launches == 1


@pytest.mark.parametrize("row", [row for row in CLASSES if row.counts_steps], ids=str)
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float64, ()), (torch.int32, (1,)), (torch.int64, (1, 1)), (torch.float32, (1,))],
    ids=str,
)
def test_any_counter_on_the_device_is_advanced_in_place(row, dtype, shape):
    ours, theirs, a, b = pair(row, fused=True)
    made = {}
    for i in range(5):
        give(ours, theirs)
        if i == 1:
            for p in ours:
                made[p] = {"step": a.state[p]["step"].to(dtype).reshape(shape).clone()}
                if "mu_product" in a.state[p]:
                    made[p]["mu_product"] = a.state[p]["mu_product"].reshape(shape).clone()
                a.state[p].update(made[p])
        a.found_inf = torch.tensor(float(i == 3), device=DEVICE)
        a.step()
        if i != 3:
            b.step()
    assert all(bits_equal(p.cpu(), q) for p, q in zip(ours, theirs, strict=True))
    for p in ours:
        assert all(a.state[p][name] is number for name, number in made[p].items())
        assert a.state[p]["step"].item() == 4


@pytest.mark.parametrize("start", [2.0**24 - 1, 2.0**24 + 2, 2.0**33])
@pytest.mark.parametrize("fused", [None, True], ids=["on the host", "on the device"])
def test_a_counter_on_the_device_does_not_stand_still_and_draws_the_bits_of_the_host(start, fused):
    ends = []
    for device, options in ((DEVICE, {"backend": "cuda", "fused": fused}), ("cpu", {"backend": "cpu"})):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 4096).view(64, 64).to(device, torch.bfloat16))
        optimizer = precond.AdamW([p], weight_format="split24", state_format="int8", **options)
        for i in range(4):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p)
            optimizer.step()
            if i == 0:
                optimizer.state[p]["step"].fill_(start)
        ends.append([p.detach().cpu(), *(t.cpu() for t in optimizer.state[p].values() if isinstance(t, torch.Tensor))])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_parameters_that_share_a_counter_on_the_device_are_an_error():
    params = [torch.nn.Parameter(torch.randn(5, device=DEVICE)) for _ in range(2)]
    optimizer = precond.AdamW(params, fused=True, backend="cuda")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[params[1]]["step"] = optimizer.state[params[0]]["step"]
    with pytest.raises(
        RuntimeError, match="step of parameter 0 of group 0 and step of parameter 1 of group 0 must not"
    ):
        optimizer.step()


def test_a_scaler_with_counters_on_the_host_is_an_error():
    p = torch.nn.Parameter(torch.randn(4, device=DEVICE))
    optimizer = precond.AdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.found_inf = torch.tensor(0.0, device=DEVICE)
    with pytest.raises(RuntimeError, match="fused must be True in every group"):
        optimizer.step()


@classes
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backends_that_read_on_the_host_unscale_and_skip_too(row, backend):
    """The scaler's tensors are on the device here, and these backends once ignored them."""
    device = DEVICE if backend == "reference" else "cpu"
    values = torch.randn(300)
    p, q = (torch.nn.Parameter(values.to(device, copy=True)) for _ in range(2))
    a, b = (row.cls([t], **{**row.kwargs, "fused": True}, backend=backend) for t in (p, q))
    a.grad_scale = torch.tensor(8.0, device=DEVICE)
    for i, overflow in enumerate((True, False, True, False)):
        g = torch.randn(300).to(device)
        p.grad, q.grad = 8.0 * g, g
        a.found_inf = torch.tensor(float(overflow), device=DEVICE)
        a.step()
        if not overflow:
            b.step()
        if i == 0:
            torch.testing.assert_close(a.state_dict()["state"], b.state_dict()["state"], rtol=0, atol=0)
        assert bits_equal(p.cpu(), q.cpu())


@classes
def test_a_parameter_of_another_backend_in_the_same_step_is_unscaled_and_skipped(row):
    values = torch.randn(300)
    params = [torch.nn.Parameter(values.to(DEVICE, dtype, copy=True)) for dtype in (torch.float32, torch.float64) * 2]
    a, b = (row.cls(pair, **{**row.kwargs, "fused": True}, backend="cuda") for pair in (params[:2], params[2:]))
    for optimizer in (a, b):
        optimizer._own["backend"] = None
    a.grad_scale = torch.tensor(8.0, device=DEVICE)
    for overflow in (False, True, False):
        g = torch.randn(300).to(DEVICE)
        for p in params[2:]:
            p.grad = g.to(p.dtype)
        for p in params[:2]:
            p.grad = 8.0 * g.to(p.dtype)
        a.found_inf = torch.tensor(float(overflow), device=DEVICE)
        a.step()
        if not overflow:
            b.step()
        assert all(bits_equal(p.cpu(), q.cpu()) for p, q in zip(params[:2], params[2:], strict=True))
