"""Whether the GPU backends have the CPU's bits: ``bench gpu`` times no backend that differs."""

from __future__ import annotations

from typing import Any

import torch

from .record import short

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(5,), (1025,), (40_000,), (100, 640)]
STEPS = 4
#: Rules of the quick tier besides adamw: those that are timed.
QUICK_RULES = ("sgd_momentum", "adagrad", "rmsprop")
#: What rides along with adamw.
RIDING: tuple[dict[str, object], ...] = (
    {"ema_decay": 0.9, "statistics": True},
    {"cautious": "update", "cautious_rescale": True, "max_update_rms": 0.3},
)
#: (row, dtype, options), weight_format and state_format among the options
Mix = tuple[Any, torch.dtype, dict[str, object]]


def mixes(tier: str) -> list[Mix]:
    """Rules, dtypes and formats: "quick", what is timed, or "full", every rule."""
    from families import BY_RULE, BY_STATES, OPTIMIZERS

    def stored(row: Any) -> list[Mix]:
        formats = (("split24", "int8"), ("stochastic", "int8"), ("stochastic", "int4"))
        return [(row, BF16, {"weight_format": weight, "state_format": state}) for weight, state in formats]

    adamw = BY_RULE["adamw"]
    timed = [(adamw, dtype, {}) for dtype in (F32, BF16, F16)]
    timed += [*stored(adamw), (adamw, F32, {"state_format": "bf16"}), (adamw, F32, {"max_grad_norm": 1.0})]
    timed += [(BY_RULE[rule], F32, {}) for rule in QUICK_RULES]
    timed += [(adamw, F32, options) for options in RIDING]
    if tier == "quick":
        return timed
    others = [(row, dtype, {}) for row in OPTIMIZERS for dtype in (F32, BF16, F16)]
    others += [mix for row in BY_STATES for mix in stored(row)]
    return timed + [mix for mix in others if mix not in timed]


def trained(backend: str, device: str, mix: Mix) -> list[torch.Tensor]:
    """Parameters, averages and statistics after a few steps, on the host."""
    from support.cases import random_values

    row, dtype, options = mix
    torch.manual_seed(1)
    params = [torch.nn.Parameter(random_values(shape, dtype).to(device, copy=True)) for shape in SHAPES]
    optimizer = row.cls(params, **row.kwargs, **options, backend=backend)
    for _ in range(STEPS):
        for p in params:
            p.grad = random_values(p.shape, dtype).to(device)
        optimizer.step()
    averages = [optimizer.state[p]["ema"] for p in params if "ema" in optimizer.state.get(p, ())]
    found = [*params, *averages, *([] if optimizer.statistics is None else [optimizer.engine.report.sums])]
    return [t.detach().cpu() for t in found]


def wrong_backends(backends: dict[str, tuple[str, str]], tier: str) -> dict[str, str]:
    """Of ``name: (backend, device)``, those that fail or differ from the cpu backend, each with the reason."""
    from support.cases import bits_equal

    wrong: dict[str, str] = {}
    for mix in mixes(tier):
        row, dtype, options = mix
        expected = trained("cpu", "cpu", mix)
        for name, (backend, device) in backends.items():
            if name in wrong or (backend == "triton" and "weight_format" in options):
                continue
            what = f"{row.rule} {dtype} {options}"
            try:
                found = trained(backend, device, mix)
            except Exception as error:
                wrong[name] = f"not timed, parity of {what}: {short(error)}"
                continue
            if not all(bits_equal(a, b) for a, b in zip(found, expected, strict=True)):
                wrong[name] = f"not timed, {what} differs from the cpu backend"
    return wrong
