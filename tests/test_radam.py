"""RAdam's warm-up: what it does not read, and what the threshold of L1 is there."""

from __future__ import annotations

import pytest
import torch
from support.cases import BACKEND

import precond
from precond.reference.radam import rectification

pytestmark = pytest.mark.usefixtures("triton_interpreter")
backends = pytest.mark.parametrize("backend", [BACKEND, "triton", "reference"])


@backends
def test_an_infinite_second_moment_is_not_read_in_the_warm_up(backend):
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    p.grad, q.grad = (torch.tensor([1e30, -1e30, 1.0]) for _ in range(2))
    ours, theirs = precond.RAdam([p], backend=backend), torch.optim.RAdam([q])
    ours.step()
    theirs.step()
    assert ours.state[p]["exp_avg_sq"].isinf().tolist() == [True, True, False]
    torch.testing.assert_close(p, q)


@backends
def test_the_threshold_of_l1_is_that_of_sgdw_in_the_warm_up_and_spares_the_same_coordinates(backend):
    """lr min(l1_decay, l1_cap), and 0 where there was no gradient; then that of den."""
    for l1_decay, l1_cap, expected in ((0.5, 10.0, 0.5), (0.5, 0.25, 0.25)):
        p = torch.nn.Parameter(torch.full((2,), 3.0))
        optimizer = precond.RAdamW([p], lr=0.125, weight_decay=0.0, l1_decay=l1_decay, l1_cap=l1_cap, backend=backend)
        for step in range(6):
            before = p.detach().clone()
            p.grad = torch.tensor([1.0, 0.0])
            optimizer.step()
            moved = (before - p.detach()) / 0.125
            assert moved[1] == 0.0
            if step < 5:
                assert moved[0].item() == pytest.approx(1.0 + expected, rel=1e-5)
        r = (rectification(0.999, 6) / (1 - 0.999**6)) ** 0.5  # den is 1 / r
        assert moved[0].item() == pytest.approx(r + min(0.5 * r**0.5, l1_cap), rel=1e-4)
