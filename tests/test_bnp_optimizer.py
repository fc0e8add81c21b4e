"""BNP is an optimizer around another one: checkpoints, copies, closures, replicas, layers that do nothing, errors."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from support.bnp import relative, small_net, snapshot
from support.cases import bits_equal
from torch import nn
from torch.nn import functional as F

import precond

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
