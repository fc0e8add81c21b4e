"""What the rules of the family promise beyond parity: intrinsic decay, complex numbers, sparse and differentiable steps."""

from __future__ import annotations

import copy
import math
import re
import warnings

import pytest
import torch
from families import CLASSES, OPTIMIZERS
from support.cases import BACKEND, bits_equal, random_values

import precond
from precond import reference

F64 = torch.float64
classes = pytest.mark.parametrize("row", CLASSES, ids=lambda row: row.cls.__name__)


def minimise(optimizer_of, gradient, steps, start=0.0):
    p = torch.nn.Parameter(torch.full((1,), start))
    optimizer = optimizer_of([p])
    for _ in range(steps):
        p.grad = gradient(p.detach())
        optimizer.step()
    return p.item()


@pytest.mark.parametrize(("momentum", "settles"), [(0.0, 0.6667), (0.9, 0.9524)])
def test_sgdw_weakens_its_decay_by_the_momentum(momentum, settles):
    """(p - 1)^2 / 2 with weight_decay 0.5: the buffer amplifies the gradient by 1 / (1 - mu), and not the decay."""
    end = minimise(lambda ps: precond.SGDW(ps, lr=0.01, momentum=momentum, weight_decay=0.5), lambda p: p - 1.0, 4000)
    assert end == pytest.approx(settles, abs=1e-4)


def test_centered_rmsprop_survives_a_constant_gradient():
    """torch's variance turns negative by rounding, and its step NaN, for some of these after about 1200 steps."""
    p = torch.nn.Parameter(torch.zeros(10_000))
    optimizer = precond.RMSprop([p], lr=1e-9, centered=True)
    p.grad = torch.linspace(0.1, 2.0, 10_000)
    for _ in range(1500):
        optimizer.step()
    assert torch.isfinite(p).all()


FROZEN = {
    # A rule, states that it leaves alone, hyper-parameters that make it do so, and den / sqrt(v).
    "adagradw": ("sum", 1e40, dict(lr_decay=0.0), 1e20),
    "rmspropw": ("square_avg", 1.0, dict(alpha=1.0), 1.0),
}


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("form", ["", "_l1", "_l1_subgradient"])
def test_intrinsic_decay_is_the_penalty_on_z(name, form):
    """With den frozen, the rule in p-space is gradient descent with a penalty on z = p / P, P = den^(-1/2)."""
    _, size, hyper, scale = FROZEN[name]
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(12, 12, generator=generator, dtype=F64)
    h, b = a @ a.T / 12, torch.randn(12, generator=generator, dtype=F64)
    v = (torch.rand(12, generator=generator, dtype=F64) + 0.1) * size
    # In units where den is of order one: p, its gradient and the penalty scale with it.
    lr, lam = 0.03 * scale, 0.4 / scale
    l1 = 0.4 / math.sqrt(scale)
    hyper = hyper | dict(lr=lr, eps=0.0, weight_decay=0.0, l1_decay=0.0, l1_cap=math.inf, momentum=0.0)
    hyper |= dict(weight_decay=lam) if not form else dict(l1_decay=l1)
    rule = reference.RULES[name + form].update
    P = v.sqrt() ** -0.5
    p = torch.randn(12, generator=generator, dtype=F64)
    z = p / P
    for _ in range(300):
        p, (new_v,) = rule(p, h @ p - b, (v,), hyper, 1, False)
        assert torch.equal(new_v, v)
        grad_z = P * (h @ (P * z) - b)
        if not form:
            z = z - lr * (grad_z + lam * z)
        elif form == "_l1":
            z = reference.soft_threshold(z - lr * grad_z, torch.full_like(z, lr * l1))
        else:
            z = z - lr * (grad_z + l1 * torch.sign(z))
    assert (p - P * z).abs().max() <= 1e-12


ADAPTIVE_L1 = [row for row in OPTIMIZERS if row.rule.endswith("_l1") and "l1_cap" in row.cls._group_options]


@pytest.mark.parametrize("row", ADAPTIVE_L1, ids=str)
@pytest.mark.parametrize("state_format", [None, "bf16", "fp16", "int8", "int4"])
def test_a_coordinate_that_never_had_a_gradient_is_spared(row, state_format):
    """Also where a format rounds: an eps in a state could look like a gradient."""
    p = torch.nn.Parameter(torch.full((64, 64), 1e-3))
    kwargs = row.kwargs | dict(weight_decay=0.0, l1_decay=1.0)
    kwargs.pop("initial_accumulator_value", None)
    optimizer = row.cls([p], **kwargs, state_format=state_format, backend=BACKEND)
    p.grad = torch.tensor([1e-3, 0.0]).repeat(64, 32)
    for _ in range(4):
        optimizer.step()
    assert not p[:, ::2].any()
    assert (p[:, 1::2] == 1e-3).all()


def test_adagrads_learning_rate_decay_reaches_its_weight_decays():
    """docs/theory.md, A.2.2: a = lr / (1 + (t - 1) lr_decay) in the step and in both decays."""
    p = torch.nn.Parameter(torch.ones(1, dtype=F64))
    optimizer = precond.AdagradW([p], lr=0.1, lr_decay=1.0, weight_decay=1.0)
    expected = 1.0
    for t in range(1, 5):
        p.grad = torch.zeros(1, dtype=F64)
        optimizer.step()
        expected -= 0.1 / t * expected
        assert p.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("backend", [BACKEND, "triton"])
def test_a_complex_parameter_is_two_real_ones(row, backend, triton_interpreter):
    values = torch.complex(random_values((7, 5)), random_values((7, 5)))
    p = torch.nn.Parameter(values.t())  # not contiguous
    q = torch.nn.Parameter(torch.view_as_real(values.t()).clone(memory_format=torch.preserve_format))
    a, b = row.cls([p], **row.kwargs, backend=backend), row.cls([q], **row.kwargs, backend=BACKEND)
    for _ in range(3):
        g = torch.complex(random_values((5, 7)), random_values((5, 7)))
        p.grad, q.grad = g, torch.view_as_real(g)
        a.step()
        b.step()
        assert bits_equal(torch.view_as_real(p.detach()).contiguous(), q.detach().contiguous())
        for name, state in a.states.present(p, row.rule).items():
            assert state.dtype == torch.complex64
            assert bits_equal(torch.view_as_real(state).contiguous(), b.state[q][name].contiguous())


@classes
def test_a_lazily_conjugated_gradient_is_read_as_it_is_meant(row):
    p, q = (torch.nn.Parameter(torch.ones(3, dtype=torch.complex64)) for _ in range(2))
    a, b = row.cls([p], **row.kwargs), row.cls([q], **row.kwargs)
    for _ in range(3):
        g = torch.randn(3, dtype=torch.complex64)
        p.grad, q.grad = g.conj(), g.conj().resolve_conj()
        a.step()
        b.step()
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def sparse_gradient(seed, sparse_dim):
    generator = torch.Generator().manual_seed(seed)
    if sparse_dim == 1:
        indices, values = torch.tensor([[1, 4, 1]]), torch.randn(3, 3, generator=generator)
    else:
        indices, values = torch.tensor([[1, 4, 1], [0, 2, 0]]), torch.randn(3, generator=generator)
    return torch.sparse_coo_tensor(indices, values, (6, 3), check_invariants=True)  # 1 twice: not coalesced


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's, in its own Adagrad
@pytest.mark.parametrize("sparse_dim", [1, 2])
@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        ("SGD", dict(lr=0.1)),
        ("SGD", dict(lr=0.1, momentum=0.9, dampening=0.1, maximize=True)),
        ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True)),
        ("Adagrad", dict(lr=0.1, lr_decay=0.1, initial_accumulator_value=0.2)),
    ],
)
def test_sparse_gradients_do_what_torchs_do(cls, kwargs, sparse_dim):
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 18).view(6, 3)) for _ in range(2))
    other, twin = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))  # dense ones in the same step
    a, b = getattr(precond, cls)([p, other], **kwargs), getattr(torch.optim, cls)([q, twin], **kwargs)
    before = p.detach().clone()
    for i in range(4):
        p.grad, q.grad = sparse_gradient(i, sparse_dim), sparse_gradient(i, sparse_dim)
        other.grad, twin.grad = torch.ones(4), torch.ones(4)
        a.step()
        b.step()
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(other, twin, rtol=1e-6, atol=1e-7)
    if sparse_dim == 1:
        assert torch.equal(p[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


@pytest.mark.parametrize("cls", ["Adagrad", "SGD"])
def test_sparse_gradients_with_weight_decay_are_refused(cls):
    p = torch.nn.Parameter(torch.ones(6, 3))
    p.grad = sparse_gradient(0, 1)
    with pytest.raises(RuntimeError, match=r"weight_decay option is not compatible with sparse gradients, got 0\.1"):
        getattr(precond, cls)([p], weight_decay=0.1).step()
    assert torch.equal(p, torch.ones(6, 3))


# A sign has no slope.
@pytest.mark.parametrize("row", [row for row in OPTIMIZERS if row.cls is not precond.Lion], ids=str)
def test_autograd_sees_a_differentiable_step(row):
    """Two steps as a function of the first parameters, against finite differences."""
    kwargs = row.kwargs | {"differentiable": True} | ({"l1_decay": 0.01} if "l1_decay" in row.kwargs else {})

    def stepped(values):
        p = values.clone()
        optimizer = row.cls([p], **kwargs)
        for g in ([0.45, -0.16, 0.22], [0.43, -0.11, 0.2]):
            p.grad = torch.tensor(g, dtype=F64)
            optimizer.step()
        return p

    assert torch.autograd.gradcheck(stepped, (torch.tensor([0.7, -1.3, 0.4], dtype=F64, requires_grad=True),))


def test_a_learning_rate_may_be_learned():
    """Hypergradient descent: autograd reaches a tensor lr through a differentiable step."""
    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
    p = torch.tensor([1.0, -2.0], dtype=F64, requires_grad=True).clone()
    optimizer = precond.SGD([p], lr=lr, differentiable=True)
    p.grad = torch.tensor([0.5, -1.0], dtype=F64)
    optimizer.step()
    p.sum().backward()
    assert lr.grad.item() == pytest.approx(0.5)


@classes
def test_states_may_be_made_before_the_first_step(row):
    """pytorch#164929: the checkpoint's zero step must not count, or every bias correction after it is wrong."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    nets = [torch.nn.Linear(3, 2, dtype=F64) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    kwargs = row.kwargs | ({"dampening": 0.0} if "dampening" in row.kwargs else {})
    a, b = (row.cls(net.parameters(), **kwargs) for net in nets)
    saved = get_optimizer_state_dict(nets[0], a)
    for state in saved["state"].values():
        assert state.get("step", torch.zeros(())) == 0
    for i in range(3):
        for net, optimizer in zip(nets, (a, b), strict=True):
            torch.manual_seed(i)
            optimizer.zero_grad()
            net(torch.randn(5, 3, dtype=F64)).square().sum().backward()
            optimizer.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)


@classes
def test_a_first_step_at_lr_zero_counts_where_a_gradient_is_not_zero(row):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = row.cls([p], **row.kwargs | {"lr": 0.0})
    p.grad = torch.tensor([0.0, 0.0, 1.0])
    optimizer.step()
    assert optimizer.state[p].get("step", torch.ones(())) == 1
    assert any(state.any() for state in optimizer.states.present(p, row.rule).values())


@classes
def test_fp16_parameters_train_under_loss_scaling(row):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 100).half())
    q = copy.deepcopy(p)
    a = row.cls([p], **row.kwargs, fused=True, state_format="fp32", backend=BACKEND)
    b = row.cls([q], **row.kwargs, state_format="fp32", backend=BACKEND)
    a.grad_scale, a.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    for _ in range(3):
        g = torch.randn(100).half() / 64
        p.grad, q.grad = g * 1024, g
        a.step()
        b.step()
    assert bits_equal(p.detach(), q.detach())


@classes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_second_moment_warns_with_its_name(row, dtype):
    p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    p.grad = torch.ones_like(p)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", precond.PrecisionWarning)
        optimizer = row.cls([p])
        optimizer.step()
    made = optimizer._row(optimizer.param_groups[0])
    rule = reference.RULES[made.rule]
    kept = made.hyper.get(rule.keeps, rule.keeps)
    underflows = dtype == torch.float16 and rule.squares
    if not rule.second_moments or not (underflows or (dtype == torch.bfloat16 and kept > 0.995)):
        assert not caught
        return
    what = "is 0 for" if underflows else f"{'stands still' if rule.squares else 'never decays'}: .* at {kept}"
    assert len(caught) == 1
    assert re.match(f"a {dtype} {rule.second_moments[0]} {what} .* state_format='fp32'", str(caught[0].message))
