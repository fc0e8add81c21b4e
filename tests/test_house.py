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
TRAINERS = sorted((ROOT / "docs" / "trainers").glob("*.md"))
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "methods").glob("*.md")), *TRAINERS]
WITHOUT_EXAMPLES = ("README", "design", "theory")
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
    ".".join(("precond", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text("utf-8")
)


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_run(module):
    results = doctest.testmod(importlib.import_module(module))
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
    assert results.attempted > 0 or page.stem in WITHOUT_EXAMPLES or page in TRAINERS
    assert results.failed == 0


@pytest.mark.source
def test_a_trainer_has_a_page_and_a_script():
    """Which tests/integrations/test_examples.py runs."""
    scripts = {path for path in (ROOT / "examples").glob("*.py") if path.stem != "tiny"}
    of_pages = [path for page in TRAINERS for path, _ in links(page) if path.suffix == ".py"]
    assert sorted(of_pages) == sorted(scripts)
    of_contents = {path for path, _ in links(ROOT / "docs" / "README.md")}
    assert not [page.name for page in TRAINERS if page not in of_contents]


FUNCTIONS = [item for item in PUBLIC if inspect.isfunction(item)]


def parameters(item):
    return [p.name for p in inspect.signature(item).parameters.values()]


def described(item):
    """The names in the "Args" of a docstring."""
    lines = re.search(r"(?ms)^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(item))[1].splitlines()
    entries = [re.match(r"    (\*{0,2}\w+(?:, \*{0,2}\w+)*),?(?::|$)", line) for line in lines]
    return [name.strip(" *") for entry in entries if entry for name in entry[1].split(",")]


@pytest.mark.parametrize("item", [*OPTIMIZERS, *FUNCTIONS], ids=lambda item: item.__name__)
def test_a_docstring_describes_every_argument_and_no_other(item):
    assert sorted(described(item)) == sorted(parameters(item))


def test_the_docstring_of_the_settings_describes_each_of_them():
    assert described(precond.Settings) == list(precond.Settings.__annotations__)


@pytest.mark.source
@pytest.mark.parametrize("item", [*OPTIMIZERS, precond.param_groups], ids=lambda item: item.__name__)
def test_a_page_links_the_docstring_and_names_what_torch_does_not_have(item):
    """A decoupled class is compared with the coupled one; one that torch lacks has its arguments in the docstring alone."""
    page = (ROOT / "docs" / f"{item.__name__.lower()}.md").read_text(encoding="utf-8")
    source = Path(inspect.getsourcefile(item)).relative_to(PACKAGE).as_posix()
    assert f"[`help(precond.{item.__name__})`](../precond/{source})" in page
    peers = [getattr(torch.optim, name, None) for name in (item.__name__, item.__name__.removesuffix("W"))]
    for peer in [peer for peer in peers if peer is not None][:1]:
        theirs = parameters(peer)
        assert not [n for n in parameters(item) if n not in theirs and not re.search(rf"`(\*\*)?{n}`", page)]
    assert f"[`{item.__name__}`]({item.__name__.lower()}.md)" in (ROOT / "docs" / "README.md").read_text("utf-8")


@pytest.mark.source
def test_the_readme_links_the_page_of_every_public_class():
    """And is a page that somebody reads: 120 lines."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [item.__name__ for item in OPTIMIZERS if f"[`{item.__name__}`](docs/" not in readme]
    assert not [name for name in precond.__all__ if not name.startswith("_") and f"`{name}`" not in readme]
    assert len(readme.splitlines()) < 120


def links(page):
    """What a page links to in this repository, as paths and anchors."""
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", text):
        path, anchor = target
        if not path.startswith("http"):
            yield (page.parent / path).resolve() if path else page, anchor.removeprefix("#")


def anchors(page):
    """Those that GitHub makes of a page's headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.source
def test_every_link_leads_somewhere():
    pages = [*ROOT.glob("*.md"), *PAGES, *(ROOT / "bench").rglob("*.md"), *(ROOT / ".ci").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {path.name}#{anchor}"
        for page in pages
        for path, anchor in links(page)
        if not path.exists() or (anchor and anchor not in anchors(path))
    ]
    assert not broken


@pytest.mark.source
def test_a_page_names_every_setting():
    page = (ROOT / "docs" / "clipping.md").read_text(encoding="utf-8")
    assert not [name for name in precond.Settings.__annotations__ if f"`{name}`" not in page]
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


@pytest.mark.source
def test_every_package_is_installed():
    listed = re.search(r"(?s)^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.M)[1]
    found = {
        ".".join((name, *path.parent.relative_to(root).parts))
        for root, name in ((ROOT / "precond", "precond"), (ROOT / "triton_kernels", "precond.triton_kernels"))
        for path in root.rglob("__init__.py")
    }
    assert set(re.findall(r'"(.*?)"', listed)) == found


@pytest.mark.source
def test_every_citation_of_the_theory_names_a_section():
    sections = set(re.findall(r"(?m)^#+ ([A-D](?:\.\d+)*)\.? ", (ROOT / "docs" / "theory.md").read_text("utf-8")))
    files = subprocess.run(
        ["git", "ls-files", "*.py", "*.h", "*.cpp", "*.cu", "*.cuh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    cited = {
        (name, label)
        for name in files.stdout.split()
        for label in re.findall(r"docs/theory\.md,\s+([A-D](?:\.\d+)*)", (ROOT / name).read_text("utf-8"))
    }
    assert len(cited) > 50
    assert not [citation for citation in cited if citation[1] not in sections]
