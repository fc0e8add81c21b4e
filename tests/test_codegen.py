"""Machine code of the GPU kernels: wide accesses, no spills, nothing inexact, no doubles in the element loop."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from families import OVERWRITING

from precond import _C
from precond._core.formats import CODED

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.source,
    pytest.mark.skipif("PRECOND_TEST_EXTENSION" in os.environ, reason="that extension has no machine code for a GPU"),
]

# Measured with nvcc 13.0 for sm_90 plus a few: 32 to 80. 80 leaves three blocks of 256 threads on a multiprocessor.
MOST_REGISTERS = 80
# Of the kernels for all other formats: 128 leave two blocks. Those of three states keep up to 32 bytes per thread in local
# memory.
MOST_MIXED_REGISTERS, MOST_STACK, MOST_PARTS_STACK = 128, 32, 160


# Of Triton's kernels with codes: 80 to 105 for sm_90, so that four programs of 128 threads share a multiprocessor. Special
# functions per element: 3.3 for AdamW, 3.6 for the centered RMSprop with momentum, of which a group's scale takes one in eight.
MOST_REGISTERS_WITH_CODES = 128
MOST_SPECIAL_WITH_CODES = 5


# Rules that have a kernel for every mix of fp32 and one kind of 16 bits: steps that are taken often, and Muon's two passes.
OFTEN = {"adam", "adamw", "sgd_momentum", "sgdw_momentum", "lion", "average", "sgdw"}


#: Rules that have kernels for formats known when compiled, and kernels with parts for plain formats.
FIXED = {"adam", "adamw", "sgd_momentum", "sgdw_momentum", "lion"}


def with_a_kernel():
    """The rules and formats of csrc/cuda/plain.cu."""
    found = []
    for name, rule in _C.rules.items():
        for p, g, s in itertools.product(("fp32", "bf16", "fp16"), repeat=3):
            if len({p, g, s} - {"fp32"}) > 1 or (rule.states == 0 and s != p):
                continue
            wide = g == "fp32" and (s == "fp32" or rule.states == 0)
            if name in OFTEN or p == g or wide:
                found.append((name, f"{p}/{g}/{s}"))
    for name in FIXED:
        found += [(f"{name}+{parts}", f"{p}/{p}/fp32") for parts in ("parts", "ema") for p in ("fp32", "bf16")]
        found.append((f"{name}+parts", "bf16/bf16/bf16"))
    return found


def states_of(name):
    """The states of a rule, or of one with parts."""
    name, _, parts = name.partition("+")
    return (_C.rules_with_parts[parts] if parts else _C.rules)[name].states


def has_codes(row) -> bool:
    return row["formats"].endswith(CODED)


@pytest.fixture(scope="module", params=["--quick", pytest.param("", marks=pytest.mark.large)])
def report(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("codegen") / "codegen.json"
    # A process of its own: Triton compiles only where its interpreter was never asked for.
    command = [sys.executable, "-m", "bench", "codegen", "--json", str(path), *request.param.split()]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(path.read_text())


@pytest.mark.skipif(not _C.cuda, reason="the extension was built without CUDA: no nvcc")
def test_cuda_kernels_are_wide_exact_and_stay_in_registers(report):
    rows = report["cuda"]
    assert {(row["rule"], row["formats"]) for row in rows} == set(with_a_kernel())
    assert len(rows) == len(with_a_kernel())
    for row in rows:
        name = f"{row['rule']} {row['formats']}"
        assert row["registers"] <= MOST_REGISTERS, name
        assert (row["stack"], row["local"]) == (0, 0), name
        assert row["double"] == 0, name
        assert row["loads_128"] >= row["wanted_loads_128"] or row["rule"] in OVERWRITING, name
        assert row["stores_128"] == row["wanted_stores_128"], name
        assert row["stores_64"] == row["wanted_stores_64"], name
        assert row["has_ptx"], name
        assert row["inexact_ptx"] == [], name
        assert row["special_per_element"] <= 8, name
        assert row["bytes_in_flight_per_sm"] >= 23 * 1024, name


@pytest.mark.skipif(not _C.cuda, reason="the extension was built without CUDA: no nvcc")
def test_cuda_kernels_of_all_formats_are_wide_and_exact_and_rarely_leave_registers(report):
    rows = report["cuda_mixed"]
    # Of a rule with parts one kernel, which has an average or none.
    assert {row["rule"] for row in rows} == {each for name in _C.rules for each in (name, f"{name}+ema")}
    for row in rows:
        name, states = row["rule"], states_of(row["rule"])
        assert row["registers"] <= MOST_MIXED_REGISTERS, name
        # States of a rule with parts are encoded by functions, which need a stack.
        most = MOST_STACK if states > 2 else 0
        assert row["stack"] <= (MOST_PARTS_STACK if "+" in name else most), name
        # The sums of statistics are doubles.
        assert row["double"] == 0 or "+" in name, name
        overwrites = name.partition("+")[0] in OVERWRITING
        # fp32 moves by twice 128 bits and what has 16 by once; remainders and codes by 128 or 64.
        assert row["loads_128"] >= 2 * (2 + states) + 1 or overwrites, name
        assert row["stores_128"] >= 2 * (1 + states) + 1, name
        assert row["loads_64"] >= 1 + states or overwrites, name
        assert row["stores_64"] >= 1 + states, name
        assert row["has_ptx"], name
        assert row["inexact_ptx"] == [], name


@pytest.mark.skipif(not _C.cuda, reason="the extension was built without CUDA: no nvcc")
def test_cuda_kernels_of_known_formats_stay_in_registers_and_approximate_only_what_they_refine(report):
    rows = report["cuda_fixed"]
    assert {row["rule"] for row in rows} == FIXED
    # Two with bf16 states, whose second moments are drawn, are for rules that have one.
    assert len(rows) == 2 * 8 + 3 * 6
    for row in rows:
        name = f"{row['rule']} {row['formats']}"
        # With codes three blocks of 256 threads share a multiprocessor, without two.
        assert row["registers"] <= (MOST_REGISTERS if row["codes"] else MOST_MIXED_REGISTERS), name
        assert (row["stack"], row["local"], row["double"]) == (0, 0, 0), name
        assert row["has_ptx"], name
        # The first guess of a quotient and of a root. test_machine_code.py has their bits.
        assert set(row["inexact_ptx"]) <= {"rcp.approx.ftz.f32", "rsqrt.approx.ftz.f32"}, name


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_triton_kernels_are_wide_exact_and_stay_in_registers(report, target):
    rows = [row for row in report["triton"] if row["target"] == target and not has_codes(row)]
    assert {row["formats"] for row in rows if row["rule"] == "adamw"} >= {"fp32/fp32/fp32", "fp16/fp16/fp16"}
    if target == "sm_90":
        assert {row["rule"] for row in rows} == set(_C.rules)
    for row in rows:
        name = f"{row['rule']} {row['formats']} {target}"
        assert row["inexact"] == [], name
        assert row["double"] == 0, name
        assert row["local"] == 0, name
        # On gfx942 a block gives each of 256 threads four elements: 16-bit operands then move by 8 bytes.
        if target != "gfx942" or row["formats"] == "fp32/fp32/fp32":
            states = _C.rules[row["rule"]].states
            assert row["loads_128"] >= 2 + states, name
            assert row["stores_128"] >= 1 + states, name


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_triton_kernels_with_codes_are_exact_and_stay_in_registers(report, target):
    rows = [row for row in report["triton"] if row["target"] == target and has_codes(row)]
    assert {row["formats"] for row in rows if row["rule"] == "adamw"} >= {"bf16_split24/bf16/int8", "fp32/fp32/int8"}
    for row in rows:
        name = f"{row['rule']} {row['formats']} {target}"
        assert row["inexact"] == [], name
        assert row["double"] == 0, name
        assert row["local"] == 0, name
        if target != "sm_90":
            continue
        assert (row["registers"] <= MOST_REGISTERS_WITH_CODES, row["stack"]) == (True, 0), name
        assert row["special_per_element"] <= MOST_SPECIAL_WITH_CODES, name
        # A thread has eight elements: fp32 moves by 2 x 16 bytes, 16 bits by 16, 8 bits by 8, 4 bits by 4.
        p, _, s = row["formats"].split("/")
        states = _C.rules[row["rule"]].states
        assert row["loads_128"] == (4 if p == "fp32" else 2) + (p == "fp16_split32"), name
        assert row["stores_128"] == (2 if p == "fp32" else 1) + (p == "fp16_split32"), name
        assert row["loads_64"] == row["stores_64"] == (states if s == "int8" else 0) + (p == "bf16_split24"), name
