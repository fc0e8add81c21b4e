"""GradientRegularizer: the penalty on z, the second gradient, and that parameters come back as they were."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.cases import bits_equal, nasty_values, random_values

import precond

F64 = torch.float64
BASES = [
    (precond.SGD, {}),
    (precond.AdamW, dict(weight_decay=0.1)),
    (precond.AdamW, dict(amsgrad=True)),
    (precond.AdagradW, {}),
    (precond.RMSprop, {}),
    (precond.RMSpropW, dict(centered=True, eps=1e-3)),
    (precond.GaussNewton, dict(curvature="gradient", power=-0.5)),
    (precond.GaussNewton, dict(curvature="gradient", eps=1e-2)),
]
bases = pytest.mark.parametrize(("cls", "kwargs"), BASES, ids=lambda item: getattr(item, "__name__", None))


def quadratic(dtype=F64, d=6):
    """A loss 1/2 w^T H w + b^T w of one parameter."""
    a = torch.randn(d, d, dtype=F64)
    h, b = (a @ a.T / d + torch.eye(d, dtype=F64)).to(dtype), torch.randn(d, dtype=F64).to(dtype)
    w = torch.nn.Parameter(torch.randn(d, dtype=F64).to(dtype))
    return w, h, lambda: 0.5 * w @ h @ w + b @ w


def closure_of(optimizer, loss_of, seen=None):
    def closure():
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of()
        loss.backward()
        if seen is not None:
            seen.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])
        return loss

    return closure


def den_of(optimizer, w):
    """den as docs/theory.md, A.1 has it, from the states as they are."""
    state, group = optimizer.state[w], optimizer.param_groups[0]
    if isinstance(optimizer, precond.GaussNewton):
        h = state["curvature"] / (1 - group["betas"][1] ** float(state["step"])) + group["eps"]
        return h.sqrt() if group["power"] == -0.5 else h
    if isinstance(optimizer, precond.Adam):
        v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        return (v / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]
    if "sum" in state:
        return state["sum"].sqrt() + group["eps"]
    if "square_avg" in state:
        variance = state["square_avg"] - (state["grad_avg"] ** 2 if group["centered"] else 0.0)
        return variance.sqrt() + group["eps"]
    return torch.ones_like(w)


@bases
def test_the_step_is_on_the_gradient_of_the_penalised_loss(cls, kwargs):
    """For a quadratic the two gradients give g + rho H P P^T g exactly: docs/theory.md, A.2.3."""
    w, h, loss_of = quadratic()
    other = torch.nn.Parameter(w.detach().clone())
    base, plain = cls([w], lr=0.05, **kwargs), cls([other], lr=0.05, **kwargs)
    optimizer = precond.GradientRegularizer(base, rho=0.3, radius=0.1)
    for step in range(6):
        with torch.enable_grad():
            w.grad = None
            loss_of().backward()
        g = w.grad.clone()
        has_p = cls is precond.SGD or step > 0
        other.grad = g + 0.3 * h @ (g / den_of(base, w)).detach() if has_p else g
        plain.step()
        optimizer.step(closure_of(optimizer, loss_of))
        torch.testing.assert_close(w.grad, other.grad, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(w, other, rtol=1e-10, atol=1e-10)


def test_it_descends_on_the_penalty_in_z():
    """With P frozen: the gradient of rho / 2 |P^T grad L|^2 by autograd, the loss not quadratic; the error is O(r)."""
    torch.manual_seed(1)
    w = torch.nn.Parameter(torch.randn(5, dtype=F64))
    loss_of = lambda: (w**4).sum() / 4 + w.prod()  # noqa: E731
    first, errors = torch.randn(5, dtype=F64), []
    for radius in (1e-2, 1e-4, 1e-6):
        v = torch.nn.Parameter(w.detach().clone())
        base = precond.AdamW([v], lr=0.0)
        v.grad = first.clone()
        base.step()
        den = den_of(base, v)
        loss_v = lambda v=v: (v**4).sum() / 4 + v.prod()  # noqa: E731
        (g,) = torch.autograd.grad(loss_v(), v, create_graph=True)
        (exact,) = torch.autograd.grad(loss_v() + 0.5 * 0.2 * (g * g / den).sum(), v)
        optimizer = precond.GradientRegularizer(base, rho=0.2, radius=radius)
        optimizer.step(closure_of(optimizer, loss_v))
        errors.append(((v.grad - exact).norm() / exact.norm()).item())
    assert loss_of().isfinite()
    assert errors[0] < 0.2
    assert errors[1] < 2e-2 * errors[0]
    assert errors[2] < 2e-2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_format", [None, "split24", "split32", "stochastic"])
@pytest.mark.parametrize("make", ["random", "nasty"])
def test_parameters_come_back_bit_for_bit(dtype, weight_format, make):
    """And what a split weight has beside it stays: the step is that of base on the same gradient."""
    torch.manual_seed(3)
    values = (nasty_values(4096) if make == "nasty" else random_values((4096,))).to(dtype).view(16, 256)
    kwargs = dict(lr=1e-2, weight_format=weight_format, state_format="int8")
    params = [torch.nn.Parameter(values.clone()) for _ in range(2)]
    base, plain = (precond.AdamW([p], **kwargs) for p in params)
    optimizer = precond.GradientRegularizer(base, rho=0.1, radius=0.1)
    gradients = [random_values(values.shape, dtype) for _ in range(6)]
    gradients.reverse()
    seen = []

    def closure():
        seen.append(params[0].detach().clone())
        params[0].grad = gradients[len(seen) % 6].clone()

    for step in range(3):
        before = params[0].detach().clone()
        optimizer.step(closure)
        params[1].grad = params[0].grad
        plain.step()
        assert bits_equal(params[0].detach(), params[1].detach())
        if step:
            assert bits_equal(seen[-2], before)
            moved = before.isfinite() & (before.abs() < 100)
            assert not torch.equal(seen[-1][moved], before[moved])
    assert base.state[params[0]].keys() == plain.state[params[1]].keys()
    for name, value in base.state[params[0]].items():
        assert name in ("key", "step") or torch.equal(value, plain.state[params[1]][name]), name


def test_coordinates_that_never_had_a_gradient_are_not_moved():
    w = torch.nn.Parameter(torch.ones(4))
    base = precond.AdamW([w], lr=1e-2)
    w.grad = torch.tensor([1.0, 1.0, 0.0, 0.0])
    base.step()
    optimizer = precond.GradientRegularizer(base, rho=0.1, radius=0.1)
    seen = []

    def closure():
        seen.append(w.detach().clone())
        w.grad = torch.ones(4)

    optimizer.step(closure)
    assert (seen[1] - seen[0] > 0.01).tolist() == [True, True, False, False]
    assert torch.equal(seen[0][2:], seen[1][2:])


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("cls", [precond.SGD, precond.AdamW])
def test_triton_and_the_cpu_agree(cls):
    results = []
    for backend in ("cpu", "triton"):
        torch.manual_seed(0)
        w, _, loss_of = quadratic(torch.float32, 70)
        optimizer = precond.GradientRegularizer(cls([w], lr=1e-2, backend=backend), rho=0.1)
        for _ in range(3):
            optimizer.step(closure_of(optimizer, loss_of))
        results.append(w.detach())
    assert bits_equal(*results)


def test_maximize_climbs_the_penalised_loss():
    """Ascent on L is descent on -L, whose regularised gradient is -(g - rho H g)."""
    w, h, loss_of = quadratic()
    loss_of().backward()
    start, g = w.detach().clone(), w.grad.clone()
    optimizer = precond.GradientRegularizer(precond.SGD([w], lr=0.1, maximize=True), rho=0.3, radius=0.1)
    optimizer.step(closure_of(optimizer, loss_of))
    torch.testing.assert_close(w.detach(), start + 0.1 * (g - 0.3 * h @ g))


def test_a_closure_runs_twice_and_its_first_loss_is_returned():
    w, _, loss_of = quadratic()
    optimizer = precond.GradientRegularizer(precond.SGD([w], lr=0.1), rho=0.3)
    seen = []
    before = loss_of().item()
    assert optimizer.step(closure_of(optimizer, loss_of, seen)).item() == before
    assert len(seen) == 2
    assert not torch.equal(seen[0][0], seen[1][0])
    still = precond.GradientRegularizer(precond.SGD([w], lr=0.1), rho=0.0)
    seen.clear()
    still.step(closure_of(still, loss_of, seen))
    assert len(seen) == 1


def test_it_behaves_as_an_optimizer():
    w, _, loss_of = quadratic()
    optimizer = precond.GradientRegularizer(precond.AdamW([w], lr=0.1), rho=0.3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, loss_of))
        scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == 0.0125
    saved = copy.deepcopy(optimizer.state_dict())
    assert precond.AdamW([w]).load_state_dict(saved) is None
    results = []
    for other in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (v,) = other.param_groups[0]["params"]
        v.grad = torch.ones_like(v)
        other.base.step()
        results.append(v.detach())
    assert all(torch.equal(results[0], result) for result in results)
    assert optimizer.rho == 0.3


def test_errors_say_what_was_expected():
    w = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(TypeError, match="base must be an optimizer of precond, got SGD"):
        precond.GradientRegularizer(torch.optim.SGD([w]))
    with pytest.raises(ValueError, match="rho must be >= 0, got -1"):
        precond.GradientRegularizer(precond.SGD([w]), rho=-1)
    with pytest.raises(ValueError, match="radius must be > 0, got 0"):
        precond.GradientRegularizer(precond.SGD([w]), radius=0)
    with pytest.raises(RuntimeError, match="needs a closure"):
        precond.GradientRegularizer(precond.SGD([w])).step()
    soap = precond.GradientRegularizer(precond.SOAP([w]))

    def closure():
        w.grad = torch.ones(2, 2)

    with pytest.raises(TypeError, match="base must have no basis, got a SOAP"):
        soap.step(closure)


@pytest.mark.parametrize("granularity", ["entry", "tensor"])
def test_a_split_weight_keeps_what_it_lacks_of_its_master(granularity):
    """In one pass and in two: that the weight was moved and moved back is no writing by somebody else."""
    w = torch.nn.Parameter(torch.randn(8, 8).bfloat16())
    base = precond.DualDescent([w], lr=1e-3, granularity=granularity, weight_format="split24")
    optimizer = precond.GradientRegularizer(base)
    closure = closure_of(optimizer, lambda: w.float().square().sum())
    optimizer.step(closure)
    before = base.state[w]["remainder"].clone()
    assert before.any()
    base.param_groups[0]["lr"] = 0.0
    optimizer.step(closure)
    assert torch.equal(base.state[w]["remainder"], before)


@bases
def test_a_complex_parameter_is_two_real_ones(cls, kwargs):
    """In steps whose second gradient is taken elsewhere: P P^T is that of real and imaginary parts."""
    w = torch.nn.Parameter(torch.complex(torch.randn(5, dtype=F64), torch.randn(5, dtype=F64)))
    x = torch.nn.Parameter(torch.view_as_real(w.detach()).clone())
    for p, as_complex in ((w, torch.Tensor.clone), (x, torch.view_as_complex)):
        optimizer = precond.GradientRegularizer(cls([p], lr=0.05, **kwargs), rho=0.3, radius=0.1)
        for _ in range(4):
            optimizer.step(closure_of(optimizer, lambda p=p, f=as_complex: (f(p).exp() * f(p)).abs().square().sum()))
    torch.testing.assert_close(torch.view_as_real(w.detach()), x.detach(), rtol=1e-12, atol=0)


# Micro-batches.

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(5), dtype=F64)
MICRO = {
    # How a closure of the whole batch is written: whether it zeroes gradients, and whether somebody did before the step.
    "none inside": (dict(set_to_none=True), None),
    "zero inside": (dict(set_to_none=False), None),
    "none before": (None, dict(set_to_none=True)),
    "zero before": (None, dict(set_to_none=False)),
    "both": (dict(set_to_none=False), dict(set_to_none=False)),
}


def net_of(cls=precond.AdamW, **kwargs):
    torch.manual_seed(2)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()
    base = cls(net.parameters(), **{"lr": 0.05, **kwargs})
    return net, precond.GradientRegularizer(base, rho=0.2, radius=0.05)


def loss_of(net, rows):
    return net(X[rows]).square().sum() / len(X)


def full_batch(net, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, slice(None))
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("way", MICRO)
@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph=True")
def test_a_closure_may_loop_over_micro_batches(way, create_graph):
    inside, before = MICRO[way]
    (net, optimizer), (twin, whole) = net_of(), net_of()

    def closure():
        if inside is not None:
            optimizer.zero_grad(**inside)
        total = 0.0
        for begin in range(0, 12, 4):
            loss = loss_of(net, slice(begin, begin + 4))
            loss.backward(create_graph=create_graph)
            total += loss.item()
        return total

    for _ in range(4):
        if before is not None:
            optimizer.zero_grad(**before)
        value = optimizer.step(closure)
        assert value == pytest.approx(whole.step(full_batch(twin, whole)).item())
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    if create_graph:
        for p in net.parameters():
            p.grad = None


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("touched", ["all", "other layers"])
@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph=True")
def test_earlier_micro_batches_are_refused_with_everything_as_it_was(parts, create_graph, touched):
    net, optimizer = net_of()
    optimizer.step(full_batch(net, optimizer))  # P is known from here on
    optimizer.zero_grad()
    if touched == "all":
        loss_of(net, slice(0, 4)).backward()
    else:
        net[0](X[:4]).square().sum().backward()  # gradients that the closure does not touch

    def closure():
        for rows in torch.arange(4, 12).chunk(parts):
            loss = loss_of(net, rows) if touched == "all" else net[2](X[rows, :5]).square().sum()
            loss.backward(create_graph=create_graph)

    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    gradients = [(p.grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()]
    with pytest.raises(RuntimeError, match=r"must evaluate all micro-batches, got .* call zero_grad before"):
        optimizer.step(closure)
    for p, (grad, values) in zip(net.parameters(), gradients, strict=True):
        assert p.grad is grad
        assert grad is None or torch.equal(grad, values)
    assert all(map(torch.equal, net.state_dict().values(), before[0].values()))
    assert str(optimizer.state_dict()) == str(before[1])
    optimizer.step(full_batch(net, optimizer))
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in net.parameters())


@pytest.mark.parametrize("parts", [1, 3])
def test_earlier_gradients_of_linear_losses_are_added(parts):
    """Without curvature there is nothing to evaluate again, and the step is that of base."""
    w, v = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer, plain = precond.GradientRegularizer(precond.SGD([w], lr=0.1)), precond.SGD([v], lr=0.1)
    factors = torch.tensor([[0.1, 0.7, -3.0, 1e-3], [0.3, 11.0, 0.4, 0.5], [0.9, 0.6, -0.4, 1e4]])
    for _ in range(3):
        optimizer.zero_grad()
        plain.zero_grad()
        (0.5 * w).sum().backward()

        def closure():
            for factor in factors[:parts]:
                (factor * w).sum().backward()

        optimizer.step(closure)
        (0.5 * v).sum().backward()
        for factor in factors[:parts]:
            (factor * v).sum().backward()
        plain.step()
        assert torch.equal(w, v)


def test_gradients_of_the_last_step_are_not_added_in_silence():
    """A closure that never zeroes them."""
    net, optimizer = net_of()

    def closure():
        loss_of(net, slice(None)).backward()

    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="the closure must evaluate all micro-batches"):
        optimizer.step(closure)


def test_a_closure_may_assign_gradients():
    (net, optimizer), (twin, whole) = net_of(), net_of()

    def closure():
        gradients = torch.autograd.grad(loss_of(net, slice(None)), list(net.parameters()))
        for p, g in zip(net.parameters(), gradients, strict=True):
            if p.grad is None:
                p.grad = g
            else:
                p.grad.copy_(g)

    for _ in range(3):
        optimizer.step(closure)
        whole.step(full_batch(twin, whole))
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


@pytest.mark.parametrize("at", [1, 2])
def test_a_closure_that_fails_leaves_parameters_and_gradients(at):
    net, optimizer = net_of()
    optimizer.step(full_batch(net, optimizer))
    calls = []

    def closure():
        full_batch(net, optimizer)()
        calls.append(1)
        if len(calls) == at:
            raise KeyError("no loss")

    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    with pytest.raises(KeyError, match="no loss"):
        optimizer.step(closure)
    assert all(map(torch.equal, net.state_dict().values(), before[0].values()))
    assert str(optimizer.state_dict()) == str(before[1])


def test_watching_gradients_does_not_compile_the_model_again():
    net, optimizer = net_of()
    compiled = torch.compile(net.float(), backend="eager")
    x = X.float()

    def closure():
        optimizer.zero_grad()
        compiled(x).square().mean().backward()

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            optimizer.step(closure)


# Steps without a closure.


def test_a_step_without_a_closure_only_makes_states():
    net, optimizer = net_of()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()
    assert not optimizer.state
    optimizer.param_groups[0]["lr"] = 0.0
    assert optimizer.step() is None
    assert {len(state) for state in optimizer.state.values()} == {3}
    assert all(float(state["step"]) == 0.0 for state in optimizer.state.values())
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()
