"""What a Triton step keeps on the device: tensor hyper-parameters, step counters, the loss scale; and what it keeps from the
last step. In the interpreter every tensor stands for one on a device; with TRITON_INTERPRET=0 on a GPU they are there.
"""

from __future__ import annotations

import ast
import contextlib
import os
import subprocess
import sys

import pytest
import torch
from families import BY_RULE, BY_STATES
from support.builds import ROOT
from support.cases import bits_equal, random_values
from support.device import NoHostReads

from precond._core import backend as _backend
from precond._core import formats as _formats

pytestmark = pytest.mark.usefixtures("triton_interpreter")
# A rule's scalars are compared in test_same_bits.py. What else happens here depends on the number of states alone.
shapes = pytest.mark.parametrize("row", BY_STATES, ids=str)
# With formats beyond torch's dtypes: a parameter's dtype, weight_format and state_format.
formats = pytest.mark.parametrize(
    "formats",
    [(torch.float32, None, None), (torch.bfloat16, "split24", "int8"), (torch.float16, "stochastic", "int4")],
    ids=str,
)
DEVICE = "cuda" if os.environ.get("TRITON_INTERPRET") == "0" and torch.cuda.is_available() else "cpu"
ADAMW = BY_RULE["adamw"]


@pytest.fixture(autouse=True)
def _everything_is_on_the_device(monkeypatch):
    monkeypatch.setattr(_backend, "on_device", lambda value: isinstance(value, torch.Tensor))


def device_tensor(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def pair(row, sizes=(5, 700, 1025), formats=(torch.float32, None, None), **override):
    """Two groups of equal parameters: on Triton with counters on the device, and on the CPU."""
    dtype, weight_format, state_format = formats
    values = [random_values((n,)).to(dtype) for n in sizes]
    ours = [torch.nn.Parameter(v.to(DEVICE, copy=True)) for v in values]
    theirs = [torch.nn.Parameter(v.clone()) for v in values]

    def groups(params):
        options = {"weight_format": weight_format, "state_format": state_format}
        return [{"params": params[:1], "lr": 0.3, **options}, {"params": params[1:], **options}]

    a = row.cls(groups(ours), **{**row.kwargs, "fused": True, **override}, backend="triton")
    return ours, theirs, a, row.cls(groups(theirs), **row.kwargs, backend="cpu")


def give(ours, theirs, factor=1.0):
    for p, q in zip(ours, theirs, strict=True):
        q.grad = (factor * random_values(q.shape)).to(q.dtype)
        p.grad = q.grad.to(DEVICE, copy=True)


def tensors_of(optimizer, params, rule):
    states = [
        [t for name, t in optimizer.state[p].items() if isinstance(t, torch.Tensor) and name != "step"] for p in params
    ]
    return [t.detach().cpu().clone() for p, its in zip(params, states, strict=True) for t in (p, *its)]


def assert_same(a, ours, b, theirs, rule):
    found, expected = tensors_of(a, ours, rule), tensors_of(b, theirs, rule)
    assert len(found) == len(expected)
    assert all(bits_equal(x, y) for x, y in zip(found, expected, strict=True))


@shapes
def test_tensor_hyper_parameters_are_read_on_the_device(row):
    ours, theirs, a, b = pair(row)
    lr = device_tensor([0.05])
    a.param_groups[1]["lr"] = lr
    a.param_groups[0]["weight_decay"] = device_tensor(0.3, torch.float64)
    b.param_groups[0]["weight_decay"] = 0.3
    if "betas" in a.defaults:
        a.param_groups[1]["betas"] = device_tensor(0.8), device_tensor(0.97, torch.float64)
        b.param_groups[1]["betas"] = torch.tensor(0.8).item(), 0.97
    for value in (0.05, 0.01, 0.2):
        lr.fill_(value)
        b.param_groups[1]["lr"] = lr.item()
        give(ours, theirs)
        with NoHostReads():
            a.step()
        b.step()
    assert_same(a, ours, b, theirs, row.rule)


@shapes
def test_a_number_may_take_the_place_of_a_tensor(row):
    ours, theirs, a, b = pair(row)
    for value in (0.1, device_tensor(0.25), 0.0, device_tensor(0.5)):
        a.param_groups[1]["lr"] = value
        b.param_groups[1]["lr"] = float(value)
        give(ours, theirs)
        a.step()
        b.step()
        assert_same(a, ours, b, theirs, row.rule)


@shapes
@formats
def test_a_loss_scaler_unscales_and_a_skipped_step_changes_nothing(row, formats, monkeypatch):
    monkeypatch.setattr(_formats.layout, "SMALLEST_CODED_FLAT", 1)
    ours, theirs, a, b = pair(row, formats=formats)
    scale = device_tensor(3.0)
    for i, overflow in enumerate((False, True, False, True, False)):
        give(ours, theirs, 3.0)
        a.grad_scale, a.found_inf = scale, device_tensor(float(overflow))
        b.grad_scale = scale.cpu()
        before = tensors_of(a, ours, row.rule)
        # Whether the undampened first step is skipped the host must know, once.
        waits = i == 0 and row.kwargs.get("dampening", 0.0) != 0.0
        with contextlib.nullcontext() if waits else NoHostReads():
            a.step()
        if overflow:
            assert all(bits_equal(x, y) for x, y in zip(before, tensors_of(a, ours, row.rule), strict=True))
        else:
            b.step()
        assert_same(a, ours, b, theirs, row.rule)
        for p in ours:
            if a.states.counts(p, row.rule):
                assert a.state[p]["step"].item() == (i + 2) // 2
                assert a.state[p]["step"].device == p.device


def test_a_scaler_with_counters_on_the_host_is_an_error_that_changes_nothing():
    ours, theirs, a, _ = pair(ADAMW, fused=None)
    before = [p.detach().clone() for p in ours]
    give(ours, theirs)
    a.found_inf = device_tensor(0.0)
    with pytest.raises(RuntimeError, match="fused must be True in every group"):
        a.step()
    assert all(bits_equal(p.detach(), q) for p, q in zip(ours, before, strict=True))
    assert not a.state


def test_counters_on_the_host_stay_there():
    ours, theirs, a, b = pair(ADAMW, fused=None)
    for _ in range(3):
        give(ours, theirs)
        a.step()
        b.step()
    assert_same(a, ours, b, theirs, "adamw")
    assert all(a.state[p]["step"].item() == 3 and a.state[p]["step"].device.type == "cpu" for p in ours)


def test_counters_of_parameters_without_elements_count_too():
    ours, theirs, a, b = pair(ADAMW, sizes=(3, 0))
    for _ in range(2):
        give(ours, theirs)
        a.step()
        b.step()
    assert [a.state[p]["step"].item() for p in ours] == [2, 2]


@shapes
def test_tables_are_made_again_only_where_an_address_or_a_shape_changed(row, monkeypatch):
    from precond.triton_kernels import launch, tables

    made = []
    for name in ("address_table", "chunk_table"):
        real = getattr(launch, name)
        monkeypatch.setattr(
            launch, name, lambda *args, real=real, name=name, **kw: made.append(name) or real(*args, **kw)
        )
    tables._tables.clear()
    values = random_values((40, 30))
    p, q = torch.nn.Parameter(values.to(DEVICE, copy=True)), torch.nn.Parameter(values.clone())
    a, b = row.cls([p], **row.kwargs, fused=True, backend="triton"), row.cls([q], **row.kwargs, backend="cpu")

    def step():
        made.clear()
        p.grad.copy_(g := random_values(p.shape))
        q.grad = g
        a.step()
        b.step()
        assert_same(a, [p], b, [q], row.rule)
        return made

    p.grad = torch.empty_like(p)
    assert step() == ["address_table", "chunk_table"]
    assert step() == []
    first = p.grad
    p.grad = torch.empty_like(p)
    assert step() == ["address_table"]
    p.grad = first
    assert step() == ["address_table"]
    # The same memory in another order, for the parameter, its gradient and its states.
    for owner, optimizer in ((p, a), (q, b)):
        owner.data = owner.data.view(30, 40).t()
        for name, state in optimizer.states.present(owner, row.rule).items():
            optimizer.state[owner][name] = state.view(30, 40).t()
    p.grad = first.view(30, 40).t()
    assert step() == []
    # Of another order than the parameter: through a copy.
    p.grad = first
    assert step() == ["address_table"]


def test_the_default_device_does_not_matter():
    ours, theirs, a, b = pair(ADAMW)
    give(ours, theirs)
    torch.set_default_device("meta")
    try:
        a.step()
    finally:
        torch.set_default_device(None)
    b.step()
    assert_same(a, ours, b, theirs, "adamw")


COMPILE_PROLOGUE = """
import itertools, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from precond.triton_kernels import RULES
from precond.triton_kernels.launch import prologue_constants
from precond.triton_kernels.prologue import prologue

cuda, hip = ("cuda", 90, 32), ("hip", "gfx942", 64)
rules = {(rule.set_scalars, rule.decay, rule.option): rule for rule in RULES.values()}.values()
# The arithmetic is a rule's; where threads are and what is read beside it is not.
cases = [(cuda, rule, True) for rule in rules] + [*itertools.product((cuda, hip), [RULES["adamw"]], (False, True))]
for target, rule, has_scaler in cases:
    types = ["*fp64", "*i64", "*fp32", "*fp32", "*fp32", "*fp32", "fp32", "i32", "*fp64", "*fp32", "*fp32", "*i64", "fp32"]
    constants = dict(prologue_constants(rule), INF=False, SKIP_NONFINITE=has_scaler)
    if not has_scaler:
        constants |= dict(grad_scale_ptr=None, found_inf_ptr=None, total_ptr=None, grad_norm_ptr=None, clip_coef_ptr=None,
                          skipped_ptr=None)
    names = prologue.arg_names
    signature = dict(zip(names, types)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(prologue, {name: signature[name] for name in names}, constants)
    options = {"num_warps": 1, "enable_fp_fusion": False}
    asm = triton.compile(source, target=GPUTarget(*target), options=options).asm
    # One layout: a thread that reads a counter is the one that writes it.
    assert "convert_layout" not in asm["ttgir"]
    assert not re.search(r"approx|rsqrt|fma\\.rn\\.f64|div\\.full", asm.get("ptx", "")), target
"""


COMPILE_NORM = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from precond.triton_kernels import norms

targets = ("cuda", 90, 32), ("hip", "gfx942", 64)
kinds = (None, False), ("fp32", True), ("bf16", False), ("fp16", False), ("fp32", False), (None, True)
for target, (name, inf) in [*itertools.product(targets[:1], kinds), *itertools.product(targets[1:], kinds[-2:])]:
    constants = dict(INF=inf, BLOCK=norms.BLOCK, LANES=norms.LANES, LEVELS=10)
    if name is None:
        function, types = norms.fold_kernel, ["*fp64", "i32", "*fp64"]
    else:
        function, types = norms.norm_kernel, ["*i64", "*i64", "*fp64"]
        constants |= dict(G=name, SLOT=norms.SLOTS)
    signature = dict(zip(function.arg_names, types)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(function, {name: signature[name] for name in function.arg_names}, constants)
    asm = triton.compile(source, target=GPUTarget(*target), options={"num_warps": norms.WARPS, "enable_fp_fusion": False}).asm
    if "ptx" in asm:
        assert ".ftz" not in asm["ptx"]
        assert name is None or "ld.global.v" in asm["ptx"], name
"""


COMPILE_STATISTICS = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from precond.triton_kernels import RULES, statistics
from precond.triton_kernels.launch import update_constants

types = dict(chunks_ptr="*i64", tensors_ptr="*i64", scalars_ptr="*fp32", control_ptr="*fp32", clip_value="fp32",
             table_ptr="*fp64", jobs_ptr="*i64", sums_ptr="*fp64")
shared = dict(STRETCH=statistics.STRETCH, LANES=statistics.LANES, LEVELS=statistics.LEVELS,
              BLOCK_SUMS=statistics.BLOCK_SUMS)
coded = ["bf16_split24", "bf16", "int8", "uint8", "bf16_stochastic"]
for target, rule, formats, measured in (
    (("cuda", 90, 32), "adamw+parts", ["fp32"] * 4, "statistics"),
    (("cuda", 90, 32), "adamw_l1+ema", coded, "statistics"),
    (("hip", "gfx942", 64), "schedule_free_adamw+parts", ["fp32"] * 4, "statistics"),
    (("cuda", 90, 32), None, None, None),
):
    if rule is None:
        function, constants = statistics.fold_statistics, dict(shared, LARGEST=statistics.LARGEST)
    else:
        function = statistics.measured_kernel
        constants = dict(update_constants(RULES[rule], formats), MEASURED=measured, **shared)
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    options = {"num_warps": statistics.WARPS, "enable_fp_fusion": False}
    asm = triton.compile(ASTSource(function, signature, constants), target=GPUTarget(*target), options=options).asm
    assert not re.search(r"approx|rsqrt|div\\.full", asm.get("ptx", "")), rule
"""


@pytest.mark.parametrize(
    "program",
    [COMPILE_PROLOGUE, COMPILE_NORM, COMPILE_STATISTICS],
    ids=["prologue", "norm", "statistics"],
)
def test_it_compiles_with_exact_operations(program):
    # A process of its own: Triton compiles only where its interpreter was never asked for.
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.source
def test_kernels_keep_to_what_triton_3_6_compiles():
    """Which pyproject.toml promises, and tests have a later one: no default, no None in a returned tuple, no starred constant."""
    found = []
    for path in sorted((ROOT / "triton_kernels").rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef) or "triton.jit" not in map(
                ast.unparse, function.decorator_list
            ):
                continue
            refused = [*function.args.defaults, *function.args.kw_defaults]
            for node in ast.walk(function):
                if isinstance(node, ast.Starred) and isinstance(node.value, ast.Name):
                    refused.append(node)
                if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
                    tuples = [node.value, *(part for part in node.value.elts if isinstance(part, ast.Tuple))]
                    refused += [part for each in tuples for part in each.elts if ast.unparse(part) == "None"]
            found += [f"{path.name}, {function.name}: {ast.unparse(node)}" for node in refused if node is not None]
    assert found == []


def test_the_guard_of_this_file_sees_a_read():
    ours, theirs, a, _ = pair(ADAMW, fused=None)
    give(ours, theirs)
    with NoHostReads(), pytest.raises(AssertionError, match="the host read a tensor"):
        a.step()
