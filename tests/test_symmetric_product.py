"""The symmetric product in Triton: against float64 in the interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.usefixtures("triton_interpreter")
# On a GPU with TRITON_INTERPRET=0.
DEVICE = "cuda" if os.environ.get("TRITON_INTERPRET") == "0" and torch.cuda.is_available() else "cpu"


def symmetric(k, m, dtype):
    x = torch.randn(k, m, m)
    return (x + x.mT).to(dtype).to(DEVICE)


def assert_rounded_once(found, a, b, alpha=1.0, y=None, beta=0.0, w=None, gamma=0.0, shift=0.0):
    """Half an ulp, and the error of a sum in float32, of the terms' magnitudes."""
    beta, gamma, shift = (torch.as_tensor(x, dtype=torch.float64, device=a.device) for x in (beta, gamma, shift))
    eye = torch.eye(a.shape[1], dtype=torch.float64, device=a.device)
    terms = [(alpha, a.double(), b.double().mT), (shift, eye, eye)]
    terms += [(factor, t.double(), eye) for factor, t in ((beta, y), (gamma, w)) if t is not None]
    expected = sum(factor * (x @ z) for factor, x, z in terms)
    size = sum(abs(factor) * (x.abs() @ z.abs()) for factor, x, z in terms)
    eps, sums = torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps * (a.shape[2] ** 0.5 + 4)
    assert found.shape == expected.shape
    assert torch.all((found.double() - expected).abs() <= 0.51 * eps * expected.abs() + sums * size + 1e-7)
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 7), (2, 64, 32), (2, 65, 33), (1, 130, 1), (1, 1, 70), (1, 260, 40), (2, 0, 3)], ids=str
)
def test_it_is_the_product_with_its_additions_rounded_once(shape, dtype):
    from precond.triton_kernels.symmetric import symmetric_product

    k, m, n = shape
    a = torch.randn(k, m, n).to(dtype).to(DEVICE)
    y, w, factors = symmetric(k, m, dtype), symmetric(k, m, dtype), torch.randn(k, 1, 1, device=DEVICE)
    for options in (
        {},
        {"shift": -factors},
        {"alpha": 2.0315, "y": y, "beta": -4.775},
        {"alpha": 0.5, "y": y, "beta": factors, "w": w, "gamma": -1.25, "shift": 0.75},
    ):
        assert_rounded_once(symmetric_product(a, a, **options), a, a, **options)


def test_operands_may_have_any_strides_and_be_two():
    from precond.triton_kernels.symmetric import symmetric_product

    z = symmetric(2, 70, torch.bfloat16)
    gap = torch.zeros(2, 70, 140, dtype=torch.bfloat16, device=DEVICE)[:, :, ::2]
    gap.copy_(torch.eye(70))
    assert_rounded_once(symmetric_product(z, gap), z, gap)
    tall = torch.randn(2, 90, 70).to(torch.bfloat16).to(DEVICE).mT
    assert_rounded_once(symmetric_product(tall, tall, 1.0, gap, 3.0), tall, tall, 1.0, gap, 3.0)
    one = torch.randn(1, 70, 9).to(torch.bfloat16).to(DEVICE).expand(3, 70, 9)
    assert_rounded_once(symmetric_product(one, one), one, one)


def test_a_sum_over_nothing_is_zero():
    from precond.triton_kernels.symmetric import symmetric_product

    empty = torch.empty(2, 3, 0, device=DEVICE)
    assert torch.equal(symmetric_product(empty, empty), torch.zeros(2, 3, 3, device=DEVICE))


def test_a_nan_spreads_over_its_row_and_column_alone():
    from precond.triton_kernels.symmetric import symmetric_product

    a = torch.ones(2, 70, 5, dtype=torch.bfloat16, device=DEVICE)
    a[1, 66, 2] = float("nan")
    found = symmetric_product(a, a).isnan()
    expected = torch.zeros_like(found)
    expected[1, 66], expected[1, :, 66] = True, True
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tiles", [1, 2, 3, 1000, 2**13])
def test_every_tile_of_the_triangle_has_one_number(tiles):
    """The kernel's arithmetic in float32, at the borders between rows of tiles, where a root may round across."""
    row = torch.arange(tiles)
    first = row * (row + 1) // 2
    for index, expected in ((first, row), (first + row, row)):
        i = ((torch.sqrt(8.0 * index.float() + 1.0) - 1.0) * 0.5).int().long()
        i = torch.where(i * (i + 1) // 2 > index, i - 1, i)
        i = torch.where((i + 1) * (i + 2) // 2 <= index, i + 1, i)
        assert torch.equal(i, expected)


COMPILE = """
import itertools, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from precond.triton_kernels import symmetric

targets = {
    ("cuda", 80, 32): "mma.sync",
    ("cuda", 90, 32): "wgmma.mma_async",
    ("cuda", 100, 32): "tcgen05.mma",
    ("hip", "gfx942", 64): "v_mfma_f32",
}
kernel = symmetric.symmetric_kernel
kinds = ("bf16", 128), ("bf16", 64), ("fp16", 128), ("fp32", 64)
for (target, unit), (kind, tile) in itertools.product(targets.items(), kinds):
    depth, warps = symmetric.TILES[tile]
    constants = dict(KIND=kind, TILE=tile, DEPTH=depth, STEPS=9, WIDEN=False, a_column=1, b_column=1)
    if kind == "fp16":
        constants |= dict.fromkeys(("y_ptr", "w_ptr", "beta_ptr", "gamma_ptr", "shift_ptr"))
    types = {"alpha": "fp32", "beta_ptr": "*fp32", "gamma_ptr": "*fp32", "shift_ptr": "*fp32"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*" + kind if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    # What a launch finds where sizes are multiples of 16.
    even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
            if name not in constants and name.endswith(("_ptr", "_row", "_batch", "m", "n"))}
    options = {"num_warps": warps, "num_stages": symmetric.STAGES, "enable_fp_fusion": False}
    compiled = triton.compile(ASTSource(kernel, signature, constants, even), target=GPUTarget(*target), options=options)
    text = compiled.asm["ptx"] if target[0] == "cuda" else compiled.asm["amdgcn"]
    # float32 is exact: no tensor core of TF32.
    assert "tf32" not in text, target
    assert (unit in text) == (kind != "fp32" or target[0] == "hip"), (target, kind)
    assert not re.search(r"(?:ld|st)\\.local|scratch_(?:load|store)", text), (target, kind)
    assert compiled.metadata.shared <= 65600, (target, kind, compiled.metadata.shared)
    if target[0] == "cuda":
        assert "cp.async" in text, (target, kind)
"""


def test_it_compiles_to_tensor_cores_without_spills():
    # A process of its own: Triton compiles only where its interpreter was never asked for.
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
