"""Muon on what consists of several matrices: convolutions, experts, fused projections, heads; against the same matrices apart."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from support.cases import BACKEND, bits_equal
from support.multipass import BF16, F32, F64

import precond

STEPS, LR = 4, 0.02


def blocks(t, flatten, split):
    """The matrices of a tensor by torch's own functions; batches of them come apart."""
    if flatten:
        t = t.flatten(1)
    found = list(t.flatten(0, -3)) if t.dim() > 2 else [t]
    cuts = split if isinstance(split, dict) else {0: split or 1}
    for dim, cut in cuts.items():
        sizes = [t.shape[-2:][dim] // cut] * cut if isinstance(cut, int) else list(cut)
        found = [part for each in found for part in each.split(sizes, dim)]
    return found


CASES = {
    "convolution": ((6, 4, 3, 3), True, None),
    "experts": ((5, 6, 10), False, None),
    "experts of two dimensions": ((2, 3, 10, 6), False, None),
    "qkv": ((12, 10), None, 3),
    "grouped qkv": ((16, 10), None, (8, 4, 4)),
    "one size": ((7, 5), None, [7]),
    "heads in columns": ((10, 12), None, {1: 4}),
    "heads both ways": ((12, 16), None, {0: 3, 1: (8, 4, 4)}),
    "gate and up of experts": ((3, 8, 6), False, 2),
    "experts in columns": ((3, 8, 6), False, {1: (2, 4)}),
    "split convolution": ((6, 4, 3, 3), True, {0: 2}),
    "heads of one row": ((4, 5), None, 4),
}


def gradients(shape, dtype=F32):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(STEPS)]


def train(p, shape, **options):
    optimizer = precond.Muon([p], lr=LR, weight_decay=0.1, **options)
    for g in gradients(shape, p.dtype):
        p.grad = g.clone()
        optimizer.step()
    return optimizer


def train_apart(value, shape, flatten, split, **options):
    parts = [torch.nn.Parameter(part.clone()) for part in blocks(value, flatten, split)]
    optimizer = precond.Muon(parts, lr=LR, weight_decay=0.1, **options)
    for g in gradients(shape, value.dtype):
        for part, own in zip(parts, blocks(g, flatten, split), strict=True):
            part.grad = own.clone()
        optimizer.step()
    return parts


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("case", CASES)
def test_blocks_train_like_parameters_of_their_own(case, dtype, adjust):
    """Bit for bit where all blocks of a parameter have one scale s: it multiplies lr. Where they have several it multiplies the
    directions, in float32.
    """
    shape, flatten, split = CASES[case]
    value = torch.randn(shape).to(dtype)
    p = torch.nn.Parameter(value.clone())
    train(p, shape, flatten=flatten, split=split, adjust_lr_fn=adjust)
    parts = train_apart(value, shape, flatten, split, adjust_lr_fn=adjust)
    scales = {0.2 * max(q.shape) ** 0.5 if adjust else max(1, q.shape[0] / q.shape[1]) ** 0.5 for q in parts}
    for found, q in zip(blocks(p.detach(), flatten, split), parts, strict=True):
        if len(scales) == 1:
            assert bits_equal(found.contiguous(), q.detach())
        else:
            eps = torch.finfo(BF16 if dtype == BF16 else F32).eps
            bound = STEPS * eps * (LR * max(scales) * 2 + q.detach().abs().max().item())
            torch.testing.assert_close(found, q.detach(), rtol=0, atol=bound)


@pytest.mark.parametrize("case", [name for name, (_, _, split) in CASES.items() if split not in (None, [7])])
def test_blocks_are_not_the_whole(case):
    """The comparison above can fail: another cut trains otherwise."""
    shape, flatten, split = CASES[case]
    value = torch.randn(shape)
    p, q = torch.nn.Parameter(value.clone()), torch.nn.Parameter(value.clone())
    train(p, shape, flatten=flatten, split=split)
    train(q, shape, flatten=flatten)
    assert (p - q).abs().max() > 0.1 * LR


def test_each_block_is_multiplied_once_a_step(monkeypatch):
    from precond import muon
    from precond._methods import newton_schulz

    seen = []

    def counted(u, group):
        seen.append(tuple(u.shape))
        return newton_schulz.orthogonalized(u, group)

    monkeypatch.setattr(muon, "orthogonalized", counted)
    shapes = [(12, 10), (12, 10), (4, 10), (3, 4, 10)]
    groups = [{"params": [torch.nn.Parameter(torch.randn(s)) for s in shapes[:2]], "split": 3}]
    groups += [{"params": [torch.nn.Parameter(torch.randn(s)) for s in shapes[2:]], "flatten": False}]
    optimizer = precond.Muon(groups)
    for group in groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()
    assert sorted(seen) == [(4, 4, 10), (6, 4, 10)]


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        ((7, 4), {"split": 2}, "blocks of equal size, got 2 blocks of 7 rows"),
        ((6, 4), {"split": (2, 3)}, "along dimension 0 that add up to the 6 rows of parameter 0 of group 0.*2, 3"),
        ((6, 4), {"split": {1: (2, 3)}}, "along dimension 1 that add up to the 4 columns of parameter 0 of group 0"),
        ((6, 4), {"split": {1: 3}}, "dimension 1 of parameter 0 of group 0 into blocks of equal size, got 3"),
        ((6, 4), {"split": {2: 2}}, "dimensions 0 .rows. and 1 .columns., each once at most, got {2: 2}"),
        ((6, 4), {"split": 0}, "integers > 0, got 0"),
        ((6, 4), {"split": (6, 0)}, "integers > 0"),
        ((6, 4), {"split": ()}, "integers > 0"),
        ((6, 4), {"split": {}}, "how a dimension is cut, got {}"),
        ((6, 4), {"split": 2.0}, "number of blocks, a sequence of sizes, or a dict"),
        ((6, 4), {"split": True}, "number of blocks, a sequence of sizes, or a dict"),
        ((6, 4), {"split": "qkv"}, "number of blocks, a sequence of sizes, or a dict"),
        ((6, 4), {"flatten": 1}, "flatten must be None, True or False, got 1"),
        ((6,), {"flatten": True}, "only supports 2D parameters"),
        ((2, 3, 4), {}, "only supports 2D parameters.*flatten=True makes it one matrix"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_when_built(shape, options, said):
    p = torch.nn.Parameter(torch.ones(shape))
    with pytest.raises(ValueError, match=said):
        precond.Muon([p], **options)
    optimizer = precond.Muon([torch.nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match=said.replace("group 0", "group 1")):
        optimizer.add_param_group({"params": [p], **options})
    assert len(optimizer.param_groups) == 1


SPLITS = [3, (8, 4), [6, 3, 3], {0: 3, 1: 2}, {1: [4, 6]}, torch.Size((8, 4))]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_options_survive_checkpoints(split, tmp_path):
    """``state_dict``, ``torch.save`` for ``weights_only``, deepcopy, and torch.distributed.checkpoint plain and flat."""
    from support.dcp_training import load, save

    def start(split=None):
        torch.manual_seed(0)
        net = torch.nn.Linear(10, 12, bias=False)
        return net, precond.Muon([{"params": net.parameters(), "split": split}], lr=LR)

    def steps(net, optimizer, begin):
        for g in gradients((12, 10))[begin : begin + 2]:
            net.weight.grad = g.clone()
            optimizer.step()

    straight, a = start(split)
    steps(straight, a, 0)
    kept = a.param_groups[0]["split"]
    file = io.BytesIO()
    torch.save((straight.state_dict(), a.state_dict()), file)
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    runs = [copy.deepcopy((straight, a))]
    net, optimizer = start()
    net.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    runs.append((net, optimizer))
    for form in ("plain", "flat"):
        save(straight, a, tmp_path / form, form == "flat")
        net, optimizer = start(split)
        load(net, optimizer, tmp_path / form, form == "flat")
        runs.append((net, optimizer))
    steps(straight, a, 2)
    for net, optimizer in runs:
        assert optimizer.param_groups[0]["split"] == kept
        steps(net, optimizer, 2)
        assert bits_equal(net.weight.detach(), straight.weight.detach())


def test_groups_without_the_options_are_torchs():
    optimizer = precond.Muon([{"params": [torch.nn.Parameter(torch.ones(2, 2))], "flatten": None, "split": None}])
    assert not {"flatten", "split"} & optimizer.param_groups[0].keys()
    assert not {"flatten", "split"} & optimizer.state_dict()["param_groups"][0].keys()


def test_a_checkpoint_of_torchs_leaves_the_options_alone():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    p = torch.nn.Parameter(torch.ones(6, 4))
    theirs, ours = torch.optim.Muon([p]), precond.Muon([p], split=2, flatten=False)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["split"] == ((0, 2),)
    assert ours.param_groups[0]["flatten"] is False


def test_options_changed_in_a_group_are_read_anew():
    value = torch.randn(12, 10)
    p, q = torch.nn.Parameter(value.clone()), torch.nn.Parameter(value.clone())
    a, b = precond.Muon([p], lr=LR), precond.Muon([q], lr=LR, split=[4, 8])
    a.param_groups[0]["split"] = [4, 8]
    p.grad = q.grad = torch.randn(12, 10)
    a.step()
    b.step()
    assert bits_equal(p.detach(), q.detach())
    a.param_groups[0]["split"] = [4, 9]
    with pytest.raises(ValueError, match="add up to the 12 rows of parameter 0 of group 0"):
        a.step()


@pytest.mark.parametrize("formats", [{"state_format": "int8"}, {"weight_format": "split24"}], ids=str)
def test_blocks_train_in_every_format(formats):
    """Formats belong to the parameter: its codes are not cut."""
    dtype = BF16 if "weight_format" in formats else F32
    value = torch.randn(128, 64).to(dtype)
    p, q = torch.nn.Parameter(value.clone()), torch.nn.Parameter(value.clone())
    train(p, (128, 64), split=(64, 32, 32), **formats)
    train(q, (128, 64), split=(64, 32, 32))
    assert (p - q).float().norm() <= 0.1 * (q - value).float().norm() + 0.01 * q.float().norm()


@pytest.mark.skipif(BACKEND != "cpu", reason="the CPU's layouts")
def test_transposed_parameters_have_blocks_too():
    value, results = torch.randn(12, 10), []
    for layout in (lambda t: t.clone(), lambda t: t.t().contiguous().t()):
        for split in (3, (8, 4), {1: (2, 8)}):
            p = torch.nn.Parameter(layout(value))
            train(p, (12, 10), split=split)
            results.append(p.detach().contiguous())
    assert all(bits_equal(a, b) for a, b in zip(results[:3], results[3:], strict=True))


def test_experts_without_gradients_rest():
    """And the others' batch is multiplied as before, whatever its place."""
    values = [torch.randn(2, 6, 4) for _ in range(3)]
    params = [torch.nn.Parameter(v.clone()) for v in values]
    optimizer = precond.Muon(params, lr=LR, flatten=False)
    alone = [torch.nn.Parameter(v.clone()) for v in values]
    singles = [precond.Muon([p], lr=LR, flatten=False) for p in alone]
    for i in range(6):
        for j, (p, q) in enumerate(zip(params, alone, strict=True)):
            g = torch.randn(2, 6, 4)
            p.grad, q.grad = (None, None) if i % 3 == j else (g, g.clone())
        optimizer.step()
        for single in singles:
            single.step()
    assert all(bits_equal(p.detach(), q.detach()) for p, q in zip(params, alone, strict=True))
