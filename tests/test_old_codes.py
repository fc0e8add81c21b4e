"""States in the codes of precond 0.1: found wherever they come in, encoded anew once, and said so once.

Over 400 lines: all of it reads the same saved files.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from families import BY_RULE, CLASSES
from support.cases import bits_equal, random_values
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import precond
from precond._core import formats as _formats

#: Made by version 0.1. AdamW of a 64 x 64 bfloat16 parameter after five steps, whose group 3 had no gradients, group 5 small ones
#: and group 7 one far above the others; beside it what to_torch_state_dict said of the states then, in some rows. And Lion of a
#: float32 one, saved by torch.distributed.checkpoint.
FILES = Path(__file__).parent / "data" / "codes-0.1.zip"
SAVED = [("split24", "int8"), ("stochastic", "int4")]
LEVELS = {"int8": 127, "uint8": 255, "int4": 7, "uint4": 15}
saved_files = pytest.mark.parametrize(("weight_format", "state_format"), SAVED)


@contextlib.contextmanager
def said(times):
    """As often as that, that old codes were found."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found = [w for w in caught if "codes of precond 0.1" in str(w.message)]
    assert len(found) == times, [str(w.message) for w in caught]
    assert all("Save a new checkpoint" in str(w.message) and w.category is UserWarning for w in found)


def loaded_file(name):
    with zipfile.ZipFile(FILES) as files:
        return torch.load(io.BytesIO(files.read(f"{name}.pt")))


def old_values(codes, scales, form):
    """Of groups, one a row, in float64: what docs/formats.md of version 0.1 says."""
    y = codes.double() / LEVELS[form]
    wide = scales.double()[:, None]
    return (y * wide) ** 2 if form.startswith("u") else y / (2 - y.abs()) * wide


def old_codes(values, form):
    """Groups of values, one a row, in codes of version 0.1: its codes and scales."""
    x = values.double().sqrt() if form.startswith("u") else values.double()
    scales = (x.abs().amax(1) * 1.004).bfloat16().clamp(min=2.0**-120)
    y = x / scales.double()[:, None]
    codes = (y if form.startswith("u") else 2 * y / (1 + y.abs())) * LEVELS[form]
    return codes.round().clamp(-LEVELS[form], LEVELS[form]).int(), scales


def packed(codes, form):
    """As they lie in memory."""
    if form.endswith("8"):
        return codes.to(torch.int8 if form == "int8" else torch.uint8)
    halves = (codes & 15).to(torch.uint8).view(*codes.shape[:-1], -1, 2)
    return halves[..., 0] | halves[..., 1] << 4


def make_old(state, names, p):
    """Bring a parameter's states into the codes of version 0.1. Returns what they then mean."""
    meant = {}
    for name in names:
        if f"{name}_scale" not in state:
            continue
        form = _formats.code_format(name, "int8" if state[name].shape == p.shape else "int4")
        values = _formats.values_of(state, name, form, p).reshape(-1, 64)
        codes, scales = old_codes(values, form)
        state[name] = packed(codes, form).view(state[name].shape)
        state[f"{name}_scale"] = scales.view(state[f"{name}_scale"].shape)
        meant[name] = form, old_values(codes, scales, form).view(p.shape)
    return meant


def assert_within_half_a_step(state, name, form, p, meant):
    """Of today's codes. A second moment that is not zero has a code of at least 1."""
    got = _formats.values_of(state, name, form, p)
    scales = state[f"{name}_scale"].view(-1, 1)
    unit = scales.double().abs() / {"int8": 29.5, "uint8": 502.0, "int4": 22.0, "uint4": 382.0}[form]
    # Steps of 2 + K y: even ones from 2 on, twice as long from each power of two on.
    kept = 5 if form.endswith("8") else 1
    of = 2 + meant.view(-1, 64).abs() / unit
    step = 2.0 ** (torch.floor(torch.log2(of)) - kept) * unit
    far = (got.view(-1, 64) - meant.view(-1, 64)).abs()
    least = (got.view(-1, 64) > 0) & (far <= step) & (meant.view(-1, 64) < step) if form.startswith("u") else far < 0
    assert ((far <= 0.5001 * step) | least).all()
    assert (got[meant == 0] == 0).all()
    if form.startswith("u"):
        assert (got[meant > 0] > 0).all()


@pytest.mark.parametrize("form", LEVELS)
@pytest.mark.parametrize("n", [64 * 64, 64 * 64 + 37, 13])
def test_only_old_groups_are_encoded_anew_within_half_a_step(form, n, monkeypatch):
    """Random ones, zeros, NaN, tiny and huge ones, between groups of today, and a last one that is not full."""
    monkeypatch.setattr(_formats.old_codes, "_AT_ONCE", 7)
    groups = -(-n // 64)
    name, dtype = ("exp_avg_sq", torch.uint8) if form.startswith("u") else ("exp_avg", torch.int8)
    torch.manual_seed(0)
    largest = LEVELS[form]
    codes = torch.randint(0 if form.startswith("u") else -largest, largest + 1, (groups, 64))
    scales = torch.exp(3 * torch.randn(groups)).bfloat16()
    nan = torch.zeros(groups, dtype=torch.bool)
    if groups > 13:
        codes[3], scales[3] = 0, 2.0**-120
        codes[5], scales[5], nan[5] = 0, torch.nan, True
        scales[7:13] = torch.tensor([2.0**-120, 2.0**-119, 2.0**-60, 2.0**-50, 1e18, 2.0**63])
    codes.view(-1)[n:] = 0
    today = torch.zeros(groups, dtype=torch.bool)
    today[1:3] = groups > 13
    p = torch.nn.Parameter(torch.zeros(n))
    state = {name: packed(codes.view(-1)[: n + n % 2 * form.endswith("4")], form), f"{name}_scale": scales.clone()}
    state[name] = state[name].view(dtype) if form == "int8" else state[name]
    state[f"{name}_scale"][today] *= -1
    before = copy.deepcopy(state)
    kept = dict(state)
    with said(1):
        _formats.renew([(p, state)])
    assert all(state[key] is kept[key] for key in state)
    per = 64 if form.endswith("8") else 32
    for group in today.nonzero().view(-1).tolist():
        rows = slice(per * group, per * (group + 1))
        assert torch.equal(state[name][rows], before[name][rows])
    assert torch.equal(state[f"{name}_scale"][today], before[f"{name}_scale"][today])
    assert (state[f"{name}_scale"].view(torch.int16) < 0).all()
    assert torch.equal(state[f"{name}_scale"].isnan(), nan)
    padded = torch.nn.functional.pad(state[name].view(torch.uint8), (0, groups * per - state[name].numel()))
    whole = {name: padded.view(state[name].dtype).view(groups, per), f"{name}_scale": state[f"{name}_scale"]}
    looked_at = ~today & ~nan
    some = {key: value[looked_at] for key, value in whole.items()}
    # Squares of the least roots are no numbers of float32.
    meant = old_values(codes, scales, form)[looked_at].float().double()
    assert_within_half_a_step(some, name, form, torch.zeros(len(meant), 64), meant)
    with said(0):
        _formats.renew([(p, state)], thorough=True)


def start(weight_format, state_format, **kwargs):
    p = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    return p, precond.AdamW([p], lr=1e-2, weight_format=weight_format, state_format=state_format, **kwargs)


def assert_has(optimizer, saved, form):
    """The states that a file of version 0.1 has."""
    p = optimizer.param_groups[0]["params"][0]
    plain = precond.to_torch_state_dict(optimizer)["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        meant = saved["decoded"][name].double()
        state = {
            name: optimizer.state[p][name][saved["rows"]],
            f"{name}_scale": optimizer.state[p][f"{name}_scale"][saved["rows"]],
        }
        assert_within_half_a_step(state, name, _formats.code_format(name, form), saved["decoded"][name], meant)
        got = _formats.values_of(state, name, _formats.code_format(name, form), saved["decoded"][name])
        assert bits_equal(plain[name][saved["rows"]], got)


@saved_files
def test_a_checkpoint_of_old_codes_has_their_values_and_trains_on(weight_format, state_format):
    saved = loaded_file(f"{weight_format}_{state_format}")
    before = copy.deepcopy(saved["optimizer"])
    p, optimizer = start(weight_format, state_format)
    with said(1):
        optimizer.load_state_dict(saved["optimizer"])
    for name, value in before["state"][0].items():
        theirs, ours = saved["optimizer"]["state"][0][name], optimizer.state[p][name]
        if not isinstance(value, torch.Tensor):
            assert ours == value
            continue
        assert bits_equal(value, theirs) if value.is_floating_point() else torch.equal(value, theirs)
        assert (ours.dtype, ours.shape) == (value.dtype, value.shape)
        if name in ("step", "remainder"):
            assert torch.equal(ours, value)
    with said(0):
        assert_has(optimizer, saved, state_format)
        # What is saved now is today's.
        q, again = start(weight_format, state_format)
        again.load_state_dict(optimizer.state_dict())
        wide, plain = start("split32", "fp32")
        plain.load_state_dict(precond.to_torch_state_dict(optimizer))
        for _ in range(3):
            g = random_values((64, 64)).bfloat16()
            for each, opt in ((p, optimizer), (q, again), (wide, plain)):
                each.grad = g.clone()
                opt.step()
    assert torch.equal(p, q)
    close = 0.1 if state_format == "int8" else 0.3
    assert (p - wide).float().square().mean().sqrt() < close * wide.float().square().mean().sqrt()


def unpickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def set_again(optimizer):
    other = type(optimizer).__new__(type(optimizer))
    other.__setstate__(optimizer.__getstate__())
    return other


@saved_files
@pytest.mark.parametrize("way", [copy.deepcopy, unpickled, set_again])
def test_an_old_optimizer_is_renewed_where_it_is_copied(weight_format, state_format, way, monkeypatch):
    """As the pickle of one that version 0.1 wrote: its __getstate__ renews nothing."""
    saved = loaded_file(f"{weight_format}_{state_format}")
    p, optimizer = start(weight_format, state_format)
    optimizer.state[p] = saved["optimizer"]["state"][0]
    monkeypatch.setattr(type(optimizer), "_prepare_to_save", lambda self: None)
    with said(1):
        copied = way(optimizer)
    monkeypatch.undo()
    with said(0):
        assert_has(copied, saved, state_format)
        copied = copy.deepcopy(copied)
        assert_has(copied, saved, state_format)


@saved_files
def test_old_states_that_are_assigned_are_renewed_by_the_next_step_or_save(weight_format, state_format):
    """As ZeroRedundancyOptimizer loads."""
    saved = loaded_file(f"{weight_format}_{state_format}")
    _, loaded = start(weight_format, state_format)
    with said(1):
        loaded.load_state_dict(saved["optimizer"])
    for first in ("save", "step", "step of a running plan"):
        q, assigned = start(weight_format, state_format)
        if first == "step of a running plan":
            q.grad = torch.zeros_like(q)
            assigned.step()
            with torch.no_grad():
                q.zero_()
        with said(1):
            assigned.state[q] = copy.deepcopy(saved["optimizer"]["state"][0])
            if first == "save":
                assigned.state_dict()
            q.grad = torch.ones_like(q)
            assigned.step()
        other, expected = start(weight_format, state_format)
        expected.load_state_dict(loaded.state_dict())
        other.grad = torch.ones_like(other)
        expected.step()
        for name, value in expected.state[other].items():
            if isinstance(value, torch.Tensor) and name != "remainder":
                assert (
                    bits_equal(value, assigned.state[q][name])
                    if value.is_floating_point()
                    else torch.equal(value, assigned.state[q][name])
                ), (first, name)


@saved_files
@pytest.mark.parametrize("asked", [None, "fp32", "bf16", "int8", "int4"])
def test_old_codes_go_to_another_format(weight_format, state_format, asked):
    saved = loaded_file(f"{weight_format}_{state_format}")
    for group in saved["optimizer"]["param_groups"]:
        del group["state_format"]
    _, optimizer = start(weight_format, asked)
    with said(1):
        optimizer.load_state_dict(saved["optimizer"])
    with said(0):
        plain = precond.to_torch_state_dict(optimizer)["state"][0]
    rough = 0.3 if "int4" in (state_format, asked) else 0.05
    for name, value in saved["decoded"].items():
        far = (plain[name][saved["rows"]] - value).abs()
        assert (far <= rough * value.abs().amax(1, keepdim=True)).all()


WRAPPERS = {
    "fop": lambda base: precond.FOP(base, 0.05, mode="diagonal", compose="gradient"),
    "gradient_regularizer": lambda base: precond.GradientRegularizer(base, rho=0.05),
    "two": lambda base: precond.FOP(precond.FOP(base, 0.05, compose="gradient"), 0.05, compose="gradient"),
}


@saved_files
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_load_old_codes(weight_format, state_format, wrapper):
    saved = loaded_file(f"{weight_format}_{state_format}")
    _, base = start(weight_format, state_format)
    optimizer = WRAPPERS[wrapper](base)
    with said(1):
        optimizer.load_state_dict(saved["optimizer"])
    with said(0):
        assert_has(base, saved, state_format)
        copied = unpickled(optimizer)
        while not isinstance(copied, precond.AdamW):
            copied = copied.base
        assert_has(copied, saved, state_format)


EVERY_CLASS = [
    # The only state of schedule-free SGD is a weight, which has no codes.
    *((row.cls, row.kwargs) for row in CLASSES if row.rule != "schedule_free_sgd"),
    (precond.Muon, {}),
    (precond.Sophia, {}),
    (precond.DualDescent, {"momentum": 0.9}),
    (precond.GaussNewton, {"clip": 0.05, "curvature": "gradient"}),
]


@pytest.mark.parametrize(("cls", "kwargs"), EVERY_CLASS, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("state_format", ["int8", "int4"])
@pytest.mark.parametrize("flat", [None, False, True])
def test_every_class_renews_old_codes_of_every_kind_of_checkpoint(cls, kwargs, state_format, flat):
    """By load_state_dict, and as torch.distributed.checkpoint loads, flat and not, in place."""
    torch.manual_seed(0)
    net = torch.nn.Linear(64, 128, bias=False)
    made = lambda: cls(net.parameters(), **{**kwargs, "state_format": state_format})  # noqa: E731
    first, second = made(), made()
    net.weight.grad = random_values((128, 64))
    first.step()
    names = [name.removesuffix("_scale") for name in first.state[net.weight] if name.endswith("_scale")]
    assert names
    meant = make_old(first.state[net.weight], names, net.weight)
    with said(1):
        if flat is None:
            first_states = torch.optim.Optimizer.state_dict(first)
            second.load_state_dict(first_states)
        else:
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            net.weight.grad = None
            fresh = get_optimizer_state_dict(net, second, options=options)
            own = second.state[net.weight]
            for name, value in first.state[net.weight].items():  # in place, as dcp.load does
                if isinstance(value, torch.Tensor):
                    own[name].copy_(value)
            set_optimizer_state_dict(net, second, fresh, options=options)
    for name, (form, values) in meant.items():
        assert_within_half_a_step(second.state[net.weight], name, form, net.weight, values)
    with said(0):
        net.weight.grad = random_values((128, 64))
        second.step()
        second.load_state_dict(second.state_dict())


def test_a_distributed_checkpoint_of_old_codes_loads(tmp_path):
    import torch.distributed.checkpoint as dcp

    with zipfile.ZipFile(FILES) as files:
        files.extractall(tmp_path)
    net = torch.nn.Linear(64, 64, bias=False)
    optimizer = precond.Lion(net.parameters(), lr=1e-3, state_format="int4")
    states = {"optimizer": get_optimizer_state_dict(net, optimizer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: a single process
        dcp.load(states, checkpoint_id=tmp_path / "distributed")
    with said(1):
        set_optimizer_state_dict(net, optimizer, states["optimizer"])
    rows = [0, 3, 5, 7, 20, 33, 50, 63]
    meant = loaded_file("distributed").double()
    state = {name: optimizer.state[net.weight][name][rows] for name in ("exp_avg", "exp_avg_scale")}
    assert_within_half_a_step(state, "exp_avg", "int4", torch.zeros(len(rows), 64), meant)
    assert optimizer.state[net.weight]["step"] == 5


@pytest.mark.parametrize("state_format", ["int8", "int4"])
def test_old_codes_of_shards_are_renewed(tmp_path, state_format):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for placement in (Shard(0), Shard(1), Replicate()):
            p = torch.nn.Parameter(DTensor.from_local(random_values((64, 128)), mesh, [placement]))
            row = BY_RULE["adamw"]
            optimizers = [row.cls([p], **row.kwargs, state_format=state_format) for _ in range(3)]
            p.grad = DTensor.from_local(random_values((64, 128)), mesh, [placement])
            optimizers[0].step()
            state = optimizers[0].state[p]
            plain = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in state.items()}
            meant = make_old(plain, ("exp_avg", "exp_avg_sq"), p)
            for name in plain:
                if isinstance(state[name], DTensor):
                    state[name].to_local().copy_(plain[name])
            with said(1):
                optimizers[1].load_state_dict(torch.optim.Optimizer.state_dict(optimizers[0]))
            with said(1):
                optimizers[2].state[p] = optimizers[0].state[p]
                optimizers[2].step()
            for name, (form, values) in meant.items():
                found = {key: t.to_local() for key, t in optimizers[1].state[p].items() if isinstance(t, DTensor)}
                assert_within_half_a_step(found, name, form, p.to_local(), values)
    finally:
        dist.destroy_process_group()


def test_states_that_are_no_codes_are_left_alone():
    """Names that end alike, other dtypes, counts that do not fit: what a step refuses it says itself."""
    p = torch.nn.Parameter(torch.zeros(64, 64))
    scale = torch.ones(64, 1, dtype=torch.bfloat16)
    codes = torch.ones(64, 64, dtype=torch.int8)
    for state in (
        {"exp_avg": torch.ones(64, 64), "exp_avg_scale": scale},
        {"exp_avg": codes, "exp_avg_scale": scale.float()},
        {"exp_avg": codes, "exp_avg_scale": scale[:32]},
        {"exp_avg_scale": scale},
        {"exp_avg": codes.t(), "exp_avg_scale": scale},
        {"exp_avg_sq": codes, "exp_avg_sq_scale": scale},
        {"exp_avg": codes.to("meta"), "exp_avg_scale": scale.to("meta")},
    ):
        before = {name: t.clone() for name, t in state.items()}
        with said(0):
            _formats.renew([(p, state), (p, None), ("name", {})], thorough=True)
        assert all(t.is_meta or torch.equal(t, before[name]) for name, t in state.items())
