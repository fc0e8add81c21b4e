"""The CUDA device that the parts run on: a GPU or, in a dry run, the emulated one.

Imported before precond, because the emulated device comes with another build of its extension.
"""

from __future__ import annotations

import sys

from support import device

if "precond" in sys.modules:
    raise ImportError("kit must be imported before precond")
device.stand_in_extension()
CUDA = device.device()
if CUDA is None:
    raise SystemExit("no CUDA device here")
