"""The two places that know of DTensor, on a mesh of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from families import OPTIMIZERS
from support.cases import bits_equal
from support.ranks import on_two_ranks

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
