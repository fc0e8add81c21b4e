"""What BNP sees of a layer's inputs, and the moments that it keeps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.bnp import F64, LAYERS, inputs, layer_of, loss_of, relative, small_net, snapshot
from support.ranks import on_two_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import precond


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
