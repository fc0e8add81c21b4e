"""Formats under FSDP2: saved on two gloo ranks, resumed on one and on three, with the bits of a run that was never sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import sharded_training
from support.cases import BACKEND
from support.ranks import launch as run
from support.sharded_training import everything, model_of, train

import precond

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="gloo ranks are CPU processes")


def launch(ranks: int, folder: Path, *arguments: str) -> None:
    program = Path(sharded_training.__file__).read_text()
    run(program, [[str(rank), str(ranks), str(folder), *arguments] for rank in range(ranks)])


@pytest.mark.parametrize(
    ("weight_format", "state_format"), [("split24", "int8"), ("stochastic", "int4"), ("split32", "bf16")]
)
def test_a_sharded_run_is_the_plain_one_and_resumes_on_other_meshes(tmp_path, weight_format, state_format):
    model = model_of(0)
    optimizer = precond.AdamW(model.parameters(), lr=1e-2, weight_format=weight_format, state_format=state_format)
    train(model, optimizer, range(3))
    three = {name: value.clone() for name, value in everything(model, optimizer).items()}
    train(model, optimizer, range(3, 6))
    six = everything(model, optimizer)

    def compare(name, expected):
        found = torch.load(tmp_path / f"{name}.pt")
        assert found.keys() == expected.keys()
        different = [key for key, value in expected.items() if not torch.equal(found[key], value)]
        assert not different, name

    formats = (weight_format, state_format)
    launch(2, tmp_path, *formats, "-", "two")
    compare("two", three)
    assert any(key.endswith("_scale") for key in three) == (state_format != "bf16")
    for ranks in (1, 3):
        launch(ranks, tmp_path, *formats, "two", f"resumed-{ranks}")
        compare(f"resumed-{ranks}", six)


def test_columns_of_a_matrix_can_be_cut(tmp_path):
    """Tensor parallel: Shard(1) has the bits of the whole, and says so where a cut would go through a group."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    from precond._core import sharding as _sharding

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        values, g = torch.randn(64, 256).bfloat16(), torch.randn(64, 256).bfloat16()
        whole = torch.nn.Parameter(values.clone())
        a = precond.AdamW([whole], weight_format="stochastic", state_format="int4")
        whole.grad = g
        a.step()
        cut = torch.nn.Parameter(DTensor.from_local(values.clone(), mesh, [Shard(1)]))
        b = precond.AdamW([cut], weight_format="stochastic", state_format="int4")
        cut.grad = DTensor.from_local(g, mesh, [Shard(1)])
        b.step()
        assert torch.equal(whole, cut.to_local())
        assert torch.equal(a.state[whole]["exp_avg"], b.state[cut]["exp_avg"].to_local())
        assert _sharding.place_of(cut) == (0, 0, 0)
        deep = torch.nn.Parameter(DTensor.from_local(torch.zeros(64, 2, 64), mesh, [Shard(2)]))
        deep.grad = DTensor.from_local(torch.zeros(64, 2, 64), mesh, [Shard(2)])
        with pytest.raises(RuntimeError, match=r"must have placements Shard\(0\), Shard\(1\) or Replicate"):
            precond.AdamW([deep], state_format="int8").step()
        rows = torch.nn.Parameter(DTensor.from_local(values.clone(), mesh, [Shard(0)]))
        c = precond.AdamW([rows], weight_format="stochastic", state_format="int4")
        rows.grad = DTensor.from_local(g, mesh, [Shard(0)])
        c.load_state_dict(b.state_dict())
        with pytest.raises(TypeError, match="exp_avg of parameter 0 of group 0 must be placed as the parameter"):
            c.step()
    finally:
        dist.destroy_process_group()


def test_a_place_in_the_unsharded_tensor_gives_its_draws(monkeypatch):
    """Pieces of a matrix, rows cut or whole, are updated as in it: what a mesh of several ranks does, in one process."""
    from precond._core import sharding as _sharding

    values, g = torch.randn(64, 256).bfloat16(), torch.randn(64, 256).bfloat16()

    def step(piece, place):
        monkeypatch.setattr(_sharding, "place_of", lambda *_: place)
        p = torch.nn.Parameter(values[piece].clone().contiguous())
        optimizer = precond.AdamW([p], weight_format="stochastic", state_format="int8")
        p.grad = g[piece].contiguous()
        optimizer.step()
        return p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]

    whole = step((slice(None), slice(None)), (0, 0, 0))
    for columns in (slice(0, 128), slice(128, 256)):
        piece = step((slice(None), columns), (columns.start, 128, 256))
        assert all(torch.equal(a, b[:, columns]) for a, b in zip(piece, whole, strict=True))
    lower = step((slice(32, 64), slice(None)), (32 * 256, 0, 0))
    assert all(torch.equal(a, b[32:]) for a, b in zip(lower, whole, strict=True))
    # Numbers of elements beyond 2^32 are others than those below.
    far = step((slice(None), slice(None)), (2**32 - 100, 0, 0))
    near = step((slice(None), slice(None)), (2**32 * 3 - 100, 0, 0))
    assert not torch.equal(far[0], whole[0])
    assert not torch.equal(far[0], near[0])
