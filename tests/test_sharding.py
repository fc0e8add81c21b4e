"""The two places that know of DTensor, on a mesh of one process."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from families import OPTIMIZERS
from support.cases import bits_equal
from support.ranks import on_ranks, on_two_ranks

import precond
from precond._core import backend
from precond._core import sharding as _sharding


@pytest.fixture
def mesh(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
def test_a_dtensor_is_updated_like_its_local_tensor(row, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    values = torch.randn(6, 10)
    plain = torch.nn.Parameter(values.clone())
    sharded = torch.nn.Parameter(distribute_tensor(values.clone(), mesh, [Shard(0)]))
    a, b = row.cls([plain], **row.kwargs), row.cls([sharded], **row.kwargs)
    for _ in range(3):
        g = torch.randn(6, 10)
        plain.grad, sharded.grad = g, distribute_tensor(g.clone(), mesh, [Shard(0)])
        a.step()
        b.step()
    assert bits_equal(plain, sharded.to_local())
    for key in b.states.names(row.rule):
        assert b.state[sharded][key].placements == sharded.placements
    assert len(b.engine.plans) == 1


def test_local_gives_plain_tensors_back():
    tensor = torch.ones(3)
    assert _sharding.local(tensor) is tensor


def test_a_norm_is_added_up_over_the_meshes_of_sharded_tensors_only(mesh):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    values = torch.randn(4, 4)
    sharded, whole = (distribute_tensor(values, mesh, [placement]) for placement in (Shard(0), Replicate()))
    assert _sharding.shard_groups(values) is None
    assert _sharding.shard_groups(whole) == {}
    groups = _sharding.shard_groups(sharded)
    assert list(groups.values()) == [mesh.get_group(0)]
    total = values.double().square().sum()
    for inf in (False, True):
        assert torch.equal(_sharding.reduce(total.clone(), groups.values(), inf), total)
    with pytest.raises(RuntimeError, match="must be placed by Shard or Replicate to have a norm, got"):
        _sharding.shard_groups(DTensor.from_local(values, mesh, [Partial()]))


def test_a_gradient_placed_otherwise_is_placed_as_its_parameter(tmp_path):
    """Two ranks; a partial sum is added up, another shard is exchanged, an asynchronous one is waited for."""
    code = """
w = torch.nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))
x = distribute_tensor(torch.arange(12.0).view(4, 3), mesh, [Shard(0)])
(x * w).sum().backward()
assert w.grad.placements == (Partial(),), w.grad.placements
precond.SGD([w], lr=1.0).step()
assert w.to_local().tolist() == [-17.0, -21.0, -25.0], w
s = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(0)]))
s.grad = distribute_tensor(torch.arange(16.0).view(4, 4), mesh, [Shard(1)])
precond.SGD([s], lr=1.0).step()
assert torch.equal(s.full_tensor(), -torch.arange(16.0).view(4, 4))
r = torch.nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Replicate()]))
r.grad = DTensor.from_local(torch.ones(2), mesh, [Partial()]).redistribute(mesh, [Replicate()], async_op=True)
precond.SGD([r], lr=1.0).step()
assert r.to_local().tolist() == [-2.0, -2.0], r
"""
    on_two_ranks(code, tmp_path)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"backend": "reference"}], ids=str)
def test_a_plan_notices_a_gradient_that_is_placed_otherwise_in_a_later_step(options, mesh):
    """Of two parameters, while the other's stays. A partial sum of one process is the whole, in other elements than a shard's."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    values = torch.randn(2, 4, 4)
    plain = [torch.nn.Parameter(v.clone()) for v in values]
    sharded = [torch.nn.Parameter(distribute_tensor(v.clone(), mesh, [Shard(0)])) for v in values]
    a, b = precond.AdamW(plain, **options), precond.AdamW(sharded, **options)
    seen = []
    redistribute = DTensor.redistribute

    def counted(self, *args, **kwargs):
        seen.append(self.placements)
        return redistribute(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DTensor, "redistribute", counted)
        for placement in ([Shard(0)], [Partial()], [Replicate()], [Shard(1)], [Shard(0)]):
            for p, q, own in zip(plain, sharded, ([Shard(0)], placement), strict=True):
                p.grad = torch.randn(4, 4)
                q.grad = DTensor.from_local(p.grad.clone(), mesh, own)
            a.step()
            b.step()
    assert seen == [(Partial(),), (Replicate(),), (Shard(1),)]
    assert all(bits_equal(p, q.to_local()) for p, q in zip(plain, sharded, strict=True))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_may_have_named_parameters_in_different_orders(ranks, tmp_path):
    """Partial gradients that are added up; and, on two meshes, the parts of a norm."""
    code = f"""
from torch.distributed.device_mesh import init_device_mesh
names = ["a", "b"] if rank in (0, 3) else ["b", "a"]
made = {{}}
for name, value in (("a", 1.0), ("b", 10.0)):
    p = made[name] = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 6), mesh, [Shard(0)]))
    p.grad = DTensor.from_local(torch.full((4, 6), value / {ranks}), mesh, [Partial()])
precond.SGD([(name, made[name]) for name in names], lr=1.0).step()
for name, value in (("a", -1.0), ("b", -10.0)):
    assert torch.allclose(made[name].full_tensor(), torch.full((4, 6), value)), (name, made[name])
if {ranks} == 4:
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("d", "t"))
    for name, dim in (("a", "d"), ("b", "t")):
        p = made[name] = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 6), square[dim], [Shard(0)]))
        p.grad = distribute_tensor(torch.ones(4, 6), square[dim], [Shard(0)])
    optimizer = precond.SGD([(name, made[name]) for name in names], lr=1.0, max_grad_norm=1.0)
    optimizer.step()
    assert abs(optimizer.grad_norm.item() - 48**0.5) < 1e-5, optimizer.grad_norm
"""
    on_ranks(ranks, code, tmp_path)


def test_a_shard_needs_no_other_look_where_gradient_and_states_are_placed_as_it(mesh):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    p = torch.nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)])
    optimizer = precond.AdamW([p])
    optimizer.step()
    state = optimizer.state[p]

    def devices(inputs=None):
        written, owners = [], []
        groups = [([p], ("exp_avg", "exp_avg_sq"), ("step",), False)]
        found = backend.reader().ready(groups, inputs or {}, optimizer.state, written, owners)
        assert [type(t) for t in written] == ([] if found == [None] else [torch.Tensor] * 3)
        assert owners == ([] if found == [None] else [(0, ""), (0, "exp_avg"), (0, "exp_avg_sq")])
        return found

    assert devices() == [-1]
    local = p.grad.to_local()
    for gradient in (DTensor.from_local(local, mesh, [Partial()]), DTensor.from_local(local, mesh, [Shard(1)]), local):
        assert devices({p: gradient}) == [None]
    p.grad = None
    assert devices() == [-1]
    for value in (state["exp_avg"].to_local(), DTensor.from_local(local, mesh, [Replicate()])):
        kept, state["exp_avg"] = state["exp_avg"], value
        assert devices() == [None]
        state["exp_avg"] = kept


@pytest.mark.parametrize("options", [{}, {"weight_format": "split24", "state_format": "int8"}], ids=str)
def test_a_step_calls_no_more_python_functions_for_shards_than_for_plain_parameters(options, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    def calls(sharded):
        made = []
        for _ in range(20):
            p, g = torch.randn(2, 8, 64).bfloat16()
            if sharded:
                p, g = (distribute_tensor(t, mesh, [Shard(0)]) for t in (p, g))
            made.append(torch.nn.Parameter(p))
            made[-1].grad = g
        optimizer = precond.AdamW(made, **options)
        optimizer.step()
        optimizer.step()
        seen = []
        sys.setprofile(lambda frame, event, _: seen.append(frame.f_code.co_qualname) if event == "call" else None)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
        return seen

    assert calls(sharded=True) == calls(sharded=False)


@pytest.mark.parametrize("weight_format", ["split24", "split32"])
def test_what_others_write_of_a_shard_is_told_element_by_element(weight_format, tmp_path):
    """Each rank compares its own piece, as FSDP2 has it."""
    code = f"""
whole = torch.randn(8, 64, dtype=torch.bfloat16)
w = torch.nn.Parameter(distribute_tensor(whole.clone(), mesh, [Shard(0)]))
model = torch.nn.ParameterList([w])
optimizer = precond.AdamW([w], lr=1e-3, weight_format="{weight_format}")
def step(i):
    torch.manual_seed(i)
    w.grad = distribute_tensor(torch.randn(8, 64, dtype=torch.bfloat16), mesh, [Shard(0)])
    optimizer.step()
for i in range(3):
    step(i)
    with torch.no_grad():
        w.clamp_(-9, 9)
before = precond.master_weights(optimizer, model)["0"].to_local()
bits = w.to_local().detach().clone()
assert (before != bits.float()).float().mean() > 0.5
with torch.no_grad():
    w.clamp_(-0.5, 0.5)
now = w.to_local().detach()
after, changed = precond.master_weights(optimizer, model)["0"].to_local(), now != bits
assert 0.1 < changed.float().mean() < 0.9
assert torch.equal(after[~changed], before[~changed])
assert torch.equal(after[changed], now[changed].float())
"""
    on_two_ranks(code, tmp_path)


METHODS = """
SHAPES = ((5, 3), (1,), (4, 2, 3), (7,), (2, 6))

def run(make, placement, dtype=torch.float32, update=None):
    generator = torch.Generator().manual_seed(5)
    def draw(shape):
        return torch.randn(shape, generator=generator).to(dtype)
    def place(t):
        return t if placement is None else distribute_tensor(t, mesh, [placement])
    params = [torch.nn.Parameter(place(draw(shape))) for shape in SHAPES]
    optimizer = make(params)
    for i in range(3):
        for p in params:
            p.grad = place(draw(p.shape))
        if update is not None:
            update(optimizer)
        optimizer.step()
    found = [p.full_tensor() if isinstance(p, DTensor) else p for p in params]
    return [t.detach() for t in found]

def check(make, *placements, exact=True, **options):
    whole = run(make, None, **options)
    for placement in placements:
        for p, q in zip(whole, run(make, placement, **options)):
            assert torch.equal(p, q) if exact else torch.allclose(p, q, rtol=1e-5, atol=1e-6), (p, q)
"""

ON_SHARDS = (
    METHODS
    + """
def dual(**options):
    return lambda ps: precond.DualDescent(ps, lr=0.1, weight_decay=0.1, **options)

for granularity in ("global", "tensor", "unit", "entry"):
    # The norm of a whole tensor is added up in another order.
    exact = granularity in ("unit", "entry")
    for kernel in precond.reference.KERNELS if granularity == "unit" else ("clip",):
        for momentum, nesterov in ((0.0, False), (0.9, False), (0.9, True)):
            options = dict(granularity=granularity, kernel=kernel, momentum=momentum, nesterov=nesterov)
            check(dual(**options), Shard(0), *([Replicate()] if kernel == "clip" else []), exact=exact)
    for formats in (dict(weight_format="split24"), dict(weight_format="split32", momentum=0.9, state_format="bf16")):
        check(dual(granularity=granularity, **formats), Shard(0), exact=exact, dtype=torch.bfloat16)
w = distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)])
for granularity, placement, needed in (("unit", Shard(1), "Shard.0. or Replicate"),):
    p = torch.nn.Parameter(w.redistribute(mesh, [placement]))
    for named in ([p], [("w", p)]):
        try:
            dual(granularity=granularity)(named)
        except RuntimeError as error:
            said = str(error)
        called = "parameter 0 of group 0 ('w')" if named[0] is not p else "parameter 0 of group 0"
        assert said.startswith(called + " must have placements " + needed.replace(".0.", "(0)")), said
    optimizer = dual(granularity="tensor")([p])
    optimizer.param_groups[0]["granularity"] = granularity
    p.grad = w.redistribute(mesh, [placement])
    before = p.full_tensor().clone()
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "parameter 0 of group 0 must have placements" in str(error), error
    assert torch.equal(p.full_tensor(), before)
"""
)

WHOLE = (
    METHODS
    + """
basis = dict(basis="kronecker", basis_frequency=2, clip=1.0)
check(lambda ps: precond.SOAP(ps, precondition_frequency=2), Replicate())
check(lambda ps: precond.SOAP(ps, l1_decay=0.01, max_precond_dim=3), Replicate())
check(lambda ps: precond.GaussNewton(ps, curvature="gradient", **basis), Replicate())
check(lambda ps: precond.GaussNewton(ps, **basis), Replicate(), update=lambda o: o.update_curvature())
check(lambda ps: precond.DualDescent(ps, granularity="spectral", momentum=0.9), Replicate())
check(lambda ps: precond.GaussNewton(ps, clip=1.0, damping=0.1), Shard(0), update=lambda o: o.update_curvature())
check(precond.Sophia, Shard(0), update=lambda o: o.update_curvature())
SHAPES = SHAPES[::4]
check(precond.Muon, Replicate())
"""
)


MEASURED = (
    METHODS
    + """
def measured(make):
    def made(ps):
        made.last = make(ps)
        return made.last
    return made

parts = {"cautious": "update", "cautious_rescale": True, "max_update_rms": 0.5}
for options in ({}, {"max_grad_norm": 0.1}, parts, parts | {"max_grad_norm": 0.1, "ema_decay": 0.5}):
    for dtype in (torch.float32, torch.bfloat16):
        make = measured(lambda ps: precond.AdamW(ps, lr=0.1, statistics=2, **options))
        whole = run(make, None, dtype)
        expected = make.last.statistics
        for placement in (Shard(0), Replicate()):
            for p, q in zip(whole, run(make, placement, dtype)):
                assert torch.allclose(p.float(), q.float(), rtol=1e-5 if dtype == torch.float32 else 0.01, atol=1e-6), (p, q)
            found = make.last.statistics
            assert torch.allclose(found.values, expected.values, rtol=1e-6, atol=1e-9), (found.table(), expected.table())
            assert torch.equal(found.values[:, 5:7], expected.values[:, 5:7])  # counts

def from_the_second_step_on(optimizer):
    optimizer.param_groups[0]["cautious_rescale"] = bool(optimizer.state)

check(lambda ps: precond.AdamW(ps, lr=0.1, cautious="update"), Shard(0), exact=False, update=from_the_second_step_on)

# A warm-up from 0: gradients of a rank that has nothing of a parameter are zeros, and its step makes more than states.
for options in ({"max_grad_norm": 1.0}, {"statistics": True}, parts):
    ones = lambda: distribute_tensor(torch.ones(1, 4), mesh, [Shard(0)])
    p = torch.nn.Parameter(ones())
    optimizer = precond.AdamW([p], lr=0.0, **options)
    for lr in (0.0, 0.1):
        optimizer.param_groups[0]["lr"], p.grad = lr, ones()
        optimizer.step()
    assert optimizer.state[p]["step"] == 2 and (p.full_tensor() < 1).all()
"""
)


@pytest.mark.parametrize("ranks", [2, 3])
def test_statistics_and_factors_are_of_whole_parameters(ranks, tmp_path):
    """Sums of pieces are added up; shards are uneven or empty."""
    on_ranks(ranks, MEASURED, tmp_path)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("code", [ON_SHARDS, WHOLE], ids=["shards", "whole"])
def test_methods_take_the_placements_that_they_promise(code, ranks, tmp_path):
    """Against unsharded runs; shards are uneven or empty. Where a whole matrix is needed, that is said when it is built."""
    on_ranks(ranks, code, tmp_path)


SHARDED = """
import functools, io, pickle
from torch.distributed.optim import ZeroRedundancyOptimizer
SHAPES = [(30, 20), (20,), (7, 7), (3, 5)]
CLASSES = [getattr(precond, name) for name in {names}]

def start(shapes, cls, group=None, **kwargs):
    generator = torch.Generator().manual_seed(3)
    init = [torch.randn(shape, generator=generator) for shape in shapes]
    a, b = ([torch.nn.Parameter(x.clone()) for x in init] for _ in range(2))
    zero = {{}} if group is None else {{"norm_process_group": group}}
    return a, b, cls(a, lr=1e-2, **kwargs), ZeroRedundancyOptimizer(b, optimizer_class=cls, lr=1e-2, **zero, **kwargs)

def give(a, b, i, scale=1.0):
    generator = torch.Generator().manual_seed(i)
    for x, y in zip(a, b):
        x.grad = scale * torch.randn(x.shape, generator=generator)
        y.grad = x.grad.clone()

def same(a, b, whole, sharded):
    assert all(torch.allclose(x, y, rtol=1e-6, atol=1e-6) for x, y in zip(a, b)), type(whole).__name__
    norms = whole.grad_norm, sharded.optim.grad_norm, whole.clip_coef, sharded.optim.clip_coef
    assert torch.allclose(norms[0], norms[1]) and torch.allclose(norms[2], norms[3]), norms
    assert (whole.skipped_steps == sharded.optim.skipped_steps).all()
"""


def test_an_optimizer_that_shards_whole_parameters_has_the_global_norm(tmp_path):
    """ZeroRedundancyOptimizer gives each rank some of the parameters, and says so to nobody."""
    names = sorted({row.cls.__name__ for row in OPTIMIZERS})
    code = (
        SHARDED.format(names=names)
        + """
for cls in CLASSES:
    a, b, whole, sharded = start(SHAPES, cls, max_grad_norm=0.5)
    for i in range(3):
        give(a, b, i)
        whole.step(), sharded.step()
    same(a, b, whole, sharded)
# Both norms, a constructor that is no class, a group that is given, and a rank that has no parameter at all.
make = functools.partial(precond.AdamW, clip_grad_value=None)
for shapes in (SHAPES, SHAPES[:1]):
    for norm_type in (2.0, math.inf):
        for group in (None, dist.group.WORLD):
            a, b, whole, _ = start(shapes, precond.AdamW, max_grad_norm=0.5, norm_type=norm_type)
            given = {} if group is None else {"norm_process_group": group}
            sharded = ZeroRedundancyOptimizer(b, make, lr=1e-2, max_grad_norm=0.5, norm_type=norm_type, **given)
            for i in range(3):
                give(a, b, i)
                whole.step(), sharded.step()
            same(a, b, whole, sharded)
# What is not finite on one rank is skipped, or raised, on all.
for shapes in (SHAPES, SHAPES[:1]):
    a, b, whole, sharded = start(shapes, precond.AdamW, max_grad_norm=0.5, nonfinite="skip")
    for i, scale in enumerate((1.0, math.inf, 1.0)):
        give(a, b, i)
        a[0].grad *= scale
        b[0].grad *= scale
        whole.step(), sharded.step()
    assert whole.skipped_steps == 1
    same(a, b, whole, sharded)
    a, b, whole, sharded = start(shapes, precond.AdamW, max_grad_norm=0.5, nonfinite="raise")
    give(a, b, 0)
    b[0].grad[0, 0] = math.nan
    try:
        sharded.step()
        raise SystemExit("no error")
    except RuntimeError as error:
        assert "non-finite" in str(error)
# The norm of one process that makes its optimizer beside a sharded one is its own.
assert precond.AdamW([torch.nn.Parameter(torch.ones(2))], max_grad_norm=1.0).norm_process_group is None
"""
    )
    on_two_ranks(code, tmp_path)


def test_a_sharded_optimizer_is_saved_and_loaded(tmp_path):
    """Process groups are not pickled: no setting may stand in a group that is saved, whichever way it came there."""
    code = (
        SHARDED.format(names=["AdamW"])
        + """
for group in (None, dist.group.WORLD):
    a, b, whole, sharded = start(SHAPES, precond.AdamW, group, max_grad_norm=0.5, weight_decay=0.1)
    late = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    whole.add_param_group({"params": [late[0]]}), sharded.add_param_group({"params": [late[1]]})
    a, b = [*a, late[0]], [*b, late[1]]
    for i in range(3):
        give(a, b, i)
        whole.step(), sharded.step()
    pickle.dumps(sharded.optim.state_dict())
    sharded.consolidate_state_dict(0)
    if rank == 0:
        torch.save(sharded.state_dict(), store + ".pt")
    dist.barrier()
    saved = torch.load(store + ".pt", weights_only=True)
    expected = whole.state_dict()
    assert saved["param_groups"] == expected["param_groups"], (saved["param_groups"][0], expected["param_groups"][0])
    for i, state in expected["state"].items():
        assert all(torch.allclose(state[name], saved["state"][i][name], atol=1e-7) for name in state)
    # Into another sharded optimizer, and into one that has everything.
    c, d, plain, again = start(SHAPES, precond.AdamW, group, max_grad_norm=0.5, weight_decay=0.1)
    late = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    plain.add_param_group({"params": [late[0]]}), again.add_param_group({"params": [late[1]]})
    c, d = [*c, late[0]], [*d, late[1]]
    for x, y, z in zip(c, d, a):
        x.data.copy_(z), y.data.copy_(z)
    plain.load_state_dict(saved), again.load_state_dict(saved)
    for i in range(3, 6):
        give(a, b, i), give(c, d, i)
        whole.step(), sharded.step(), plain.step(), again.step()
    same(a, b, whole, sharded), same(c, d, plain, again)
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a, c))
"""
    )
    on_two_ranks(code, tmp_path)
