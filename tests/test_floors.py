"""Who may import or include whom: what stands on a floor uses that floor and those below it, and nothing goes in a circle."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest
from support.builds import ROOT

pytestmark = pytest.mark.source

#: The modules of precond from the ground up, a floor a line; a package counts with all of its modules. Other public modules stand
#: on top.
PYTHON = """
_C _version _core.extras _core.iteration _core.precision _core.rows _core.settings _core.sharding bases reference
_core.backend _core.metric
_core.amp _core.arguments _core.checkpoint _core.formats _core.remainders _core.scales
_core.counters _core.groups _core.memory _core.norm _core.parts _core.states _core.swapped
_core.statistics _core.twins
_core.checks _core.clipping triton_kernels
_core.averages _core.executors _core.offloaded _core.saved _core.updates
_core.plan
_core.engine
_core.passes
_core.offload
_core.moves
_core.optimizer
_core.conversions
_core.single
_methods _wrappers
_inputs
"""
FLOORS = [line.split() for line in PYTHON.strip().splitlines()]

#: What the files of a folder of csrc may include besides their own.
CPP = {
    "base": set(),
    "rules": {"base"},
    "formats": {"base"},
    "plan": {"base", "rules", "formats"},
    "cpu": {"base", "rules", "formats", "plan"},
    "cuda": {"base", "rules", "formats", "plan"},
    "offload": {"base", "rules", "formats", "plan", "cpu", "cuda"},
    "python": {"base", "rules", "formats", "plan", "cpu", "cuda", "offload"},
}


def modules(package: Path, name: str) -> dict[str, Path]:
    """The modules of a package by their full names, packages themselves included."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = [name, *path.relative_to(package).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, module: str, known: dict[str, Path]) -> set[str]:
    """The modules among ``known`` that a module imports, at its top or inside a function, for types alone or not."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                used.add(full if full in known else source)
    return (used & known.keys()) - {module}


def python_arrows() -> dict[str, set[str]]:
    known = modules(ROOT / "precond", "precond") | modules(ROOT / "triton_kernels", "precond.triton_kernels")
    known["precond._C"] = ROOT / "precond" / "_C.pyi"
    return {name: imports(path, name, known) for name, path in known.items()}


def floor_of(module: str) -> int:
    inside = module.removeprefix("precond").removeprefix(".")
    for level, names in enumerate(FLOORS):
        if any(inside == name or inside.startswith(f"{name}.") for name in names):
            return level
    private = inside.startswith("_") and inside not in ("__main__", "_core", "_methods", "_wrappers")
    assert not private, f"{module} must have a floor in PYTHON"
    return len(FLOORS)


def test_no_module_imports_from_a_floor_above():
    wrong = [
        f"{name} imports {other}"
        for name, used in python_arrows().items()
        for other in sorted(used)
        if floor_of(other) > floor_of(name)
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    # The package itself imports its public modules, and they live in it.
    arrows = {name: used - {"precond"} for name, used in python_arrows().items() if name != "precond"}
    graphlib.TopologicalSorter(arrows).prepare()  # raises CycleError, which names the circle


def cpp_arrows() -> list[tuple[str, str]]:
    found = []
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        includes = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), flags=re.M)
        # families.h is made by CMake: the list of families, which the registries of three floors read.
        found += [(path.relative_to(ROOT / "csrc").as_posix(), name) for name in includes if name != "families.h"]
    return found


def test_no_source_includes_from_a_floor_above():
    arrows = cpp_arrows()
    assert len(arrows) > 30
    wrong = [
        f"{path} includes {include}"
        for path, include in arrows
        if (folder := include.split("/")[0]) != path.split("/")[0] and folder not in CPP[path.split("/")[0]]
    ]
    assert wrong == []
