"""Executes the machine code of the GPU kernels on the CPU. tests/test_machine_code.py and bench/executed.py call harness.py."""
