"""``python -m precond`` on the device of ``kit``: small steps in all kinds of kernels, which is what a sanitizer looks at."""

import runpy

import kit  # noqa: F401 (first)

if __name__ == "__main__":
    runpy.run_module("precond", run_name="__main__", alter_sys=True)
