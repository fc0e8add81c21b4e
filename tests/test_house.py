"""What a user meets first: the report, the examples in docstrings and pages, the demo, the public names."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import precond

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
PUBLIC = [getattr(precond, name) for name in precond.__all__]
OPTIMIZERS = [item for item in PUBLIC if isinstance(item, type) and issubclass(item, torch.optim.Optimizer)]


def run_module(*arguments, cwd=None, **env):
    result = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_report_names_everything_and_verifies_a_step(tmp_path):
    output = run_module("precond", cwd=tmp_path, TRITON_INTERPRET="0")
    for expected in (
        f"precond {precond.__version__}",
        "torch 2.",
        "instruction set",
        "OpenMP threads",
        "backend cpu        one verified step",
        "backend reference  one verified step",
        "backend cuda       not available: ",
        "backend triton     not available: no GPU",
    ):
        assert expected in output
    assert "backend triton     one verified step" in run_module("precond", cwd=tmp_path, TRITON_INTERPRET="1")


class Wrong(precond.AdamW):
    """On the cpu backend a step that is wrong in one element of the last tensor, if ``broken`` says so of its options."""

    broken = staticmethod(lambda group: True)

    def __init__(self, params, *, backend, **options):
        super().__init__(params, backend=backend, **options)
        self.on_cpu = backend == "cpu"

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        group = self.param_groups[0]
        if self.on_cpu and self.broken(group):
            group["params"][-1].view(-1)[0] += 0.125


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (lambda group: group.get("l1_decay", 0) > 0, "fp32 on cpu, cpu"),
        (lambda group: group.get("weight_format") is not None, "bf16 split24 + int8 on cpu, cpu"),
    ],
    ids=["fp32", "formats"],
)
def test_the_report_fails_where_a_step_is_wrong(monkeypatch, capsys, broken, named):
    from precond import __main__ as report

    monkeypatch.setattr(Wrong, "broken", staticmethod(broken))
    monkeypatch.setattr(report, "AdamW", Wrong)
    monkeypatch.setattr(report, "BACKENDS", ("cpu", "reference"))
    with pytest.raises(SystemExit) as stop:
        report.main()
    assert stop.value.code == f"precond: wrong steps: {named}"
    output = capsys.readouterr().out
    assert f"backend cpu        WRONG on cpu: {named.partition(' on ')[0]}: 1 of the 1 elements of shape (1,)" in output
    assert "backend cpu        one verified step each on cpu: " in output
    assert "backend reference  one verified step each on cpu: fp32 (" in output


def test_the_report_fails_where_a_step_raises(monkeypatch, capsys):
    from precond import __main__ as report

    def raises(self, closure=None):
        raise RuntimeError("kernel launch: device not ready")

    monkeypatch.setattr(report.SGD, "step", raises)
    monkeypatch.setattr(report, "BACKENDS", ("cpu",))
    with pytest.raises(SystemExit) as stop:
        report.main()
    assert stop.value.code == "precond: wrong steps: clipped on cpu, cpu"
    assert "WRONG on cpu: clipped: RuntimeError: kernel launch: device not ready" in capsys.readouterr().out


PACKAGE = Path(precond.__file__).parent
EXAMPLES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for folder in ("*.py", "diagnostics/*.py")
    for path in PACKAGE.glob(folder)
    if ">>> " in path.read_text("utf-8")
)


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_run(module):
    results = doctest.testmod(importlib.import_module(f"precond.{module}"))
    assert results.attempted > 0
    assert results.failed == 0


class Markdown(doctest.DocTestParser):
    """Reads the examples of a page: a fence ends what is expected."""

    def parse(self, string, name="<string>"):
        return super().parse(re.sub(r"(?m)^```.*", "", string), name)


@pytest.mark.source
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_pages_run(page):
    results = doctest.testfile(str(page), module_relative=False, parser=Markdown(), encoding="utf-8")
    assert results.attempted > 0 or page.stem == "README"
    assert results.failed == 0


@pytest.mark.source
@pytest.mark.parametrize("item", [*OPTIMIZERS, precond.param_groups], ids=lambda item: item.__name__)
def test_a_page_names_every_argument_that_torch_does_not_have(item):
    """A decoupled class is compared with the coupled one, Lion and functions with nothing."""
    page = (ROOT / "docs" / f"{item.__name__.lower()}.md").read_text(encoding="utf-8")
    names = [item.__name__, item.__name__.removesuffix("W")]
    peer = next((getattr(torch.optim, name) for name in names if hasattr(torch.optim, name)), None)
    theirs = set() if peer is None else set(inspect.signature(peer).parameters)
    parameters = [str(p) if p.kind == p.VAR_KEYWORD else p.name for p in inspect.signature(item).parameters.values()]
    parameters = [name.partition(":")[0] for name in parameters]
    missing = [name for name in parameters if name not in theirs and f"`{name}`" not in page]
    assert not missing
    assert f"[`{item.__name__}`]({item.__name__.lower()}.md)" in (ROOT / "docs" / "README.md").read_text("utf-8")


@pytest.mark.source
def test_a_page_names_every_setting():
    page = (ROOT / "docs" / "clipping.md").read_text(encoding="utf-8")
    assert not [name for name in precond.Settings.__annotations__ if f"| `{name}` |" not in page]
    assert "](clipping.md)" in (ROOT / "docs" / "README.md").read_text("utf-8")


@pytest.mark.source
@pytest.mark.filterwarnings("ignore")
def test_the_demo_trains_and_draws(tmp_path):
    picture = tmp_path / "demo.png"
    small = ["--steps", 8, "--batch", 4, "--context", 32, "--width", 32, "--layers", 1]
    output = run_module("bench", "demo", *small, "--out", picture, cwd=ROOT)
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in output.splitlines() if line.startswith(("torch.optim.AdamW", "precond.AdamW"))]
    assert len(rows) == 2
    theirs, ours = rows
    assert abs(float(theirs[1]) - float(ours[1])) < 1e-3
    assert float(ours[4]) == pytest.approx(8.0)


@pytest.mark.source
def test_the_version_lives_in_one_place():
    assert precond.__version__ == precond._C.version
    text = (ROOT / "precond" / "_version.py").read_text()
    assert f'"{precond.__version__}"' in text
    found = subprocess.run(
        ["git", "grep", "-lF", f'"{precond.__version__}"', "--", "*.py", "*.toml", "*.txt", "*.cpp", "*.h"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    assert found in ([], ["precond/_version.py"])
