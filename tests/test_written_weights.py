"""Weights that somebody else writes between steps: what they lack of their masters stays where the write left them alone."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from families import CLASSES
from support.cases import BACKEND, bits_equal

import precond

BF16, F16 = torch.bfloat16, torch.float16
SPLIT = ("split24", "split32")
formats = pytest.mark.parametrize("weight_format", SPLIT)
#: Classes with arguments, those of the methods of several passes too.
EVERY_CLASS = [
    *((row.cls, row.kwargs) for row in CLASSES),
    *((cls, {}) for cls in (precond.Muon, precond.SOAP, precond.DualDescent, precond.Sophia)),
    (precond.GaussNewton, {"clip": 0.05}),
]
every_class = pytest.mark.parametrize(("cls", "kwargs"), EVERY_CLASS, ids=lambda x: getattr(x, "__name__", ""))


def started(weight_format, cls=precond.AdamW, dtype=BF16, steps=3, shape=(64, 64), **kwargs):
    """A layer and its optimizer after some steps: every remainder is something."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    optimizer = cls(layer.parameters(), **kwargs | {"lr": 1e-3}, backend=BACKEND, weight_format=weight_format)
    step(layer, optimizer, steps)
    return layer, optimizer


def step(layer, optimizer, steps=1):
    for i in range(steps):
        generator = torch.Generator().manual_seed(i)
        layer.weight.grad = torch.randn(layer.weight.shape, generator=generator).to(layer.weight.dtype)
        optimizer.step()


def master(layer, optimizer):
    return precond.master_weights(optimizer, layer)["weight"]


def touch(layer):
    """A write that changes nothing: what a clamp does that never cuts."""
    with torch.no_grad():
        layer.weight.mul_(1.0)


def watched(layer, optimizer):
    """From its first foreign write on a weight's elements are told from each other."""
    touch(layer)
    step(layer, optimizer)
    return layer, optimizer


@every_class
@formats
def test_an_element_keeps_its_remainder_unless_its_bits_change(cls, kwargs, weight_format):
    layer, optimizer = watched(*started(weight_format, cls, **kwargs))
    before, bits = master(layer, optimizer), layer.weight.detach().clone()
    assert (before != bits.float()).float().mean() > 0.5
    with torch.no_grad():
        layer.weight.clamp_(-0.05, 0.05)
    changed = layer.weight != bits
    assert 0.1 < changed.float().mean() < 0.9
    after = master(layer, optimizer)
    assert bits_equal(after[~changed], before[~changed])
    assert bits_equal(after[changed], layer.weight.detach()[changed].float())
    if "z" in optimizer.state[layer.weight]:
        return  # a step at lr 0 moves the weight towards z all the same
    # A step goes on from there.
    optimizer.param_groups[0]["lr"] = 0.0
    step(layer, optimizer)
    assert bits_equal(master(layer, optimizer), after) or weight_format == "split24"
    torch.testing.assert_close(master(layer, optimizer), after, rtol=2**-14, atol=0.0)


@formats
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_the_first_write_leaves_exactly_what_was_written(weight_format, dtype):
    layer, optimizer = started(weight_format, dtype=dtype)
    with torch.no_grad():
        layer.weight[:32].fill_(2.0)
    assert bits_equal(master(layer, optimizer), layer.weight.detach().float())


@formats
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_weight_that_is_swapped_out_and_in_again_keeps_everything(weight_format, dtype):
    """Averages of weights are evaluated that way. Signed zeros and NaN are bits like others."""
    layer, optimizer = started(weight_format, dtype=dtype)
    with torch.no_grad():
        layer.weight[0, :3] = torch.tensor([0.0, -0.0, float("nan")])
    watched(layer, optimizer)
    before, own = optimizer.state[layer.weight]["remainder"].clone(), layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(64, 64))
        layer.weight.copy_(own)
    optimizer.state_dict()
    assert torch.equal(optimizer.state[layer.weight]["remainder"], before)
    with torch.no_grad():
        layer.weight.neg_()  # a zero that changes its sign was written
    optimizer.state_dict()
    assert not optimizer.state[layer.weight]["remainder"].any()


def clamped(w, i):
    w.clamp_(-0.5, 2.5)


def cut_in_part(w, i):
    w[::2].clamp_(max=2.4)


def swapped(w, i):
    own = w.clone()
    w.fill_(1.0)
    w.copy_(own)


def normalised(w, i):
    w.mul_((w.norm(dim=1, keepdim=True) / 21.0).reciprocal().clamp(max=1.0))


def written_at_times(w, i):
    if i % 100 == 50:
        w[0].fill_(2.0)


WRITES = [clamped, cut_in_part, swapped, normalised, written_at_times]


def trained(write, dtype, weight_format, cls=precond.AdamW, **kwargs):
    w = torch.nn.Parameter(torch.full((64, 64), 2.6592, dtype=dtype))
    kwargs = {"weight_decay": 0.0, "lr": 1e-3, "state_format": "fp32", **kwargs}
    optimizer = cls([w], weight_format=weight_format, backend=BACKEND, **kwargs)
    for i in range(300):
        w.grad = torch.ones_like(w)
        optimizer.step()
        with torch.no_grad():
            write(w, i)
    return w.detach().float()


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("weight_format", [*SPLIT, "stochastic"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_training_goes_on_as_in_float32_whatever_is_written(write, weight_format, dtype):
    """Steps of 1e-3 are a sixteenth of the distance of two bfloat16 numbers there."""
    expected, found = trained(write, torch.float32, None), trained(write, dtype, weight_format)
    tolerance = 0.06 if weight_format == "stochastic" else 0.02  # a random walk of 300 steps, over 64 elements
    assert (found.mean(1) - expected.mean(1)).abs().max() < tolerance
    assert (expected - 2.6592).abs().min() > 0.1


def test_an_embedding_with_a_largest_norm_trains_as_in_float32():
    """It writes the rows that it looks up, in forward."""

    def run(dtype, weight_format):
        torch.manual_seed(0)
        layer = torch.nn.Embedding(8, 64, max_norm=6.0)
        layer = layer.to(dtype)
        optimizer = precond.AdamW(
            layer.parameters(), lr=1e-3, weight_decay=0.0, state_format="fp32", weight_format=weight_format
        )
        target = torch.linspace(-1, 1, 64)
        for _ in range(300):
            optimizer.zero_grad()
            (layer(torch.arange(8)).float() - target).square().sum().backward()
            optimizer.step()
        return layer.weight.detach().float()

    expected = run(torch.float32, None)
    for weight_format in SPLIT:
        assert (run(BF16, weight_format) - expected).abs().mean() < 0.01


@formats
def test_several_writes_skipped_steps_and_looks_between_steps_change_nothing_more(weight_format):
    layer, optimizer = watched(*started(weight_format, fused=True))
    before, bits = master(layer, optimizer), layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight[0].fill_(3.0)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(2.0)
    optimizer.step()  # skipped
    master(layer, optimizer)
    with torch.no_grad():
        layer.weight[1].fill_(4.0)
    optimizer.step()  # skipped
    optimizer.state_dict()
    with torch.no_grad():
        layer.weight[0].copy_(bits[0])
    after = master(layer, optimizer)
    assert bits_equal(after[2:], before[2:])
    assert bits_equal(after[:2], layer.weight.detach()[:2].float())


@formats
def test_a_weight_without_a_gradient_is_not_taken_for_one_that_a_step_wrote(weight_format):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(64, 64, dtype=BF16)) for _ in range(2)]
    model = torch.nn.ParameterList(params)
    optimizer = precond.AdamW(params, lr=1e-3, weight_format=weight_format, backend=BACKEND)
    for i in range(6):
        for p in params:
            p.grad = torch.randn_like(p)
        if i > 3:
            params[1].grad = None
            with torch.no_grad():
                params[1].fill_(2.0 + i)
        optimizer.step()
    assert (precond.master_weights(optimizer, model)["1"] == 7.0).all()


def copies(layer, optimizer):
    file = io.BytesIO()
    torch.save((layer.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, states = torch.load(file, weights_only=True)
    other = torch.nn.Linear(64, 64, bias=False, dtype=BF16)
    resumed = type(optimizer)(other.parameters(), lr=1e-3, weight_format="split32", backend=BACKEND)
    resumed.load_state_dict(states)
    other.load_state_dict(weights)  # in either order
    yield other, resumed
    yield copy.deepcopy((layer, optimizer))
    yield pickle.loads(pickle.dumps((layer, optimizer)))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    yield layer, optimizer


def test_a_copy_has_what_was_written_and_goes_on_as_the_original():
    def start():
        layer, optimizer = watched(*started("split32"))
        with torch.no_grad():
            layer.weight[0].fill_(2.0)  # not noticed before the next step
        return layer, optimizer

    layer, optimizer = start()
    expected = master(layer, optimizer)
    step(layer, optimizer, 2)
    touch(layer)
    later = master(layer, optimizer)
    for kind, (other, resumed) in zip(("save", "deepcopy", "pickle", "load"), copies(*start()), strict=True):
        assert bits_equal(master(other, resumed), expected), kind
        step(other, resumed, 2)
        assert bits_equal(master(other, resumed), later), kind
        touch(other)
        # A new process does not know that others write the weight: its first write counts as one of all elements.
        assert bits_equal(master(other, resumed), other.weight.detach().float() if kind == "save" else later), kind


def stored_bytes(optimizer):
    noted = optimizer.states.remainders._noted.values()
    return sum(entry.stored.nbytes for entry in noted if entry.stored is not None)


@formats
def test_only_weights_that_somebody_writes_cost_memory(weight_format):
    layer, optimizer = started(weight_format)
    assert stored_bytes(optimizer) == 0
    step(*watched(layer, optimizer))
    assert stored_bytes(optimizer) == layer.weight.nbytes


@formats
def test_a_weight_that_is_dropped_is_not_kept_alive(weight_format):
    layer, optimizer = watched(*started(weight_format))
    weight = weakref.ref(layer.weight)
    optimizer.state.pop(layer.weight)
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    optimizer.param_groups[0]["params"][:] = [layer.weight]
    gc.collect()
    assert weight() is None
    step(layer, optimizer)
    assert optimizer.states.remainders._noted.keys() == {id(layer.weight)}


@formats
def test_a_weight_that_leaves_its_format_and_comes_back_starts_anew(weight_format):
    layer, optimizer = watched(*started(weight_format))
    for form in (None, weight_format):
        optimizer.param_groups[0]["weight_format"] = form
        step(layer, optimizer, 2)
    assert optimizer.state[layer.weight]["remainder"].any()
    step(layer, optimizer)


@formats
def test_a_regularizer_that_moves_weights_and_puts_them_back_changes_nothing(weight_format):
    layer, base = watched(*started(weight_format))
    optimizer = precond.GradientRegularizer(base)
    before, bits = master(layer, base), layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight[0].fill_(2.0)
    base.param_groups[0]["lr"] = 0.0

    def closure():
        optimizer.zero_grad()
        loss = layer.weight.float().square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    after = master(layer, base)
    torch.testing.assert_close(after[1:], before[1:], rtol=2**-14, atol=0.0)
    assert (after[1:] != bits[1:].float()).float().mean() > 0.5
    assert (after[0] == 2.0).all()
