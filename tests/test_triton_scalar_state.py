"""A rule that keeps one number per parameter, on Triton: who advances it, and that a rule reads only what it declares."""

from __future__ import annotations

import os

import pytest
import torch

from precond._core.formats import Layout

pytestmark = pytest.mark.usefixtures("triton_interpreter")
DEVICE = "cuda" if os.environ.get("TRITON_INTERPRET") == "0" and torch.cuda.is_available() else "cpu"
HYPERS = {"lr": 0.1, "momentum": 0.9, "q": 0.96}, {"lr": 0.3, "momentum": 0.7, "q": 0.5}


def rounded(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).float().item()


@pytest.mark.parametrize("on_device", [True, False], ids=["on the device", "given as a number"])
def test_a_scalar_state_goes_on_with_its_rounded_value_and_not_in_a_skipped_step(on_device, monkeypatch):
    from support.product_rule import RULE, product_after

    from precond import triton_kernels

    monkeypatch.setitem(triton_kernels.RULES, "product", RULE)
    params = [torch.linspace(-1.0, 1.0, n, device=DEVICE) for n in (3, 1500)]
    counters = [torch.tensor(float(before), device=DEVICE) for before in (0, 41)]
    products = [torch.tensor(before, device=DEVICE) for before in (1.0, 0.25)]

    def kept():
        return [(int(counter), float(product)) for counter, product in zip(counters, products, strict=True)]

    def item(p, hyper, step, scalar_state):
        return triton_kernels.Item(
            rule="product",
            p=p,
            g=torch.full_like(p, 0.5),
            states=[],
            hyper=hyper,
            step=step,
            fresh=False,
            sign=1.0,
            layout=Layout("fp32", (), (0, 0, 0)),
            beside=[None, None],
            key=0,
            scalar_state=scalar_state,
        )

    for skipped in (False, True, False, False):
        before = kept()
        after = [
            (step + 1, rounded(product_after(hyper, step + 1, product)))
            for hyper, (step, product) in zip(HYPERS, before, strict=True)
        ]
        expected = [p.clone() for p in params]
        if not skipped:
            for p, hyper, (_, product) in zip(expected, HYPERS, after, strict=True):
                p -= rounded(hyper["lr"] / (1.0 - product)) * torch.full_like(p, 0.5)
        numbers = zip(counters, products, strict=True) if on_device else after
        items = [item(p, hyper, *of_p) for p, hyper, of_p in zip(params, HYPERS, numbers, strict=True)]
        triton_kernels.update(items, found_inf=torch.tensor(float(skipped), device=DEVICE))
        assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))
        assert kept() == (after if on_device and not skipped else before)


@pytest.mark.parametrize("undeclared", [{"reads_step": False}, {"advance": None}], ids=["step", "scalar state"])
def test_what_a_rule_reads_without_saying_so_is_an_error(undeclared):
    from support.product_rule import RULE

    from precond.triton_kernels import RULES
    from precond.triton_kernels.launch import job_table, run_prologue
    from precond.triton_kernels.prologue import SCALAR_FLOATS

    rule = RULES["adamw"] if "reads_step" in undeclared else RULE
    hyper = torch.full((len(rule.hyper),), 0.5, dtype=torch.float64, device=DEVICE)
    jobs = job_table([0, 1, 0, 0, 1, 0, 0, 0, 0, 0]).to(DEVICE)
    scalars, control = torch.empty(SCALAR_FLOATS.value, device=DEVICE), torch.empty(2, device=DEVICE)
    run_prologue(rule, hyper, jobs, scalars, control)
    with pytest.raises(Exception, match="NoneType"):
        run_prologue(rule._replace(**undeclared), hyper, jobs, scalars, control)
