"""One captured graph in each kind of kernel: replays with a changed lr and eager steps on the CPU give the same bits."""

from __future__ import annotations

import functools
import warnings

import torch
from kit import CUDA
from results import finish, say

import precond

#: Plain first: a capture that fails can fail those after it.
CASES = {
    "plain": (torch.float32, {}),
    "split24 with int8 states": (torch.bfloat16, {"weight_format": "split24", "state_format": "int8"}),
    "clipped": (torch.float32, {"max_grad_norm": 1.0}),
    "with an average and statistics": (torch.float32, {"ema_decay": 0.9, "statistics": True}),
    "with a limit": (torch.bfloat16, {"weight_format": "split24", "max_update_rms": 0.5}),
}
RATES = [0.01, 0.01, 0.02, 0.005, 0.03]
EAGER = 2


def compare(case: str) -> bool:
    dtype, options = CASES[case]
    values, gradient = torch.randn(130, 640).to(dtype), torch.randn(130, 640).to(dtype)
    results, steps = [], 0.0
    for backend, where in (("cuda", CUDA.name), ("cpu", "cpu")):
        p = torch.nn.Parameter(values.to(where, copy=True))
        p.grad = gradient.to(where, copy=True)
        if backend == "cpu":
            optimizer = precond.AdamW([p], lr=RATES[0], backend=backend, **options)
            for rate in RATES:
                optimizer.param_groups[0]["lr"] = torch.tensor(rate).item()
                optimizer.step()
        else:
            lr = torch.tensor(RATES[0], device=where)
            optimizer = precond.AdamW([p], lr=lr, capturable=True, backend=backend, **options)
            with CUDA.on(CUDA.new_stream()):
                for _ in range(EAGER):
                    optimizer.step()
            replay = CUDA.capture(optimizer.step)
            for rate in RATES[EAGER:]:
                lr.fill_(rate)
                replay()
            CUDA.synchronize()
            steps = float(optimizer.state[p]["step"])
        states = {k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor) and k != "step"}
        if optimizer.statistics is not None:
            states["statistics"] = optimizer.engine.report.sums
        results.append({name: t.detach().cpu() for name, t in {"p": p, **states}.items()})
    wrong = [name for name, t in results[0].items() if not torch.equal(t, results[1][name])]
    if steps != len(RATES):
        wrong.append(f"step: {steps} instead of {len(RATES)}")
    say(what="graph", case=case, equal=not wrong, wrong=wrong)
    return not wrong


def main() -> None:
    warnings.simplefilter("ignore", precond.PrecisionWarning)
    torch.manual_seed(0)
    todo = {case: functools.partial(compare, case) for case in CASES}
    finish("graph", "graphs have the bits of eager steps", todo)


if __name__ == "__main__":
    main()
