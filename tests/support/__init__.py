"""What tests and benchmarks share: tensors, parity with the reference, devices, builds, ranks. No module here imports pytest."""
