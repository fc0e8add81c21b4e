"""The promise: the same bits whatever the threads, chunks, order, alignment, instruction set or backend."""

from __future__ import annotations

import pytest
import torch
from families import ALL_RULES, BY_RULE, BY_STATES
from support.cases import BACKEND, bits_equal, gradient, guarded, nasty_values, random_values

from precond import _C
from precond._core import executors
from precond._core.passes import Job, Pass, plain_step

rows = pytest.mark.parametrize("row", ALL_RULES, ids=str)
# For what depends on where operands lie and not on what a rule does with them.
shapes = pytest.mark.parametrize("row", BY_STATES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy's, in Triton's interpreter
triton_bits = pytest.mark.usefixtures("triton_interpreter")
SIZES = [1, 7, 64, 300, 513, 2049]
LONG = [*SIZES, 70_000]


def mixed_values(n: int) -> torch.Tensor:
    """NaN, infinities and denormals in the first half alone: elements of the second have numbers after all steps."""
    return torch.cat([nasty_values(n // 2), random_values((n - n // 2,))])


def train(row, dtype, *, sizes=SIZES, steps=20, layout="contiguous", backend=BACKEND, g_dtype=None):
    """Parameters and states after some steps on gradients that depend on the seed alone."""
    torch.manual_seed(1)
    values = [mixed_values(n).to(dtype) for n in sizes]
    params = [guarded(v, layout).tensor.requires_grad_() for v in values]
    optimizer = row.cls(params, **row.kwargs, backend=backend)
    for _ in range(max(steps, row.steps)):
        for p in params:
            p.grad_dtype = None
            p.grad = mixed_values(p.numel()).to(g_dtype or dtype)
        optimizer.step()
    return [t for p in params for t in (p.detach(), *optimizer.states.present(p, row.rule).values())]


def assert_same(a, b):
    assert len(a) == len(b)
    assert all(bits_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@rows
@dtypes
def test_instruction_sets_agree(row, dtype, isa):
    found = train(row, dtype)
    assert any(t.isnan().any() for t in found)
    assert sum(t.isfinite().sum() for t in found) > sum(t.numel() for t in found) / 2
    _C.select_isa("")
    assert_same(train(row, dtype), found)


@shapes
@dtypes
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_thread_counts_agree(row, dtype, threads, one_thread):
    expected = train(row, dtype, sizes=LONG)
    torch.set_num_threads(threads)
    assert_same(train(row, dtype, sizes=LONG), expected)


@shapes
@pytest.mark.parametrize("chunk", [1, 256, 1000, 1 << 20])
def test_chunk_sizes_agree(row, chunk, monkeypatch):
    expected = train(row, torch.float32, sizes=LONG)
    monkeypatch.setattr(executors, "_CHUNK", chunk)
    assert_same(train(row, torch.float32, sizes=LONG), expected)


@shapes
@dtypes
def test_alignments_and_strides_agree(row, dtype):
    expected = train(row, dtype)
    assert_same(train(row, dtype, layout="offset"), expected)
    assert_same(train(row, dtype, layout="strided"), expected)


@shapes
def test_gradient_layouts_agree(row):
    def step(layout):
        torch.manual_seed(3)
        p = torch.nn.Parameter(random_values((12, 5, 4, 6)))
        optimizer = row.cls([p], **row.kwargs, backend=BACKEND)
        for _ in range(3):
            p.grad = gradient(random_values(p.shape), layout, p)
            optimizer.step()
        return [p.detach(), *optimizer.states.present(p, row.rule).values()]

    for layout in ("transposed", "channels_last", "strided"):
        assert_same(step(layout), step("contiguous"))


@rows
def test_the_order_of_tensors_does_not_matter(row):
    def step(order):
        torch.manual_seed(5)
        params = [torch.nn.Parameter(random_values((n,))) for n in SIZES]
        grads = [random_values((n,)) for n in SIZES]
        optimizer = row.cls([params[i] for i in order], **row.kwargs, backend=BACKEND)
        for _ in range(3):
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            optimizer.step()
        return [p.detach() for p in params]

    forward = list(range(len(SIZES)))
    assert_same(step(forward), step(forward[::-1]))


@rows
def test_flushing_denormals_outside_does_not_change_the_update(row):
    values, *grads = (random_values((40_000,), scale=1e-38) for _ in range(5))

    def step(flush):
        p = torch.nn.Parameter(values.clone())
        optimizer = row.cls([p], **row.kwargs, backend=BACKEND)
        assert torch.set_flush_denormal(flush)
        try:
            for g in grads:
                p.grad = g
                optimizer.step()
            flushes = (torch.tensor([1e-40]) * 1).item() == 0.0
        finally:
            torch.set_flush_denormal(False)
        assert flushes == flush, "the caller's setting must survive the step"
        return [p.detach(), *optimizer.states.present(p, row.rule).values()]

    expected = step(False)
    assert any(((t.abs() < 1.1e-38) & (t != 0)).any() for t in (*expected, values))
    assert_same(step(True), expected)


def any_bits(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Any bits at all, and those around which bfloat16 rounds: ties, the largest, NaNs that would become infinite, denormals."""
    low = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    high = [0x0000, 0x0080, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x7FC0, -0x8000, -0x0081, -0x0080]
    edges = (torch.tensor(high, dtype=torch.int32)[:, None] << 16 | low).view(-1)
    bits = torch.randint(-(2**31), 2**31, (n,)).to(torch.int32)
    bits = torch.where(torch.rand(n) < 0.5, bits, edges[torch.randint(len(edges), (n,))])
    return bits.view(dtype) if dtype == torch.float32 else (bits >> 16).to(torch.int16).view(dtype)


@pytest.mark.parametrize("rule", ["average", "sgdw"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@torch.no_grad()
def test_one_bfloat16_operand_in_a_loop_has_the_bits_of_tiles(rule, dtypes, isa):
    """A strided operand goes through tiles. Lengths around vectors, stretches of a loop, tiles and chunks."""

    def run(layouts, hyper, n):
        torch.manual_seed(n)
        operands = zip((*dtypes, torch.float32), layouts, strict=True)
        p, g, m = (guarded(any_bits(n, dtype), layout) for dtype, layout in operands)
        if rule == "average" and hyper["momentum"] == 0.0:
            m.tensor.zero_()  # so that the average is the gradient itself, rounded as it is
        state = {"momentum_buffer": m.tensor} if rule == "average" else {}
        for sign in (1.0, -1.0):
            job = Job(p.tensor, g.tensor, state, hyper, sign)
            Pass(rule, tuple(state), BACKEND).run([job])
        for each in (p, g, m):
            each.check()
        if p.tensor.dtype == torch.bfloat16:
            assert (p.tensor[p.tensor.isnan()].view(torch.int16) == 0x7FC0).all(), "every NaN is torch's"
        return [p.tensor, m.tensor]

    averages = [{"momentum": 0.0, "lookahead": 0.0}, {"momentum": 0.95, "lookahead": 0.05}]
    steps = [plain_step(0.5, 0.0), plain_step(1e-3, 0.1)]
    layouts = [("contiguous",) * 3, ("offset",) * 3, ("offset", "contiguous", "offset")]
    for hyper in averages if rule == "average" else steps:
        for n in (1, 15, 17, 33, 63, 64, 65, 129, 1000, 5003, 70_001):
            _C.select_isa("")
            tiled = run(("strided", "contiguous", "contiguous"), hyper, n)
            assert n < 1000 or all(t.isnan().any() and t.isfinite().any() for t in tiled)
            for name in (isa, ""):
                _C.select_isa(name)
                for layout in layouts if n < 70_000 else layouts[:1]:
                    assert_same(run(layout, hyper, n), tiled)


if BACKEND != "cpu":

    @rows
    @dtypes
    def test_this_backend_agrees_with_the_cpu(row, dtype):
        assert_same(train(row, dtype), train(row, dtype, backend="cpu"))


TRITON_SIZES = [1, 300, 1025]


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@triton_bits
@pytest.mark.parametrize(
    ("row", "dtype", "g_dtype"),
    [(row, F32, F32) for row in ALL_RULES]
    # How operands are stored does not depend on the rule.
    + [(row, *pair) for row in BY_STATES for pair in [(BF16, BF16), (F32, BF16), (BF16, F32), (F16, F16)]],
    ids=str,
)
def test_triton_in_the_interpreter_agrees(row, dtype, g_dtype):
    kwargs = dict(sizes=TRITON_SIZES, steps=4, g_dtype=g_dtype)
    assert_same(train(row, dtype, backend="triton", **kwargs), train(row, dtype, backend="cpu", **kwargs))


@triton_bits
@shapes
@pytest.mark.parametrize("layout", ["offset", "strided"])
def test_triton_takes_every_layout(row, layout):
    kwargs = dict(sizes=[300, 1025], steps=2, layout=layout)
    assert_same(
        train(row, torch.float32, backend="triton", **kwargs), train(row, torch.float32, backend="cpu", **kwargs)
    )


@triton_bits
@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_triton_takes_every_gradient_layout_and_leaves_it_alone(layout):
    row = BY_RULE["adamw"]
    values, g = random_values((6, 40)), random_values((6, 40))
    results = []
    for backend in ("triton", "cpu"):
        p = torch.nn.Parameter(values.clone())
        optimizer = row.cls([p], **row.kwargs, backend=backend)
        p.grad = gradient(g, layout, p)
        version = p.grad._version
        optimizer.step()
        assert p.grad._version == version
        results.append(p.detach())
    assert bits_equal(*results)


@triton_bits
def test_triton_takes_states_of_different_formats():
    row = BY_RULE["adamw"]
    results = []
    for backend in ("triton", "cpu"):
        torch.manual_seed(2)
        p = torch.nn.Parameter(random_values((300,)))
        optimizer = row.cls([p], **row.kwargs, backend=backend)
        optimizer.state[p] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros(300, dtype=torch.bfloat16),
            "exp_avg_sq": torch.zeros(300),
        }
        for _ in range(3):
            p.grad = random_values((300,))
            optimizer.step()
        results += [p.detach(), *optimizer.states.present(p, row.rule).values()]
    assert_same(results[:3], results[3:])


@pytest.mark.parametrize("row", ALL_RULES, ids=str)
def test_the_scalars_of_both_texts_are_the_same_bits(row):
    from precond.triton_kernels import RULES
    from precond.triton_kernels.launch import job_table, run_prologue
    from precond.triton_kernels.prologue import SCALAR_FLOATS

    rule = RULES[row.rule]
    names = _C.rules[row.rule].hyper
    quarter = 0x3FD0000000000000  # the bits of 0.25
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2, 3, 10, 1000, 123_456, 2**24, 2**31 + 3, 2**53, 2**63):
        hyper = torch.rand(len(names), generator=generator, dtype=torch.float64)
        expected = torch.tensor(_C.scalars(row.rule, hyper.tolist(), step, step == 1, 0.25))
        written = torch.full((SCALAR_FLOATS.value,), 7.0)
        run_prologue(
            rule, hyper, job_table([0, 1, step == 1, 0, min(step, 2**62), 0, quarter, 0, 0, 0]), written, torch.empty(2)
        )
        assert bits_equal(written[: len(expected)], expected)
