"""Batch normalisation preconditioning: docs/theory.md, A.3 in float64, the kernel, and being an optimizer around another. One
file, because the same layers and inputs serve all of it.
"""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import bits_equal
from support.ranks import on_two_ranks
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import precond
from precond._core import backend as _backend
from precond._wrappers import standardised as _standardised
from precond.bnp import precondition_gradients

F64 = torch.float64

#: A layer without padding, and the shape of its inputs.
LAYERS = {
    "linear": (lambda **k: nn.Linear(5, 3, **k), (12, 5)),
    "linear_few_rows": (lambda **k: nn.Linear(40, 3, **k), (6, 40)),
    "linear_leading": (lambda **k: nn.Linear(5, 3, **k), (3, 4, 2, 5)),
    "linear_one_row": (lambda **k: nn.Linear(5, 3, **k), (5,)),
    "conv1d": (lambda **k: nn.Conv1d(4, 3, 3, stride=2, **k), (6, 4, 9)),
    "conv1d_unbatched": (lambda **k: nn.Conv1d(4, 3, 3, **k), (4, 9)),
    "conv2d": (lambda **k: nn.Conv2d(4, 6, (3, 2), dilation=2, **k), (3, 4, 9, 8)),
    "conv2d_few_rows": (lambda **k: nn.Conv2d(4, 6, 3, **k), (1, 4, 4, 4)),
    "conv2d_groups": (lambda **k: nn.Conv2d(4, 6, 3, groups=2, **k), (3, 4, 5, 6)),
    "conv2d_depthwise": (lambda **k: nn.Conv2d(4, 8, 3, groups=4, **k), (3, 4, 5, 6)),
    "conv3d": (lambda **k: nn.Conv3d(2, 3, 2, **k), (3, 2, 4, 4, 4)),
}
layers = pytest.mark.parametrize("name", LAYERS)


def layer_of(name, **kwargs):
    make, shape = LAYERS[name]
    return make(dtype=F64, **kwargs), shape


def inputs(shape, channel, seed=0):
    """Inputs whose channels have scales over a decade and means of two deviations."""
    generator = torch.Generator().manual_seed(seed)
    width = shape[channel]
    scales = torch.logspace(-0.5, 0.5, width, dtype=F64)
    x = torch.randn(shape, generator=generator, dtype=F64).movedim(channel, -1)
    return ((x + torch.linspace(-2, 2, width, dtype=F64)) * scales).movedim(-1, channel)


def channel_of(layer, shape):
    return len(shape) + 1 - layer.weight.dim()


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


def loss_of(y):
    return torch.tanh(y - 0.3).square().mean() + 0.1 * y.sin().mean()


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


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


# Statistics.


def small_net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 8), nn.Linear(8, 3)
    ).to(dtype)


def graph(node):
    return node and [node.name(), [graph(parent) for parent, _ in node.next_functions]]


def test_the_forward_is_unchanged_to_the_bit():
    net, x = small_net(), torch.randn(5, 2, 4, 4)
    plain = net(x)
    plain.square().mean().backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    precond_opt = precond.BNP(net, torch.optim.SGD(net.parameters()))
    watched = net(x)
    assert torch.equal(plain, watched)
    assert graph(plain.grad_fn) == graph(watched.grad_fn)
    watched.square().mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
    precond_opt.remove()
    assert not any(layer._forward_hooks for layer in net)


def snapshot(opt):
    kept = ("rows", "samples")
    return [
        (tuple(w.shape), own["mean"].tolist(), own["var"].tolist(), *map(own.get, kept)) for w, own in opt.own.items()
    ]


def test_only_training_with_gradients_is_counted():
    ends = []
    for looks in (False, True):
        net = small_net()
        opt = precond.BNP(net, torch.optim.SGD(net.parameters(), lr=0.1))
        for i in range(3):
            opt.zero_grad()
            x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(i))
            net(x).square().mean().backward()
            if looks:
                net.eval()
                net(x + 100).sum()
                net.train()
                with torch.no_grad():
                    net(x - 100)
                with torch.inference_mode():
                    net(x - 50)
                torch.func.functional_call(net, {n: p * 2 for n, p in net.named_parameters()}, (x + 7,))
                torch.func.grad(lambda z: net(z).sum())(x)  # noqa: B023
                copy.deepcopy(net)(x + 3)
            opt.step()
        ends.append((snapshot(opt), [p.tolist() for p in net.parameters()]))
    assert ends[0] == ends[1]


def test_the_running_statistics_are_those_of_all_rows_by_their_weights():
    """Also of batches of one row, which have no variance of their own. The start is a batch of mean 0 and variance 1."""
    layer = nn.Linear(3, 2, dtype=F64)
    opt = precond.BNP(layer, torch.optim.SGD(layer.parameters()), stat_momentum=0.9)
    sizes = (1, 1, 7, 2, 1)
    rows, shares = [torch.tensor([[-1.0] * 3, [1.0] * 3], dtype=F64)], [torch.full((2,), 0.5 * 0.9 ** len(sizes))]
    for seed, size in enumerate(sizes):
        x = inputs((size, 3), 1, seed)
        opt.zero_grad()
        layer(input=x).sum().backward()
        opt.step()
        rows.append(x)
        shares.append(torch.full((size,), 0.1 / size * 0.9 ** (len(sizes) - 1 - seed)))
    x, share = torch.cat(rows), torch.cat(shares).double()
    share /= share.sum()
    mean = share @ x
    torch.testing.assert_close(opt.own[layer.weight]["mean"], mean, rtol=1e-7, atol=0.0)
    torch.testing.assert_close(opt.own[layer.weight]["var"], share @ (x - mean).square(), rtol=1e-7, atol=0.0)


def test_one_row_at_a_time_standardises_as_all_rows_do():
    """Deviations of 0.01 to 100 around a mean of as much: the gradient of a stream is scaled by its variance."""
    sigma = torch.logspace(-2, 2, 5, dtype=F64)
    layer = nn.Linear(5, 1, dtype=F64)
    opt = precond.BNP(layer, torch.optim.SGD(layer.parameters(), lr=0.0), eps1=0.0, eps2=1e-12)
    draw = torch.Generator().manual_seed(3)
    for x in sigma * (1.0 + torch.randn(3000, 1, 5, dtype=F64, generator=draw)):
        opt.zero_grad()
        layer(x).sum().backward()
        opt.step()
    own = opt.own[layer.weight]
    torch.testing.assert_close(own["var"].sqrt() / sigma, torch.ones(5, dtype=F64), rtol=0.25, atol=0.0)
    torch.testing.assert_close(own["mean"] / sigma, torch.ones(5, dtype=F64), rtol=0.25, atol=0.0)


@pytest.mark.parametrize("name", ["linear_few_rows", "conv2d"])
def test_micro_batches_are_one_batch(name):
    """Of different sizes, with the gradient of the whole."""
    x = inputs((11, *LAYERS[name][1][1:]), 1)
    ends = []
    for cuts in ([11], [1, 4, 6]):
        torch.manual_seed(0)
        layer, _ = layer_of(name)
        opt = precond.BNP(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
        for part in x.split(cuts):
            (loss_of(layer(part)) * len(part) / 11).backward()
        opt.step()
        ends.append((layer.weight.detach(), layer.bias.detach(), opt.own[layer.weight]))
    for one, many in zip(ends[0][:2], ends[1][:2], strict=True):
        assert relative(many, one) <= 1e-12
    assert relative(ends[1][2]["var"], ends[0][2]["var"]) <= 1e-12
    assert ends[1][2]["samples"] == 11
    assert ends[1][2]["rows"] == layer(x).numel() // len(layer.weight)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_counts_once(use_reentrant):
    ends = []
    for again in (False, True):
        net = small_net(F64)
        opt = precond.BNP(net, torch.optim.SGD(net.parameters(), lr=0.1))
        for seed in range(3):
            x = inputs((3, 2, 4, 4), 1, seed).requires_grad_()
            y = checkpoint(net, x, use_reentrant=use_reentrant) if again else net(x)
            y.square().mean().backward()
        opt.step()
        ends.append((snapshot(opt), [p.tolist() for p in net.parameters()]))
    assert ends[0] == ends[1]
    assert ends[0][0][0][3] == 3 * 3 * 4 * 4


def test_a_channel_that_is_not_finite_keeps_its_statistics():
    layer = nn.Linear(3, 2)
    opt = precond.BNP(layer, torch.optim.SGD(layer.parameters(), lr=0.0), stat_momentum=0.5)
    for value in (4.0, math.inf):
        layer(torch.tensor([[4.0, value, 0.0], [2.0, 2.0, 0.0]]))
        layer.weight.grad, layer.bias.grad = torch.ones(2, 3), torch.ones(2)
        opt.step()
    assert opt.own[layer.weight]["mean"].tolist() == [2.25, 1.5, 0.0]
    assert opt.own[layer.weight]["var"].tolist() == [2.6875, 3.25, 0.25]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_inputs_are_added_up_in_float32(dtype):
    """A mean of 300 with a deviation of 4: bfloat16 would not see the second."""
    layer = nn.Linear(3, 2).to(dtype)
    opt = precond.BNP(layer, precond.AdamW(layer.parameters(), state_format="fp32"), stat_momentum=0.0)
    x = (300 + 4 * torch.randn(2000, 3)).to(dtype)
    layer(x).float().mean().backward()
    opt.step()
    own = opt.own[layer.weight]
    assert own["mean"].dtype == own["var"].dtype == torch.float32
    torch.testing.assert_close(own["mean"].double(), x.double().mean(0), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(own["var"].double(), x.double().var(0, correction=0), rtol=1e-5, atol=0.0)
    assert layer.weight.dtype == dtype


@pytest.mark.parametrize("shape", [(1, 3), (300_000, 3), (1, 50_000, 3), (2, 3, 300, 300)])
def test_large_inputs_are_centred_piece_by_piece(shape):
    x = inputs(shape, 1).float() if len(shape) == 4 else inputs(shape, -1).float()
    dim = 1 if len(shape) == 4 else len(shape) - 1
    from precond._wrappers.inputs import moments

    count, mean, squares = moments(x, dim, torch.float32)
    values = x.double().movedim(dim, 0).flatten(1)
    assert count == values.shape[1]
    torch.testing.assert_close(mean.double(), values.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares.double() / count, values.var(1, correction=0), rtol=1e-5, atol=1e-12)


# Being an optimizer.

BASES = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01),
    "our_adamw": lambda ps: precond.AdamW(ps, lr=0.01, weight_decay=0.1, max_grad_norm=1.0),
    "our_lion": lambda ps: precond.Lion(ps, lr=0.003),
}


def run(net, opt, steps, start=0):
    for i in range(start, start + steps):
        opt.zero_grad()
        x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(i))
        net(x).square().mean().backward()
        opt.step()
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("compose", ["gradient", "direction"])
def test_a_checkpoint_resumes_to_the_bit(base, compose):
    net = small_net()
    opt = precond.BNP(net, BASES[base](net.parameters()), compose=compose)
    run(net, opt, 3)
    file = io.BytesIO()
    torch.save([net.state_dict(), opt.state_dict()], file)
    expected = run(net, opt, 2, 3)
    file.seek(0)
    weights, states = torch.load(file)
    assert states["state"][0]["bnp_mean"].shape == (2,)
    fresh = small_net()
    other = precond.BNP(fresh, BASES[base](fresh.parameters()), compose=compose)
    run(fresh, other, 1, 9)  # what it has seen is forgotten
    fresh(torch.randn(5, 2, 4, 4))
    fresh.load_state_dict(weights)
    other.load_state_dict(states)
    assert all(bits_equal(p, q) for p, q in zip(run(fresh, other, 2, 3), expected, strict=True))
    assert snapshot(other) == snapshot(opt)


@pytest.mark.parametrize("compose", ["gradient", "direction"])
def test_a_step_leaves_gradients_as_they_are(compose):
    net = small_net()
    opt = precond.BNP(net, torch.optim.Adam(net.parameters()), compose=compose)
    net(torch.randn(5, 2, 4, 4)).square().mean().backward()
    gradients = [(p.grad, p.grad.clone()) for p in net.parameters()]
    opt.step()
    assert all(p.grad is g and torch.equal(g, c) for p, (g, c) in zip(net.parameters(), gradients, strict=True))


def test_a_direction_that_fails_leaves_the_parameters():
    net = small_net()
    opt = precond.BNP(net, torch.optim.SGD(net.parameters(), lr=0.1), compose="direction")
    net(torch.randn(5, 2, 4, 4)).square().mean().backward()
    before = copy.deepcopy(net.state_dict())

    def fails():
        raise KeyError("no step")

    opt.base.step = fails
    with pytest.raises(KeyError):
        opt.step()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_copy_goes_on_alone():
    net = small_net()
    opt = precond.BNP(net, precond.AdamW(net.parameters(), lr=0.01))
    run(net, opt, 2)
    opt.process_group = pytest  # something that can be neither copied nor pickled
    twin, twins = copy.deepcopy((net, opt))
    opt.process_group = None
    assert twins.module is twin
    assert twins.process_group is None
    average = copy.deepcopy(net)
    pickle.loads(pickle.dumps(average))
    before = snapshot(opt)
    expected = run(twin, twins, 2, 2)
    average(torch.randn(5, 2, 4, 4))
    assert snapshot(opt) == before
    assert not opt._pending
    assert all(bits_equal(p, q) for p, q in zip(run(net, opt, 2, 2), expected, strict=True))
    assert snapshot(opt) == snapshot(twins)


def test_hooks_keep_nothing_alive():
    net = small_net()
    precond.BNP(net, torch.optim.SGD(net.parameters()))
    net(torch.randn(5, 2, 4, 4)).sum().backward()  # its optimizer is gone


def test_after_remove_the_statistics_stay():
    net = small_net()
    opt = precond.BNP(net, torch.optim.SGD(net.parameters(), lr=0.1))
    run(net, opt, 1)
    opt.remove()
    before, values = snapshot(opt), [p.detach().clone() for p in net.parameters()]
    after = run(net, opt, 1, 1)
    assert snapshot(opt) == before
    assert not torch.equal(values[0], after[0])
    assert relative(after[0] - values[0], -0.1 * net[0].weight.grad) > 1e-3


def test_closures_and_schedulers_work_as_with_the_base():
    ends = []
    for by_closure in (False, True):
        net = small_net()
        opt = precond.BNP(net, torch.optim.SGD(net.parameters(), lr=0.2))
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
        for i in range(3):
            x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(i))

            def closure(net=net, opt=opt, x=x):
                opt.zero_grad()
                loss = net(x).square().mean()
                loss.backward()
                return loss

            if by_closure:
                assert opt.step(closure) > 0
            else:
                closure()
                assert opt.step() is None
            scheduler.step()
        assert opt.param_groups is opt.base.param_groups
        assert opt.param_groups[0]["lr"] == 0.025
        ends.append((snapshot(opt), [p.tolist() for p in net.parameters()]))
    assert ends[0] == ends[1]


def test_a_scaler_unscales_before_the_step_and_skips_it():
    nets = [small_net(), small_net()]
    opts = [precond.BNP(net, precond.AdamW(net.parameters(), lr=0.01)) for net in nets]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(3):
        x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(i))
        scaler.scale(nets[0](x).square().mean()).backward()
        scaler.step(opts[0])
        scaler.update()
        nets[1](x).square().mean().backward()
        opts[1].step()
        for opt in opts:
            opt.zero_grad()
    # A power of two changes no bit.
    assert all(bits_equal(p.detach(), q.detach()) for p, q in zip(*(net.parameters() for net in nets), strict=True))
    before, weights = snapshot(opts[0]), [p.detach().clone() for p in nets[0].parameters()]
    scaler.scale(nets[0](x).square().mean()).backward()
    nets[0][0].weight.grad[0, 0, 0, 0] = math.inf
    scaler.step(opts[0])
    assert snapshot(opts[0]) == before
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), weights, strict=True))


def test_replicas_pool_their_statistics(tmp_path):
    """Two ranks with half of the rows each are one process with all."""
    code = """
def steps(x, group):
    torch.manual_seed(0)
    head = torch.nn.Unflatten(1, (3, 10)), torch.nn.Conv1d(3, 4, 3), torch.nn.Tanh(), torch.nn.Flatten()
    net = torch.nn.Sequential(*head, torch.nn.Linear(32, 2)).double()
    opt = precond.BNP(net, torch.optim.SGD(net.parameters(), lr=0.1), process_group=group)
    for rows in x.unbind():
        opt.zero_grad()
        net(rows).square().mean().backward()
        if group is not None:
            for p in net.parameters():
                dist.all_reduce(p.grad)
                p.grad /= ranks
        opt.step()
    return [*net.parameters(), *(own["var"] for own in opt.own.values())]
torch.manual_seed(1)
x = 2 + torch.randn(3, 8, 30, dtype=torch.float64)
halves, whole = steps(x[:, 4 * rank : 4 * rank + 4], dist.group.WORLD), steps(x, None)
for a, b in zip(halves, whole, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
"""
    on_two_ranks(code, tmp_path)


# Layers that do nothing.


def linear_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def stepped(net, opt, forward=None):
    opt.zero_grad()
    (net(torch.randn(8, 4) + 5.0) if forward is None else forward()).square().mean().backward()
    opt.step()


def test_assigned_weights_are_found_again():
    """load_state_dict(assign=True), as for a model that was made on the meta device."""
    net, other = linear_net(), linear_net()
    opt, twin = (precond.BNP(m, precond.AdamW(m.parameters()), stat_momentum=0.5) for m in (net, other))
    stepped(net, opt)
    net.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=True)
    opt.param_groups[0]["params"][:] = list(net.parameters())
    opt.state.clear()
    for i in range(3):
        for m, o in ((net, opt), (other, twin)):
            torch.manual_seed(i)
            stepped(m, o)
    assert len(opt.own) == 2
    assert snapshot(opt) == snapshot(twin)
    assert all(map(torch.equal, net.parameters(), other.parameters()))
    assert [len(layer._forward_hooks) for layer in net] == [1, 0, 1]


@pytest.mark.parametrize("seen", [False, True])
def test_weights_that_the_base_does_not_update_are_named(seen):
    net = linear_net()
    opt = precond.BNP(net, precond.SGD(net.parameters(), lr=0.1))
    if seen:
        stepped(net, opt)
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
    with pytest.warns(UserWarning, match="layers 0, 2 have new weights that base does not update: put these into its"):
        stepped(net, opt)
    stepped(net, opt)  # once is enough


def unseen_by_eval(net, opt):
    net.eval()
    stepped(net, opt)


def unseen_by_functional_call(net, opt):
    params = {name: p * 1.0 for name, p in net.named_parameters()}
    stepped(net, opt, lambda: torch.func.functional_call(net, params, (torch.randn(8, 4),)))


def unseen_by_bypass(net, opt):
    def forward():
        x = torch.tanh(F.linear(torch.randn(8, 4), net[0].weight, net[0].bias))
        return F.linear(x, net[2].weight, net[2].bias)

    stepped(net, opt, forward)


@pytest.mark.parametrize("unseen", [unseen_by_eval, unseen_by_functional_call, unseen_by_bypass])
@pytest.mark.parametrize("compose", ["gradient", "direction"])
def test_layers_whose_inputs_nobody_sees_are_named_once(unseen, compose):
    net, twin = linear_net(), linear_net()
    opt = precond.BNP(net, torch.optim.SGD(net.parameters(), lr=0.1), compose=compose)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    torch.manual_seed(1)
    with pytest.warns(
        UserWarning, match="layers 0, 2 have gradients but no inputs were seen, so they take base's plain step"
    ):
        unseen(net, opt)
    torch.manual_seed(1)
    unseen(twin, plain)
    assert all(map(torch.equal, net.parameters(), twin.parameters()))
    unseen(net, opt)  # once is enough
    net.train()
    stepped(net, opt)
    assert len(opt.own) == 2


def test_a_layer_that_is_parametrized_later_is_no_longer_seen():
    """Its weight is computed then, and no parameter."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    opt = precond.BNP(net, precond.SGD(net.parameters(), lr=0.1))
    torch.nn.utils.parametrizations.weight_norm(net[0])
    net(torch.randn(8, 4)).sum().backward()
    seen = {id(weight) for weight in opt._pending}
    assert seen == {id(net[1].weight)}


@pytest.mark.parametrize("first", ["run", "build"])
@pytest.mark.filterwarnings("ignore")  # what Dynamo says of profilers and leaves
def test_a_model_that_was_compiled_before_is_named(first):
    """A model that ran before has no hooks in what was compiled."""
    torch._dynamo.reset()
    net = linear_net()
    compiled = torch.compile(net, backend="eager")
    if first == "run":
        compiled(torch.randn(8, 4) + 5.0).sum().backward()
    opt = precond.BNP(net, precond.SGD(net.parameters(), lr=0.1))
    if first == "run":
        with pytest.warns(UserWarning, match="if torch.compile first ran the model after BNP was built"):
            stepped(compiled, opt)
    else:
        stepped(compiled, opt)
    assert len(opt.own) == (2 if first == "build" else 0)


def test_what_is_meant_to_do_nothing_says_nothing():
    """No gradient, a frozen layer, hooks that were removed, and a step that only makes states."""
    net = linear_net()
    net[0].requires_grad_(False)
    opt = precond.BNP(net, precond.SGD(net.parameters(), lr=0.1))
    opt.step()
    stepped(net, opt)
    assert set(opt.own) == {net[2].weight}
    copied = copy.deepcopy((net, opt))[1]
    assert set(copied.own) == {copied.module[2].weight}
    net[0].requires_grad_(True)
    opt.remove()
    stepped(net, opt)
    assert set(opt.own) == {net[2].weight}
    assert not any(layer._forward_hooks for layer in net)
    group = {"params": [nn.Parameter(torch.ones(2))]}
    opt.add_param_group(group)
    assert not any(layer._forward_hooks for layer in net)


def test_a_layer_is_seen_first_after_a_checkpoint_of_torch_distributed():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    (net, asked), (other, plain) = (
        (m, precond.BNP(m, precond.AdamW(m.parameters()))) for m in (linear_net(), linear_net())
    )
    saved = get_optimizer_state_dict(net, asked)
    state = saved["state"]["0.weight"]
    assert (state["bnp_rows"], state["bnp_mean"].tolist(), state["bnp_var"].tolist()) == (0, [0.0] * 4, [1.0] * 4)
    for m, o in ((net, asked), (other, plain)):
        torch.manual_seed(0)
        stepped(m, o)
    assert snapshot(asked) == snapshot(plain)
    assert all(map(torch.equal, net.parameters(), other.parameters()))


def test_a_checkpoint_from_before_samples_counts_rows_until_the_next_forward():
    layer, shape = layer_of("conv2d_few_rows")
    x = inputs(shape, 1)
    opt = precond.BNP(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
    loss_of(layer(x)).backward()
    opt.step()
    saved = opt.state_dict()
    del saved["state"][0]["bnp_samples"]
    opt.load_state_dict(saved)
    before, g = layer.weight.detach().clone(), layer.weight.grad.clone()
    mean, var = (opt.own[layer.weight][name] for name in ("mean", "var"))
    opt.step()
    s2 = var + 1e-2 * var.max() + 1e-4
    scaled = (g - layer.bias.grad.view(-1, 1, 1, 1) * mean.view(-1, 1, 1)) / s2.view(-1, 1, 1)
    assert relative(before - layer.weight, scaled / (36 / 4)) <= 1e-12
    loss_of(layer(x)).backward()
    opt.step()
    assert (opt.own[layer.weight]["rows"], opt.own[layer.weight]["samples"]) == (4, 1)


# The kernel.

KERNEL_SHAPES = [((1, 1), 1), ((3, 7), 1), ((257, 200), 1), ((40, 3, 3, 3), 1), ((6, 5, 13), 2), ((8, 1, 3, 3), 8)]


def operands(shape, groups, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    gW, gb = (torch.randn(size, generator=generator).to(dtype) for size in (shape, shape[:1]))
    mean = 3 * torch.randn(groups * shape[1], generator=generator)
    return gW, gb, mean.to(dtype), (0.1 + torch.rand(groups * shape[1], generator=generator)).to(dtype)


@pytest.mark.parametrize(("shape", "groups"), KERNEL_SHAPES)
def test_the_kernel_is_as_near_to_float64_as_its_operands(shape, groups):
    gW, gb, mean, inv_s2 = operands(shape, groups)
    GW, Gb = _standardised._by_kernel(gW, gb, mean, inv_s2 * 0.5, 0.5)
    exact_W, exact_b = precondition_gradients(*(t.double() for t in (gW, gb, mean, inv_s2)), 0.5)
    mu, scale = (_standardised._per_column(v.double(), gW) for v in (mean, inv_s2))
    terms = (gW.double().abs() + (mu * _standardised._per_row(gb.double(), gW)).abs()) * scale * 0.5
    ulp = 2.0**-23
    assert ((GW - exact_W).abs() <= 2 * ulp * terms).all()
    # The sums: a rounding for each of the 64 partial sums' additions, at most.
    sums = gb.double().abs() * 0.5 + (terms * mu.abs()).flatten(1).sum(1)
    longest = math.ceil(gW[0].numel() / 64) + 6
    assert ((Gb - exact_b).abs() <= (2 + longest) * ulp * sums).all()


@pytest.mark.parametrize(("shape", "groups"), KERNEL_SHAPES)
def test_the_kernel_has_the_same_bits_for_any_threads_and_instruction_set(shape, groups):
    gW, gb, mean, inv_s2 = operands(shape, groups)
    before, threads = _backend._C.selected_isa(), torch.get_num_threads()
    results = []
    try:
        for isa in _backend._C.available_isas():
            _backend._C.select_isa(isa)
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(_standardised._by_kernel(gW, gb, mean, inv_s2, 1.0))
    finally:
        _backend._C.select_isa(before)
        torch.set_num_threads(threads)
    assert gW.numel() > 32768 or shape[0] < 257
    for GW, Gb in results[1:]:
        assert bits_equal(GW, results[0][0])
        assert bits_equal(Gb, results[0][1])


@pytest.mark.parametrize(("shape", "groups"), KERNEL_SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "other", "bfloat16", "no kernel"])
def test_any_layout_and_dtype_has_the_same_transform(monkeypatch, shape, groups, layout):
    gW, gb, mean, inv_s2 = operands(shape, groups)
    calls = []
    kernel = _standardised._by_kernel
    monkeypatch.setattr(_standardised, "_by_kernel", lambda *args: calls.append(1) or kernel(*args))
    if layout == "no kernel":
        monkeypatch.setattr(_backend, "_C", None)
    if layout == "other":
        gW = gW.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "bfloat16":
        gW, gb = gW.bfloat16(), gb.bfloat16()
    GW, Gb = precondition_gradients(gW, gb, mean, inv_s2, 0.25)
    assert bool(calls) == (layout == "contiguous" or (layout == "other" and gW.is_contiguous()))
    assert GW.shape == gW.shape
    assert GW.dtype == gW.dtype
    exact_W, exact_b = precondition_gradients(*(t.double() for t in (gW, gb, mean, inv_s2)), 0.25)
    tolerance = dict(rtol=1e-2, atol=1e-2) if layout == "bfloat16" else dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(GW.double(), exact_W, **tolerance)
    torch.testing.assert_close(Gb.double(), exact_b, **tolerance)


def test_flushed_denormals_change_no_bit():
    gW, gb, mean, inv_s2 = operands((3, 70), 1)
    small = gW * 1e-38, gb * 1e-38, mean, inv_s2, 1.0
    expected = _standardised._by_kernel(*small)
    torch.set_flush_denormal(True)
    try:
        found = _standardised._by_kernel(*small)
    finally:
        torch.set_flush_denormal(False)
    assert 0 < expected[0].abs().min() < 1e-38
    assert bits_equal(found[0], expected[0])
    assert bits_equal(found[1], expected[1])


# Errors.


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(stat_momentum=1.5), r"stat_momentum must be in \[0, 1\], got 1\.5"),
        (dict(stat_momentum=math.nan), r"stat_momentum must be in \[0, 1\], got nan"),
        (dict(eps1=-1.0), r"eps1 must be >= 0 and finite, got -1\.0"),
        (dict(eps2=0.0), r"eps2 must be > 0 and finite, got 0\.0"),
        (dict(compose="both"), r"compose must be 'gradient' or 'direction', got 'both'"),
    ],
)
def test_values_out_of_range_raise(kwargs, message):
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=message):
        precond.BNP(layer, torch.optim.SGD(layer.parameters()), **kwargs)
    assert not layer._forward_hooks


def test_what_cannot_be_preconditioned_raises():
    layer = nn.Linear(3, 2)
    sgd = torch.optim.SGD(layer.parameters())
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got list"):
        precond.BNP(list(layer.parameters()), sgd)
    with pytest.raises(TypeError, match=r"base must be a torch\.optim\.Optimizer, got Linear"):
        precond.BNP(layer, layer)
    with pytest.raises(TypeError, match="base must be an optimizer that steps without a closure, got LBFGS"):
        precond.BNP(layer, torch.optim.LBFGS(layer.parameters()))
    with pytest.raises(ValueError, match=r"module must have an nn\.Linear .* got LayerNorm with none"):
        precond.BNP(nn.LayerNorm(3), sgd)
    with pytest.raises(ValueError, match="no lazy layers: run it once before, got a LazyLinear"):
        precond.BNP(nn.Sequential(layer, nn.LazyLinear(2)), sgd)
    short = nn.Linear(3, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"'direction' needs float32 or float64 weights, got torch\.bfloat16"):
        precond.BNP(short, torch.optim.SGD(short.parameters()), compose="direction")
    a, b = nn.Conv1d(2, 4, 1), nn.Conv1d(4, 4, 1, groups=2)
    b.weight = a.weight
    with pytest.raises(ValueError, match=r"same number of input channels, got 2 and 4 for parameter 0 of group 0"):
        precond.BNP(nn.ModuleList([a, b]), torch.optim.SGD([a.weight]))
    opt = precond.BNP(layer, sgd)
    layer(torch.randn(4, 3)).sum().backward()
    layer.weight.grad = layer.weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"gradient of parameter 0 of group 0 must be dense, got torch\.sparse_coo"):
        opt.step()


def test_pickles_of_the_time_before_folders_find_their_classes():
    import precond._inputs
    from precond._wrappers import inputs

    assert precond._inputs.Observer is inputs.Observer
    assert precond._inputs.Inputs is inputs.Inputs
