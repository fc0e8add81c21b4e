"""``make gpu`` without a GPU: every part runs at a small size on the emulated device, so that a rented card meets no typo."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree
from pathlib import Path

import pytest
from support.builds import ROOT

RUN = ROOT / ".ci" / "gpu" / "run"
pytestmark = [
    pytest.mark.source,
    pytest.mark.skipif(not RUN.exists(), reason="needs a checkout"),
    pytest.mark.skipif(
        shutil.which("bash") is None or shutil.which("timeout") is None, reason="needs bash and coreutils"
    ),
]
PARTS = re.search(r"parts='\n(.*?)'", RUN.read_text(), re.DOTALL)[1].split()[::3] if RUN.exists() else []


def kit(out, *arguments, **env):
    # Not the settings of the pytest that runs this.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PRECOND_"))}
    env = {**inherited, "OUT": str(out), "PYTHON": sys.executable, **env}
    return subprocess.run([RUN, *arguments], env=env, cwd=out, capture_output=True, text=True, check=False)


def lines(out):
    return [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


def test_every_part_runs_on_the_emulated_device(extension, tmp_path):
    result = kit(tmp_path, "--dry-run", PRECOND_TEST_EXTENSION=str(extension))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = lines(tmp_path)
    assert rows[0]["what"] == "begin"
    assert {row["part"]: row["status"] for row in rows if row["what"] == "part"} == {
        name: "left out" if name == "install" else "ok" for name in PARTS
    }
    compared = [row for row in rows if row["what"] in ("parity", "graph")]
    assert len(compared) > 8
    assert all(row["equal"] for row in compared)
    assert {row["who"] for row in rows if row["what"] in ("speed", "small")} >= {"precond cuda", "torch fused"}

    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [
        "dry-run-exact.json",
        "dry-run-products.json",
        "dry-run.json",
        "dry-run.md",
        "gpu.jsonl",
        "logs.tgz",
    ]
    assert json.loads((tmp_path / "dry-run.json").read_text())["results"]
    with tarfile.open(tmp_path / "logs.tgz") as logs:
        names = [name.removeprefix("./") for name in logs.getnames()]
        assert {f"{name}.log" for name in PARTS} <= set(names)
        suites = [name for name in logs.getnames() if name.endswith(".xml")]
        assert len(suites) == 5  # four suites, a capture
        for name in suites:
            (suite,) = xml.etree.ElementTree.parse(logs.extractfile(name)).iter("testsuite")
            assert int(suite.get("tests")) > int(suite.get("skipped"))

    summary = result.stdout.split("\nno GPU, ")[1].splitlines()
    assert len(summary) < 60
    assert [line.split()[0] for line in summary[1:]][: len(PARTS)] == PARTS


def test_parts_that_no_longer_fit_are_left_out(extension, tmp_path):
    result = kit(tmp_path, "--dry-run", "graph", "exact", LIMIT="5", PRECOND_TEST_EXTENSION=str(extension))
    assert result.returncode == 0, result.stdout + result.stderr
    parts = [(row["part"], row["status"]) for row in lines(tmp_path) if row["what"] == "part"]
    assert parts == [("graph", "left out"), ("exact", "left out")]
    assert re.search(r"exact +left out +0 s +\d s were left, it needs 90", result.stdout)


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (["speeed"], {}, f"no part speeed; there are: {' '.join(PARTS)}"),
        (["speed"], {"LIMIT": "4 minutes"}, "LIMIT must be whole seconds, got 4 minutes"),
        (["--dry-run"], {}, "--dry-run needs the path of the emulated extension in PRECOND_TEST_EXTENSION"),
    ],
)
def test_a_wrong_argument_is_refused(arguments, env, message, tmp_path):
    result = kit(tmp_path, *arguments, **env)
    assert result.returncode == 2
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_copy_of_the_sources_can_be_configured(tmp_path):
    names = re.search(r"for name in (.*?); do cp", RUN.read_text())[1].split()
    for name in names:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    options = ["-DPRECOND_PYTHON=OFF", "-DPRECOND_CUDA=OFF", "-DPRECOND_VERSION=0"]
    subprocess.run([cmake, "-S", tmp_path, "-B", tmp_path / "build", *options], check=True, capture_output=True)
