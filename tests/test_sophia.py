"""Sophia is the published order of steps (docs/theory.md, C.6), and an optimizer."""

from __future__ import annotations

import pytest
import torch
from support import multipass
from support.cases import BACKEND
from support.multipass import BF16, F32, F64, assert_close, give, params_of

import precond


class SophiaText:
    """docs/theory.md, C.6, in the published order."""

    def __init__(self, p, lr, b1=0.965, b2=0.99, rho=0.04, decay=0.1, batch=5120.0):
        self.p, self.m, self.h = p.detach().double(), torch.zeros_like(p, dtype=F64), torch.zeros_like(p, dtype=F64)
        self.of = lr, b1, b2, rho, decay, batch

    def update(self, g):
        b2 = self.of[2]
        self.h = b2 * self.h + (1 - b2) * g.double() ** 2

    def step(self, g):
        lr, b1, _, rho, decay, batch = self.of
        self.p = self.p * (1 - lr * decay)
        self.m = b1 * self.m + (1 - b1) * g.double()
        ratio = (self.m.abs() / (rho * batch * self.h + 1e-15)).clamp(max=1.0)
        self.p = self.p - lr * self.m.sign() * ratio


@pytest.mark.parametrize(
    ("dtype", "backend"), [(F64, None), (F32, BACKEND), (F32, "reference")], ids=["f64", "fused", "f32"]
)
@pytest.mark.parametrize("options", [dict(lr=0.01, batch=64.0), dict(lr=0.1, rho=2.0, decay=0.3, b1=0.5, batch=8.0)])
def test_sophia_is_the_published_order_step_by_step(dtype, backend, options):
    params = params_of(dtype=dtype)
    texts = [SophiaText(p, **options) for p in params]
    names = dict(batch="batch_size", decay="weight_decay")
    kwargs = {names.get(k, k): v for k, v in options.items()}
    b1 = kwargs.pop("b1", 0.965)
    optimizer = precond.Sophia(params, betas=(b1, 0.99), **kwargs, backend=backend)
    clamped = 0
    for i in range(12):
        give(params, i)
        for text, p in zip(texts, params, strict=True):
            text.step(p.grad)
        optimizer.step()
        assert_close(params, [text.p for text in texts], *((1e-11, 1e-12) if dtype == F64 else (1e-5, 1e-5)))
        if i % 3 == 0:  # the published loop updates after a step
            give(params, 500 + i)
            for text, p in zip(texts, params, strict=True):
                text.update(p.grad)
            optimizer.update_curvature()
            assert_close(
                [optimizer.state[p]["curvature"] for p in params], [text.h for text in texts], rtol=1e-5, atol=1e-7
            )
        bound = [text.m.abs() >= options.get("rho", 0.04) * options["batch"] * text.h for text in texts]
        clamped += sum(int(b.sum()) for b in bound)
    assert 0 < clamped < 12 * sum(p.numel() for p in params)  # both sides of the clamp were seen


def test_sophia_moves_by_signs_before_its_first_update():
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = precond.Sophia([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.tensor([3.0, -1e-6, 0.0, 1e4])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.1, 0.1, 0.0, -0.1]))


def test_sophia_resumes_and_is_an_optimizer():
    def feed(optimizer):
        optimizer.update_curvature()

    multipass.check_resumes(lambda ps: precond.Sophia(ps, lr=0.01, batch_size=8), curvature=feed)
    multipass.check_resumes(
        lambda ps: precond.Sophia(ps, lr=0.01, weight_format="split24", state_format="int8"),
        ((64, 64),),
        BF16,
        4,
        7,
        feed,
    )
    multipass.check_is_an_optimizer(lambda ps: precond.Sophia(ps, lr=0.01), curvature=feed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rho=0.0), "rho must be > 0, got 0.0"),
        (dict(batch_size=0), "batch_size must be > 0, got 0"),
        (dict(lr=-1.0), "Invalid learning rate"),
        (dict(betas=(1.0, 0.9)), "Invalid beta parameter at index 0"),
    ],
    ids=str,
)
def test_sophias_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        precond.Sophia(params_of(((2, 2),)), **options)
