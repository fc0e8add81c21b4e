"""Machine code of the GPU kernels, without a GPU: registers, widths, spills, special functions, predicted bounds.

CUDA: disassembles the extension that is installed. Triton: compiles every rule offline for the targets named. cuobjdump comes
from the triton package. The kernels listed in tests/machine_code are also executed (executed.py). With ``--quick`` nothing is
disassembled or executed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import triton
from families import BY_RULE, BY_STATES
from machine_code.triton_cubins import compiled as compiled_triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from precond import _C, reference
from precond._core import formats as _formats

from . import ROOT, timing
from .executed import GPUS, executed_kernels, print_executed

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
PLAIN = ("fp32", "fp32", "fp32")
FORMATS = [
    PLAIN,
    ("bf16", "bf16", "bf16"),
    ("fp16", "fp16", "fp16"),
    ("fp32", "fp32", "bf16"),
    ("bf16", "bf16", "fp32"),
]
# Of Triton: split weights, stochastic rounding, states with codes.
STORAGE = [
    ("bf16_split24", "bf16", "int8"),
    ("bf16_stochastic", "bf16", "int4"),
    ("fp16_split32", "fp16", "int8"),
    ("fp32", "fp32", "int8"),
]
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
CPP_FORMATS = {"Fp32": "fp32", "Bf16": "bf16", "Fp16": "fp16"}
# Whose times the rows have.
GPU = GPUS["H200"]
# Approximations, flushed denormals, and operations that the assembler may still fuse.
INEXACT_PTX = re.compile(r"\w+\.approx\S*|\S+\.ftz\S*|rsqrt\S*|mad\.\S*f32|mul\.f32|add\.f32")


def cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool) if tool.exists() else "cuobjdump", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def demangled(names: list[str]) -> dict[str, str]:
    tool = shutil.which("c++filt")
    if tool is None:
        raise FileNotFoundError("c++filt (binutils) is needed to read the names of the kernels")
    output = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, output.splitlines(), strict=True))


def traffic(states: int, p: str, g: str, s: str) -> int:
    """Bytes per parameter and step: p and states read and written, g read."""
    return 2 * BYTES[p] + BYTES[g] + 2 * states * BYTES[s]


def sections(text: str, pattern: str) -> dict[str, str]:
    """The text after each match of a pattern with one group, up to the next match."""
    parts = re.split(pattern, text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# What is counted in a kernel's text, by a name that its PTX and its SASS share.
COUNTED = {
    "loads_128": {"PTX": r"ld\.global\.v4\.\w32", "SASS": r"LDG\.E\.128"},
    "stores_128": {"PTX": r"st\.global\.v4\.\w32", "SASS": r"STG\.E\.128"},
    "loads_64": {"PTX": r"ld\.global\.v2\.\w32", "SASS": r"LDG\.E\.64"},
    "stores_64": {"PTX": r"st\.global\.v2\.\w32", "SASS": r"STG\.E\.64"},
    "local": {"PTX": r"(?:ld|st)\.local\S*", "SASS": r"LDL\S*|STL\S*"},
    "double": {
        "PTX": r"(?:add|sub|mul|fma|div|sqrt|setp|cvt)\.\S*f64\S*",
        "SASS": r"(?:DADD|DMUL|DFMA|DSETP|F2F\.F64|F2F\.F32\.F64)\S*",
    },
    # An exact division or root takes one, beside a slow way.
    "special": {"PTX": r"(?:div|sqrt|rcp|rsqrt|ex2|lg2|sin|cos|tanh)\.\S*f32", "SASS": r"MUFU\S*"},
}
OPCODE = {
    "PTX": re.compile(r"(?:^|[;{}])[ \t]*(?:@!?%?\w+[ \t]+)?([a-z]\w*\.[^\s;]+)", re.MULTILINE),
    "SASS": re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.MULTILINE),
}


class MachineCode:
    """The kernels of a compiled file: by their mangled names, what they are called, their registers, their instructions.

    To disassemble all SASS takes a minute. If ``quick``, instructions are those of the PTX, of which SASS has the same accesses.
    """

    def __init__(self, path: str | Path, arch: str, quick: bool) -> None:
        texts = sections(cuobjdump("-ptx", str(path)), r"\.entry (\w+)\(")
        # What a kernel calls may stand behind another one.
        ptx = opcodes({name: re.split(r"\.func\b", text)[0] for name, text in texts.items()}, "PTX")
        self.kind = "PTX" if quick else "SASS"
        self.code = self._ptx = ptx
        if not quick:
            self.code = opcodes(sections(cuobjdump("-sass", "-arch", arch, str(path)), r"Function : (\S+)"), "SASS")
        self.names = demangled(list(self.code))
        usage = cuobjdump("-res-usage", "-arch", arch, str(path))
        self._usage = dict(re.findall(r"Function (\S+):\s*\n\s*(.*)", usage))

    def counts(self, mangled: str) -> dict[str, object]:
        """What every kernel is held to."""
        code, ptx = self.code[mangled], self._ptx.get(mangled, {})
        counted = {
            name: sum(n for opcode, n in code.items() if re.fullmatch(texts[self.kind], opcode))
            for name, texts in COUNTED.items()
        }
        return {
            "registers": int(re.search(r"REG:(\d+)", self._usage[mangled])[1]),  # type: ignore[index]
            "stack": int(re.search(r"STACK:(\d+)", self._usage[mangled])[1]),  # type: ignore[index]
            **counted,
            "inexact_ptx": sorted(opcode for opcode in ptx if INEXACT_PTX.fullmatch(opcode)),
            "has_ptx": mangled in self._ptx,
        }


def opcodes(texts: dict[str, str], kind: str) -> dict[str, Counter[str]]:
    """How often each instruction stands in each text."""
    return {name: Counter(OPCODE[kind].findall(text)) for name, text in texts.items()}


#: Every compiled rule; those with parts as "rule+parts" and "rule+ema".
COMPILED = {
    **_C.rules,
    **{f"{name}+{parts}": rule for parts, of in _C.rules_with_parts.items() for name, rule in of.items()},
}


def rule_named(type_: str) -> str:
    """The rule of a functor's type as it is demangled."""
    plain = re.sub(r"precond::\w+::", "", type_).replace(" ", "")
    return next(name for name, rule in COMPILED.items() if rule.type.replace(" ", "") == plain)


def cuda_kernels(machine: MachineCode) -> list[dict[str, object]]:
    """One row per kernel of formats that stand alone."""
    rows = []
    for mangled in machine.code:
        found = re.search(
            r"update_kernel<(.*), precond::\w+::(\w+), precond::\w+::(\w+), precond::\w+::(\w+)>\(",
            machine.names[mangled],
        )
        if found is None:
            continue
        rule = rule_named(found[1])
        p, g, s = (CPP_FORMATS[f] for f in found.groups()[1:])
        states = COMPILED[rule].states
        # 16 bytes of the widest operand; of 16-bit ones beside it, 8 bytes.
        pack = 4 if "fp32" in (p, g, s) else 8
        packs = 2 if pack == 4 else 1
        # Copies of the rule in the code: the loop over packs, the single pack, the single element.
        copies = packs * pack + (pack if packs > 1 else 0) + 1
        counts = machine.counts(mangled)
        threads = min(2048, 65536 // (counts["registers"] * 256) * 256)  # type: ignore[operator]
        per_thread = packs * pack * (BYTES[p] + BYTES[g] + states * BYTES[s])
        # Bytes of an access to each operand. All are asked for by the packs in flight, and by the single one.
        loaded, stored = ([pack * BYTES[f] for f in (p, *others, *[s] * states)] for others in ([g], []))
        special = counts["special"] / copies  # type: ignore[operator]
        moved = traffic(states, p, g, s)
        rows.append(
            {
                "rule": rule,
                "formats": f"{p}/{g}/{s}",
                **counts,
                "wanted_loads_128": loaded.count(16) * (packs + (packs > 1)),
                "wanted_stores_128": stored.count(16) * (packs + (packs > 1)),
                "wanted_stores_64": stored.count(8) * (packs + (packs > 1)),
                "special_per_element": special,
                "bytes_in_flight_per_sm": threads * per_thread,
                "memory_ps": GPU.memory_ps(moved),
                "special_ps": GPU.special_ps(special),
            }
        )
    return rows


def mixed_kernels(machine: MachineCode) -> list[dict[str, object]]:
    """One row per kernel of the other formats, all of whose branches are in one piece of code."""
    rows = []
    for mangled, name in machine.names.items():
        found = re.search(r"update_(?:mixed|parts)_kernel<(.*)>\(", name)
        if found is not None:
            rows.append({"rule": rule_named(found[1]), **machine.counts(mangled)})
    return rows


def fixed_kernels(machine: MachineCode) -> list[dict[str, object]]:
    """One row per kernel of formats that are known when compiled, for whole chunks."""
    rows = []
    for mangled, code in machine.code.items():
        name = re.sub(r"precond::(\w+::)?", "", machine.names[mangled])
        found = re.search(r"update_fixed_kernel<(\w+<.*?>), (.*)>\(", name)
        if found is None:
            continue
        counts = machine.counts(mangled)
        rows.append({"rule": rule_named(found[1]), "formats": found[2], **counts, "codes": "Codes<" in found[2]})
        rows[-1]["instructions"] = code.total()
    return rows


def machine_code(cubin: bytes, elements: int) -> dict[str, object]:
    """Registers and special functions of a compiled Triton kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = cuobjdump("-res-usage", file.name), cuobjdump("-sass", file.name)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "special_per_element": len(re.findall(r"\bMUFU", code)) / elements,
    }


def triton_kernel(rule: str, formats: tuple[str, str, str], target: str) -> dict[str, object]:
    """Compile one Triton update kernel offline and count what matters."""
    from precond.triton_kernels import kernel

    names, form = reference.RULES[rule].states, formats[2]
    states = [_formats.code_format(name, form) if form in _formats.CODED else form for name in names]
    compiled = compiled_triton(rule, formats[0], formats[1], states, GPUTarget(*TARGETS[target]))
    row: dict[str, object] = {"rule": rule, "formats": "/".join(formats), "target": target}
    if "cubin" in compiled.asm and formats in STORAGE:
        per_thread = kernel.BLOCK // (32 * kernel.WARPS)
        # The text stands there twice: for a full block, and for a part of another one.
        row |= machine_code(compiled.asm["cubin"], per_thread + per_thread // kernel.PARTS)
    if "ptx" in compiled.asm:
        text = compiled.asm["ptx"]
        row["loads_128"] = len(re.findall(r"ld\.global\.v4\.b32", text))
        row["stores_128"] = len(re.findall(r"st\.global\.v4\.b32", text))
        row["loads_64"] = len(re.findall(r"ld\.global\.v2\.b32", text))
        row["stores_64"] = len(re.findall(r"st\.global\.v2\.b32", text))
        row["inexact"] = sorted(set(re.findall(r"\w+\.approx\S*|\S+\.ftz\S*|rsqrt\S*|mad\.\S*f32", text)))
        row["double"] = len(re.findall(r"\b(?:add|mul|fma|div|sqrt|cvt)\.\S*f64", text))
        row["local"] = len(re.findall(r"\b(?:ld|st)\.local", text))
    else:
        text = compiled.asm["amdgcn"]
        row["loads_128"] = text.count("global_load_dwordx4")
        row["stores_128"] = text.count("global_store_dwordx4")
        row["inexact"] = sorted(set(re.findall(r"v_rsq_f32", text)))
        row["double"] = len(re.findall(r"\bv_(?:add|mul|fma)_f64", text))
        row["local"] = len(re.findall(r"\bscratch_(?:load|store)", text))
    return row


def report(arch: str, targets: list[str], quick: bool) -> dict[str, object]:
    cases = [
        (row.rule, formats, target)
        for row in BY_RULE.values()
        for formats in FORMATS
        for target in targets
        if not quick or row in BY_STATES or (formats == PLAIN and target == "sm_90")
    ]
    machine = MachineCode(_C.__file__, arch, quick) if _C.cuda and not _C.cuda_on_host else None
    cases += [
        (row.rule, formats, target)
        for row in (BY_STATES[2:3] if quick else BY_STATES)
        for formats in STORAGE
        for target in targets
        if not quick or target in ("sm_90", "gfx942")
    ]
    return {
        "environment": {"cuda": _C.cuda, "triton": triton.__version__, "commit": timing.commit()},
        "cuda": cuda_kernels(machine) if machine else [],
        "cuda_mixed": mixed_kernels(machine) if machine else [],
        "cuda_fixed": fixed_kernels(machine) if machine else [],
        "executed": [] if quick else executed_kernels(),
        "triton": [triton_kernel(*case) for case in tqdm(cases, desc="triton", leave=False)],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", default="sm_90", help="of the CUDA kernels to disassemble (default sm_90)")
    parser.add_argument(
        "--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS), help="of Triton (default all)"
    )
    parser.add_argument("--json", type=Path, default=None, help="where to write the report")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="Triton: every rule once, every format and target for one rule of each shape; CUDA: from PTX; nothing is executed",
    )


def run(arguments: argparse.Namespace) -> None:
    result = report(arguments.arch, arguments.targets, arguments.quick)
    path = arguments.json or ROOT / "bench" / "results" / "codegen.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"CUDA, {arguments.arch}: {_C.cuda or 'not built'}\n")
    print(
        "| rule | p/g/state | registers | KB in flight per SM | special functions per element | bound by, ps per element |"
    )
    print("|---|---|---|---|---|---|")
    for row in sorted(result["cuda"], key=lambda row: (row["rule"], row["formats"])):
        memory, special = row["memory_ps"], row["special_ps"]
        bound = f"memory {memory:.2f}" if memory >= special else f"special functions {special:.2f}"
        print(
            f"| {row['rule']} | {row['formats']} | {row['registers']} | {row['bytes_in_flight_per_sm'] / 1024:.0f} | "
            f"{row['special_per_element']:.1f} | {bound} |"
        )
    print(
        "\n| rule, formats that do not stand alone | registers | bytes of stack | accesses to it |\n|---|---|---|---|"
    )
    for row in sorted(result["cuda_mixed"], key=lambda row: row["rule"]):
        print(f"| {row['rule']} | {row['registers']} | {row['stack']} | {row['local']} |")
    print("\n| rule, whole chunks | formats | registers | bytes of stack | KB of code |\n|---|---|---|---|---|")
    for row in sorted(result["cuda_fixed"], key=lambda row: (row["rule"], row["formats"])):
        size = 16 * row["instructions"] / 1024
        print(f"| {row['rule']} | {row['formats']} | {row['registers']} | {row['stack']} | {size:.0f} |")
    print(
        "\n| Triton rule | p/g/state | target | 128-bit loads | 128-bit stores | local memory |\n|---|---|---|---|---|---|"
    )
    for row in result["triton"]:
        print(
            f"| {row['rule']} | {row['formats']} | {row['target']} | {row['loads_128']} | {row['stores_128']} | {row['local']} |"
        )
    if result["executed"]:
        print_executed(result["executed"])
    print(f"\nwritten to {path}")
