"""Set-up that must precede imports, and shared fixtures."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of one worker that wait for work would spin on the core of another.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from support import cases, device

device.stand_in_extension()  # tests/test_cuda_on_host.py


def pytest_configure(config):
    """Warnings that tests expect. In pyproject.toml the first would import precond too early."""
    # The table trains bf16 with betas[1] = 0.999 on purpose.
    config.addinivalue_line("filterwarnings", "ignore::precond.PrecisionWarning")
    # What torch says, once per process, of looking for host syncs on a GPU, and of a capture that an error ended.
    config.addinivalue_line("filterwarnings", "ignore:Synchronization debug mode is a prototype feature")
    config.addinivalue_line("filterwarnings", "ignore:The CUDA Graph is empty")


def pytest_ignore_collect(collection_path, config):
    """tests/integrations runs only where it is named, as ``make test-integrations`` does: it needs other libraries."""
    named = any("integrations" in argument for argument in config.args)
    return True if collection_path.name == "integrations" and not named else None


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty returns NaN, so that an element nobody wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_generate_tests(metafunc):
    """A test of ``isa`` runs with each instruction set of this machine but the best, which all other tests run with. It does not
    matter to another backend, where the best is enough.
    """
    if "isa" in metafunc.fixturenames:
        from precond import _C

        *others, best = _C.available_isas()
        metafunc.parametrize("isa", others if cases.BACKEND == "cpu" else [best], indirect=True)


@pytest.fixture
def isa(request):
    """Selects an instruction set; ``_C.select_isa("")`` selects the best."""
    from precond import _C

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


@pytest.fixture(scope="session")
def extension():
    """The path of the extension with the CUDA backend compiled for the CPU, tests/cuda_on_host."""
    from support.builds import emulated_extension

    return emulated_extension()


@pytest.fixture
def small_pieces(monkeypatch):
    """Gradients that are offloaded come in several pieces, and rings go round."""
    from precond._core import twins

    monkeypatch.setattr(twins, "_SLOT", 32768)
