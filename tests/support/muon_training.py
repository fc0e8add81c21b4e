"""Muon on shards against Muon on whole matrices, as a rank of a gloo group: for tests/test_muon_sharded.py.

Over 400 lines: a function per scenario, which ranks of one number run in the same processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import precond
from precond import muon
from precond._methods import owners
from support.shards import (
    BF16,
    F32,
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

LR = 0.02
#: Shards are uneven, or empty.
SHAPES = ((12, 10), (5, 3), (2, 6), (1, 4), (7, 16), (12, 10))

scenario = Scenarios()
run = scenario.run


def simulated(folder: str) -> None:
    """The bytes of a step on paper are those that are sent."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from bench import scaling

    shapes = [(64, 48), (48, 100), (16, 48), (7, 5)] * 3
    meshes = [((dist.get_world_size(),), (Shard(0),)), ((dist.get_world_size(),), (Shard(1),))]
    if dist.get_world_size() == 4:
        meshes = [((2, 2), (Replicate(), Shard(0))), ((2, 2), (Shard(1), Shard(0)))]
    for sizes, placements in meshes:
        mesh = init_device_mesh("cpu", sizes)
        matrices = [scaling.Sharded(f"parameter {i} of group 0", shape, placements) for i, shape in enumerate(shapes)]
        plan = scaling.plan_of(matrices, sizes)
        place = lambda i, t: distribute_tensor(t, mesh, placements, src_data_rank=None)  # noqa: B023, E731
        with Counted() as counted:
            _, optimizer = train(muon_of(), shapes, place)
        assert counted.bytes == STEPS * sum(plan.sent()[dist.get_rank()])
        assert sum(everywhere(counted.bytes)) > 0
        (exchange,) = exchanges(optimizer)
        assert [(a.unit, a.owner, a.batch) for a in exchange.plan.assigned] == [
            (a.unit, a.owner, a.batch) for a in plan.assigned
        ]


def muon_of(**options: Any) -> Callable[[list[nn.Parameter]], precond.Muon]:
    return lambda params: precond.Muon(params, lr=LR, **options)


def check(mesh, placements, shapes=SHAPES, dtype=F32, **options) -> precond.Muon:
    return check_against_whole(muon_of(**options), mesh, placements, shapes, dtype=dtype)


class Counted(CountedBytes):
    """All-to-alls and products are noted in ``log`` too: what has begun, and what was waited for."""

    def __enter__(self) -> Counted:
        super().__enter__()
        self.log: list[tuple[str, int]] = []
        #: Matrices that were multiplied.
        self.matrices, self._orthogonalized = 0, muon.orthogonalized
        muon.orthogonalized = self.orthogonalized
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        muon.orthogonalized = self._orthogonalized

    def all_to_all(self, *args, **options):
        number = sum(what == "start" for what, _ in self.log)
        self.log.append(("start", number))
        handle, log = super().all_to_all(*args, **options), self.log

        class Handle:
            def wait(self) -> None:
                handle.wait()
                log.append(("arrived", number))

        return Handle()

    def orthogonalized(self, u, group):
        self.log.append(("products", self.matrices))
        self.matrices += len(u)
        return self._orthogonalized(u, group)


@scenario(2, 3)
def shards_of_one_dimension():
    mesh = line()
    for placement in (Shard(0), Shard(1)):
        check(mesh, [placement])
        check(mesh, [placement], adjust_lr_fn="match_rms_adamw", nesterov=False, maximize=True)
        check(mesh, [placement], dtype=BF16)
    check(mesh, [[Shard(0)], [Shard(1)], [Replicate()], [Shard(0)], [Shard(1)], [Replicate()]])


@scenario(2, 3)
def a_rank_without_any_part():
    optimizer = check(line(), [Shard(0)], shapes=((1, 4), (1, 6), (1, 4)))
    (exchange,) = exchanges(optimizer)
    assert {a.owner for a in exchange.plan.assigned} == {0}  # which has all of them
    assert exchange.bytes_sent == 0


@scenario(2, 3)
def formats_on_shards():
    """Their random bits belong to elements, so not even these differ."""
    shapes = ((66, 64), (128, 64), (2, 64))
    mesh = line()
    for options in (
        dict(state_format="int8"),
        dict(weight_format="split24", dtype=BF16),
        dict(weight_format="stochastic", state_format="int8", dtype=BF16),
    ):
        check(mesh, [Shard(0)], shapes=shapes, **options)


UNITS = (
    ((6, 4, 3, 3), dict(flatten=True)),
    ((5, 6, 10), dict(flatten=False)),
    ((2, 3, 10, 6), dict(flatten=False)),
    ((12, 10), dict(split=3)),
    ((16, 10), dict(split=(8, 4, 4))),
    ((10, 12), dict(split={1: 4})),
    ((12, 16), dict(split={0: 3, 1: (8, 4, 4)})),
    ((3, 8, 6), dict(flatten=False, split={0: 2, 1: (2, 4)})),
    ((16, 4), dict(split=(12, 2, 2))),  # several scales
)


@scenario(2, 3)
def several_matrices_of_a_parameter():
    mesh = line()
    for shape, options in UNITS:
        for dim in range(len(shape)):
            check(mesh, [Shard(dim)], shapes=(shape, shape), **options)


@scenario(2, 3)
def experts_that_ranks_have_whole_do_not_travel():
    ranks = dist.get_world_size()
    with Counted() as counted:
        optimizer = check(line(), [Shard(0)], shapes=((2 * ranks, 6, 10), (3, 4, 4)), flatten=False)
    (exchange,) = exchanges(optimizer)
    assert counted.bytes == exchange.bytes_sent == 0
    assert not any(what == "start" for what, _ in counted.log)


@scenario(2, 3)
def a_parameter_without_gradients():
    """On all ranks it stays as it is; on one rank its shard does, and the others see zeros there."""
    mesh, me = line(), dist.get_rank()
    start, grads = values(SHAPES, 5), values(SHAPES, 6)
    place = lambda t: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None)  # noqa: E731
    params = [nn.Parameter(place(t.clone())) for t in start]
    optimizer = muon_of(weight_decay=0.1)(params)
    for p, g in zip(params, grads, strict=True):
        p.grad = place(g)
    params[1].grad = None
    rows = params[0].to_local().shape[0]
    if me == 1:
        params[0].grad = None
    grads[0][rows : 2 * rows] = 0.0
    expected = [nn.Parameter(t.clone()) for t in start]
    plain = muon_of(weight_decay=0.1)(expected)
    for p, g in zip(expected, grads, strict=True):
        p.grad = g
    expected[1].grad = None
    optimizer.step()
    plain.step()
    expected[0].data[rows : 2 * rows] = start[0][rows : 2 * rows]
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p.full_tensor(), q)
    assert torch.equal(params[1].full_tensor(), start[1])
    assert bool(optimizer.state.get(params[0])) == (me != 1)
    assert not optimizer.state.get(params[1])
    # Of nobody, and of one rank alone: the step ends on all ranks.
    for p in params:
        p.grad = None
    optimizer.step()
    if me == 0:
        for p in params:
            p.grad = DTensor.from_local(
                torch.ones_like(p.to_local()), mesh, [Shard(0)], run_check=False, shape=p.shape, stride=p.stride()
            )
    before = [p.to_local().clone() for p in params]
    optimizer.step()
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p.to_local(), q) == (me != 0 or p.to_local().numel() == 0)


@scenario(2, 3)
def frozen_parameters_do_not_travel():
    mesh = line()
    place = lambda t: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None)  # noqa: E731
    params = [nn.Parameter(place(t)) for t in values(SHAPES, 5)]
    optimizer = muon_of()(params)

    def step():
        for p, g in zip(params, values(SHAPES, 6), strict=True):
            p.grad = place(g) if p.requires_grad else None
        before = sum(exchange.bytes_sent for exchange in exchanges(optimizer))
        optimizer.step()
        return sum(exchange.bytes_sent for exchange in exchanges(optimizer)) - before

    for p in params[2:]:
        p.requires_grad_(False)
    exchanges(optimizer)
    some = sum(everywhere(step()))
    kept = [p.full_tensor().clone() for p in params]
    for p in params[2:]:
        p.requires_grad_(True)
    exchanges(optimizer)
    assert some < sum(everywhere(step()))
    assert not any(torch.equal(p.full_tensor(), q) for p, q in zip(params, kept, strict=True))
    params[0].requires_grad_(False)
    params[0].grad = place(torch.ones(SHAPES[0]))
    raises(optimizer.step, "parameter 0 of group 0", "must require gradients")


@scenario(2, 3)
def ranks_whose_order_differs():
    mesh, me = line(), dist.get_rank()
    place = lambda t: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None)  # noqa: E731
    expected, _ = train(muon_of(), SHAPES, lambda i, t: t)

    def start(order, named):
        params = [nn.Parameter(place(t)) for t in values(SHAPES, 5)]
        given = [(f"w{i}", params[i]) if named else params[i] for i in order]
        groups = [{"params": given[:2]}, {"params": given[2:]}]
        return params, muon_of()(groups)

    order = list(range(len(SHAPES)))
    turned = order[me:] + order[:me]
    params, optimizer = start(turned, named=True)
    for i in range(STEPS):
        for p, g in zip(params, values(SHAPES, 100 + i), strict=True):
            p.grad = place(g)
        optimizer.step()
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p.full_tensor(), q)
    for named, order_here, said in ((False, turned, "(12, 10)"), (True, order[: len(order) - me], "none")):
        params, optimizer = start(order_here, named)
        for p, g in zip(params, values(SHAPES, 6), strict=True):
            p.grad = place(g)
        before = [p.full_tensor().clone() for p in params]
        raises(optimizer.step, "the same sharded matrices on all ranks", "by their names", said)
        raises(optimizer.step, "the same sharded matrices on all ranks")  # again, and not a hang
        assert all(torch.equal(p.full_tensor(), q) for p, q in zip(params, before, strict=True))
    # Blocks that differ are other matrices.
    params, optimizer = start(order, named=False)
    optimizer.param_groups[0]["params"] = params[:1]
    optimizer.param_groups[0]["split"] = 2 if me == 1 else 3
    raises(optimizer.step, "the same sharded matrices on all ranks", "blocks of (4, 4, 4) by (10,)", "blocks of (6, 6)")


@scenario(2, 3)
def what_is_placed_otherwise():
    p = nn.Parameter(DTensor.from_local(torch.ones(4, 4), line(), [Partial()]))
    raises(lambda: precond.Muon([p]), "parameter 0 of group 0 must be placed by Shard or Replicate, got P")


@scenario(2, 3)
def bytes_are_sent_once_each_way():
    ranks = dist.get_world_size()
    shapes = ((60, 48),) * 8 + ((48, 120),) * 4 + ((30, 30),) * 3
    with Counted() as counted:
        optimizer = check(line(), [Shard(0)], shapes=shapes, dtype=BF16)
    (exchange,) = exchanges(optimizer)
    me = dist.get_rank()
    assert counted.bytes == exchange.bytes_sent == STEPS * sum(exchange.plan.sent()[me])
    # The unsharded run was counted too.
    assert sum(everywhere(counted.matrices)) - ranks * STEPS * len(shapes) == STEPS * len(shapes)
    assert sum(what == "start" for what, _ in counted.log) == 2 * STEPS * exchange.plan.batches
    parameters = sum(2 * rows * columns for rows, columns in shapes) / ranks
    sent = [each / STEPS / parameters for each in everywhere(counted.bytes)]
    assert max(sent) <= 2.1
    assert sum(sent) / ranks <= 2 * (1 - 1 / ranks) + 0.01


@scenario(2, 3)
def the_next_batch_is_on_its_way_during_products():
    smallest, owners.SMALLEST_BATCH = owners.SMALLEST_BATCH, 1024
    try:
        with Counted() as counted:
            params = [distribute_tensor(t, line(), [Shard(0)], src_data_rank=None) for t in values([(48, 48)] * 24, 5)]
            params = [nn.Parameter(p) for p in params]
            optimizer = muon_of()(params)
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
    finally:
        owners.SMALLEST_BATCH = smallest
    (exchange,) = exchanges(optimizer)
    batches = exchange.plan.batches
    assert batches >= 3
    # Numbers of all-to-alls: gathers 0, 1, then in turn the return of a batch and the gather of the one after the next.
    gathers, returns = [0, 1], []
    number = 2
    for b in range(batches):
        returns.append(number)
        number += 1
        if b + 2 < batches:
            gathers.append(number)
            number += 1
    place = {event: i for i, event in enumerate(counted.log)}
    products = [i for i, (what, _) in enumerate(counted.log) if what == "products"]
    assert len(products) == batches
    for b, at in enumerate(products):
        assert place["arrived", gathers[b]] < at < place["start", returns[b]]
        if b + 1 < batches:
            assert place["start", gathers[b + 1]] < at < place["arrived", gathers[b + 1]]
            # A result is on its way during the products of the next batch.
            assert place["arrived", returns[b]] > products[b + 1]


@scenario(2, 3)
def a_model_under_fsdp2():
    """With its own backward pass; every rank has the same data, so the average over ranks is a rounding away from it."""
    mesh = line()

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 17), nn.Tanh(), nn.Linear(17, 6), nn.Tanh(), nn.Linear(6, 1))

    def steps(net):
        matrices = [(name, p) for name, p in net.named_parameters() if p.dim() == 2]
        optimizer = muon_of()(matrices)
        for i in range(STEPS):
            (x,) = values([(16, 8)], i)
            (net(x) - 1.0).square().mean().backward()
            optimizer.step()
            net.zero_grad()
        return [whole(p.detach()) for p in net.parameters()]

    sharded = model()
    for layer in sharded:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for p, q in zip(steps(sharded), steps(model()), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=STEPS * LR * 0.05)


@scenario(4)
def meshes_of_two_dimensions():
    mesh = square()
    for placements in (
        [Replicate(), Shard(0)],  # HSDP
        [Shard(1), Replicate()],
        [Shard(0), Shard(1)],  # FSDP and tensor parallel
        [Shard(1), Shard(0)],
        [Shard(0), Shard(0)],
        [Replicate(), Replicate()],
    ):
        check(mesh, placements)
    check(mesh, [[Replicate(), Shard(0)], [Shard(0), Shard(1)], [Shard(0), Replicate()]] * 2)
    for shape, options in UNITS:
        last = len(shape) - 1
        check(mesh, [Shard(0), Shard(last)], shapes=(shape,), **options)
        check(mesh, [Replicate(), Shard(0)], shapes=(shape,), **options)


@scenario(4)
def replicas_have_one_owner():
    shapes = ((24, 16),) * 6
    with Counted() as counted:
        optimizer = check(square(), [Replicate(), Shard(0)], shapes=shapes, dtype=BF16)
    assert sum(everywhere(counted.matrices)) - 4 * STEPS * 6 == STEPS * 6
    (exchange,) = exchanges(optimizer)
    for a in exchange.plan.assigned:  # of its own row of the mesh
        assert {rank // 2 for rank in a.sources} == {a.owner // 2}
        assert sorted(a.holders) == [0, 1, 2, 3]
    # A shard's bytes go to the owner once; results go to both rows.
    elements = sum(rows * columns for rows, columns in shapes)
    assert sum(everywhere(counted.bytes)) == STEPS * 2 * (elements // 2 + elements * 3 // 2)


@scenario(4)
def fsdp_over_tensor_parallel():
    """torch's own placements of both, which cut dimension 0 twice."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = square("dp", "tp")

    def model(hidden):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, hidden, bias=False), nn.Tanh(), nn.Linear(hidden, 8, bias=False))

    for hidden, options in ((16, dict(split=2)), (16, {}), (10, {})):  # 5 rows for two ranks
        net, plain_net = model(hidden), model(hidden)
        parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        for layer in (net[0], net[2]):
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(net, mesh=mesh["dp"])
        params, plain = list(net.parameters()), list(plain_net.parameters())
        assert type(params[0].placements[0]).__name__ == "_StridedShard"
        a, b = muon_of(**options)(params), muon_of(**options)(plain)
        for i in range(STEPS):
            for p, q, g in zip(params, plain, values([q.shape for q in plain], i), strict=True):
                assert torch.equal(p.full_tensor(), q)
                q.grad = g
                p.grad = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None)
                assert torch.equal(p.grad.full_tensor(), g)
            a.step()
            b.step()
        for p, q in zip(params, plain, strict=True):
            assert torch.equal(p.full_tensor(), q)


@scenario(3)
def a_mesh_of_some_ranks():
    """Of two dimensions, so that no process group is its own; the third rank has other matrices."""
    mesh, small = DeviceMesh("cpu", [[0], [1]]), DeviceMesh("cpu", [[2]])
    me = dist.get_rank()
    if me < 2:
        check(mesh, [Shard(0), Replicate()])
        check(mesh, [Shard(1), Shard(0)])
    else:
        check(small, [Shard(0), Shard(1)])


@scenario(4)
def dense_matrices_and_experts_on_other_meshes():
    """Two sets of ranks take turns in the same order on all ranks."""
    everyone, mesh = line(), square("replicate", "experts")
    own = mesh["experts"]
    shapes = ((12, 10), (5, 6, 10), (7, 16), (2, 10, 6))

    def place(i, t):
        return distribute_tensor(t, own if t.dim() == 3 else everyone, [Shard(1 if i == 3 else 0)], src_data_rank=None)

    expected, _ = train(muon_of(flatten=False), shapes, lambda i, t: t)
    found, optimizer = train(muon_of(flatten=False), shapes, place)
    assert all(torch.equal(p, q) for p, q in zip(found, expected, strict=True))
    assert len(exchanges(optimizer)) == 2


@scenario(4)
def what_is_wrong_on_one_mesh_is_said_on_those_around_it():
    everyone, own = line(), square("replicate", "experts")["experts"]
    for wrong in (1, 2):
        dense = nn.Parameter(distribute_tensor(torch.ones(12, 10), everyone, [Shard(0)], src_data_rank=None))
        experts = nn.Parameter(distribute_tensor(torch.ones(6, 10), own, [Shard(0)], src_data_rank=None))
        split = 2 if dist.get_rank() == wrong else 3
        optimizer = precond.Muon([{"params": [dense]}, {"params": [experts], "split": split}])
        for p in (dense, experts):
            p.grad = torch.ones_like(p)
        raises(optimizer.step, "the same sharded matrices on all ranks")


@scenario(2, 3)
def beside_other_methods():
    """What is wrong raises before any group has moved, and one rank alone may load its own states."""
    mesh, me = line(), dist.get_rank()
    shapes = SHAPES[:1] * 2
    matrices = [nn.Parameter(distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None)) for t in values(shapes, 5)]
    bias = nn.Parameter(torch.zeros(3))
    groups = [dict(params=[bias], optimizer=precond.AdamW), dict(params=matrices, optimizer=precond.Muon)]
    optimizer = precond.Grouped(groups, lr=LR)
    for p in (bias, *matrices):
        p.grad = torch.ones_like(p)
    optimizer.param_groups[1]["split"] = 2 if me == 1 else 3
    raises(optimizer.step, "the same sharded matrices on all ranks")
    assert not bias.any()
    assert not optimizer.state
    optimizer.param_groups[1]["split"] = None
    optimizer.step()
    if me == 0:
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.state[bias]["step"] == 2
