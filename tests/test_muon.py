"""Muon against torch's, and what torch's does not have."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys

import pytest
import torch
from support import multipass
from support.cases import bits_equal
from support.multipass import BF16, F32, F64, give, params_of

import precond
from precond._methods.newton_schulz import orthogonalized

if not hasattr(torch.optim, "Muon"):
    pytest.skip("this torch has no Muon to compare with", allow_module_level=True)

MATRICES = ((6, 10), (10, 6), (8, 8), (6, 10), (1, 5), (5, 1), (40, 7))
#: Products of bfloat16 matrices may be added up in another order when they are batched, and the directions are near 1.
ROUGH = 0.02


def pair(dtype=F32, **kwargs):
    ours, theirs = params_of(MATRICES, dtype), params_of(MATRICES, dtype)
    return ours, theirs, precond.Muon(ours, **kwargs), torch.optim.Muon(theirs, **kwargs)


def assert_near(ours, theirs, lr, scale=2.5, steps=5):
    """Within the roughness of that many directions of about 1, each times lr and at most ``scale``."""
    for p, q in zip(ours, theirs, strict=True):
        rounding = torch.finfo(p.dtype).eps * q.detach().abs().max().item()
        torch.testing.assert_close(p, q, rtol=0, atol=ROUGH * lr * scale * steps + steps * rounding)


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False},
        {"momentum": 0.5, "weight_decay": 0.0},
        {"momentum": 0.0},
        {"adjust_lr_fn": "original", "weight_decay": 0.5},
        {"adjust_lr_fn": "match_rms_adamw"},
        {"ns_steps": 1, "eps": 1e-3},
        {"ns_steps": 0},
        {"ns_coefficients": (2.0, -1.5, 0.5)},
    ],
    ids=str,
)
def test_it_trains_like_torchs(options, dtype):
    if dtype == BF16 and options == {"nesterov": False}:
        pytest.skip("torch's iteration then divides the momentum itself by its norm: the next test")
    ours, theirs, a, b = pair(dtype, lr=0.02, **options)
    start = [p.detach().clone() for p in ours]
    for i in range(5):
        give(ours, i)
        give(theirs, i)
        a.step()
        b.step()
    assert_near(ours, theirs, 0.02)
    for p, q in zip(ours, theirs, strict=True):
        m, n = a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"]
        assert m.dtype == n.dtype
        torch.testing.assert_close(m, n, rtol=0, atol=10 * torch.finfo(dtype).eps)
    # The tolerance is far below what the steps did.
    for p, before in zip(ours, start, strict=True):
        assert (p - before).abs().max() > 0.007


def test_a_bfloat16_momentum_stays_a_mean_without_nesterov():
    """torch 2.13 normalises ``momentum_buffer`` in place there; ours is the mean that the fp32 run has."""
    rounded, exact = params_of(MATRICES, BF16), params_of(MATRICES)
    a, b = precond.Muon(rounded, nesterov=False), torch.optim.Muon(exact, nesterov=False)
    for i in range(4):
        give(rounded, i)
        for p, q in zip(rounded, exact, strict=True):
            q.grad = p.grad.float()
        a.step()
        b.step()
    for p, q in zip(rounded, exact, strict=True):
        m, n = a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"]
        torch.testing.assert_close(m.float(), n, rtol=0.02, atol=0.002)


def test_one_steps_direction_is_torchs_within_its_rounding():
    """The iteration itself, on the same input: the largest difference is a few bfloat16 ulp of a direction."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    group = dict(ns_coefficients=(3.4445, -4.775, 2.0315), ns_steps=5, eps=1e-7)
    for shape in ((16, 48), (48, 16), (32, 32)):
        u = torch.randn(3, *shape)
        found = orthogonalized(u.to(BF16), group)
        for a, one in zip(found, u, strict=True):
            expected = _zeropower_via_newtonschulz(one, **group)
            assert (a.float() - expected.float()).abs().max() <= ROUGH
        s = torch.linalg.svdvals(orthogonalized(u.double(), group))
        assert s.min() > 0.3
        assert s.max() < 1.6


def test_a_tensor_learning_rate_is_read_anew():
    lr = torch.tensor(0.02)
    ours, theirs, a, _ = pair(lr=lr)
    b = precond.Muon(theirs, lr=0.02)
    for i in range(4):
        give(ours, i)
        give(theirs, i)
        a.step()
        b.step()
        lr.mul_(0.5)
        b.param_groups[0]["lr"] = lr.item()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_named_parameters_and_groups_are_torchs():
    ours, theirs = params_of(MATRICES), params_of(MATRICES)

    def groups(params):
        named = [(f"w{i}", p) for i, p in enumerate(params)]
        return [
            {"params": named[:3], "lr": 0.05, "adjust_lr_fn": "match_rms_adamw"},
            {"params": named[3:], "momentum": 0.5, "ns_steps": 3},
        ]

    a, b = precond.Muon(groups(ours)), torch.optim.Muon(groups(theirs))
    for i in range(3):
        give(ours, i)
        give(theirs, i)
        a.step()
        b.step()
    assert_near(ours[:3], theirs[:3], 0.05, steps=3)
    assert_near(ours[3:], theirs[3:], 0.001, steps=3)
    assert a.param_groups[1]["param_names"] == b.param_groups[1]["param_names"]
    assert a.state_dict()["state"].keys() == b.state_dict()["state"].keys()
    assert list(a.state[ours[0]]) == list(b.state[theirs[0]])


@pytest.mark.parametrize("direction", ["torch to precond", "precond to torch"])
def test_training_goes_on_in_the_other_library(direction):
    classes = [torch.optim.Muon, precond.Muon]
    first, second = classes if direction == "torch to precond" else reversed(classes)
    params, straight = params_of(MATRICES), params_of(MATRICES)
    a = first(params, lr=0.02, momentum=0.8)
    reference = torch.optim.Muon(straight, lr=0.02, momentum=0.8)
    multipass.train(params, a, 0, 3)
    b = second(params, lr=123.0)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    multipass.train(params, b, 3, 6)
    multipass.train(straight, reference, 0, 6)
    assert_near(params, straight, 0.02, steps=6)


def test_it_is_torchs_class_and_takes_its_arguments():
    assert isinstance(precond.Muon(params_of(MATRICES)), torch.optim.Muon)
    ours = list(inspect.signature(precond.Muon.__init__).parameters.values())
    theirs = list(inspect.signature(torch.optim.Muon.__init__).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), ()])
def test_only_matrices_are_taken_with_torchs_message(shape):
    odd = torch.nn.Parameter(torch.ones(shape))
    with pytest.raises(ValueError) as theirs:  # noqa: PT011
        torch.optim.Muon([odd])
    with pytest.raises(ValueError) as ours:  # noqa: PT011
        precond.Muon([odd])
    hint = "; flatten=True makes it one matrix, flatten=False a batch of them" if len(shape) > 2 else ""
    assert str(ours.value) == f"{theirs.value}: parameter 0 of group 0{hint}"
    optimizer = precond.Muon(params_of(MATRICES))
    with pytest.raises(ValueError, match="only supports 2D"):
        optimizer.add_param_group({"params": [odd]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0},
        {"momentum": -0.1},
        {"weight_decay": -0.1},
        {"adjust_lr_fn": "other"},
        {"lr": torch.ones(2)},
        {"ns_steps": 100},
        {"ns_coefficients": (1.0, 2.0)},
    ],
    ids=str,
)
def test_errors_begin_with_torchs_messages(wrong):
    ours, theirs = params_of(((3, 3),)), params_of(((3, 3),))
    give(theirs, 0)
    with pytest.raises(ValueError) as expected:  # noqa: PT011
        torch.optim.Muon(theirs, **wrong).step()
    with pytest.raises(ValueError) as found:  # noqa: PT011
        precond.Muon(ours, **wrong)
    assert str(found.value).startswith(str(expected.value))


def test_what_it_does_not_take_is_said_at_the_step():
    (p,) = params_of(((3, 3),))
    give([p], 0)
    p.grad = torch.ones(3, 3).to_sparse()
    with pytest.raises(RuntimeError, match="Muon does not support sparse gradients"):
        precond.Muon([p]).step()
    c = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    c.grad = torch.ones_like(c)
    with pytest.raises(RuntimeError, match="Muon does not support complex parameters"):
        precond.Muon([c]).step()
    with pytest.raises(ValueError, match="momentum must be < 1"):
        precond.Muon([p], momentum=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'foreach'"):
        precond.Muon([p], foreach=True)


def test_maximize_climbs():
    down, up = params_of(MATRICES), params_of(MATRICES)
    a, b = precond.Muon(down, lr=0.1), precond.Muon(up, lr=0.1, maximize=True)
    for i in range(3):
        give(down, i)
        give(up, i)
        for p in down:
            p.grad.neg_()
        a.step()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(down, up, strict=True))


def test_a_zero_gradient_leaves_the_decay():
    (p,) = params_of(((4, 6),))
    before = p.detach().clone()
    optimizer = precond.Muon([p], lr=0.5, weight_decay=0.1)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), 0.95 * before, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_matrices_are_passed_over(shape):
    params = [torch.nn.Parameter(torch.ones(shape)), *params_of(((3, 3),))]
    give(params, 0)
    optimizer = precond.Muon(params)
    optimizer.step()
    optimizer.step()
    assert torch.isfinite(params[1]).all()


CODED = ((64, 64), (128, 64), (3, 3))


@pytest.mark.parametrize(
    ("dtype", "formats"),
    [
        (F32, {}),
        (F64, {}),
        (F32, {"state_format": "int8"}),
        (BF16, {"weight_format": "split24"}),
        (BF16, {"weight_format": "stochastic", "state_format": "int8"}),
        (BF16, {"weight_format": "split24", "state_format": "int8"}),
        (BF16, {"state_format": "fp32"}),
    ],
    ids=str,
)
def test_it_resumes_with_the_same_bits_in_every_format(dtype, formats):
    multipass.check_resumes(lambda ps: precond.Muon(ps, lr=0.02, **formats), CODED, dtype, at=3, steps=6)


def test_formats_train_near_the_plain_run():
    plain, coded, split = params_of(CODED), params_of(CODED), params_of(CODED, BF16)
    runs = [
        (plain, precond.Muon(plain, lr=0.02)),
        (coded, precond.Muon(coded, lr=0.02, state_format="int8")),
        (split, precond.Muon(split, lr=0.02, weight_format="split24", state_format="fp32")),
    ]
    start = [p.detach().clone() for p in plain]
    for params, optimizer in runs:
        multipass.train(params, optimizer, 0, 5)
    assert runs[1][1].state[coded[0]]["momentum_buffer"].dtype == torch.int8
    assert runs[2][1].state[split[0]]["remainder"].dtype == torch.int8
    for p, q, r, before in zip(plain, coded, split, start, strict=True):
        moved = (p - before).norm()
        assert (q - p).norm() <= 0.1 * moved
        assert (r.float() - p - (before.to(BF16).float() - before)).norm() <= 0.1 * moved + 0.01 * p.norm()


def test_it_is_an_optimizer():
    shapes = ((4, 6), (7, 3), (4, 6), (0, 3), (3, 0))
    multipass.check_is_an_optimizer(lambda ps: precond.Muon(ps, lr=0.02), shapes=shapes)


def test_transposed_and_strided_parameters_and_gradients():
    values, grads = torch.randn(6, 10), torch.randn(6, 10)
    results = []
    for layout in (lambda t: t.clone(), lambda t: t.t().contiguous().t()):
        for grad_layout in (lambda t: t.clone(), lambda t: t.t().contiguous().t()):
            p = torch.nn.Parameter(layout(values))
            optimizer = precond.Muon([p], lr=0.1)
            for _ in range(2):
                p.grad = grad_layout(grads)
                optimizer.step()
            results.append(p.detach().contiguous())
    assert all(bits_equal(results[0], other) for other in results[1:])


def test_a_scaler_unscales_before_the_step():
    ours, theirs = params_of(MATRICES), params_of(MATRICES)
    a, b = precond.Muon(ours, lr=0.1), precond.Muon(theirs, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for i in range(2):
        give(ours, i)
        give(theirs, i)
        scaler.scale(torch.ones(()))
        for p in ours:
            p.grad.mul_(scaler.get_scale())
        scaler.step(a)
        scaler.update()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_states_may_be_made_before_the_first_step():
    multipass.check_states_may_be_made_first(precond.Muon, biases=False)


def test_every_backend_takes_the_same_steps(triton_interpreter):
    multipass.check_backends(lambda ps, b: precond.Muon(ps, lr=0.01, backend=b), shapes=((6, 10), (8, 8), (10, 6)))


def test_before_torch_2_9_it_stands_alone():
    code = (
        "import torch; del torch.optim.Muon\n"
        "import precond\n"
        "w = torch.nn.Parameter(torch.zeros(3, 4)); w.grad = torch.ones(3, 4)\n"
        "optimizer = precond.Muon([w]); optimizer.step(); optimizer.load_state_dict(optimizer.state_dict())\n"
        "assert bool((w < 0).all()) and isinstance(optimizer, torch.optim.Optimizer)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_split_weight_that_was_written_by_hand_is_its_own_master():
    net = torch.nn.Linear(8, 8, bias=False, dtype=BF16)
    optimizer = precond.Muon(net.parameters(), weight_format="split24")
    give([net.weight], 0)
    optimizer.step()
    assert not torch.equal(precond.master_weights(optimizer, net)["weight"], net.weight.float())
    torch.nn.init.ones_(net.weight)
    assert torch.equal(precond.master_weights(optimizer, net)["weight"], torch.ones(8, 8))
