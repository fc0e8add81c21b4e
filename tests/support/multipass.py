"""What the tests of the methods of several passes share: parameters, gradients, and going on from a checkpoint."""

from __future__ import annotations

import copy
import io
import pickle

import torch

from support.cases import BACKEND, bits_equal

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SHAPES = ((4, 6), (7, 3), (5,), (3, 2, 2, 2), (1, 4), ())


def params_of(shapes=SHAPES, dtype=F32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=F64).to(dtype)) for shape in shapes]


def give(params, step, scale=1.0):
    """The gradients of a step, the same for the same parameters' shapes."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=F64)).to(p.dtype)


def train(params, optimizer, begin, end, curvature=None, scale=1.0):
    """Steps, with a curvature update before every third where there is one."""
    for i in range(begin, end):
        if curvature is not None and i % 3 == 0:
            give(params, 500 + i)
            curvature(optimizer)
        give(params, i, scale)
        optimizer.step()


def assert_close(found, expected, rtol=1e-12, atol=1e-13):
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p.detach().to(q.dtype), q.detach(), rtol=rtol, atol=atol)


def eigenvectors(a, found):
    """Those that an optimizer has found of a factor, largest first: rounding decides which span the space of an eigenvalue of 0,
    as that of the first gradient's longer side.
    """
    u = found.detach().double()
    diagonal = u.T @ a @ u
    close = torch.finfo(found.dtype).eps * 64
    torch.testing.assert_close(u.T @ u, torch.eye(len(u), dtype=F64), rtol=0, atol=close)
    torch.testing.assert_close(diagonal, diagonal.diag().diag(), rtol=0, atol=close * float(a.trace()))
    assert (diagonal.diag().diff() <= close * a.trace()).all()
    return u


def same(a, b):
    return bits_equal(a, b) if a.is_floating_point() else torch.equal(a, b)


def check_resumes(make, shapes=SHAPES, dtype=F32, at=4, steps=9, curvature=None):
    """``make(params)`` stopped at a step and gone on with has the bits of the straight run: by torch.save, deepcopy, pickle."""
    straight = params_of(shapes, dtype)
    optimizer = make(straight)
    train(straight, optimizer, 0, steps, curvature)

    params = params_of(shapes, dtype)
    first = make(params)
    train(params, first, 0, at, curvature)
    for p in params:
        p.grad = None
    file = io.BytesIO()
    torch.save((params, first.state_dict()), file)
    file.seek(0)
    loaded, saved = torch.load(file, weights_only=False)
    second = make(loaded)
    second.load_state_dict(saved)
    runs = [
        (loaded, second),
        copy.deepcopy((params, first)),
        pickle.loads(pickle.dumps((params, first))),
    ]
    for others, resumed in runs:
        train(others, resumed, at, steps, curvature)
        for p, q in zip(others, straight, strict=True):
            assert bits_equal(p.detach(), q.detach())
            ours, theirs = resumed.state.get(p, {}), optimizer.state.get(q, {})
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                assert same(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value, name


def check_backends(make, curvature=None, shapes=SHAPES):
    """The kernels' bits on every backend that has them, and the reference text's values."""
    runs = {}
    for backend in (BACKEND, "triton", "reference"):
        runs[backend] = params_of(shapes)
        train(runs[backend], make(runs[backend], backend), 0, 5, curvature)
    for p, q, r in zip(*runs.values(), strict=True):
        assert bits_equal(p.detach(), q.detach())
        torch.testing.assert_close(p, r, rtol=1e-4, atol=1e-5)


def check_states_may_be_made_first(make, feed=None, biases=True):
    """pytorch#164929: the zero step of torch.distributed.checkpoint changes nothing, and what it makes can be loaded into."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def start():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=biases), torch.nn.Linear(5, 3, bias=biases)).double()
        params = list(net.parameters())
        return net, params, make(params)

    (net, params, touched), (_, others, straight) = start(), start()
    saved = get_optimizer_state_dict(net, touched)
    for state in saved["state"].values():
        assert state.get("step", torch.zeros(())) == 0
    train(params, touched, 0, 4, feed)
    train(others, straight, 0, 4, feed)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    # Into a new process' optimizer.
    again, copies, resumed = start()
    for p, q in zip(copies, params, strict=True):
        p.data.copy_(q)
    template = get_optimizer_state_dict(again, resumed)
    found = get_optimizer_state_dict(net, touched)
    assert {k: v.keys() for k, v in template["state"].items()} == {k: v.keys() for k, v in found["state"].items()}
    set_optimizer_state_dict(again, resumed, found)
    train(copies, resumed, 4, 8, feed)
    train(params, touched, 4, 8, feed)
    assert all(torch.equal(p, q) for p, q in zip(copies, params, strict=True))


def check_is_an_optimizer(make, dtype=F32, curvature=None, shapes=(*SHAPES, (0, 3), (0,))):
    """Closures, None and empty gradients, gradients left alone, versions, hooks, zero_grad, late groups."""
    params = params_of(shapes, dtype)
    idle = torch.nn.Parameter(torch.ones(2, 2, dtype=dtype))
    optimizer = make([*params, idle])
    fired = []
    optimizer.register_step_post_hook(lambda *_: fired.append(1))
    for i in range(3):
        if curvature is not None:
            give(params, 100 + i)
            curvature(optimizer)
        give(params, i)
        grads = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
        versions = [p._version for p in params]
        seen = []

        def closure(seen=seen):
            seen.append(torch.is_grad_enabled())
            return 3.5

        assert optimizer.step(closure) == 3.5
        assert seen == [True]
        for p, (g, value, version) in zip(params, grads, strict=True):
            assert p.grad is g
            assert torch.equal(g, value)
            assert g._version == version
        if i > 0:
            assert all(p._version > version for p, version in zip(params, versions, strict=True) if p.numel())
        assert all(torch.isfinite(p).all() for p in params)
    assert len(fired) == 3
    assert torch.equal(idle, torch.ones(2, 2, dtype=dtype))
    assert not optimizer.state.get(idle)
    late = torch.nn.Parameter(torch.ones(3, 3, dtype=dtype))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    if curvature is not None:
        give([*params, late], 7)
        curvature(optimizer)
    for i in range(2):
        give([*params, late], 8 + i)
        optimizer.step()
    assert not torch.equal(late, torch.ones(3, 3, dtype=dtype))
    optimizer.zero_grad()
    assert all(p.grad is None for p in [*params, late])
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
