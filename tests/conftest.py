"""Set-up that must precede imports, and shared fixtures."""

import importlib.util
import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of one worker that wait for work would spin on the core of another.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# Another build of the extension stands in for the installed one: tests/test_cuda_on_host.py.
if path := os.environ.get("PRECOND_TEST_EXTENSION"):
    spec = importlib.util.spec_from_file_location("precond._C", path)
    sys.modules["precond._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["precond._C"])


def pytest_configure(config):
    """The table trains bf16 with betas[1] = 0.999 on purpose. In pyproject.toml it would import precond too early."""
    config.addinivalue_line("filterwarnings", "ignore::precond.PrecisionWarning")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty returns NaN, so that an element nobody wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def isa(request):
    """Each instruction set in turn; one that this machine lacks is not a case here."""
    from precond import _C

    if request.param not in _C.available_isas():
        pytest.skip(f"this CPU has no {request.param}")
    before = _C.selected_isa()
    _C.select_isa(request.param)
    yield request.param
    _C.select_isa(before)


@pytest.fixture
def triton_interpreter():
    """For a test that holds Triton to the CPU's bits: skipped where the interpreter has others than the compiler."""
    triton = pytest.importorskip("triton")
    if os.environ["TRITON_INTERPRET"] == "1" and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("Triton's interpreter before 3.9 does not fuse tl.fma")
