"""Batch normalisation preconditioning is docs/theory.md, A.3, in float64: of every kind of layer, in z, for condition numbers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bnp import F64, LAYERS, channel_of, inputs, layer_of, loss_of, relative
from torch import nn
from torch.nn import functional as F

import precond
from precond.bnp import precondition_gradients

layers = pytest.mark.parametrize("name", LAYERS)


def statistics(layer, x):
    """Per channel, as one would write it down."""
    values = x.movedim(channel_of(layer, x.shape), 0).reshape(layer.weight.shape[1] * getattr(layer, "groups", 1), -1)
    return values.mean(1), values.var(1, correction=0)


def columns(layer, values):
    """A number per channel as a row of the im2col matrix has it, for every output."""
    outputs, per_group = layer.weight.shape[:2]
    taps = math.prod(layer.weight.shape[2:])
    of_group = values.view(-1, per_group).repeat_interleave(taps, 1)
    return of_group.repeat_interleave(outputs // of_group.shape[0], 0)


def explicit_p(mean, s):
    """P for one output: U D in the variables (b, w)."""
    size = mean.numel() + 1
    U = torch.eye(size, dtype=F64)
    U[0, 1:] = -mean
    return U @ torch.diag(torch.cat([torch.ones(1, dtype=F64), 1 / s]))


def expected_q2(layer, x):
    """m / n of n samples: rows of a dense layer, images of a convolution, whose losses sum over at least its positions."""
    m = layer.weight[0].numel()
    if layer.weight.dim() == 2:
        return max(m * layer.weight.shape[1] / x.numel(), 1.0)
    images = x if x.dim() == layer.weight.dim() else x[None]
    return max(m / len(images), layer(images)[0, 0].numel())


@layers
def test_a_step_of_sgd_is_p_p_transposed_g(name):
    layer, shape = layer_of(name)
    x = inputs(shape, channel_of(layer, shape))
    opt = precond.BNP(layer, torch.optim.SGD(layer.parameters(), lr=0.1), stat_momentum=0.0, eps1=0.02, eps2=1e-3)
    loss_of(layer(x)).backward()
    before = [p.detach().clone() for p in (layer.weight, layer.bias)]
    opt.step()
    mean, var = statistics(layer, x)
    s = (var + 0.02 * var.max() + 1e-3).sqrt()
    q2 = expected_q2(layer, x)
    assert ("few_rows" in name or "one" in name or "conv" in name) <= (q2 > 1)
    for i, (mu, scale) in enumerate(zip(columns(layer, mean), columns(layer, s), strict=True)):
        P = explicit_p(mu, scale)
        g = torch.cat([layer.bias.grad[i : i + 1], layer.weight.grad[i].flatten()])
        moved = torch.cat([(layer.bias - before[1])[i : i + 1], (layer.weight - before[0])[i].flatten()])
        assert relative(moved, -0.1 / q2 * P @ P.T @ g) <= 1e-9


def stepped_in_z(layer, x, mean, s, make, steps, penalty=0.0):
    """Any optimizer on z itself, where the layer sees standardised inputs; the parameters that z stands for."""
    shape = [1] * x.dim()
    shape[channel_of(layer, x.shape)] = -1
    standardised = (x - mean.view(shape)) / s.view(shape)
    mu, scale = (columns(layer, v).view_as(layer.weight) for v in (mean, s))
    weight, bias = layer.weight.detach(), layer.bias.detach()
    zW = nn.Parameter(weight * scale)
    zb = nn.Parameter(bias + (weight * mu).flatten(1).sum(1))

    def p():
        w = zW / scale
        return w, zb - (w * mu).flatten(1).sum(1)

    opt = make([zW, zb])
    for _ in range(steps):
        opt.zero_grad()
        linear = F.linear if isinstance(layer, nn.Linear) else layer._conv_forward
        y = linear(standardised, zW, zb)
        loss = loss_of(y)
        if penalty:
            loss = loss + penalty / 2 * sum(v.square().sum() for v in p())
        loss.backward()
        opt.step()
    return [v.detach() for v in p()], zW.detach()


def frozen(layer, base, x, **kwargs):
    """A BNP whose statistics are those of x and stay so."""
    opt = precond.BNP(layer, base, stat_momentum=1.0, **kwargs)
    mean, var = statistics(layer, x)
    opt.own[layer.weight] = {"mean": mean, "var": var, "rows": 1, "samples": 1}
    return opt, mean, (var + opt.eps1 * var.max() + opt.eps2).sqrt()


def train(layer, opt, x, steps):
    for _ in range(steps):
        opt.zero_grad()
        loss_of(layer(x)).backward()
        opt.step()


@layers
@pytest.mark.parametrize("compose", ["gradient", "direction"])
def test_steps_are_gradient_descent_on_standardised_inputs(name, compose):
    layer, shape = layer_of(name)
    x = inputs(shape, channel_of(layer, shape))
    lr, start = 0.1, copy.deepcopy(layer)
    opt, mean, s = frozen(layer, torch.optim.SGD(layer.parameters(), lr=lr), x, compose=compose)
    train(layer, opt, x, 5)
    if compose == "gradient":
        lr /= expected_q2(layer, x)
    (weight, bias), _ = stepped_in_z(start, x, mean, s, lambda ps: torch.optim.SGD(ps, lr=lr), 5)
    assert relative(layer.weight, weight) <= 1e-9
    assert relative(layer.bias, bias) <= 1e-9
    assert relative(start.bias, bias) > 1e-4


DIRECTIONS = {
    # A base, the same in z, and a penalty on p that the latter lacks.
    "adam": (torch.optim.Adam, dict(lr=0.02), dict(lr=0.02), 0.0),
    "adamw": (torch.optim.AdamW, dict(lr=0.02, weight_decay=0.5), dict(lr=0.02, weight_decay=0.5), 0.0),
    "ours": (precond.AdamW, dict(lr=0.02, weight_decay=0.5), dict(lr=0.02, weight_decay=0.5), 0.0),
    "l1": (precond.AdamW, dict(lr=0.05, l1_decay=0.3), dict(lr=0.05, l1_decay=0.3), 0.0),
    "momentum": (precond.SGDW, dict(lr=0.1, momentum=0.9), dict(lr=0.1, momentum=0.9), 0.0),
    "coupled": (torch.optim.Adam, dict(lr=0.02, weight_decay=0.4), dict(lr=0.02), 0.4),
    "coupled_ours": (precond.RMSprop, dict(lr=0.02, weight_decay=0.4), dict(lr=0.02), 0.4),
    "coupled_maximize": (
        torch.optim.Adam,
        dict(lr=0.02, weight_decay=0.4, maximize=True),
        dict(lr=0.02, maximize=True),
        -0.4,
    ),
}


@pytest.mark.parametrize("case", DIRECTIONS)
@pytest.mark.parametrize("name", ["linear_few_rows", "conv2d_groups"])
def test_a_direction_is_a_step_of_the_base_in_z(case, name):
    cls, kwargs, in_z, penalty = DIRECTIONS[case]
    layer, shape = layer_of(name)
    x = inputs(shape, channel_of(layer, shape))
    start = copy.deepcopy(layer)
    opt, mean, s = frozen(layer, cls(layer.parameters(), **kwargs), x, compose="direction")
    train(layer, opt, x, 6)
    (weight, bias), zW = stepped_in_z(start, x, mean, s, lambda ps: cls(ps, **in_z), 6, penalty)
    assert relative(layer.weight, weight) <= 1e-9
    assert relative(layer.bias, bias) <= 1e-9
    assert torch.equal(layer.weight == 0, zW == 0)
    assert (case == "l1") == bool((zW == 0).any())


def test_an_l1_decay_in_z_makes_exact_zeros_of_weights():
    layer = nn.Linear(100, 20)
    base = precond.SGDW([layer.weight], lr=1.0, weight_decay=0.0, l1_decay=1e3)
    opt = precond.BNP(layer, base, stat_momentum=0.0, compose="direction")
    layer(torch.randn(200, 100) * torch.linspace(0.1, 3.0, 100)).mean().backward()
    opt.step()
    assert torch.equal(layer.weight, torch.zeros(20, 100))


def test_gradients_given_to_adam_keep_only_the_centring():
    """docs/theory.md, A.3.5: the first step of Adam is a sign, whatever s2 is, but not whatever mu is."""
    ends = []
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        layer, shape = layer_of("linear", bias=False)
        opt, _, _ = frozen(layer, torch.optim.Adam(layer.parameters(), eps=1e-30), inputs(shape, 1))
        opt.own[layer.weight]["var"] = opt.own[layer.weight]["var"] * torch.linspace(1.0, scale, 5, dtype=F64)
        train(layer, opt, inputs(shape, 1), 1)
        ends.append(layer.weight.detach())
    assert relative(*ends) <= 1e-12


def kappa(a):
    s = torch.linalg.svdvals(a)
    return (s[0] / s[-1]).item()


def best_scaling(a):
    """The smallest condition number of a with scaled columns, by descent on the logarithms."""
    log_d = (-a.norm(dim=0).log()).requires_grad_()
    gram, best = a.T @ a, math.inf
    opt = torch.optim.Adam([log_d])
    for i in range(300):
        d = log_d.exp()
        eigenvalues = torch.linalg.eigvalsh(d[:, None] * gram * d)
        value = (eigenvalues[-1] / eigenvalues[0]).log()
        best = min(best, math.exp(value.item() / 2))
        opt.zero_grad()
        value.backward()
        opt.param_groups[0]["lr"] = 0.02 * (1 - i / 300)
        opt.step()
    return best


KAPPAS = {
    # docs/theory.md, A.3.6: of Hhat, Hhat U, Hhat U D and the best diagonal scaling, and the factor by which random numbers vary.
    "independent": (5.9e4, 9.7e3, 1.304, 1.284, 1.03),
    "correlated": (9.5e4, 1.9e4, 4.40, 3.985, 2.0),
}


@pytest.mark.parametrize("case", KAPPAS)
def test_p_brings_the_condition_number_near_the_best_scaling(case):
    N, m = 1000, 20
    generator = torch.Generator().manual_seed(0)
    sigma = torch.logspace(-2, 2, m, dtype=F64)
    H = torch.randn(N, m, generator=generator, dtype=F64)
    if case == "correlated":
        H = H @ (torch.eye(m, dtype=F64) + 0.5 * torch.randn(m, m, generator=generator, dtype=F64) / math.sqrt(m))
    H = H * sigma + torch.linspace(-5, 5, m, dtype=F64) * sigma

    layer = nn.Linear(m, 1, dtype=F64)
    opt = precond.BNP(layer, torch.optim.SGD(layer.parameters()), stat_momentum=0.0, eps1=0.0, eps2=1e-12)
    layer(H).sum().backward()
    opt.step()
    own = opt.own[layer.weight]
    extended = torch.cat([torch.ones(N, 1, dtype=F64), H], 1)
    U = explicit_p(own["mean"], torch.ones(m, dtype=F64))
    P = explicit_p(own["mean"], own["var"].sqrt())
    best = best_scaling(extended @ U)
    measured = [kappa(extended), kappa(extended @ U), kappa(extended @ P), best]
    *expected, varies = KAPPAS[case]
    assert all(1 / varies <= a / b <= varies for a, b in zip(measured, expected, strict=True))
    assert measured[0] > 3 * measured[1] > 1000 * measured[2]
    assert 1.0 <= measured[2] / best <= math.sqrt(m + 1)


def test_least_squares_take_tens_of_steps_instead_of_billions():
    """docs/theory.md, A.3.6: the rate of the preconditioned Hessian's condition number, 1.7 instead of 3.5e9."""
    generator = torch.Generator().manual_seed(0)
    sigma = torch.logspace(-2, 2, 20, dtype=F64)
    H = torch.randn(1000, 20, generator=generator, dtype=F64) * sigma + torch.linspace(-5, 5, 20, dtype=F64) * sigma
    layer, truth = nn.Linear(20, 1, dtype=F64), nn.Linear(20, 1, dtype=F64)
    base = torch.optim.SGD(layer.parameters(), lr=1.0)
    opt = precond.BNP(layer, base, stat_momentum=0.0, eps1=0.0, eps2=1e-12)
    losses = []
    for _ in range(30):
        opt.zero_grad()
        loss = (layer(H) - truth(H).detach()).square().mean() / 2
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] <= 1e-12 * losses[0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    shape=st.sampled_from([(3, 7), (1, 1), (4, 3, 2), (6, 2, 3, 3), (2, 3, 1, 2, 2)]),
    groups=st.sampled_from([1, 2]),
    decades=st.floats(0.0, 6.0),
    inv_q2=st.floats(1e-3, 1.0),
)
def test_every_transformed_gradient_is_an_ascent_direction(seed, shape, groups, decades, inv_q2):
    """<g, P P^T g / q^2> is the square of P^T g / q."""
    groups = groups if shape[0] % groups == 0 else 1
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=F64)

    gW, gb = normal(*shape), normal(shape[0])
    mean = 10 * normal(groups * shape[1])
    s2 = 10 ** ((torch.rand(groups * shape[1], generator=generator, dtype=F64) - 0.5) * decades)
    GW, Gb = precondition_gradients(gW, gb, mean, 1 / s2, inv_q2)
    per_row = [v.view(groups, 1, -1).expand(-1, shape[0] // groups, -1).reshape(shape[0], -1) for v in (mean, s2)]
    mu, s2 = (v.view(*shape[:2], *[1] * (len(shape) - 2)) for v in per_row)
    zW = (gW - mu * gb.view(-1, *[1] * (len(shape) - 1))) / s2.sqrt()
    squared = (zW.square().sum() + gb.square().sum()) * inv_q2
    inner = (gW * GW).sum() + (gb * Gb).sum()
    size = (gW * GW).abs().sum() + (gb * Gb).abs().sum()
    assert squared > 0
    assert abs(inner - squared) <= 1e-12 * (size + squared)


# What is a layer, and with which bias.


def moved_by(layer, params, x, **kwargs):
    opt = precond.BNP(layer, torch.optim.SGD(params, lr=1.0), stat_momentum=0.0, **kwargs)
    before = copy.deepcopy(layer.state_dict())
    layer.zero_grad()
    loss_of(layer(x)).backward()
    opt.step()
    return {name: value - before[name] for name, value in layer.state_dict().items()}


@pytest.mark.parametrize("name", ["linear_few_rows", "conv2d_groups"])
@pytest.mark.parametrize("compose", ["gradient", "direction"])
def test_without_a_bias_to_move_only_the_division_is_left(name, compose):
    layer, shape = layer_of(name)
    x = inputs(shape, 1)
    _, var = statistics(layer, x)
    s2 = var + 1e-2 * var.max() + 1e-4
    q2 = expected_q2(layer, x) if compose == "gradient" else 1.0
    loss_of(layer(x)).backward()
    expected = -layer.weight.grad / (columns(layer, s2).view_as(layer.weight) * q2)
    one = copy.deepcopy(layer)
    assert relative(moved_by(one, [one.weight], x, compose=compose)["weight"], expected) <= 1e-9
    two = copy.deepcopy(layer)
    two.bias.requires_grad_(False)
    moved = moved_by(two, two.parameters(), x, compose=compose)
    assert relative(moved["weight"], expected) <= 1e-9
    assert not moved["bias"].any()


def test_everything_else_takes_the_plain_step():
    """Norms, transposed convolutions, forwards of one's own, and layers whose forward never runs."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return F.linear(x, 2 * self.weight, self.bias)

    net = nn.Sequential(
        nn.ConvTranspose1d(3, 4, 1),
        nn.BatchNorm1d(4),
        nn.MultiheadAttention(5, 1, batch_first=True),
        Doubled(5, 5),
        nn.Linear(5, 5),
    )
    twin = copy.deepcopy(net)
    opts = [precond.BNP(net, torch.optim.SGD(net.parameters(), lr=0.1)), torch.optim.SGD(twin.parameters(), lr=0.1)]
    x = torch.randn(2, 3, 5)
    for model, opt in zip((net, twin), opts, strict=True):
        y = model[1](model[0](x))
        loss_of(model[4](model[3](model[2](y, y, y)[0]))).backward()
        opt.step()
    equal = {name for name, p in net.named_parameters() if torch.equal(p, twin.get_parameter(name))}
    assert equal == {name for name, _ in net.named_parameters()} - {"4.weight", "4.bias"}


def test_layers_that_share_a_weight_are_one():
    """Their inputs are pooled; one bias for both centres, two do not."""
    for shared in (True, False):
        a, b = nn.Linear(4, 4, dtype=F64), nn.Linear(4, 4, dtype=F64)
        b.weight = a.weight
        if shared:
            b.bias = a.bias
        net = nn.Sequential(a, b)
        x = inputs((9, 4), 1)
        middle = a(x).detach()
        opt = precond.BNP(net, torch.optim.SGD(net.parameters(), lr=1.0), stat_momentum=0.0)
        before = a.bias.detach().clone()
        loss_of(net(x)).backward()
        opt.step()
        mean, var = statistics(a, torch.cat([x, middle]))
        torch.testing.assert_close(opt.own[a.weight]["mean"], mean)
        torch.testing.assert_close(opt.own[a.weight]["var"], var)
        assert opt.own[a.weight]["rows"] == 18
        assert torch.equal(a.bias, before - a.bias.grad) != shared


def test_a_layer_may_join_later():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    opt = precond.BNP(net, torch.optim.SGD(net[0].parameters(), lr=0.1))
    net(torch.randn(4, 3)).sum().backward()
    opt.add_param_group({"params": list(net[1].parameters())})
    opt.step()
    assert set(opt.own) == {net[0].weight}
    net(torch.randn(4, 3)).sum().backward()
    opt.step()
    assert set(opt.own) == {net[0].weight, net[1].weight}
    assert [len(layer._forward_hooks) for layer in net] == [1, 1]
