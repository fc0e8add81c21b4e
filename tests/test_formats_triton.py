"""Storage formats in Triton's interpreter: the bits of the CPU for every rule and format, wherever the elements are."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from families import BEYOND, BY_RULE, BY_STATES, OPTIMIZERS
from support.cases import bits_equal, gradient, guarded, nasty_values, random_values

import precond
from precond import _C
from precond._core import formats as _formats
from precond._core import sharding as _sharding

pytestmark = [
    pytest.mark.usefixtures("triton_interpreter", "_codes_for_small_tensors"),
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),  # numpy's, in the interpreter
]
#: Per number of states one rule, and one whose only state is a second moment.
SHAPES = [*BY_STATES, BY_RULE["adagradw_l1"]]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
#: A parameter's dtype, weight_format and state_format: what differs most.
MAIN = [(BF16, "split24", "int8"), (FP16, "stochastic", "bf16"), (FP32, None, "int4")]
#: The rest that has other code.
MORE = [
    (BF16, "stochastic", "int4"),
    (BF16, "split32", None),
    (BF16, None, "int8"),
    (FP16, "split24", "fp16"),
    (FP16, "split32", "fp32"),
    (FP32, None, "bf16"),
]
main = pytest.mark.parametrize("formats", MAIN, ids=str)
# Less than a group, a whole block and one element, whole rows.
SIZES = [(3,), (1025,), (8, 128)]


@pytest.fixture
def _codes_for_small_tensors(monkeypatch):
    monkeypatch.setattr(_formats.layout, "SMALLEST_CODED_FLAT", 1)
    monkeypatch.setattr(_formats.layout, "SMALLEST_CODED", 1)


def mixed_values(shape) -> torch.Tensor:
    """Random values, zeros and denormals; in the first groups infinities and NaNs too, which take a group's codes away."""
    values = random_values((torch.Size(shape).numel(),))
    small = torch.tensor([0.0, -0.0, 1e-40, -1e-42, 1e-20, 1e19, 7e4])
    where = torch.rand(len(values)) < 0.1
    values[where] = small[torch.randint(len(small), (int(where.sum()),))]
    values[: len(values) // 4] = nasty_values(len(values) // 4)
    return values.view(shape)


def group_of(params, formats):
    return {"params": params, "weight_format": formats[1], "state_format": formats[2]}


def tensors_of(optimizer, params):
    """Each parameter and all of its states, by name."""
    states = [(i, name, value) for i, p in enumerate(params) for name, value in optimizer.state[p].items()]
    named = {(i, name): value.detach().clone() for i, name, value in states if isinstance(value, torch.Tensor)}
    return {(i, "p"): p.detach().clone() for i, p in enumerate(params)} | named


def train(row, formats, backend, *, sizes=SIZES, steps=3, make=mixed_values, layout="contiguous", g_layout=None):
    torch.manual_seed(1)
    params = [guarded(make(size).to(formats[0]), layout).tensor.requires_grad_() for size in sizes]
    optimizer = row.cls([group_of(params, formats)], **row.kwargs, backend=backend)
    for _ in range(max(steps, row.steps)):
        for p in params:
            p.grad = gradient(make(p.shape).to(p.dtype), g_layout or "contiguous", p)
        optimizer.step()
    return tensors_of(optimizer, params)


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not bits_equal(a[key], b[key])] == []


def test_the_names_are_those_of_the_compiled_part():
    from precond.triton_kernels import formats

    assert {name for name in _C.formats if formats.is_plain(name)} == set(_formats.names.PLAIN.values())
    assert {name for name in _C.formats if formats.is_coded(name)} == set(_formats.names.LEVELS)
    for name in _C.formats:
        layout = _formats.Layout(name, (), (0, 0, 0))
        assert (formats.is_plain(name), formats.draws(name, "fp32")) == (layout.plain, layout.draws)


# Each rule in one of the main formats; below, one rule per number of states in all. The table's GaussNewton writes its curvature
# as plain numbers, which four bits do not take.
@pytest.mark.parametrize(
    ("row", "formats"), [*zip(OPTIMIZERS, itertools.cycle(MAIN)), *((row, MAIN[0]) for row in BEYOND)], ids=str
)
def test_every_rule_has_the_bits_of_the_cpu(row, formats):
    assert_same(train(row, formats, "triton", steps=2), train(row, formats, "cpu", steps=2))


@pytest.mark.parametrize("row", SHAPES, ids=str)
@pytest.mark.parametrize("formats", MORE, ids=str)
def test_every_format_has_the_bits_of_the_cpu(row, formats):
    found = train(row, formats, "triton")
    assert_same(found, train(row, formats, "cpu"))
    assert any(t.isnan().any() for t in found.values())


@pytest.mark.parametrize("row", SHAPES, ids=str)
@main
def test_random_values_have_the_bits_of_the_cpu(row, formats):
    def make(shape):
        return random_values(shape, scale=0.01)

    found = train(row, formats, "triton", make=make)
    assert_same(found, train(row, formats, "cpu", make=make))
    assert all(t.isfinite().all() for t in found.values())


@main
@pytest.mark.parametrize("clip", [{"clip_grad_value": 0.05}, {"max_grad_norm": 0.5}], ids=str)
def test_clipped_gradients_have_the_bits_of_the_cpu(formats, clip):
    row = BY_RULE["adamw"]
    clipped = dataclasses.replace(row, kwargs=row.kwargs | clip)
    found = train(clipped, formats, "triton", make=random_values)
    assert_same(found, train(clipped, formats, "cpu", make=random_values))
    assert not bits_equal(found[2, "p"], train(row, formats, "cpu", make=random_values)[2, "p"])


@main
def test_what_a_block_has_behind_the_last_element_changes_no_group(formats):
    """There a step is 0 / 0."""
    row = BY_RULE["rmspropw_momentum"]
    row = dataclasses.replace(row, kwargs=row.kwargs | {"eps": 0.0})
    found = train(row, formats, "triton", make=random_values)
    assert_same(found, train(row, formats, "cpu", make=random_values))
    assert all(t.isfinite().all() for t in found.values())


@main
@pytest.mark.parametrize("layout", ["offset", "strided", "transposed"])
def test_every_layout_of_parameters_and_gradients(formats, layout):
    row, sizes = BY_RULE["adamw"], [(4, 128), (2, 64, 3, 3)]
    expected = train(row, formats, "cpu", sizes=sizes, steps=2)
    for options in (dict(layout=layout), dict(g_layout=layout)):
        found = train(row, formats, "triton", sizes=sizes, steps=2, **options)
        assert_same(found, expected)


def test_parameters_of_different_formats_take_a_step_together():
    results = []
    for backend in ("triton", "cpu"):
        torch.manual_seed(2)
        params = [mixed_values((4, 64)).to(dtype).requires_grad_() for dtype, *_ in MAIN + MORE]
        groups = [group_of([p], formats) for p, formats in zip(params, MAIN + MORE, strict=True)]
        optimizer = precond.AdamW(
            [*groups, {"params": [plain := random_values((5,)).requires_grad_()]}], backend=backend
        )
        for _ in range(2):
            for p in (*params, plain):
                p.grad = random_values(p.shape).to(p.dtype)
            optimizer.step()
        results.append(tensors_of(optimizer, [*params, plain]))
    assert_same(*results)


# Rows shorter and longer than a block, ends of rows inside of one, and more than 2^32 elements or runs before. Where there are
# codes, a row is a multiple of a group.
PLACES = [(7, 0, 0), (5, 64, 1000), (64, 960, 1001), (3, 1472, 2**33), (2**32 - 600, 0, 0), (2**40, 1024, 4096)]
PLACES += [(2**35 - 600, 0, 0), (2**35 - 2048, 1536, 2048), (2**35 - 2044, 1536, 2048)]
ODD_PLACES = [(5, 97, 1000), (0, 1, 3), (3, 1025, 1026)]


@pytest.mark.parametrize(
    ("formats", "place"), [*itertools.product(MAIN, PLACES), *itertools.product(MAIN[1:2], ODD_PLACES)], ids=str
)
def test_a_piece_of_a_larger_tensor_has_the_bits_of_the_cpu(formats, place, monkeypatch):
    row, sizes = BY_RULE["adamw"], [(17, 192)]
    whole = train(row, formats, "cpu", sizes=sizes, steps=2)
    monkeypatch.setattr(_sharding, "place_of", lambda *_: place)
    found = train(row, formats, "triton", sizes=sizes, steps=2)
    assert_same(found, train(row, formats, "cpu", sizes=sizes, steps=2))
    assert not all(bits_equal(found[key], whole[key]) for key in found)


@main
def test_columns_of_a_tensor_have_the_bits_of_the_whole(formats, monkeypatch):
    values, grads = random_values((8, 256)).to(formats[0]), [random_values((8, 256)) for _ in range(2)]

    def step(columns, place):
        monkeypatch.setattr(_sharding, "place_of", lambda *_: place)
        p = values[:, columns].clone(memory_format=torch.contiguous_format).requires_grad_()
        optimizer = precond.AdamW([group_of([p], formats)], lr=0.05, backend="triton")
        for g in grads:
            p.grad = g[:, columns].to(p.dtype)
            optimizer.step()
        found = tensors_of(optimizer, [p])
        return {key: t for key, t in found.items() if t.dim()}

    whole = step(slice(None), (0, 0, 0))
    left, right = step(slice(0, 64), (0, 64, 256)), step(slice(64, 256), (64, 192, 256))
    assert_same({key: torch.cat([left[key], right[key]], dim=1) for key in whole}, whole)


def test_scalars_have_the_seed_of_their_key_and_step():
    from precond.triton_kernels import RULES
    from precond.triton_kernels.launch import job_table, run_prologue
    from precond.triton_kernels.prologue import SCALAR_FLOATS, SEED

    rule = RULES["lion"]
    width = SCALAR_FLOATS.value
    cases = list(
        itertools.product([0, 1, 2**32 - 1, 0x0123456789ABCDEF, 2**63 - 1], [1, 2, 1000, 2**24, 2**31 + 2, 2**52 + 1])
    )
    written = torch.zeros(len(cases) * width)
    hyper = torch.rand(len(rule.hyper), dtype=torch.float64)
    jobs = job_table([number for key, step in cases for number in (0, 1, 0, 0, step, 0, 0, key, 0, 0)])
    run_prologue(rule, hyper, jobs, written, torch.empty(1 + len(cases)))
    found = written.view(torch.int32).view(-1, width)[:, SEED.value :].long() & 0xFFFFFFFF
    assert found.tolist() == [list(_formats.seed_of(*case)) for case in cases]


WRONG = {"short": lambda t: t[:-1], "wide": lambda t: t.double(), "transposed": lambda t: t.t().contiguous().t()}


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("name", "wrong"),
    # A remainder of another dtype or shape is another format's, and made anew.
    [*itertools.product(["exp_avg", "exp_avg_scale", "exp_avg_sq"], WRONG), ("remainder", "transposed")],
)
def test_what_a_checkpoint_must_not_bring_is_an_error_that_changes_nothing(backend, name, wrong):
    p = random_values((4, 128)).bfloat16().requires_grad_()
    p.grad = random_values(p.shape).to(p.dtype)
    optimizer = precond.AdamW([group_of([p], MAIN[0])], backend=backend)
    optimizer.step()
    optimizer.state[p][name] = WRONG[wrong](optimizer.state[p][name])
    before = tensors_of(optimizer, [p])
    with pytest.raises((TypeError, RuntimeError), match=f"{name} of parameter 0 of group 0 must have"):
        optimizer.step()
    assert_same(tensors_of(optimizer, [p]), before)
