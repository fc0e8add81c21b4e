"""Masks that ride along in the pass of the step, and factors on updates that need a pass before: ``cautious``,
``cautious_rescale`` and ``max_update_rms`` of a group.
"""

from __future__ import annotations

import pytest
import torch
from families import BY_RULE, BY_STATES, CLASSES, OPTIMIZERS
from support.cases import BACKEND, bits_equal, nasty_values, random_values

import precond
from precond import reference
from precond._core import formats as _formats

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
pytestmark = [
    pytest.mark.usefixtures("_codes_for_small_tensors"),
    pytest.mark.filterwarnings("ignore::precond.PrecisionWarning", "ignore:.*encountered in.*:RuntimeWarning"),
]
FORMATS = [(F32, None, None), (F32, None, "int8"), (BF16, "split24", "int8"), (F16, "stochastic", "bf16")]
in_formats = pytest.mark.parametrize("formats", FORMATS, ids=lambda f: "-".join(map(str, f)).replace("torch.", ""))
#: Schedule-free has no mask.
ROWS = [row for row in CLASSES if not row.rule.startswith("schedule_free")]
DECOUPLED = [row for row in ROWS if row.peer in (None, torch.optim.AdamW)]
#: Every class with each mask that it has.
MASKED = [(row, mask) for row in ROWS for mask in ("update", "decay", "both") if mask == "update" or row in DECOUPLED]


@pytest.fixture
def _codes_for_small_tensors(monkeypatch):
    monkeypatch.setattr(_formats.layout, "SMALLEST_CODED", 1)


def run(row, formats=FORMATS[0], backend=BACKEND, steps=4, values=random_values, shapes=((3,), (40, 64)), **options):
    """Parameters and states after some steps, and the last gradients."""
    dtype, weight_format, state_format = formats
    torch.manual_seed(0)
    params = [values((torch.Size(shape).numel(),)).view(shape).to(dtype).requires_grad_() for shape in shapes]
    group = {"params": params, "weight_format": weight_format, "state_format": state_format}
    optimizer = row.cls([group], **{**row.kwargs, **options}, backend=backend)
    for step in range(max(steps, row.steps)):
        torch.manual_seed(1 + step)
        for p in params:
            p.grad = values((p.numel(),)).view(p.shape).to(dtype)
        optimizer.step()
    found = {(i, "p"): p.detach() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        found |= {(i, k): v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not bits_equal(a[key], b[key])] == []


def snapshots(row, **options):
    """A step in float64: what it began with, its gradient as the rule has it, its hyper-parameters, and what it made."""
    torch.manual_seed(2)
    p = torch.randn(500, dtype=torch.float64, requires_grad=True)
    optimizer = row.cls([p], **{**row.kwargs, **options})
    for step in range(1, 5):
        before = p.detach().clone(), [t.clone() for t in optimizer.states.present(p, row.rule).values()]
        p.grad = torch.randn(500, dtype=torch.float64)
        optimizer.step()
        _, sign, hyper = optimizer._row(optimizer.param_groups[0])
        numbers = {name: float(optimizer.state[p][name]) for name in optimizer.states.scalars(row.rule)}
        if before[1] or step == 1:
            yield before, sign * p.grad, {**hyper, **numbers}, step, p.detach()


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_mask_on_the_update_is_that_of_the_paper(row):
    """Where u g > 0 the step is the rule's own; elsewhere only the decay is left, the step with u = 0."""
    for (p, states), g, hyper, step, found in snapshots(row, cautious="update", weight_decay=0.1):
        states = states or [torch.full_like(p, row.cls._initial(p, {"initial_accumulator_value": 0.0}))] * len(
            reference.RULES[row.rule].states
        )
        made, _ = reference.RULES[row.rule].formula(p, g, tuple(states), hyper, step, step == 1)
        keeps = made.taken * reference.decays.decayed_gradient(p, g, hyper, reference.RULES[row.rule].decay) > 0
        assert 0 < keeps.sum() <= len(keeps)
        stepped = reference.decays.stepped
        expected = torch.where(
            keeps,
            stepped(p, made, hyper, reference.RULES[row.rule].decay),
            stepped(p, made._replace(taken=torch.zeros_like(p)), hyper, reference.RULES[row.rule].decay),
        )
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("row", DECOUPLED, ids=str)
def test_the_decay_is_left_out_where_the_update_goes_the_other_way(row):
    for (p, states), g, hyper, step, found in snapshots(row, cautious="decay", weight_decay=0.1):
        if not states and reference.RULES[row.rule].states:
            continue
        made, _ = reference.RULES[row.rule].formula(p, g, tuple(states), hyper, step, step == 1)
        decayed = reference.decays.stepped(p, made, hyper, reference.RULES[row.rule].decay)
        keeps = made.taken * p >= 0
        assert 0 < keeps.sum() < len(keeps)
        torch.testing.assert_close(found, torch.where(keeps, decayed, p - made.taken), rtol=1e-14, atol=0)


def made_in(row, p, states, g, hyper, step):
    """The step of the rule alone, in float64, and its decay."""
    states = states or [torch.full_like(p, row.cls._initial(p, {"initial_accumulator_value": 0.0}))] * len(
        reference.RULES[row.rule].states
    )
    made, _ = reference.RULES[row.rule].formula(p, g, tuple(states), hyper, step, step == 1)
    return made, reference.RULES[row.rule].decay


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_rescaled_mask_is_that_of_the_paper(row):
    """Algorithm 1: what is left is divided by the mean of the mask."""
    for (p, states), g, hyper, step, found in snapshots(
        row, cautious="update", cautious_rescale=True, weight_decay=0.1
    ):
        made, decay = made_in(row, p, states, g, hyper, step)
        mask = (made.taken * reference.decays.decayed_gradient(p, g, hyper, decay) > 0).double()
        update = made.taken * mask / mask.mean()
        expected = reference.decays.stepped(p, made._replace(taken=update), hyper, decay)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # the factor is a float32


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_an_update_is_limited_as_adafactors(row, limit):
    """To u / max(1, rms(u) / d), with u over lr and without decay."""
    for (p, states), g, hyper, step, found in snapshots(row, max_update_rms=limit, weight_decay=0.1):
        made, decay = made_in(row, p, states, g, hyper, step)
        u = made.taken / hyper["lr"]
        update = made.taken / max(1.0, u.square().mean().sqrt().item() / limit)
        expected = reference.decays.stepped(p, made._replace(taken=update), hyper, decay)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


SCALED = [
    dict(cautious="update", cautious_rescale=True),
    dict(max_update_rms=0.3),
    dict(cautious="both", cautious_rescale=True, ema_decay=0.5, max_update_rms=0.3),
]


@in_formats
@pytest.mark.parametrize("options", SCALED, ids=["rescale", "limit", "all"])
@pytest.mark.parametrize("row", [BY_RULE["adamw"], BY_RULE["adamw_l1"], BY_RULE["lion"]], ids=str)
def test_factors_agree_bit_for_bit(row, options, formats, triton_interpreter):
    assert_same(run(row, formats, **options), run(row, formats, "triton", **options))


@pytest.mark.parametrize("options", SCALED, ids=["rescale", "limit", "all"])
@pytest.mark.parametrize("row", DECOUPLED, ids=str)
def test_kernels_have_the_factors_of_the_reference(row, options):
    found, expected = (run(row, backend=backend, steps=1, **options) for backend in (BACKEND, "reference"))
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


@in_formats
@pytest.mark.parametrize("row", BY_STATES, ids=str)
def test_a_limit_that_is_not_reached_changes_no_bit(row, formats):
    """Neither of parameters nor of states and counters: the first pass writes nothing."""
    assert_same(run(row, formats), run(row, formats, max_update_rms=1e30))


def test_a_limit_is_kept_whatever_is_done_with_gradients():
    """Groups differ; a norm clips them; what a step of the other group does is its own."""
    torch.manual_seed(0)
    a, b = (torch.randn(5000, requires_grad=True) for _ in range(2))
    groups = [{"params": [a], "max_update_rms": 0.2}, {"params": [b]}]
    optimizer = precond.AdamW(groups, lr=0.1, weight_decay=0.0, statistics=True, max_grad_norm=1.0, fused=True)
    plain = precond.AdamW([c := b.detach().clone().requires_grad_()], lr=0.1, weight_decay=0.0)
    for step in range(1, 4):
        a.grad, b.grad = torch.randn(5000), torch.randn(5000)
        optimizer.step()
        assert optimizer.statistics.values[0, 2].item() == pytest.approx(0.02, rel=1e-5)
        assert optimizer.statistics.values[1, 2].item() > 0.03
        assert optimizer.state[a]["step"] == step
        c.grad = b.grad * optimizer.clip_coef
        plain.step()
    torch.testing.assert_close(b, c)


def test_a_step_that_is_skipped_is_counted_once():
    p = torch.ones(10, requires_grad=True)
    options = dict(max_update_rms=0.5, max_grad_norm=1.0, nonfinite="skip", fused=True)
    optimizer = precond.AdamW([p], **options, backend=BACKEND)
    for bad in (False, True, True, False):
        p.grad = torch.full((10,), float("nan") if bad else 1.0)
        optimizer.step()
    assert optimizer.skipped_steps == 2
    assert optimizer.state[p]["step"] == 2
    assert p.isfinite().all()


@pytest.mark.parametrize(("row", "mask"), MASKED, ids=str)
def test_the_kernels_do_what_the_reference_does(row, mask):
    """In float32. A direction so near 0 that its sign is rounding moves nothing that could be seen, but for Lion's."""
    found, expected = (run(row, backend=backend, cautious=mask) for backend in (BACKEND, "reference"))
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


@in_formats
@pytest.mark.parametrize("row", BY_STATES, ids=str)
@pytest.mark.parametrize(
    "options", [dict(cautious="update"), dict(cautious="update", ema_decay=0.5, ema_format="bf16")]
)
def test_backends_agree_bit_for_bit(row, formats, options, triton_interpreter):
    assert_same(run(row, formats, **options), run(row, formats, "triton", **options))


@pytest.mark.parametrize("row", [BY_RULE[name] for name in ("adamw", "adamw_l1", "lion", "sgdw_momentum")], ids=str)
def test_both_masks_agree_bit_for_bit_also_on_nans_and_infinities(row, triton_interpreter):
    options = dict(cautious="both", values=lambda shape: nasty_values(shape[0]))
    assert_same(run(row, **options), run(row, backend="triton", **options))


@pytest.mark.parametrize("row", [row for row in OPTIMIZERS if row.cls in (precond.AdamW, precond.Adam)], ids=str)
def test_masks_that_hide_nothing_change_no_bit(row):
    """On gradients that always have one sign, with weights of the same."""

    def positive(n):
        return random_values(n).abs() + 0.1

    sign = {"maximize": False}
    masked = "update" if row.cls is precond.Adam else "both"
    options = dict(values=positive, weight_decay=0.0, lr=1e-4, **sign)
    assert_same(run(row, **options), run(row, cautious=masked, **options))


@pytest.mark.parametrize("mask", ["update", "decay", "both"])
def test_a_nan_gradient_gives_a_nan_parameter(mask):
    p = torch.ones(2, requires_grad=True)
    optimizer = precond.AdamW([p], cautious=mask, backend=BACKEND)
    p.grad = torch.tensor([float("nan"), 1.0])
    optimizer.step()
    assert p.isnan().tolist() == [True, False]


def test_states_of_a_masked_rule_are_those_of_the_rule():
    """The mask is on the step alone, and a checkpoint goes both ways."""
    p = torch.ones(8, requires_grad=True)
    masked = precond.AdamW([p], cautious="both", backend=BACKEND)
    p.grad = torch.linspace(-1, 1, 8)
    masked.step()
    assert masked.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
    torch.optim.AdamW([p.detach().clone().requires_grad_()]).load_state_dict(precond.to_torch_state_dict(masked))
    assert masked.param_groups[0]["cautious"] == "both"
    assert "cautious" not in precond.to_torch_state_dict(masked)["param_groups"][0]


def test_groups_differ_and_change_between_steps():
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    optimizer = precond.SGD(
        [
            {"params": [a], "cautious": "update"},
            {"params": [b]},
            {"params": [c], "cautious": "update", "ema_decay": 0.5},
        ],
        lr=1.0,
        momentum=0.9,
        backend=BACKEND,
    )
    for g in (torch.ones(2), torch.tensor([-0.5, 1.0])):
        for p in (a, b, c):
            p.grad = g
        optimizer.step()
    assert a.tolist() == c.tolist() == [0.0, pytest.approx(-1.9)]
    assert b.tolist() == [pytest.approx(-0.4), pytest.approx(-1.9)]
    optimizer.param_groups[0]["cautious"] = None
    for p in (a, b, c):
        p.grad = torch.tensor([-0.1, -0.1])
    optimizer.step()
    assert a[0].item() == pytest.approx(0.0 - (0.9 * 0.4 - 0.1))


@pytest.mark.parametrize(
    ("cls", "value", "message"),
    [
        (precond.AdamW, "updates", "cautious must be None, 'update', 'decay' or 'both', got 'updates'"),
        (precond.AdamW, True, "cautious must be None, .* got True"),
        (precond.Adam, "decay", "cautious must be None or 'update' for Adam, whose decay is part of the gradient"),
        (precond.SGD, "both", "cautious must be None or 'update' for SGD"),
    ],
)
def test_errors_say_what_is_expected(cls, value, message):
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        cls([p], cautious=value)
    with pytest.raises(ValueError, match=message):
        cls([{"params": [p], "cautious": value}])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(max_update_rms=0), ValueError, "max_update_rms must be None or a number > 0, got 0"),
        (dict(max_update_rms="1"), ValueError, "max_update_rms must be None or a number > 0, got '1'"),
        (dict(cautious_rescale=1), ValueError, "cautious_rescale must be False or True, got 1"),
        (dict(cautious_rescale=True), ValueError, "cautious_rescale=True needs cautious='update' or 'both', got None"),
        (
            dict(max_update_rms=1.0, differentiable=True),
            RuntimeError,
            "max_update_rms must be None with differentiable",
        ),
        (dict(max_update_rms=1.0, cls=precond.Muon), RuntimeError, r"max_update_rms must be None .*, got 1.0"),
        (dict(max_update_rms=1.0, cls=precond.ScheduleFreeAdamW), ValueError, "max_update_rms must be None for Sch"),
    ],
)
def test_errors_of_factors(options, error, message):
    cls = options.pop("cls", precond.AdamW)
    with pytest.raises(error, match=message):
        cls([torch.ones(2, 2, requires_grad=True)], **options)
