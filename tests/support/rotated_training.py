"""SOAP, GaussNewton with a basis and spectral DualDescent on shards against whole matrices, as a rank of a gloo group: for
tests/test_rotated_sharded.py.

Over 400 lines: a function per scenario, which ranks of one number run in the same processes.
"""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import precond
from precond._core import iteration
from precond.diagnostics import preconditioner_of
from support.shards import (
    BF16,
    STEPS,
    CountedBytes,
    Scenarios,
    check_against_whole,
    everywhere,
    exchanges,
    line,
    raises,
    square,
    train,
    values,
    whole,
)

#: Shards are uneven, or empty; a vector, and a tensor of more dimensions. Two are of one shape.
SHAPES = ((12, 10), (5, 3), (2, 6), (7,), (1, 4), (4, 2, 3), (12, 10))
KRONECKER: dict[str, Any] = dict(basis="kronecker", basis_frequency=2, clip=1.0)

scenario = Scenarios()
run = scenario.run


def of(cls, **options):
    return lambda params: cls(params, lr=0.1, **options)


def soap(**options):
    return of(precond.SOAP, **{"precondition_frequency": 2, "relative_eps": 1e-3, **options})


def gauss_newton(**options):
    return of(precond.GaussNewton, **{**KRONECKER, **options})


def update_curvature(optimizer) -> None:
    optimizer.update_curvature(batch_size=4)


def update_estimates(optimizer) -> None:
    """From the second step on, when there is a basis."""
    if any(optimizer.state.values()):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.update_curvature(estimates=[p.grad.square() for p in params])


#: What makes each optimizer, its dtype, and what is called before each step.
CASES = (
    (soap(), {}),
    (soap(weight_decay=0.1, maximize=True, max_precond_dim=4, precondition_frequency=1), {}),
    (soap(l1_decay=0.01), {}),
    (soap(one_sided=True, orthogonalize="match_rms_adamw"), {}),
    (soap(), dict(dtype=BF16)),
    (soap(weight_format="split24", state_format="bf16"), dict(dtype=BF16)),
    (soap(weight_format="stochastic", state_format="fp32"), dict(dtype=BF16)),
    (soap(), dict(dtype=torch.float64)),
    (gauss_newton(curvature="gradient"), {}),
    (gauss_newton(power=-0.5, clip=None), dict(update=update_curvature)),
    (gauss_newton(curvature="hutchinson", l1_decay=0.01), dict(update=update_estimates)),
    (of(precond.DualDescent, granularity="spectral", momentum=0.9, nesterov=True), {}),
    (of(precond.DualDescent, granularity="spectral", kernel="asinh", weight_format="split32"), dict(dtype=BF16)),
)


@scenario(2, 3)
def shards_of_one_dimension():
    for make, options in CASES:
        check_against_whole(make, line(), [Shard(0)], SHAPES, **options)
    placements = [[Shard(1)], [Shard(0)], [Shard(1)], [Replicate()], [Replicate()], [Shard(2)], [Shard(0)]]
    for make, options in (CASES[0], CASES[4], CASES[9], CASES[11]):
        check_against_whole(make, line(), placements, SHAPES, **options)


@scenario(4)
def meshes_of_two_dimensions():
    shapes = SHAPES[:3] + SHAPES[4:]
    for placements in ([Replicate(), Shard(0)], [Shard(0), Shard(1)], [Shard(1), Shard(0)], [Shard(0), Shard(0)]):
        for make, options in (CASES[0], CASES[2], CASES[6], CASES[9], CASES[11]):
            check_against_whole(make, square(), placements, shapes, **options)


@scenario(2, 3)
def bases_that_are_given():
    """Of matrices and of all entries; nothing is refreshed."""
    for shape, basis in (((6, 4), "pair"), ((4, 3), "flat"), ((12,), "flat")):
        orthogonal = [torch.linalg.qr(t)[0] for t in values([(n, n) for n in (6, 4, 12)], 0)]
        given = orthogonal[2] if basis == "flat" else tuple(orthogonal[:2])
        make = gauss_newton(basis=given, curvature="gradient")
        check_against_whole(make, line(), [Shard(0)], (shape, shape))


@scenario(2, 3)
def a_matrix_is_rotated_once_and_its_bytes_travel_once_each_way():
    shapes = ((48, 30),) * 8 + ((30, 120),) * 6 + ((30, 30),) * 3
    refreshed, found = [], iteration.refreshed

    def counted(basis, a):
        refreshed.append(len(basis))
        return found(basis, a)

    iteration.refreshed = counted
    try:
        with CountedBytes() as counted_bytes:
            _, optimizer = train(
                soap(precondition_frequency=1),
                shapes,
                lambda i, t: distribute_tensor(t, line(), [Shard(0)], src_data_rank=None),
            )
    finally:
        iteration.refreshed = found
    ranks = dist.get_world_size()
    assert sum(everywhere(sum(refreshed))) == 2 * len(shapes) * (
        STEPS - 1
    )  # both sides; the first bases are eigenvectors
    (exchange,) = exchanges(optimizer)
    assert counted_bytes.bytes == exchange.bytes_sent
    assert max(exchange.plan.costs) <= 1.1 * sum(exchange.plan.costs) / ranks
    parameters = sum(4 * rows * columns for rows, columns in shapes) / ranks
    sent = [each / STEPS / parameters for each in everywhere(counted_bytes.bytes)]
    assert max(sent) <= 2.1
    assert sum(sent) / ranks <= 2 * (1 - 1 / ranks) + 0.01
    # 16-bit gradients travel as they are.
    with CountedBytes() as counted_bytes:
        _, optimizer = train(
            soap(), shapes, lambda i, t: distribute_tensor(t, line(), [Shard(0)], src_data_rank=None), dtype=BF16
        )
    sent = [each / STEPS / (parameters / 2) for each in everywhere(counted_bytes.bytes)]
    assert sum(sent) / ranks <= 3 * (1 - 1 / ranks) + 0.01


def sharded(shapes=SHAPES, seed=5) -> list[nn.Parameter]:
    return [nn.Parameter(placed(t)) for t in values(shapes, seed)]


def placed(t: torch.Tensor) -> torch.Tensor:
    return distribute_tensor(t, line(), [Shard(0)], src_data_rank=None)


class Pair:
    """A sharded run beside an unsharded one, on the same gradients."""

    def __init__(self, make, shapes=SHAPES) -> None:
        self.make, self.shapes = make, shapes
        self.params, self.plain = sharded(shapes), [nn.Parameter(t) for t in values(shapes, 5)]
        self.optimizer, self.expected = make(self.params), make(self.plain)
        self.seed = 100

    def step(self, *, without=(), scale: float = 1.0) -> None:
        self.seed += 1
        for i, (p, q, g) in enumerate(zip(self.params, self.plain, values(self.shapes, self.seed), strict=True)):
            p.grad, q.grad = (None, None) if i in without else (placed(scale * g), scale * g)
        self.optimizer.step()
        self.expected.step()

    def check(self) -> None:
        for p, q in zip(self.params, self.plain, strict=True):
            assert torch.equal(p.full_tensor(), q), (p.shape, (p.full_tensor() - q).abs().max())
            assert ("step" in self.optimizer.state.get(p, {})) == ("step" in self.expected.state.get(q, {}))
            if "step" in self.expected.state.get(q, {}):
                assert self.optimizer.state[p]["step"] == self.expected.state[q]["step"]


@scenario(2, 3)
def parameters_without_gradients():
    """Of nobody: nothing changes, bases neither. Of one rank: the others see zeros, and it leaves its shard alone."""
    for make in (soap(), gauss_newton(curvature="gradient"), CASES[11][0]):
        pair = Pair(make)
        for without in ((), (0, 2), (), (0, 1, 2, 3, 4, 5, 6), (1,), ()):
            pair.step(without=without)
        pair.check()
    pair, me = Pair(soap(weight_decay=0.1)), dist.get_rank()
    pair.step()
    before = pair.params[0].to_local().clone()
    for i, (p, q, g) in enumerate(zip(pair.params, pair.plain, values(SHAPES, 6), strict=True)):
        if i == 0:
            rows = slice(me * len(before), (me + 1) * len(before))
            g[len(before) : 2 * len(before)] = 0.0
        p.grad, q.grad = placed(g), g
    if me == 1:
        pair.params[0].grad = None
    pair.optimizer.step()
    pair.expected.step()
    found = pair.params[0].to_local()
    assert torch.equal(found, before if me == 1 else pair.plain[0].detach()[rows])
    for p, q in list(zip(pair.params, pair.plain, strict=True))[1:]:
        assert torch.equal(p.full_tensor(), q)


@scenario(2, 3)
def a_rank_without_any_part():
    optimizer = check_against_whole(soap(), line(), [Shard(0)], ((1, 4), (1, 6), (1, 4)))
    (exchange,) = exchanges(optimizer)
    assert {a.owner for a in exchange.plan.assigned} == {0}
    assert exchange.bytes_sent == 0


@scenario(2, 3)
def owners_change():
    """States follow, when parameters freeze or come later; what is frozen keeps its states, also in a checkpoint."""
    shapes = ((12, 10), (30, 20), (5, 3), (20, 30), (7, 7))
    pair = Pair(soap(), shapes)
    pair.step()
    pair.step()
    owners = lambda: {a.unit.param: a.owner for e in exchanges(pair.optimizer) for a in e.plan.assigned}  # noqa: E731
    before = owners()
    for params in (pair.params, pair.plain):
        for p in params[1:4]:
            p.requires_grad_(False)
    pair.step(without=(1, 2, 3))
    assert owners() != before
    saved = pair.optimizer.state_dict()["state"]
    expected = pair.expected.state_dict()["state"]
    for i, states in expected.items():
        assert states.keys() == saved[i].keys()
        assert all(torch.equal(whole(saved[i][key]), value) for key, value in states.items() if key != "basis_step")
    for params in (pair.params, pair.plain):
        for p in params[1:4]:
            p.requires_grad_(True)
    pair.step()
    pair.step()
    pair.check()
    assert owners() == before


@scenario(2, 3)
def steps_that_are_clipped_or_skipped():
    for options in (dict(max_grad_norm=1e30), dict(clip_grad_value=0.05), dict(max_grad_norm=1e30, nonfinite="skip")):
        pair = Pair(soap(**options))
        for i in range(4):
            pair.step(scale=float("inf") if i == 2 and "nonfinite" in options else 1.0)
        pair.check()
        assert int(pair.optimizer.skipped_steps) == ("nonfinite" in options)
    # Norms are added up in another order.
    expected, _ = train(soap(max_grad_norm=0.1), SHAPES, lambda i, t: t)
    found, _ = train(soap(max_grad_norm=0.1), SHAPES, lambda i, t: placed(t))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@scenario(2, 3)
def groups_beside_each_other_and_copies():
    """One optimizer of Muon, SOAP and AdamW; deep copies and pickles go on like the original."""

    def make(params):
        return precond.Grouped(
            [
                dict(params=params[:2], optimizer=precond.SOAP, precondition_frequency=2, relative_eps=1e-3, lr=0.1),
                dict(params=params[2:3], optimizer=precond.Muon, lr=0.1),
                dict(params=params[3:5], optimizer=precond.AdamW, lr=0.1),
                dict(params=params[5:], optimizer=precond.SOAP, precondition_frequency=1, relative_eps=1e-3, lr=0.05),
            ]
        )

    pair = Pair(make)
    pair.step()
    pair.step()
    pair.check()
    state = pair.optimizer.state_dict()
    pair.optimizer = make(pair.params)
    pair.optimizer.load_state_dict(state)
    pair.step()
    pair.check()
    pair.optimizer.state_dict()
    both = copy.deepcopy((pair.params, pair.optimizer))
    before = [p.to_local().clone() for p in pair.params]
    pair.step()
    pair.check()
    pair.params, pair.optimizer = both
    assert all(torch.equal(p.to_local(), q) for p, q in zip(pair.params, before, strict=True))
    for p, g in zip(pair.params, values(SHAPES, pair.seed), strict=True):
        p.grad = placed(g)
    pair.optimizer.step()
    pair.check()


@scenario(2, 3)
def checkpoints():
    """Saved by torch.save on each rank, loaded from an unsharded run and into one; full dictionaries, gathered and sent."""
    pair = Pair(soap(), tuple(shape for shape in SHAPES if len(shape) > 1))
    for _ in range(STEPS):
        pair.step()
    file = io.BytesIO()
    torch.save(pair.optimizer.state_dict(), file)
    file.seek(0)
    pair.optimizer = pair.make(pair.params)
    pair.optimizer.load_state_dict(torch.load(file))
    saved = pair.optimizer.state_dict()  # of what no step has brought to its owner yet
    assert all(not isinstance(v, torch.Tensor) or v.numel() for s in saved["state"].values() for v in s.values())
    pair.step()
    pair.check()
    pair.optimizer = pair.make(pair.params)
    pair.optimizer.load_state_dict(pair.expected.state_dict())
    pair.step()
    pair.check()
    gathered = pair.optimizer.state_dict()
    gathered["state"] = {i: {key: whole(v) for key, v in s.items()} for i, s in gathered["state"].items()}
    pair.expected = pair.make(pair.plain)
    pair.expected.load_state_dict(gathered)
    pair.step()
    pair.check()

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 17), nn.Tanh(), nn.Linear(17, 6), nn.Tanh(), nn.Linear(6, 1))

    def started():
        net = model()
        for layer in net[::2]:
            fully_shard(layer, mesh=line())
        fully_shard(net, mesh=line())
        return net, soap()(net.parameters())

    def step(net, optimizer, i):
        (x,) = values([(16, 8)], i)
        (net(x) - 1.0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    net, optimizer = started()
    for i in range(STEPS):
        step(net, optimizer, i)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))  # its counters go on
    weights = [p.detach().full_tensor() for p in net.parameters()]
    step(net, optimizer, STEPS)
    if dist.get_rank() == 0:
        shapes = {name: tuple(t.shape) for name, t in full["state"]["2.weight"].items() if isinstance(t, torch.Tensor)}
        assert shapes["exp_avg"] == (6, 17)
        assert shapes["basis_right_0"] == (17, 17)
    other, again = started()
    for p, w in zip(other.parameters(), weights, strict=True):
        p.data.copy_(distribute_tensor(w, p.device_mesh, p.placements, src_data_rank=None))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(other, again, full if dist.get_rank() == 0 else {}, options=options)
    step(other, again, STEPS)
    for p, q in zip(other.parameters(), net.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q.full_tensor())


@scenario(2, 3)
def what_is_wrong_is_said_on_all_ranks():
    p = nn.Parameter(DTensor.from_local(torch.ones(4, 4), line(), [Partial()]))
    for make in (soap(), gauss_newton(), CASES[11][0]):
        raises(functools.partial(make, [p]), "parameter 0 of group 0 must be placed by Shard or Replicate, got P")
    shapes = ((12, 10), (30, 20), (5, 3))

    def started(make):
        params = sharded(shapes)
        for p, g in zip(params, values(shapes, 6), strict=True):
            p.grad = placed(g)
        return params, make(params)

    params, optimizer = started(soap())
    optimizer.step()
    name = "basis_left_0"
    owned = [p for p in params if optimizer.state[p][name].numel()]
    if owned:
        optimizer.state[owned[0]][name] = torch.eye(3)[:2]
    raises(optimizer.step, f"{name} of parameter", "must have shape")
    raises(optimizer.step, f"{name} of parameter", "must have shape")  # again, and not a hang
    params, optimizer = started(gauss_newton(clip=None))
    raises(optimizer.step, "update_curvature must be called before the first step", "parameter 0 of group 0")
    params, optimizer = started(gauss_newton(curvature="hutchinson"))
    estimates = [p.grad for p in params]
    update = functools.partial(optimizer.update_curvature, estimates=estimates)
    raises(update, "a step must come before estimates of parameter 0 of group 0")
    optimizer.step()
    update()
    plain = functools.partial(optimizer.update_curvature, estimates=[whole(g) for g in estimates])
    raises(plain, "an estimate must be a DTensor on the mesh of parameter 0 of group 0")
    raises(lambda: preconditioner_of(optimizer), "its basis is with the rank that owns its matrix")


def with_a_nan(p: nn.Parameter) -> None:
    """In the gradient of one rank."""
    if dist.get_rank() == 0:
        p.grad.to_local().view(-1)[:1] = float("nan")


@scenario(2, 3)
def what_fails_in_an_owners_work_is_said_on_all_ranks():
    """In the same step, and no weight has moved; a run goes on from its last checkpoint."""
    shapes = ((12, 10), (30, 20), (5, 3))
    for make, update, said in (
        (soap(precondition_frequency=1), None, "of parameter 1 of group 0: a must be finite"),
        (gauss_newton(curvature="gradient", basis_frequency=1), None, "of parameter 1 of group 0: a must be finite"),
        (gauss_newton(basis_frequency=1), update_curvature, "of parameter 1 of group 0: a must be finite"),
        (CASES[11][0], None, "the direction of parameter 1 of group 0 has no singular values"),
    ):
        pair = Pair(make, shapes)
        for optimizer in (pair.optimizer, pair.expected):
            for p, q, g in zip(pair.params, pair.plain, values(shapes, 6), strict=True):
                p.grad, q.grad = placed(g), g
            if update is not None:
                update(optimizer)
        pair.step()
        saved, before = copy.deepcopy(pair.optimizer.state_dict()), [p.full_tensor() for p in pair.params]
        for p, g in zip(pair.params, values(shapes, 7), strict=True):
            p.grad = placed(g)
        with_a_nan(pair.params[1])
        raises(functools.partial(update, pair.optimizer) if update else pair.optimizer.step, said)
        assert all(torch.equal(p.full_tensor(), q) for p, q in zip(pair.params, before, strict=True))
        pair.optimizer.load_state_dict(saved)
        pair.step()
        pair.check()


@scenario(4)
def what_fails_in_a_small_set_of_ranks_is_said_in_larger_ones():
    everyone, own = line(), square("replicate", "experts")["experts"]
    for wrong in (0, 1):
        params = [
            nn.Parameter(distribute_tensor(torch.ones(12, 10), mesh, [Shard(0)], src_data_rank=None))
            for mesh in (everyone, own)
        ]
        optimizer = soap(precondition_frequency=1)(params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        with_a_nan(params[wrong])
        raises(optimizer.step, "a must be finite")  # also where experts are others


@scenario(2, 3)
def what_else_is_kept_of_a_parameter():
    """A wrapper's states stay where they are, formats' go when they are not asked for, and passes do not pile up."""
    pair = Pair(
        lambda params: precond.FOP(soap()(params), 0.05, "diagonal", normalize=None, compose="gradient"),
        ((12, 10), (7, 16)),
    )
    for _ in range(3):
        pair.step()
    saved = pair.optimizer.state_dict()
    pair.check()
    pair.optimizer = pair.make(pair.params)
    pair.optimizer.load_state_dict(saved)
    pair.step()
    pair.check()
    shapes = ((12, 10),) * 6
    pair = Pair(soap(), shapes)
    for i in range(12):
        pair.step(without=[k for k in range(6) if (i >> (k % 3)) & 1])
    pair.check()
    assert len(pair.optimizer._passes) <= 2 * len(shapes)
    params = [nn.Parameter(placed(t)) for t in values([(12, 10)], 5, BF16)]
    optimizer = soap(weight_format="split24")(params)
    for weight_format in ("split24", None):
        optimizer.param_groups[0]["weight_format"] = weight_format
        params[0].grad = placed(torch.ones(12, 10, dtype=BF16))
        optimizer.step()
        assert ("remainder" in optimizer.state[params[0]]) == (weight_format is not None)
    frozen = nn.Parameter(placed(torch.ones(4, 4, dtype=torch.complex64)), requires_grad=False)
    soap()([frozen, *sharded()]).state_dict()


def beside(**options):
    """Every method of several passes and one of one, with what rides along in the last pass."""

    def make(params):
        groups = [
            dict(params=params[:2], optimizer=precond.SOAP, precondition_frequency=2, relative_eps=1e-3, **options),
            dict(params=params[2:3], optimizer=precond.GaussNewton, curvature="gradient", **KRONECKER, **options),
            dict(params=params[3:4], optimizer=precond.AdamW, **options),
            dict(params=params[4:5], optimizer=precond.Muon, ema_decay=0.5, cautious="both"),
            dict(params=params[5:], optimizer=precond.DualDescent, granularity="spectral", ema_decay=0.5),
        ]
        return precond.Grouped(groups, lr=0.1, statistics=True)

    return make


@scenario(2, 3)
def what_rides_along_in_the_last_pass():
    """A rank may lack a gradient: sums that scale updates are added up all the same."""
    shapes = ((12, 10), (7, 16), (9, 4), (7,), (6, 8), (8, 6))
    pair = Pair(beside(ema_decay=0.5, cautious="both"), shapes)
    for without in ((), (0, 4), (), ()):
        pair.step(without=without)
        found, expected = pair.optimizer.statistics, pair.expected.statistics
        assert torch.equal(found.values.isnan(), expected.values.isnan())
        torch.testing.assert_close(found.values, expected.values, rtol=1e-6, atol=1e-9, equal_nan=True)
    pair.check()
    assert not found.values.isnan().any()
    for p, q in zip(pair.params, pair.plain, strict=True):
        assert torch.equal(pair.optimizer.state[p]["ema"].full_tensor(), pair.expected.state[q]["ema"])
    scales = dict(cautious="update", cautious_rescale=True, max_update_rms=0.5)
    pair = Pair(beside(**scales), shapes)
    for _ in range(3):
        pair.step()
    for p, q in zip(pair.params, pair.plain, strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-5, atol=1e-6)
    pair.step()
    if dist.get_rank() == 1:
        pair.params[0].grad = None
    before = pair.params[0].to_local().clone()
    pair.optimizer.step()
    assert torch.equal(before, pair.params[0].to_local()) == (dist.get_rank() == 1)


@scenario(2, 3)
def owners_stay_where_only_some_groups_are_updated():
    def make(params):
        options = dict(optimizer=precond.GaussNewton, lr=0.1, **KRONECKER)
        return precond.Grouped(
            [dict(params=params[:3], **options), dict(params=params[3:], curvature="gradient", **options)]
        )

    pair = Pair(make, ((12, 10), (7, 16), (5, 3), (12, 10), (9, 4)))
    agreed = []
    for _ in range(3):
        for optimizer in (pair.optimizer, pair.expected):
            for p, q, g in zip(pair.params, pair.plain, values(pair.shapes, 6), strict=True):
                p.grad, q.grad = placed(g), g
            optimizer.update_curvature()
        pair.step()
        agreed += [exchange for _, exchange in pair.optimizer._agreed[precond.GaussNewton]._held.values()]
    pair.check()
    assert len(set(map(id, agreed))) == 1
