"""``bench gpu`` and its clock without a GPU: so that a mistake in them does not show first on a rented card."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import ROOT, exact, gpu, timing


def bench(*arguments):
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_dry_run_times_every_case_and_a_second_one_none(tmp_path):
    output = bench("gpu", "--device", "cpu", "--out", tmp_path)
    path = tmp_path / "dry-run.json"
    names = [case.name for case in gpu.cases(1.0)]
    results = json.loads(path.read_text())["results"]
    assert [result["case"] for result in results] == names
    lines = output.splitlines()
    table = (tmp_path / "dry-run.md").read_text()
    for result in results:
        assert any(line.startswith(f"{result['case']}: ") for line in lines)
        assert f"| {result['case']} | precond cuda | " in table
        for name, row in result["contenders"].items():
            if name not in gpu.PEERS:  # other libraries may be missing
                assert row["device_ms"] > 0
                assert row["device_ms_quartiles"][0] <= row["device_ms"] <= row["device_ms_quartiles"][1]
                assert row["host_ms"] > 0
    before = path.read_bytes()
    assert f"0 of {len(names)} cases to measure" in bench("gpu", "--device", "cpu", "--out", tmp_path)
    assert path.read_bytes() == before
    assert "1 of 1 cases to measure" in bench(
        "gpu", "--device", "cpu", "--out", tmp_path, "--only", "^Adagrad", "--rounds", 1
    )
    assert {result["case"]: result["run"] for result in json.loads(path.read_text())["results"]} == {
        name: int(name.startswith("Adagrad")) for name in names
    }


class Device:
    """A stream in model: what is queued takes its milliseconds after what was queued before; the host has a clock of its own."""

    def __init__(self):
        self.host = self.free = 0.0
        self.ends = []

    def queue(self, ms):
        if len(self.ends) >= 1000:  # as a real one: the host waits for a place
            self.host = max(self.host, self.ends[-1000])
        self.free = max(self.free, self.host) + ms
        self.ends.append(self.free)

    def synchronize(self):
        self.host = max(self.host, self.free)

    def perf_counter(self):
        return self.host / 1e3

    def event(self, enable_timing):
        def record():
            event.at = max(self.free, self.host)

        event = SimpleNamespace(
            record=record, query=lambda: self.host >= event.at, elapsed_time=lambda end: end.at - event.at
        )
        return event


@pytest.fixture
def device(monkeypatch):
    model = Device()
    monkeypatch.setattr(torch.cuda, "Event", model.event)
    monkeypatch.setattr(torch.cuda, "synchronize", model.synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: model.queue(cycles / 1e6))
    monkeypatch.setattr(timing.time, "perf_counter", model.perf_counter)
    return model


def call(device, host, kernel, *, waits=False, kernels=1):
    """A step of so many milliseconds on the host and then on the device."""

    def step():
        device.host += host
        for _ in range(kernels):
            device.queue(kernel / kernels)
        if waits:
            device.synchronize()

    return step


def test_time_of_the_host_is_not_time_of_the_device(device):
    calls = {"slow host": call(device, 7.0, 2.0), "slow device": call(device, 0.1, 5.0)}
    times, failed = timing.Clock("cuda").interleaved(calls, 4)
    assert not failed
    assert times["slow host"].device == pytest.approx([2.0] * 4)
    assert times["slow host"].host == pytest.approx([7.0] * 4)
    assert times["slow device"].device == pytest.approx([5.0] * 4)
    assert times["slow device"].host == pytest.approx([0.1] * 4)
    assert all(found.pace.ahead for found in times.values())


def test_a_spin_that_was_too_short_is_repeated(device):
    clock = timing.Clock("cuda")
    pace = timing.Pace(3, spin_ms=1.0)
    assert clock.device_ms(call(device, 2.0, 0.5), pace) == pytest.approx(0.5)
    assert pace.ahead
    assert pace.spin_ms > 2.0


def test_more_launches_than_a_stream_takes_are_fewer_calls(device):
    times, _ = timing.Clock("cuda").interleaved({"many": call(device, 2.0, 3.0, kernels=600)}, 3)
    assert times["many"].device == pytest.approx([3.0] * 3)
    assert times["many"].pace.ahead
    assert times["many"].pace.calls == 1


def test_a_call_that_waits_for_the_device_is_marked(device):
    times, _ = timing.Clock("cuda").interleaved({"waits": call(device, 2.0, 0.5, waits=True)}, 3)
    assert not times["waits"].summary()["queued_ahead"]
    assert 0.5 <= times["waits"].device[-1] <= 2.5


def test_a_contender_that_fails_while_timed_leaves_the_others(device):
    left = iter(range(8))

    def breaks():
        next(left)

    times, failed = timing.Clock("cuda").interleaved({"breaks": breaks, "works": call(device, 0.1, 1.0)}, 5)
    assert list(times) == ["works"]
    assert list(failed) == ["breaks"]
    assert times["works"].device == pytest.approx([1.0] * 5)


def test_a_dry_run_of_the_cost_of_exactness(tmp_path):
    arguments = ("exact", "--device", "cpu", "--out", tmp_path, "--rounds", 1)
    assert "3 of 3 cases to measure" in bench(*arguments)
    results = json.loads((tmp_path / "dry-run-exact.json").read_text())["results"]
    assert [result["case"] for result in results] == list(exact.CASES)
    assert all(result["ratio"] > 0 for result in results)
    assert "0 of 3 cases to measure" in bench(*arguments)
