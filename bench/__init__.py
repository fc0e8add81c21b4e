"""Benchmarks and the demo: ``python -m bench --help``. A benchmark refuses to time what fails parity."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# tests/families, tests/support and tests/machine_code: what benchmarks and tests share.
sys.path.insert(0, str(ROOT / "tests"))
# Read when torch is imported: below it Kineto writes "USDT: ... profiler_start" to stderr for every profile.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
