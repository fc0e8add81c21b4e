"""The result file of a benchmark: it survives a cut at any time, and a run measures only what it does not have."""

from __future__ import annotations

import argparse
import json
import time

import pytest

from bench import cpu as bench_cpu
from bench import methods, record


def case(name, log, value=1.0):
    def measure():
        log.append(name)
        if value is None:
            raise RuntimeError("out of memory\nand more")
        return {"ms": value}

    return measure


def line(result):
    return f"{result['ms']} ms"


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(tmp_path, capsys):
    path, log = tmp_path / "results.json", []

    def cut():
        raise KeyboardInterrupt

    first = record.Record(path, {"cpu": "a"}, {"seconds": 1})
    with pytest.raises(KeyboardInterrupt):
        first.measure({"one": case("one", log), "two": cut, "three": case("three", log)}, line)
    assert [result["case"] for result in json.loads(path.read_text())["results"]] == ["one"]
    assert "one: 1.0 ms\n" in capsys.readouterr().out
    second = record.Record(path, {"cpu": "a"}, {"seconds": 1})
    second.measure({name: case(name, log) for name in ("one", "two", "three")}, line)
    assert log == ["one", "two", "three"]
    assert [result["case"] for result in second.results(["three", "two", "one", "four"])] == ["three", "two", "one"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("other", [({"cpu": "b"}, {"seconds": 1}), ({"cpu": "a"}, {"seconds": 2})])
def test_results_of_another_environment_or_setting_are_kept_until_they_are_measured_again(tmp_path, other):
    path, log = tmp_path / "results.json", []
    cases = {name: case(name, log) for name in ("one", "two")}
    record.Record(path, {"cpu": "a"}, {"seconds": 1}).measure(cases, line)
    later = record.Record(path, *other)
    later.measure({"two": case("two", log, 2.0)}, line)
    assert later.others(cases) == "Of another run, whose environment is in results.json: one.\n"
    report = json.loads(path.read_text())
    assert [(result["ms"], result["run"]) for result in report["results"]] == [(1.0, 0), (2.0, 1)]
    assert [(run["environment"], run["settings"]) for run in report["runs"]] == [({"cpu": "a"}, {"seconds": 1}), other]
    later = record.Record(path, *other)
    later.measure({"one": case("one", log, 3.0)}, line)
    assert not later.others(cases)
    report = json.loads(path.read_text())
    assert [(result["ms"], result["run"]) for result in report["results"]] == [(3.0, 0), (2.0, 0)]
    assert len(report["runs"]) == 1


def test_fresh_goes_on_where_it_was_cut_off(tmp_path):
    path, log = tmp_path / "results.json", []
    cases = {name: case(name, log) for name in ("one", "two")}
    record.Record(path, {}, {}).measure(cases, line)
    # The first case of the file, which would put its run before the older one.
    record.Record(path, {}, {}, fresh=True).measure({"one": cases["one"]}, line)
    record.Record(path, {}, {}).measure(cases, line)
    assert log == ["one", "two", "one", "two"]


def test_fresh_measures_everything_again(tmp_path):
    path, log = tmp_path / "results.json", []
    for fresh in (False, True):
        record.Record(path, {}, {}, fresh=fresh).measure({"one": case("one", log)}, line)
    assert log == ["one", "one"]
    assert len(json.loads(path.read_text())["runs"]) == 1


def test_a_case_that_fails_has_a_line_and_is_tried_again(tmp_path, capsys):
    path, log = tmp_path / "results.json", []
    results = record.Record(path, {}, {})
    results.measure({"one": case("one", log, None), "two": case("two", log)}, line)
    assert results.failed(["one", "two"]) == ["one"]
    assert "one: error: RuntimeError: out of memory\n" in capsys.readouterr().out
    record.Record(path, {}, {}).measure({"one": case("one", log), "two": case("two", log)}, line)
    assert log == ["one", "two", "one"]


def test_no_case_begins_after_the_end(tmp_path, capsys):
    log = []
    record.Record(tmp_path / "results.json", {}, {}).measure({"one": case("one", log)}, line, end=time.monotonic() - 1)
    assert not log
    assert "1 cases left" in capsys.readouterr().out


def test_only_takes_a_part_of_a_name_or_a_pattern():
    names = ["AdamW split24 + int8, 32M", "AdamW fp32", "SGD fp32"]
    assert record.chosen(names, "split24 + int8") == names[:1]
    assert record.chosen(names, "^AdamW") == names[:2]
    assert record.chosen(names, "") == names
    with pytest.raises(SystemExit, match="matches no case; there are: AdamW split24"):
        record.chosen(names, "Lion")


def test_the_committed_record_has_the_cases_of_the_benchmark():
    """So that a run that replaces some of them leaves none of another name."""
    results = json.loads((record.ROOT / "bench" / "results" / "cpu.json").read_text())["results"]
    names = [case.name for case in bench_cpu.cases(quick=False)]
    names += [*methods.cases(1.0, quick=False), bench_cpu.HOST, bench_cpu.PLANS, bench_cpu.IMPORT, bench_cpu.OFFLOAD]
    assert [result["case"] for result in results] == names


@pytest.mark.parametrize("flags", [[], ["--quick", "--only", "AdamW", "--fresh", "--out", "x"]])
def test_the_flags(flags):
    parser = argparse.ArgumentParser()
    record.add_arguments(parser)
    arguments = parser.parse_args(flags)
    assert (record.end_of(arguments) is None) == (not flags)
