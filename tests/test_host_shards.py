"""Shards in the host's memory on a mesh of devices: what FSDP2's CPUOffloadPolicy has, and the twins of precond's own offload."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore

import precond
from precond._core.sharding import like


@pytest.fixture
def mesh():
    """Of two devices that are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield DeviceMesh("cuda", [0, 1], _init_backend=False, _rank=0)
    dist.destroy_process_group()


def test_states_and_results_stay_on_the_host(mesh):
    def shard(values):
        meta = TensorMeta(torch.Size((128, 64)), (64, 1), values.dtype)
        return DTensor(values, DTensorSpec(mesh, (Shard(0),), tensor_meta=meta), requires_grad=False)

    options = dict(state_format="int8", weight_format="split24", ema_decay=0.9)
    plain = torch.nn.Parameter(torch.randn(64, 64, dtype=torch.bfloat16))
    p = torch.nn.Parameter(shard(plain.detach().clone()))
    ours, theirs = precond.AdamW([p], **options), precond.AdamW([plain], **options)
    for _ in range(2):
        plain.grad = torch.randn_like(plain)
        p.grad = like(p, plain.grad)
        ours.step()
        theirs.step()
    assert p.to_local().equal(plain)
    for name, state in theirs.state[plain].items():
        if isinstance(state, torch.Tensor) and state.dim():
            found = ours.state[p][name]
            assert found.placements == p.placements
            assert found.to_local().equal(state)
    with ours.averaged():
        assert p.to_local().device.type == "cpu"
