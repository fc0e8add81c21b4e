"""Compiles Triton's update kernels without a GPU. As a program: ``python -m machine_code.triton_cubins FOLDER TITLE...`` writes
the cubins of kernels of listed.py for sm_90, and what launch.py needs to know of each.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from precond.triton_kernels import RULES, kernel
from precond.triton_kernels.formats import BESIDE
from precond.triton_kernels.launch import update_constants
from precond.triton_kernels.prologue import SCALAR_FLOATS

from .listed import CASES

POINTERS = {"chunks_ptr": "*i64", "tensors_ptr": "*i64", "scalars_ptr": "*fp32", "control_ptr": "*fp32"}


def compiled(rule: str, p: str, g: str, states: list[str], target: GPUTarget):
    """update_kernel as launch.py calls it."""
    constants = update_constants(RULES[rule], [p, g, *states])
    signature = POINTERS | {"clip_value": "fp32"} | dict.fromkeys(constants, "constexpr")
    hints = {(i,): [["tt.divisibility", 16]] for i in range(len(POINTERS))}
    source = ASTSource(kernel.update_kernel, signature, constants, hints)
    return triton.compile(source, target=target, options={"num_warps": kernel.WARPS, "enable_fp_fusion": False})


def main() -> None:
    folder = Path(sys.argv[1])
    for k, title in enumerate(sys.argv[2:]):
        case = CASES[title]
        p, g, *states = case.formats
        code = compiled(case.rule, p, g, states, GPUTarget("cuda", 90, 32))
        (folder / f"triton_{k}.cubin").write_bytes(code.asm["cubin"])
        layout = {
            "threads": 32 * kernel.WARPS,
            "block": kernel.BLOCK,
            "row": SCALAR_FLOATS.value,
            "slots": kernel.SLOTS.value,
            "numel": kernel.NUMEL.value,
            "beside": BESIDE.value,
            "place": kernel.PLACE.value,
            # Those of the signature, then pointers to scratch memory that these kernels do not use.
            "parameters": re.findall(r"\.param \.(u64|f32)", code.asm["ptx"].partition(")")[0]),
        }
        (folder / f"triton_{k}.json").write_text(json.dumps(layout))


if __name__ == "__main__":
    main()
