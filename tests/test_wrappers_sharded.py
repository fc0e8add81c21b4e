"""Wrappers on several ranks: FSDP2, DDP, ZeroRedundancyOptimizer; checkpoints that are resharded."""

from __future__ import annotations

import pytest
import torch
from families import CLASSES
from support.ranks import END, START, launch, on_two_ranks

RESHARD = """
from torch.distributed.fsdp import fully_shard
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
folder, flat, load, save, base = sys.argv[4:9]
options = StateDictOptions(flatten_optimizer_state_dict=flat == "flat")
torch.manual_seed(0 if load == "-" else 1)
net = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 5)).double()
for layer in (net[0], net[2], net):
    fully_shard(layer, mesh=mesh)
make = {"SGD": precond.SGD, "AdamW": precond.AdamW, "torch": torch.optim.Adam}[base]
opt = precond.FOP(make(net.parameters(), lr=0.05), 50.0, "diagonal", normalize=None, compose="gradient")
def states():
    return dict(zip(("model", "optimizer"), get_state_dict(net, opt, options=options)))
if load != "-":
    loaded = states()
    dcp.load(loaded, checkpoint_id=f"{folder}/{load}")
    set_state_dict(net, opt, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=options)
for step in range(3) if load == "-" else range(3, 6):
    opt.zero_grad()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    net(x).square().mean().backward()
    opt.step()
dcp.save(states(), checkpoint_id=f"{folder}/{save}")
found = {name: p.full_tensor() for name, p in net.named_parameters()}
found |= {f"{name} M": opt.own[p]["preconditioner"].full_tensor() for name, p in net.named_parameters()}
assert all((M - 1).abs().max() > 1e-3 for name, M in found.items() if name.endswith("M"))
if rank == 0:
    torch.save(found, f"{folder}/{save}.pt")
"""


@pytest.mark.parametrize(("base", "flat"), [("SGD", "flat"), ("AdamW", "plain"), ("torch", "flat")])
def test_an_elementwise_m_is_resharded_with_its_parameter(tmp_path, flat, base):
    for ranks, load, save in ((2, "-", "half"), (3, "half", "three"), (2, "half", "two")):
        store = f"{tmp_path}/store-{save}"
        arguments = [str(ranks), store, str(tmp_path), flat, load, save, base]
        launch(START + RESHARD + END, [[str(rank), *arguments] for rank in range(ranks)])
    three, two = (torch.load(tmp_path / f"{save}.pt") for save in ("three", "two"))
    torch.testing.assert_close(three, two, rtol=1e-12, atol=1e-14)


def test_what_cannot_be_sharded_says_so_before_torch_makes_states(tmp_path):
    """torch sets lr to 0 for the step that makes them, and does not restore it if that raises."""
    code = """
from torch.distributed.fsdp import fully_shard
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
def refused(what, text):
    try:
        what()
    except (RuntimeError, ValueError) as error:
        assert text in str(error), error
    else:
        raise AssertionError(text)
plain = torch.nn.Linear(4, 4)
net = fully_shard(torch.nn.Linear(4, 4))
base = precond.AdamW(net.parameters())
text = "is sharded and must have mode='diagonal' and normalize=None"
refused(lambda: precond.FOP(base, 0.05), text)
refused(lambda: precond.FOP(base, 0.05, "diagonal", normalize="step"), text)
refused(lambda: precond.BNP(net, base), "parameter 0 of group 0 must be a plain tensor, got a DTensor")
late = precond.FOP(precond.AdamW(plain.parameters()), 0.05)
refused(lambda: late.add_param_group({"params": list(net.parameters())}), text)
# A mesh of whole copies has no restriction, and M is saved once.
whole = torch.nn.Linear(4, 4)
for name, p in list(whole.named_parameters()):
    setattr(whole, name, torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate()])))
opt = precond.FOP(precond.AdamW(whole.parameters(), lr=0.5), 0.05, "output")
saved = get_optimizer_state_dict(whole, opt)
assert opt.param_groups[0]["lr"] == 0.5
assert torch.equal(saved["state"]["weight"]["fop_preconditioner"], torch.eye(4))
# Sharded after it was built: torch's own order of things, and the step says so.
lazy = torch.nn.Linear(4, 4)
opt = precond.FOP(precond.AdamW(lazy.parameters(), lr=0.5), 0.05)
fully_shard(lazy)
opt.param_groups[0]["params"] = list(lazy.parameters())
get_optimizer_state_dict(lazy, opt)
assert opt.param_groups[0]["lr"] == 0.5
lazy(torch.ones(2, 4)).sum().backward()
refused(opt.step, text)
"""
    on_two_ranks(code, tmp_path)


REGULARIZED = """
import contextlib
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
mine = X.chunk(2)[rank]
def make(how):
    torch.manual_seed(2)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    if how == "fsdp":
        for layer in (net[0], net[2], net):
            fully_shard(layer, mesh=mesh)
    elif how != "whole":
        net = DDP(net, gradient_as_bucket_view=how == "views")
    opt = precond.GradientRegularizer(precond.AdamW(net.parameters(), lr=0.05), rho=0.2, radius=0.05)
    return net, opt
def full(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t
def train(how, zero, parts):
    net, opt = make(how)
    rows = X if how == "whole" else mine
    def closure():
        if zero is not None:
            opt.zero_grad(set_to_none=zero)
        for part in rows.chunk(parts):
            (net(part).square().sum() / len(rows)).backward()
    for _ in range(3):
        if zero is None:
            opt.zero_grad(set_to_none=False)
        opt.step(closure)
    return [full(p.detach()) for p in net.parameters()]
expected = train("whole", True, 1)
for how in ("fsdp", "ddp", "views"):
    for zero in (True, False, None):
        for parts in (1, 2):
            for p, q in zip(train(how, zero, parts), expected):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    for parts in (1, 2):
        net, opt = make(how)
        def add():
            for part in mine.chunk(parts):
                net(part).square().sum().backward()
        opt.step(add)
        try:
            opt.step(add)
        except RuntimeError as error:
            assert "the closure must evaluate all micro-batches" in str(error), error
        else:
            raise AssertionError((how, parts))
"""


def test_micro_batches_of_shards_and_replicas_have_the_whole_batch_s_step(tmp_path):
    on_two_ranks(REGULARIZED, tmp_path)


SHARDED_METRICS = """
from torch.distributed.fsdp import fully_shard
cls, kwargs, dtype = CASE
steps = []
for sharded in (False, True):
    torch.manual_seed(0)
    net = torch.nn.Linear(128, 65).to(dtype)
    if sharded:
        fully_shard(net, mesh=mesh)
    opt = precond.GradientRegularizer(cls(net.parameters(), **kwargs), rho=0.1, radius=0.1)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(3)).to(dtype)
    def closure():
        opt.zero_grad()
        (net(x) - 1).square().mean().backward()
    for _ in range(2):  # the first makes P
        opt.step(closure)
        if hasattr(opt.base, "update_curvature") and opt.param_groups[0]["curvature"] != "gradient":
            closure()
            opt.base.update_curvature(4)
    steps.append([p.full_tensor() if sharded else p.detach() for p in net.parameters()])
for p, q in zip(*steps):
    assert torch.equal(p, q), (CASE, (p - q).abs().max())
"""
#: Every class, and formats whose values are not what lies in memory.
METRICS = [f"(precond.{row.cls.__name__}, {dict(row.kwargs, state_format='int8')!r}, torch.float32)" for row in CLASSES]
METRICS += [
    f"(precond.{name}, {dict(lr=1e-2, **kwargs)!r}, torch.float32)"
    for name, kwargs in [
        ("RMSprop", dict(centered=True, eps=1e-3)),
        ("RMSpropW", dict(centered=True, eps=1e-3, state_format="int4")),
        ("AdamW", dict(amsgrad=True, state_format="bf16")),
        ("Sophia", {}),
        ("Sophia", dict(state_format="int8")),
        ("GaussNewton", dict(curvature="gradient", power=-0.5, state_format="int8")),
        ("DualDescent", {}),
    ]
]
METRICS += [
    f"(precond.AdamW, dict(lr=1e-2, weight_format={weights!r}, state_format={states!r}), torch.bfloat16)"
    for weights, states in (("split24", "int8"), ("split32", None), ("stochastic", "int4"))
]


def test_the_regularizer_moves_shards_as_it_moves_whole_parameters(tmp_path):
    code = "".join(f"CASE = {case}\n{SHARDED_METRICS}" for case in METRICS)
    on_two_ranks(code, tmp_path)


def test_entries_around_a_zero_redundancy_optimizer_are_saved(tmp_path):
    code = """
from torch.distributed.optim import ZeroRedundancyOptimizer
def make():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    base = ZeroRedundancyOptimizer(net.parameters(), optimizer_class=precond.AdamW, lr=0.05)
    bnp = precond.BNP(net, base, stat_momentum=0.5)
    return net, base, precond.FOP(bnp, 0.05, mode="output", normalize="hypergradient")
def train(net, opt, steps):
    for i in steps:
        torch.manual_seed(i)
        opt.zero_grad()
        net(torch.randn(8, 4)).square().mean().backward()
        opt.step()
net, base, opt = make()
train(net, opt, range(3))
saved = []
for to in range(2):
    base.consolidate_state_dict(to)
    if rank == to:
        saved.append(copy.deepcopy((net.state_dict(), opt.state_dict())))
other, _, fresh = make()
other.load_state_dict(saved[0][0])
fresh.load_state_dict(saved[0][1])
assert len(fresh.own) == 4 and len(fresh.base.own) == 2
train(net, opt, range(3, 5))
train(other, fresh, range(3, 5))
for p, q in zip(net.parameters(), other.parameters()):
    assert torch.equal(p, q)
    assert torch.equal(opt.own[p]["preconditioner"], fresh.own[q]["preconditioner"])
"""
    on_two_ranks(code, tmp_path)
