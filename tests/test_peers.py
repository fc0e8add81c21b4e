"""What other libraries are known to get wrong, done right on the CPU; a docstring says who does what. Stock torch comes last."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import BY_STATES, CLASSES, DROP_INS, OPTIMIZERS
from support.cases import BACKEND, guarded, random_values

import precond

classes = pytest.mark.parametrize("row", CLASSES, ids=lambda row: row.cls.__name__)
drop_ins = pytest.mark.parametrize("row", DROP_INS, ids=lambda row: row.cls.__name__)
shapes = pytest.mark.parametrize("row", BY_STATES, ids=str)


def steps(optimizer, params, gradients):
    for gs in gradients:
        for p, g in zip(params, gs, strict=True):
            p.grad_dtype = None
            p.grad = g
        optimizer.step()


@classes
def test_parameters_of_every_layout_take_the_same_steps(row):
    """DeepSpeed's CPUAdam loses updates of tensors that are not contiguous."""
    values, g = random_values((6, 8)), random_values((6, 8))
    plain = torch.nn.Parameter(values.clone())
    odd = [guarded(values, layout).tensor.requires_grad_() for layout in ("transposed", "strided", "offset")]
    for p in (plain, *odd):
        steps(row.cls([p], **row.kwargs, backend=BACKEND), [p], [[g]] * 3)
    assert not torch.equal(plain, values)
    assert all(torch.equal(p, plain) for p in odd)


@classes
def test_a_gradient_is_read_in_its_own_dtype(row):
    """DeepSpeed's CPUAdam does not check it."""
    values, g = random_values((50,)), random_values((50,)).bfloat16()
    p, q = (torch.nn.Parameter(values.clone()) for _ in range(2))
    steps(row.cls([p], **row.kwargs, backend=BACKEND), [p], [[g]] * 2)
    steps(row.cls([q], **row.kwargs, backend=BACKEND), [q], [[g.float()]] * 2)
    assert torch.equal(p, q)


@classes
def test_a_channels_last_gradient_reaches_its_own_elements(row):
    """Apex updates wrong elements."""
    values, g = random_values((2, 3, 4, 5)), random_values((2, 3, 4, 5))
    p, q = (torch.nn.Parameter(values.clone()) for _ in range(2))
    steps(row.cls([p], **row.kwargs, backend=BACKEND), [p], [[g.contiguous(memory_format=torch.channels_last)]] * 2)
    steps(row.cls([q], **row.kwargs, backend=BACKEND), [q], [[g]] * 2)
    assert torch.equal(p, q)


@classes
@pytest.mark.parametrize("position", [0, 1, 2])
def test_an_empty_tensor_keeps_nobody_from_the_step(row, position):
    """TransformerEngine skips all tensors of a group for an empty one at its end: #3207, #3202."""
    shapes = [(4,), (5,)]
    shapes.insert(position, (0,))
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    steps(row.cls(params, **row.kwargs, backend=BACKEND), params, [[torch.ones_like(p) for p in params]])
    assert all(p.numel() == 0 or not torch.equal(p, torch.ones_like(p)) for p in params)


@pytest.mark.parametrize("row", [r for r in CLASSES if r.counts_steps], ids=lambda row: row.cls.__name__)
def test_every_parameter_counts_its_own_steps(row):
    """DeepSpeed shares one counter, and counts twice for mixed dtypes: #8471."""
    params = [torch.nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float16)]
    optimizer = row.cls(params, **row.kwargs, backend=BACKEND)
    for i in range(4):
        for k, p in enumerate(params):
            p.grad = torch.ones_like(p) if i >= k else None
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [4, 3, 2]
    assert len({optimizer.state[p]["step"].data_ptr() for p in params}) == 3


@pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_coordinate_without_gradients_stays_where_it_is(row, dtype):
    """A state that was zero stays exactly zero, and so does the parameter but for a plain decay. unsloth-zoo #962: they drift."""
    p = torch.nn.Parameter(torch.ones(64, dtype=dtype))
    kwargs = row.kwargs | {"weight_decay": 0.0} | ({"l1_decay": 1e-30} if "l1_decay" in row.kwargs else {})
    optimizer = row.cls([p], **kwargs, backend=BACKEND)
    g = torch.zeros(64, dtype=dtype)
    g[::2] = 0.5
    steps(optimizer, [p], [[g]] * 20)
    assert torch.equal(p[1::2], torch.ones(32, dtype=dtype))
    group = optimizer.param_groups[0]
    rests = {optimizer._initial(p, group), group.get("eps", 0.0)}  # a maximum may have eps in it
    if "z" in optimizer.states.names(row.rule):
        rests.add(1.0)  # a weight
    for state in optimizer.states.present(p, row.rule).values():
        assert any(torch.equal(state[1::2], torch.full((32,), rest, dtype=dtype)) for rest in rests)


@classes
def test_every_backend_decays_at_the_same_place_of_the_step(row, triton_interpreter):
    """With a decay so large that the order shows. In bitsandbytes the order depends on the backend: #2010."""
    results = []
    for backend in (BACKEND, "triton", "reference"):
        p = torch.nn.Parameter(torch.linspace(-2, 2, 33))
        kwargs = row.kwargs | {"lr": 0.4, "weight_decay": 0.9}
        steps(row.cls([p], **kwargs, backend=backend), [p], [[torch.linspace(1, -1, 33)]] * 2)
        results.append(p.detach())
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-5)


@pytest.mark.large
@pytest.mark.parametrize("row", BY_STATES[:2], ids=str)
def test_elements_beyond_two_to_the_31_are_updated(row):
    """Elsewhere nothing happens, or an index overflows: DeepSpeed #7640, pytorch #137368. Takes up to 15 GB."""
    n = (1 << 31) + 4099
    places = torch.tensor([0, 1, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, n - 1])
    p = torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16))
    p.grad = torch.zeros(n, dtype=torch.bfloat16)
    p.grad[places] = 1.0
    q = torch.nn.Parameter(torch.zeros(len(places), dtype=torch.bfloat16))
    q.grad = torch.ones_like(q)
    row.cls([p], **row.kwargs).step()
    row.cls([q], **row.kwargs).step()
    assert torch.equal(p[places], q)
    assert torch.count_nonzero(p) == len(places)


# Stock torch.


@classes
def test_loading_keeps_the_dtype_of_bf16_states(row):
    """torch casts them to the parameter's: pytorch#146542, torchtitan#4615."""
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = row.cls([p], **row.kwargs, state_format="bf16")
    steps(optimizer, [p], [[torch.ones(5)]])
    again = row.cls([p], **row.kwargs)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    states = again.states.present(p, row.rule)
    assert states
    assert all(state.dtype == torch.bfloat16 for state in states.values())


@classes
@pytest.mark.parametrize("how", ["transposed", "expanded", "strided", "channels_last"])
def test_fused_steps_follow_the_strides_of_the_gradient(row, how):
    """torch's fused step updates the wrong elements."""
    values, g = random_values((2, 3, 4, 5)), random_values((2, 3, 4, 5))
    if how == "expanded":
        g = g[:1].expand(2, 3, 4, 5)
    p = torch.nn.Parameter(values.clone())
    q = torch.nn.Parameter(values.clone())
    odd = guarded(g, how).tensor if how != "expanded" else g
    steps(row.cls([p], **row.kwargs, fused=True, backend=BACKEND), [p], [[odd]] * 3)
    steps(row.cls([q], **row.kwargs, backend=BACKEND), [q], [[g.contiguous()]] * 3)
    assert torch.equal(p, q)


@classes
def test_a_parameter_takes_gradients_of_its_grad_dtype(row):
    """`p.grad_dtype = torch.float32` on a bf16 parameter, which torch offers and its optimizers refuse."""
    p = torch.nn.Parameter(torch.ones(7, dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    optimizer = row.cls([p], **row.kwargs)
    (p.float() * torch.linspace(-1, 1, 7)).sum().backward()
    p.grad = p.grad.float()
    optimizer.step()
    assert not torch.equal(p, torch.ones(7, dtype=torch.bfloat16))


@classes
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_still_takes_a_loss_scaler_into_its_step(row, how):
    """torch's copy loses the flag."""
    optimizer = row.cls([torch.nn.Parameter(torch.ones(2))], **row.kwargs, fused=True)
    assert how(optimizer)._step_supports_amp_scaling


def test_a_first_gradient_may_come_late():
    """torch's fused SGD fails."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = precond.SGD(params, lr=1.0, momentum=0.9, fused=True)
    steps(optimizer, params, [[torch.ones(2), None], [torch.ones(2), torch.ones(2)]])
    assert params[1].tolist() == [0.0, 0.0]
    assert params[0].tolist() == pytest.approx([1.0 - 1.0 - 1.9] * 2)
