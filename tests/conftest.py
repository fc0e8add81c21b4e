"""Set-up that must precede imports, and shared fixtures."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch


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
