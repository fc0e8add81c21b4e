"""NAdam's product of momenta, a state of one number: torch's bits, and what checkpoints and skipped steps do to it."""

from __future__ import annotations

import copy

import pytest
import torch
from support.cases import BACKEND, bits_equal
from support.training import model, train

import precond

pytestmark = pytest.mark.usefixtures("triton_interpreter")
backends = pytest.mark.parametrize("backend", [BACKEND, "triton", "reference"])
OPTIONS = dict(lr=0.05, momentum_decay=0.5)


def stepped(optimizer, p, seeds):
    for seed in seeds:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)
        optimizer.step()


@backends
@pytest.mark.parametrize("fused", [None, True], ids=["on the host", "beside the parameter"])
def test_the_product_has_torchs_bits(backend, fused):
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 700)) for _ in range(2))
    ours = precond.NAdam([p], **OPTIONS, fused=fused, backend=backend)
    theirs = torch.optim.NAdam([q], **OPTIONS, foreach=False)
    for i in range(30):
        stepped(ours, p, [i])
        stepped(theirs, q, [i])
        assert torch.equal(ours.state[p]["mu_product"], theirs.state[q]["mu_product"])
    torch.testing.assert_close(p, q)


def test_it_becomes_denormal_without_harm():
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    ours, theirs = precond.NAdam([p], **OPTIONS), torch.optim.NAdam([q], **OPTIONS)
    stepped(ours, p, range(1500))
    stepped(theirs, q, range(1500))
    assert ours.state[p]["mu_product"] == theirs.state[q]["mu_product"]
    assert ours.state[p]["mu_product"] < torch.finfo(torch.float32).tiny
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_of_torch_bring_it_in_float32_or_as_a_number(dtype):
    """torch casts it to the dtype of the parameter when it loads; an old checkpoint has a float."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 70).to(dtype))
    theirs = torch.optim.NAdam([p], **OPTIONS, foreach=False)
    stepped(theirs, p, range(3))
    saved = copy.deepcopy(theirs.state_dict())
    old = copy.deepcopy(saved)
    for name in ("step", "mu_product"):
        old["state"][0][name] = float(old["state"][0][name])
    for name in ("decoupled_weight_decay", "capturable", "differentiable", "foreach", "maximize"):
        del old["param_groups"][0][name]
    ends = []
    for checkpoint in (saved, old):
        q = torch.nn.Parameter(p.detach().clone())
        ours = precond.NAdam([q])
        ours.load_state_dict(checkpoint)
        assert ours.state[q]["mu_product"].dtype == torch.float32
        assert ours.state[q]["mu_product"] == theirs.state[p]["mu_product"]
        stepped(ours, q, [3])
        ends.append(q)
    stepped(theirs, p, [3])
    assert bits_equal(ends[0], ends[1])
    torch.testing.assert_close(ends[0], p)


@pytest.mark.parametrize("direction", ["torch to precond", "precond to torch"])
def test_nadamw_goes_on_where_torchs_decoupled_nadam_stopped(direction):
    options = OPTIONS | dict(weight_decay=0.1)
    ends = []
    for switch in (True, False):
        net = model()
        make = [
            lambda params: torch.optim.NAdam(params, **options, decoupled_weight_decay=True),
            lambda params: precond.NAdamW(params, **options),
        ]
        first, second = make if direction == "torch to precond" else make[::-1]
        a = first(net.parameters())
        train(net, a, 4)
        b = a
        if switch:
            b = second(net.parameters())
            b.load_state_dict(copy.deepcopy(a.state_dict()))
        train(net, b, 4, start=4)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@backends
def test_a_skipped_step_leaves_it(backend):
    """Of ``nonfinite="skip"`` and of a loss scaler, also before the first step."""
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 700)) for _ in range(2))
    a = precond.NAdamW([p], **OPTIONS, fused=True, max_grad_norm=1e3, nonfinite="skip", backend=backend)
    b = precond.NAdamW([q], **OPTIONS, max_grad_norm=1e3, backend=backend)
    for i in range(4):
        p.grad = torch.full_like(p, torch.nan)
        a.step()
        a.found_inf = torch.ones(())
        stepped(a, p, [i])
        del a.found_inf
        stepped(a, p, [i])
        stepped(b, q, [i])
        assert bits_equal(p.detach(), q.detach())
        assert a.state[p]["mu_product"] == b.state[q]["mu_product"]
    assert a.skipped_steps == 8


def test_a_momentum_decay_below_0_is_an_error():
    with pytest.raises(ValueError, match=r"Invalid momentum_decay value: -1.0 \(momentum_decay must be >= 0\)"):
        precond.NAdam([torch.nn.Parameter(torch.ones(1))], momentum_decay=-1.0)


@pytest.mark.skipif(BACKEND != "cpu", reason="there parameters are on a supported device")
@pytest.mark.parametrize("cls", [precond.NAdam, precond.RAdam])
def test_fused_in_a_group_does_not_make_the_cpu_capturable(cls):
    """torch's classes have no fused step, so that no step takes the place of the one that refuses."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(AssertionError, match="must be on supported devices"):
        cls([{"params": [p], "fused": True}], capturable=True).step()
