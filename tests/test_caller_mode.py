"""Every product, decomposition and reduction runs at the precision that a method states, whatever modes a caller has set for a
model; and the modes are as before afterwards.

Over 400 lines: one table of subjects, which every test goes through.
"""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from families import CLASSES
from support.cases import bits_equal
from torch.utils._python_dispatch import TorchDispatchMode

import precond
from precond import bases, curvature, diagnostics
from precond._core import precision

BY_OPERATION = hasattr(torch._C, "_get_fp32_precision_getter")
new_settings = pytest.mark.skipif(not BY_OPERATION, reason="torch before 2.9 has one precision for all backends")


@contextlib.contextmanager
def setting(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def products(*settings):
    """Precisions by backend and operation."""
    for backend, operation, value in settings:
        torch._C._set_fp32_precision_setter(backend, operation, value)
    try:
        yield
    finally:
        for backend, operation, _ in settings:
            torch._C._set_fp32_precision_setter(backend, operation, "none")


@contextlib.contextmanager
def matmul_precision(value):
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        if BY_OPERATION:
            for operation in precision._PRODUCTS:
                torch._C._set_fp32_precision_setter(*operation, "none")


@contextlib.contextmanager
def mixed():
    """Old and new settings that torch refuses to read as one."""
    with matmul_precision("high"), products(("mkldnn", "matmul", "bf16")):
        yield


@contextlib.contextmanager
def autocast(device, dtype):
    """torch.autocast, also for a device that this machine has not."""
    before = torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, False)
        torch.set_autocast_dtype(device, before)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic(warn_only):
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    yield


PRECISIONS = {
    "matmul precision high": lambda: matmul_precision("high"),
    "matmul precision medium": lambda: matmul_precision("medium"),
    "allow_tf32": lambda: setting(torch.backends.cuda.matmul, "allow_tf32", True),
    "16-bit reductions": lambda: setting(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    "float16 reductions": lambda: setting(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
}
if BY_OPERATION:
    PRECISIONS |= {
        "all tf32": lambda: products(("generic", "all", "tf32")),
        "all bf16": lambda: products(("generic", "all", "bf16")),
        "backend bf16": lambda: products(("mkldnn", "all", "bf16"), ("cuda", "all", "tf32")),
        "operation bf16": lambda: products(("mkldnn", "matmul", "bf16"), ("cuda", "matmul", "tf32")),
        "operation and all": lambda: products(("mkldnn", "matmul", "tf32"), ("generic", "all", "tf32")),
        "mixed": mixed,
    }
MODES = PRECISIONS | {
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "autocast of both": lambda: autocast("cuda", torch.float16),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float16": lambda: default_dtype(torch.float16),
    "default device": lambda: torch.device("meta"),
    "deterministic": lambda: deterministic(warn_only=False),
    "deterministic warnings": lambda: deterministic(warn_only=True),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
}


def flags():
    """What the caller has set, and what setting something later would do."""

    def read(getter):
        try:
            return getter()
        except RuntimeError:  # torch's, of old and new settings that contradict each other
            return "mixed"

    found = {
        "autocast": [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
        "matmul": read(torch.get_float32_matmul_precision),
        "tf32": read(torch._C._get_cublas_allow_tf32),
        "cudnn": read(torch._C._get_cudnn_allow_tf32),
        "reductions": [get() for get, _ in precision._REDUCTIONS],
        "default": (torch.get_default_dtype(), torch.get_default_device()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }
    if BY_OPERATION:
        found["products"] = own_precisions()
    return found


def own_precisions():
    """What each operation resolves to, as it is and for other values of what it may inherit."""
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    names = [(b, o) for b in ("cuda", "mkldnn") for o in ("all", "matmul", "conv", "rnn")]
    generic = get("generic", "all")
    found = [generic]
    for value in (generic, "ieee", "tf32"):
        put("generic", "all", value)
        found.append([get(*name) for name in names])
    put("generic", "all", generic)
    return found


def values(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64, device="cpu").to(
        dtype
    )


SHAPES = ((6, 5), (4, 2, 3), (5,))


class Training:
    """Some parameters and steps on given gradients."""

    def __init__(self, make, shapes=SHAPES, dtype=torch.float32, update=None):
        self.make, self.shapes, self.dtype, self.update = make, shapes, dtype, update

    def __call__(self, mode):
        params = [torch.nn.Parameter(values(shape, 1, self.dtype)) for shape in self.shapes]
        optimizer = self.make(params)
        for i in range(5):
            for p in params:
                p.grad = values(p.shape, 10 + i, self.dtype)
            with mode():
                if self.update is not None and i % 2 == 0:
                    self.update(optimizer)
                optimizer.step()
        state = getattr(optimizer, "own", optimizer.state)
        assert not any(t.is_inference() for s in state.values() for t in s.values() if isinstance(t, torch.Tensor))
        return [*params, *(t for p in params for t in state.get(p, {}).values() if isinstance(t, torch.Tensor))]


def bnp(compose):
    """A layer's inputs are seen inside of the mode, and so is the step."""

    def run(mode):
        layer = torch.nn.Linear(4, 3, dtype=torch.float32, device="cpu")
        for p in layer.parameters():
            p.data.copy_(values(p.shape, 2))
        optimizer = precond.BNP(layer, torch.optim.SGD(layer.parameters(), lr=0.1), compose=compose)
        for i in range(3):
            for p in layer.parameters():
                p.grad = values(p.shape, 20 + i)
            with mode():
                with torch.inference_mode(False), torch.enable_grad():
                    layer(values((16, 4), 30 + i))
                optimizer.step()
        return [*layer.parameters(), *(t for t in optimizer.own[layer.weight].values() if isinstance(t, torch.Tensor))]

    return run


def regularized(mode):
    p = torch.nn.Parameter(values((6, 5), 3))
    optimizer = precond.GradientRegularizer(precond.AdamW([p], lr=0.1, backend="reference"))

    def closure():
        p.grad = p.detach() * 2 + 1
        return p.grad

    for _ in range(3):
        with mode():
            optimizer.step(closure)
    return [p]


W = values((5, 4), 4)
X = values((32, 5), 5)


def graph():
    """Parameters, outputs and a loss with a graph of products, made in no mode."""
    w, b = torch.nn.Parameter(W.clone()), torch.nn.Parameter(values((4,), 6))
    outputs = torch.tanh(X @ w) + b
    return [w, b], outputs, outputs.square().sum()


def generator():
    return torch.Generator("cpu").manual_seed(7)


def basis(n, seed=8):
    return torch.linalg.qr(values((n, n), seed, torch.float64)).Q.float()


def of_graph(function):
    def run(mode):
        params, outputs, loss = graph()
        with mode():
            found = function(params, outputs, loss)
        return list(found) if isinstance(found, list | tuple) else [found]

    return run


def plain(function):
    def run(mode):
        with mode():
            found = function()
        return [t for t in (found if isinstance(found, list | tuple) else [found]) if isinstance(t, torch.Tensor)]

    return run


def spd(n):
    a = values((n, n), 9, torch.float32)
    return a @ a.T


A, Q, Q2 = spd(6), basis(6), basis(6, 11)
FLAT = basis(30, 12)
PAIR = (basis(6, 13), basis(5, 14))
GNB = functools.partial(precond.GaussNewton.update_curvature, batch_size=4)
spread = [(basis(5, 15), basis(4, 16)), None]


def operator(params, outputs, loss):
    return diagnostics.hessian_operator(loss, params, [values(p.shape, 17).abs() for p in params])


SUBJECTS = {
    **{
        f"{row.cls.__name__} {backend}": Training(functools.partial(row.cls, **row.kwargs, backend=backend))
        for row in CLASSES
        for backend in (None, "reference")
        if row.cls is not precond.Sophia
    },
    "AdamW clipped": Training(lambda ps: precond.AdamW(ps, max_grad_norm=0.1)),
    "AdamW clipped, reference": Training(lambda ps: precond.AdamW(ps, max_grad_norm=0.1, backend="reference")),
    "AdamW int8, reference": Training(
        lambda ps: precond.AdamW(ps, state_format="int8", backend="reference"), shapes=((64, 64),)
    ),
    "AdamW split24": Training(
        lambda ps: precond.AdamW(ps, weight_format="split24", state_format="bf16", backend="reference"),
        dtype=torch.bfloat16,
    ),
    "AdamW float64": Training(precond.AdamW, dtype=torch.float64),
    "AdamW complex": Training(precond.AdamW, dtype=torch.complex64),
    "NAdam reference float16": Training(lambda ps: precond.NAdam(ps, backend="reference"), dtype=torch.float16),
    "Muon": Training(precond.Muon, shapes=((6, 5), (5, 6))),
    "Muon bfloat16": Training(precond.Muon, shapes=((6, 5), (5, 6)), dtype=torch.bfloat16),
    "SOAP": Training(lambda ps: precond.SOAP(ps, lr=0.1, precondition_frequency=2)),
    "SOAP L1": Training(lambda ps: precond.SOAP(ps, lr=0.1, l1_decay=0.01, max_precond_dim=4)),
    "SOAP float64": Training(lambda ps: precond.SOAP(ps, precondition_frequency=2), dtype=torch.float64),
    "SOAP bfloat16": Training(lambda ps: precond.SOAP(ps, precondition_frequency=2), dtype=torch.bfloat16),
    "GaussNewton gnb": Training(
        lambda ps: precond.GaussNewton(ps, basis="kronecker", basis_frequency=2, clip=1.0), update=GNB
    ),
    "GaussNewton gradient": Training(
        lambda ps: precond.GaussNewton(ps, basis="kronecker", curvature="gradient", basis_frequency=2)
    ),
    "GaussNewton flat": Training(
        lambda ps: precond.GaussNewton(ps, basis=FLAT, curvature="gradient", power=-0.5), shapes=((6, 5), (30,))
    ),
    "GaussNewton pair": Training(
        lambda ps: precond.GaussNewton(ps, basis=PAIR, clip=1.0), shapes=((6, 5),), update=GNB
    ),
    "GaussNewton identity": Training(lambda ps: precond.GaussNewton(ps, clip=1.0), update=GNB),
    "Sophia": Training(precond.Sophia, update=precond.Sophia.update_curvature),
    **{
        f"DualDescent {granularity} {kernel}": Training(
            functools.partial(precond.DualDescent, lr=0.1, granularity=granularity, kernel=kernel, momentum=0.9)
        )
        for granularity in precond.dual.GRANULARITIES
        for kernel in ("smoothed", "power")
    },
    **{
        f"FOP {mode}": Training(
            lambda ps, mode=mode: precond.FOP(
                torch.optim.SGD(ps, lr=0.1),
                hyper_lr=0.1,
                mode=mode,
                normalize=("step", "matrix", "hypergradient"),
                compose="gradient",
            )
        )
        for mode in ("output", "diagonal")
    },
    "BNP gradient": bnp("gradient"),
    "BNP direction": bnp("direction"),
    "GradientRegularizer": regularized,
    "eigenbasis": plain(lambda: bases.eigenbasis(A)),
    "refreshed": plain(lambda: bases.refreshed(Q, A)),
    "rotate": plain(lambda: bases.rotate(A, Q, Q2)),
    "rotate_back": plain(lambda: bases.rotate_back(A, Q, Q2)),
    "match_columns": plain(lambda: bases.match_columns(Q, Q2)),
    "interpolate_basis": plain(lambda: bases.interpolate_basis(Q, Q2, 0.3)),
    "interpolate_basis at several": plain(lambda: bases.interpolate_basis(Q, Q2, S)),
    "distance": plain(lambda: torch.tensor(bases.distance(Q, Q2), dtype=torch.float64, device="cpu")),
    "sampled_label_loss": of_graph(lambda ps, f, loss: curvature.sampled_label_loss(f.detach(), generator=generator())),
    "sampled_label_loss squared": of_graph(
        lambda ps, f, loss: curvature.sampled_label_loss(f.detach(), "squared", generator=generator())
    ),
    "gauss_newton_bartlett": of_graph(
        lambda ps, f, loss: curvature.gauss_newton_bartlett(f, ps, bases=spread, draws=2, generator=generator())
    ),
    "hutchinson": of_graph(
        lambda ps, f, loss: curvature.hutchinson(loss, ps, bases=spread, draws=2, generator=generator())
    ),
    "hutchinson of G": of_graph(
        lambda ps, f, loss: curvature.hutchinson(
            lambda z: z.square().sum(), ps, product="gauss_newton", outputs=f, probe="gaussian", generator=generator()
        )
    ),
    "hessian_product": of_graph(lambda ps, f, loss: curvature.hessian_product(loss, ps, [W, W[0]])),
    "gauss_newton_product": of_graph(
        lambda ps, f, loss: curvature.gauss_newton_product(f, lambda z: z.square().sum(), ps, [W, W[0]])
    ),
    "dense": of_graph(lambda *of: diagnostics.dense(operator(*of))),
    "extreme_eigenvalues": of_graph(lambda *of: diagnostics.extreme_eigenvalues(operator(*of), 2)),
    "spectral_density": of_graph(lambda *of: diagnostics.spectral_density(operator(*of), probes=2, steps=8)),
    "standardize": plain(lambda: diagnostics.standardize(X.bfloat16())),
    "layer_conditions": plain(
        lambda: [torch.tensor(v, dtype=torch.float64, device="cpu") for v in diagnostics.layer_conditions(X).values()]
    ),
}
S = torch.tensor([0.25, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_mode_of_the_caller_changes_no_bit_and_is_left_as_it_was(subject):
    expected = [t.detach().clone() for t in SUBJECTS[subject](contextlib.nullcontext)]
    wrong = []
    for name, mode in MODES.items():
        kept = []

        @contextlib.contextmanager
        def checked(mode=mode, kept=kept):
            with mode():
                before = flags()
                yield
                kept.append(flags() == before)

        found = SUBJECTS[subject](checked)
        assert kept
        if not all(kept) or len(found) != len(expected) or not all(map(same, found, expected)):
            wrong.append(name)
    assert wrong == []


def same(found, expected):
    # A counter of float64 and complex parameters has the dtype of torch's, which follows the default.
    return bits_equal(found.detach(), expected) if found.dim() else float(found) == float(expected)


class Witness(TorchDispatchMode):
    """Sees at each product and decomposition what it would run with."""

    seen: list[str]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "mv", "addmm", "baddbmm", "addmv", "dot", "_foreach_norm") or name.startswith(
            ("linalg", "_linalg")
        ):
            in_mode = torch._C._is_any_autocast_enabled() or torch.is_inference_mode_enabled()
            self.seen.append(f"{name} deviates" if in_mode or precision._deviates() else name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def hostile():
    """Everything at once, on any machine: bits differ only where the processor has 16-bit products."""
    with matmul_precision("medium"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        yield


#: Those that multiply, decompose or take norms of vectors.
WITH_PRODUCTS = [
    name
    for name in SUBJECTS
    if name.split()[0] in ("Muon", "SOAP", "GaussNewton", "FOP") or "DualDescent spectral" in name
    if name != "GaussNewton identity"
]
WITH_PRODUCTS += [name for name in SUBJECTS if name.islower() and not name.startswith(("standardize", "sampled"))]


@pytest.mark.parametrize("subject", WITH_PRODUCTS)
def test_every_product_runs_at_the_precision_that_is_stated(subject):
    seen = []

    @contextlib.contextmanager
    def watched():
        witness = Witness()
        witness.seen = seen
        with hostile(), witness:
            yield

    SUBJECTS[subject](watched)
    assert [name for name in seen if "deviates" in name] == []
    assert seen


CLOSURES = {
    **{row.cls.__name__: functools.partial(row.cls, **row.kwargs) for row in CLASSES},
    "Muon": precond.Muon,
    "SOAP": precond.SOAP,
    "GaussNewton": functools.partial(precond.GaussNewton, basis="kronecker", curvature="gradient"),
    "DualDescent": functools.partial(precond.DualDescent, granularity="spectral"),
    "FOP": lambda ps: precond.FOP(torch.optim.SGD(ps, lr=0.1), hyper_lr=0.1),
    "GradientRegularizer": lambda ps: precond.GradientRegularizer(precond.AdamW(ps)),
}


@pytest.mark.parametrize("name", CLOSURES)
def test_closures_run_in_the_modes_of_their_caller(name):
    p = torch.nn.Parameter(values((6, 5), 1))
    optimizer = CLOSURES[name]([p])
    seen = []

    def closure():
        seen.append((p @ p.T).dtype)
        seen.append(torch.get_float32_matmul_precision())
        p.grad = values((6, 5), 10)
        return 0.0

    for _ in range(2):
        with matmul_precision("medium"), torch.autocast("cpu", torch.bfloat16):
            optimizer.step(closure)
    assert set(seen) == {torch.bfloat16, "medium"}
    assert len(seen) >= 4


def test_a_function_of_the_user_runs_in_the_modes_of_its_caller():
    params, outputs, _ = graph()
    seen = []

    def loss(z):
        seen.append(((z @ z.T).dtype, torch.get_float32_matmul_precision()))
        return z.square().sum()

    with matmul_precision("high"), torch.autocast("cpu", torch.bfloat16):
        curvature.gauss_newton_product(outputs, loss, params, [W, W[0]])
        curvature.hutchinson(loss, params, product="gauss_newton", outputs=outputs)
    assert seen == [(torch.bfloat16, "high")] * 2


@pytest.mark.parametrize("mode", [*PRECISIONS, "autocast bfloat16", "autocast of both", "inference"])
def test_modes_are_as_before_after_an_error(mode):
    @precision.at_stated_precision
    def fails():
        assert not precision._deviates()
        assert not torch.is_grad_enabled()
        raise KeyError("mine")

    with MODES[mode](), torch.no_grad():
        assert precision._deviates()
        before = flags()
        with pytest.raises(KeyError, match="mine"):
            fails()
        assert flags() == before
    assert not precision._deviates()


def test_nothing_is_written_where_nothing_deviates(monkeypatch):
    def refuse(*_):
        raise AssertionError("a setting was written")

    for name in [name for name in dir(torch._C) if "precision" in name and name.startswith("_set")]:
        monkeypatch.setattr(torch._C, name, refuse)
    monkeypatch.setattr(precision, "_REDUCTIONS", tuple((get, refuse) for get, _ in precision._REDUCTIONS))
    for subject in ("SOAP", "Muon", "gauss_newton_product"):
        SUBJECTS[subject](contextlib.nullcontext)


@pytest.mark.parametrize("value", ["high", "medium"])
def test_torch_with_one_precision_for_all_backends(value, monkeypatch):
    """Before 2.9."""
    monkeypatch.setattr(precision, "_BY_OPERATION", False)
    with matmul_precision(value):
        with precision.stated_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == value
        assert flags()["tf32"]


@pytest.mark.parametrize("inference", [False, True])
def test_tensors_of_an_inference_mode_are_updated_in_it_alone(inference):
    """A parameter that was made for inference cannot be written outside; states of another are for training."""
    with torch.inference_mode():
        p = torch.ones(4, 4) if inference else torch.nn.Parameter(torch.ones(4, 4))
    q = p if inference else torch.nn.Parameter(values((4, 4), 1))
    optimizer = precond.SOAP([q], lr=0.1)
    for _ in range(3):
        with torch.inference_mode():
            q.grad = values((4, 4), 2)
            optimizer.step()
    assert inference or not any(t.is_inference() for t in optimizer.state[q].values() if isinstance(t, torch.Tensor))
    assert not bits_equal(q.detach(), torch.ones(4, 4) if inference else values((4, 4), 1))
