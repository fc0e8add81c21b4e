"""Machine code of the GPU kernels, executed on the CPU: the CPU's bits, and a bound on the instructions they take."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import pytest
from machine_code import build
from machine_code.harness import Harness
from machine_code.listed import CASES, HANDFUL

from bench.executed import predicted

pytestmark = [
    pytest.mark.source,
    pytest.mark.skipif(find_spec("triton") is None, reason="cuobjdump comes with the triton package: not installed"),
    pytest.mark.skipif("PRECOND_TEST_EXTENSION" in os.environ, reason="that extension has no machine code for a GPU"),
]


class Bounds(NamedTuple):
    """What a kernel is held to on a full chunk of ordinary numbers, in the second step."""

    instructions: float  # of warps, for 32 elements: at most
    in_flight: int  # bytes of a thread's loads: at least
    spills: int = 0  # bytes of a thread's stack: at most


# As executed with nvcc 13.0 and Triton 3.9; instructions have 2 % to spare. A kernel waits for memory and not for instructions
# below 277 (AdamW fp32) and 120 (split24 + int8) on an H100, 218 and 94 on an H200; `python -m bench codegen` predicts what
# follows for each. Tighten an entry when its kernel improves.
BOUNDS = {
    "AdamW fp32": Bounds(40.1, 128),
    "AdamW bf16": Bounds(46, 64),
    "AdamW fp16": Bounds(46, 64),
    "AdamW fp32 + bf16 states, nearest": Bounds(44.2, 96),
    "AdamW bf16, fp32 gradients and states": Bounds(42.1, 112),
    "AdamW fp32, fp16 gradients": Bounds(41.1, 112),
    "AdamW fp32 + ema": Bounds(60.3, 160),
    "AdamW fp32, masks": Bounds(55.8, 128),
    "SGD momentum fp32": Bounds(11.8, 96),
    "Lion fp32": Bounds(20, 96),
    "Adagrad fp32": Bounds(32.3, 96),
    "RMSprop, centered, momentum, bf16": Bounds(49.9, 80),
    "AdamW L1 fp32": Bounds(69.8, 128),
    "DualDescent, power, momentum, fp32": Bounds(91.4, 96),
    "GaussNewton, own, root, fp32": Bounds(44.4, 128),
    # One load at a time: those of 16 and of 8 bytes, of which one is executed, have the same registers.
    "AdamW bf16, fp32 gradients, mixed states": Bounds(109.1, 16),
    "AdamW fp32 + bf16 states, v drawn": Bounds(119.7, 16),
    "AdamW split24 + int8": Bounds(168.8, 16),
    "AdamW stochastic + int8": Bounds(159.5, 16),
    "AdamW stochastic + int4": Bounds(160.3, 16),
    "AdamW split32 + fp32": Bounds(118.8, 16),
    "AdamW split24 + int8 + bf16 ema": Bounds(255.7, 16, spills=64),
    "AdamW AMSGrad split24 + int8": Bounds(218, 16, spills=24),
    # Whole chunks in formats that are known when compiled; with codes at most 82, with bf16 states 60, whatever a compiler does.
    "AdamW split24 + int8, whole": Bounds(79.9, 60),
    "AdamW stochastic + int8, whole": Bounds(73.6, 52),
    "AdamW split24 + int4, whole": Bounds(79.7, 52),
    "AdamW stochastic + int4, whole": Bounds(74.6, 44),
    "AdamW split32 + fp32, whole": Bounds(49.8, 112),
    "AdamW fp32 + bf16 states, whole": Bounds(49.4, 96),
    "AdamW bf16 + bf16 states, whole": Bounds(50.7, 64),
    "SGD momentum split24 + int8, whole": Bounds(40.1, 50),
    "Lion split24 + int8, whole": Bounds(48.3, 50),
    "AdamW any layout": Bounds(145, 8),
    # The limit of a clamp is fetched anew for every element: 1 more than with comparisons. In all others a clamp is 2 less.
    "Triton AdamW fp32": Bounds(47.3, 128),
    "Triton AdamW bf16": Bounds(71, 64),
    "Triton SGD momentum fp32": Bounds(15.5, 96),
    "Triton Lion fp32": Bounds(23.6, 96),
    "Triton Adagrad fp32": Bounds(36.7, 96),
    "Triton DualDescent, power, momentum, fp32": Bounds(95.4, 96),
    "Triton AdamW fp32 + bf16 states, v drawn": Bounds(64.9, 32),
    "Triton AdamW split32 + fp32": Bounds(65.5, 112),
    "Triton AdamW split24 + int8": Bounds(101.6, 40),
    "Triton SGD momentum split24 + int8": Bounds(54.6, 40),
    "Triton Lion split24 + int8": Bounds(61.3, 40),
    "Triton AdamW stochastic + int8": Bounds(93.4, 32),
    "Triton AdamW stochastic + int4": Bounds(95.7, 32),
}
assert BOUNDS.keys() == CASES.keys(), "every kernel of machine_code/listed.py has bounds"
# Triton's kernels of formats with codes, beside those of csrc.
LIKE = [
    (f"Triton {name}", f"{name}, whole")
    for name in ("AdamW split24 + int8", "AdamW stochastic + int8", "AdamW stochastic + int4")
]
assert all(BOUNDS[triton].instructions <= 1.3 * BOUNDS[cuda].instructions for triton, cuda in LIKE)


def titles():
    no_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc compiles the CUDA kernels: not on PATH")
    for title, case in CASES.items():
        marks = [] if title in HANDFUL else [pytest.mark.large]
        yield pytest.param(title, marks=marks if case.triton else [*marks, no_nvcc])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("machine_code")


@pytest.fixture(scope="module")
def harness(folder):
    return Harness(build.cpu_text(folder), build.fp(folder))


@pytest.fixture(scope="module")
def kernel(request, folder):
    """A function from a title to its kernel. What this run asks for is compiled at once: a compiler takes seconds to start."""
    specs = (getattr(item, "callspec", None) for item in request.session.items)
    asked = (spec.params.get("title") for spec in specs if spec)
    wanted = [title for title in dict.fromkeys(asked) if title in CASES]
    if shutil.which("nvcc") is None:
        wanted = [title for title in wanted if CASES[title].triton]
    built = build.kernels([CASES[title] for title in wanted], folder)
    return built.__getitem__


@pytest.mark.parametrize("title", list(titles()))
def test_a_kernel_has_the_bits_of_the_cpu_and_stays_within_its_bounds(title, harness, kernel):
    case, built = CASES[title], kernel(title)
    inputs = harness.inputs(case, built)
    results = [harness.run(case, built, given) for given in inputs]
    assert [difference for result in results for difference in result.differences] == []
    bounds = BOUNDS[title]
    for given, result in zip(inputs, results, strict=True):
        # Kernels of known formats have no slow way for gradients of 0, as those of frozen or unused embeddings are.
        if given is inputs[0] or (case.whole and given.name == "zeros"):
            assert result.instructions <= bounds.instructions, given.name
    assert results[0].in_flight >= bounds.in_flight
    assert built.kernel.spills <= bounds.spills

    row = predicted(case, built, results[0], *harness.cpu_text.traffic(case.formats))
    assert all(0 < gpu["percent_of_copy"] <= 100.01 for gpu in row["predicted"].values())
    # Kernels made for formats that stand alone wait for memory, and for nothing else, on either GPU.
    if case.kernel.startswith("update_kernel<") or (case.triton and not case.groups):
        assert {gpu["bound"] for gpu in row["predicted"].values()} == {"memory"}
        assert row["bytes_in_flight_per_sm"] >= 23 * 1024
    if case.whole:
        assert row["predicted"]["H100"]["percent_of_copy"] >= 95
        assert row["predicted"]["H200"]["percent_of_copy"] >= 85


@pytest.mark.large
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("title", list(titles()))
def test_a_kernel_has_the_bits_of_the_cpu_for_other_nasty_numbers(title, seed, harness, kernel):
    case, built = CASES[title], kernel(title)
    (nasty,) = (given for given in harness.inputs(case, built) if given.name == "nasty")
    assert harness.run(case, built, nasty._replace(seed=seed)).differences == []


def one_ulp_off(row):
    """The first scalar, which every rule uses."""
    row[0] = np.nextafter(row[0], np.float32(1))
    return row


@pytest.mark.parametrize("title", ["Triton AdamW fp32"])
def test_a_wrong_scalar_is_seen(title, harness, kernel):
    case, built = CASES[title], kernel(title)
    assert harness.run(case, built, harness.inputs(case, built)[0], spoil=one_ulp_off).differences != []


@pytest.mark.parametrize("title", ["Triton AdamW fp32"])
@pytest.mark.parametrize(
    ("op", "old", "new"),
    [("FMUL", "FMUL ", "FMUL.RM "), ("FFMA", "FFMA ", "FFMA.FTZ "), ("STG.E.128", ".64]", ".64+0x800]")],
)
def test_wrong_instructions_are_seen(title, op, old, new, harness, kernel):
    """Products that round down, denormals that are flushed, stores that go elsewhere."""
    case, built = CASES[title], kernel(title)
    instructions = [
        line._replace(text=line.text.replace(old, new)) if line.text.startswith(op) else line
        for line in built.kernel.instructions
    ]
    assert instructions != built.kernel.instructions
    spoiled = built._replace(kernel=replace(built.kernel, instructions=instructions))
    differences = [harness.run(case, spoiled, given).differences for given in harness.inputs(case, built)[:2]]
    assert differences != [[], []]
