"""The CUDA backend without a GPU: its sources compiled for the CPU (tests/cuda_on_host), under sanitizers in C++, and as the
backend of the Python suites.
"""

from __future__ import annotations

import os
import sys
import xml.etree.ElementTree

import pytest
from support import builds
from support.builds import ROOT, run

pytestmark = pytest.mark.source

PROGRAMS = ("cuda_tests", "cuda_runtime_tests", "offload_tests")


@pytest.mark.parametrize(("sanitizer", "threads"), [("address,undefined", 1), ("thread", 3)])
def test_the_kernels_pass_their_tests_under_sanitizers(sanitizer, threads):
    programs = builds.sanitized(sanitizer, *PROGRAMS) / "tests"
    # ThreadSanitizer does not know libgomp's barriers: one OpenMP thread, several block threads.
    env = {"CUDA_ON_HOST_THREADS": str(threads), "OMP_NUM_THREADS": "1", "TSAN_OPTIONS": "halt_on_error=1"}
    for name in PROGRAMS:
        assert run(programs / name, env=env).endswith("all passed\n")


# What is left out: the host's own passes and promises, what does not depend on the backend, the other backends.
SUITES = {
    "test_parity.py": "not lesser_instruction_sets",
    "test_same_bits.py": "this_backend or alignments or gradient_layouts or order_of",
    # Not those of the host's own passes, of float64, and of a skipped first step, which leaves zero states on a device.
    # A tensor of the host is one of the device there, which NAdam takes with capturable=True alone.
    # Schedule-free weights its average by lr: with one on the device it is for capturable=True too, test_gpu.py.
    "test_api.py": "not loss_scaling and not every_kind and not (a_tensor_lr_is_read and ScheduleFree)",
    "test_plan.py": "not temporary and not gil and not set_num_threads and not another_dtype",
    # float64 beside it is for the reference text, and what is freed does not depend on the backend.
    "test_changing_sets.py": "not freed and not several_backends",
    "test_checkpoints.py": "not distributed",
    "test_device_scalars.py": "",
    "test_devices.py": "",
    "test_gpu.py": "not few_bits",
    "test_formats_cuda.py": "not rule_and_format",
    "test_clipping.py": "not triton and not errors_say and not thread_counts",
    "test_clipping_passes.py": "",
    "test_grouped.py": "not zero_redundancy",
    "test_gradient_release.py": "bit_for_bit and (adamw or muon or grouped)",
    "test_offload.py": "",
    "test_offload_moves.py": "",
    "test_offload_steps.py": "",
    "test_gradient_release_clipping.py": "norm_of_the_step or backward_pass_clips",
    # Against Triton's interpreter, and that nothing else changes; the rest is the host's.
    "test_averages.py": "(changes_nothing or agree) and (amsgrad or sgd_momentum) or gives_every_bit and amsgrad",
    "test_cautious.py": "agree and (adamw or lion) and not factors or factors_agree and lion and split24"
    " or groups_differ or a_limit_is_kept or counted_once",
    "test_statistics.py": "backends_agree_bit_for_bit and adamw and split24 or one_order and 1 or stand_still or kth",
    "test_several_passes.py": "of_the_gradient and not l1 or same_bits and float16 or skipped_step",
    # Emulated blocks with barriers are slow: not ten thousand steps, not all rules once more, and no statistics.
    "test_formats.py": "not ten_thousand and not second_moments and not keeps_its and not rule_and_format"
    " and not instruction_sets and (not resumed_run or adamw) and not go_to_torch and not steps_grow and not nearer"
    " and not draws_within",
}


def test_the_python_suites_pass_on_the_cuda_backend(extension):
    """In one process: to start one takes 5 s."""
    chosen = [f"({suite} and ({select}))" if select else f"({suite})" for suite, select in SUITES.items()]
    env = {**os.environ, "PRECOND_TEST_EXTENSION": str(extension), "PRECOND_BACKEND": "cuda"}
    results = extension.parent / "suites.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", results]
    run(*command, *(ROOT / "tests" / suite for suite in SUITES), "-k", " or ".join(chosen), env=env, cwd=ROOT)
    cases = xml.etree.ElementTree.parse(results).iter("testcase")
    assert {f"{case.get('classname').split('.')[-1]}.py" for case in cases if case.find("skipped") is None} == set(
        SUITES
    )
