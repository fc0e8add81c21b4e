"""Formats on the CUDA backend: the bits of the CPU for every rule, format of the parameter and format of its states. Run on the
CUDA sources compiled for the CPU by test_cuda_on_host.py, and on a GPU by ``make gpu``.
"""

from __future__ import annotations

import pytest
import torch
from families import BEYOND, BY_RULE, BY_STATES, OPTIMIZERS
from support.cases import BACKEND, gradient, guarded, memory, nasty_values, random_values

import precond
from precond._core import formats as _formats

if BACKEND != "cuda":
    pytest.skip("is about the CUDA backend", allow_module_level=True)
rows = pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
shapes = pytest.mark.parametrize("row", BY_STATES, ids=str)
DEVICE = "cuda" if BACKEND == "cuda" and not precond._core.backend.cuda_on_host() else "cpu"

WEIGHTS = [
    (torch.float32, None),
    *[(dtype, form) for dtype in (torch.bfloat16, torch.float16) for form in (None, *_formats.WEIGHT_FORMATS)],
]
STATES = [None, "bf16", "fp16", *_formats.CODED]
# Flat buffers with tails, matrices of several chunks, rows that are no multiple of a group.
SHAPES = [(4097,), (4160,), (70, 64), (5, 4, 256), (9, 1024), (33, 65), (7,)]


def train(row, dtype, weight_format, state_format, backend, *, shapes=SHAPES, steps=5, change=None, make=random_values):
    """Parameters and everything in their state after some steps."""
    torch.manual_seed(3)
    device = "cpu" if backend == "cpu" else DEVICE
    values = [make(shape).to(dtype) for shape in shapes]
    params = [torch.nn.Parameter(v.to(device, copy=True)) for v in values]
    if change is not None:
        params = [torch.nn.Parameter(change(p.detach())) for p in params]
    group = {"params": params, "weight_format": weight_format, "state_format": state_format}
    optimizer = row.cls([group], **row.kwargs, backend=backend)
    for step in range(max(steps, row.steps)):
        for p in params:
            p.grad_dtype = None
            g = make(tuple(p.shape)).to(torch.float32 if step % 2 else dtype).to(device)
            p.grad = g if change is None else change(g)
        optimizer.step()
    found = {}
    for i, p in enumerate(params):
        found[f"{i}"] = memory(p)
        found |= {f"{i} {k}": memory(v) for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
    return found


def assert_the_bits_of_the_cpu(*args, **kwargs):
    ours, theirs = train(*args, BACKEND, **kwargs), train(*args, "cpu", **kwargs)
    assert ours.keys() == theirs.keys()
    for name, bits in ours.items():
        assert torch.equal(bits, theirs[name]), name


@pytest.fixture(autouse=True)
def _small_buffers_take_codes(monkeypatch):
    monkeypatch.setattr(_formats.layout, "SMALLEST_CODED_FLAT", 4096)


@shapes
@pytest.mark.parametrize("state_format", STATES)
@pytest.mark.parametrize(("dtype", "weight_format"), WEIGHTS)
def test_every_format_has_the_bits_of_the_cpu(row, dtype, weight_format, state_format):
    assert_the_bits_of_the_cpu(row, dtype, weight_format, state_format)


@pytest.mark.parametrize(
    ("row", "weight_format", "state_format"),
    [(row, *formats) for row in OPTIMIZERS for formats in (("split24", "int8"), ("stochastic", "int4"))]
    + [(row, "split24", "int8") for row in BEYOND],
    ids=str,
)
def test_every_rule_has_the_bits_of_the_cpu(row, weight_format, state_format):
    assert_the_bits_of_the_cpu(row, torch.bfloat16, weight_format, state_format)


@pytest.mark.large
@rows
@pytest.mark.parametrize("state_format", STATES)
@pytest.mark.parametrize(("dtype", "weight_format"), WEIGHTS)
def test_every_rule_and_format_has_the_bits_of_the_cpu(row, dtype, weight_format, state_format):
    assert_the_bits_of_the_cpu(row, dtype, weight_format, state_format)


@shapes
@pytest.mark.parametrize("state_format", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("weight_format", ["stochastic", "split24", "split32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_inf_and_denormals_have_the_bits_of_the_cpu(row, dtype, weight_format, state_format):
    def make(shape):
        return nasty_values(torch.Size(shape).numel()).view(shape)

    assert_the_bits_of_the_cpu(row, dtype, weight_format, state_format, make=make)


@shapes
@pytest.mark.parametrize("layout", ["offset", "transposed", "strided"])
@pytest.mark.parametrize(
    ("weight_format", "state_format"), [("split24", "int8"), ("stochastic", "int4"), (None, "fp16")]
)
def test_every_layout_has_the_bits_of_the_cpu(row, layout, weight_format, state_format):
    def change(t):
        return guarded(t, layout).tensor if DEVICE == "cpu" else t

    assert_the_bits_of_the_cpu(row, torch.bfloat16, weight_format, state_format, change=change)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_a_gradient_of_any_layout_is_taken_and_left_alone(layout):
    row, values, g = BY_RULE["adamw"], random_values((96, 64), torch.bfloat16), random_values((96, 64))
    results = []
    for backend in (BACKEND, "cpu"):
        device = "cpu" if backend == "cpu" else DEVICE
        p = torch.nn.Parameter(values.to(device, copy=True))
        group = {"params": [p], "weight_format": "split24", "state_format": "int8"}
        optimizer = row.cls([group], **row.kwargs, backend=backend)
        p.grad_dtype = None
        p.grad = gradient(g, layout, p).to(device)
        version = p.grad._version
        optimizer.step()
        assert p.grad._version == version
        results.append([memory(p), memory(optimizer.state[p]["exp_avg"])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_many_tensors_of_mixed_formats_take_one_launch_for_each_kernel():
    params = [torch.nn.Parameter(random_values((64, 64)).bfloat16().to(DEVICE)) for _ in range(300)]
    groups = [
        {"params": params[:100], "weight_format": "split24", "state_format": "int8"},
        {"params": params[100:200], "weight_format": "stochastic", "state_format": "int4"},
        {"params": params[200:]},
    ]
    optimizer = precond.AdamW(groups, betas=(0.9, 0.99), backend=BACKEND)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    (plan,) = next(iter(optimizer.engine.plans.values())).compiled
    assert plan.plan.launches == 2


@pytest.mark.parametrize(("rows", "aligned", "launches"), [(16, True, 1), (32, True, 1), (33, True, 2), (33, False, 1)])
def test_whole_chunks_of_known_formats_have_a_kernel_of_their_own(rows, aligned, launches):
    """Chunks of 8192 elements, if all operands are aligned to 16 bytes."""
    memory = torch.zeros(rows * 256 + 1, dtype=torch.bfloat16, device=DEVICE)
    p = torch.nn.Parameter(memory[: rows * 256].view(rows, 256) if aligned else memory[1:].view(rows, 256))
    optimizer = precond.AdamW([p], weight_format="split24", state_format="int8", backend=BACKEND)
    p.grad = torch.ones_like(p)
    optimizer.step()
    (plan,) = next(iter(optimizer.engine.plans.values())).compiled
    assert plan.plan.launches == launches
