"""One step of each timed case between the start and the stop of a profiler, which then sees each kernel once."""

from __future__ import annotations

import argparse
import warnings

import speed
import torch
from kit import CUDA

import precond


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=0.1, help="of a billion elements (default 0.1)")
    asked = parser.parse_args()
    warnings.simplefilter("ignore", precond.PrecisionWarning)
    for case in speed.chosen("speed", asked.scale):
        params = [torch.nn.Parameter(torch.randn(shape, device=CUDA.name).to(case.dtype)) for shape in case.shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer = case.contenders["precond cuda"](params)
        optimizer.step()
        optimizer.step()
        CUDA.synchronize()
        if not CUDA.emulated:
            torch.cuda.profiler.start()
        optimizer.step()
        CUDA.synchronize()
        if not CUDA.emulated:
            torch.cuda.profiler.stop()
        print(case.name, flush=True)


if __name__ == "__main__":
    main()
