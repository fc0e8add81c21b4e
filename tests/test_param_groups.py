"""Parameter groups: which parameter is decayed, which is a hidden matrix, and that torch's optimizers take the groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import precond


class RMSGain(nn.LayerNorm):
    """A norm that only its base class tells."""


class MyNorm(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(*shape))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2)
        self.ln_2 = RMSGain((3, width))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width, bias=False))
        self.scale = nn.Parameter(torch.ones(()))


class Transformer(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.blocks = nn.ModuleList([Block(8)])
        self.out = MyNorm(1, 8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


HIDDEN = [
    "blocks.0.attn.in_proj_weight",
    "blocks.0.attn.out_proj.weight",
    "blocks.0.mlp.0.weight",
    "blocks.0.mlp.2.weight",
]
UNDECAYED = [
    "blocks.0.scale", "blocks.0.ln_1.weight", "blocks.0.ln_1.bias", "blocks.0.attn.in_proj_bias", "blocks.0.attn.out_proj.bias",
    "blocks.0.ln_2.weight", "blocks.0.ln_2.bias", "blocks.0.mlp.0.bias", "out.gain",
]  # fmt: skip


def names(groups):
    return [[name for name, _ in group["params"]] for group in groups]


def options(groups):
    return [{k: v for k, v in group.items() if k != "params"} for group in groups]


def test_vectors_biases_and_norms_are_not_decayed():
    groups = precond.param_groups(Transformer(), 0.1)
    assert names(groups) == [["pos_embed", "wte.weight", *HIDDEN, "lm_head.weight"], UNDECAYED]
    assert options(groups) == [{"weight_decay": 0.1}, {"weight_decay": 0.0}]


def test_hidden_matrices_get_a_group_of_their_own():
    groups = precond.param_groups(Transformer(), 0.1, matrices=dict(lr=0.02, use_muon=True))
    assert names(groups) == [["pos_embed", "wte.weight", "lm_head.weight"], UNDECAYED, HIDDEN]
    assert options(groups)[2] == {"weight_decay": 0.1, "lr": 0.02, "use_muon": True}
    groups = precond.param_groups(Transformer(), 0.1, matrices=dict(weight_decay=0.3))
    assert options(groups) == [{"weight_decay": 0.1}, {"weight_decay": 0.0}, {"weight_decay": 0.3}]
    assert options(precond.param_groups(Transformer(), matrices={})) == [{}, {"weight_decay": 0.0}, {}]


def test_a_head_tied_to_an_embedding_is_an_embedding_and_appears_once():
    groups = precond.param_groups(Transformer(tied=True), 0.1, matrices={})
    assert names(groups) == [["pos_embed", "wte.weight"], UNDECAYED, HIDDEN]


def test_a_tied_parameter_is_exempt_if_any_of_its_places_is():
    model = Transformer(tied=True)
    assert names(precond.param_groups(model, 0.1, ["norm", "LM_Head"]))[0] == ["pos_embed", *HIDDEN]


@pytest.mark.parametrize(
    ("head", "taken"),
    [(None, "2.weight"), ("1", "1.weight"), ("1.weight", "1.weight"), ("", None)],
)
def test_the_head_is_the_last_matrix_or_the_one_that_is_named(head, taken):
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    groups = precond.param_groups(model, matrices={}, head=head)
    assert names(groups)[:-1] == ([[taken]] if taken else [])
    assert names(groups)[-1] == [f"{i}.weight" for i in range(3) if f"{i}.weight" != taken]


def test_a_frozen_head_is_still_the_head():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].requires_grad_(False)
    assert names(precond.param_groups(model, matrices={})) == [["0.weight"]]
    assert precond.param_groups(model.requires_grad_(False)) == []


def test_convolutions_are_matrices_and_batch_norms_are_not_decayed():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, bias=False), nn.Flatten(), nn.Linear(4, 2)
    )
    groups = precond.param_groups(model, 0.1, matrices={})
    assert names(groups) == [["4.weight"], ["0.bias", "1.weight", "1.bias", "4.bias"], ["0.weight", "2.weight"]]


def test_words_are_looked_for_in_the_last_two_parts_of_a_name_and_in_classes():
    model = nn.ModuleDict({
        "norm1": nn.ModuleDict({"linear": nn.Linear(2, 2)}),  # the projection of an adaptive norm
        "rel": nn.ParameterDict({"position_bias": nn.Parameter(torch.ones(2, 2))}),
        "norm2": nn.Linear(2, 2),
        "relative": nn.Bilinear(2, 2, 2),
    })  # fmt: skip
    decayed = names(precond.param_groups(model, 0.1))[0]
    assert decayed == ["norm1.linear.weight", "relative.weight"]
    decayed = names(precond.param_groups(model, 0.1, ["bilinear", "linear.weight"]))[0]
    assert decayed == ["rel.position_bias", "norm2.weight"]


@pytest.mark.parametrize("cls", [precond.AdamW, torch.optim.AdamW])
def test_optimizers_take_the_groups_and_checkpoints_keep_the_names(cls):
    def make():
        torch.manual_seed(0)
        model = Transformer(tied=True)
        groups = precond.param_groups(model, 0.1, matrices=dict(lr=0.02))
        return model, names(groups), cls(groups, lr=1e-3, weight_decay=0.5)

    model, expected, optimizer = make()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    assert [group["param_names"] for group in saved["param_groups"]] == expected
    settings = [(group["lr"], group["weight_decay"]) for group in saved["param_groups"]]
    assert settings == [(1e-3, 0.1), (1e-3, 0.0), (0.02, 0.1)]
    _, _, other = make()
    other.load_state_dict(saved)
    assert [group["param_names"] for group in other.param_groups] == expected
    assert all(len(other.state[p]) == 3 for group in other.param_groups for p in group["params"])


def test_the_optimizer_keeps_its_own_decay_where_none_is_given():
    optimizer = precond.AdamW(precond.param_groups(Transformer()), weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_named_parameters_do_without_a_module():
    named = Transformer().named_parameters()
    # No class tells that out.gain and ln_2.weight, of two dimensions, belong to norms; a word does.
    groups = precond.param_groups(named, 0.1, ("bias", "ln_", "out."))
    assert names(groups)[1] == UNDECAYED
    twice = nn.Parameter(torch.ones(2, 2))
    assert names(precond.param_groups([("a", twice), ("b", twice)])) == [["a"]]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(weight_decay=-0.1), ValueError, r"weight_decay value: -0.1 \(weight_decay must be >= 0\)"),
        (dict(no_decay="bias"), TypeError, r"no_decay must be several words, such as \('bias',\), got the string 'bias'"),
        (dict(no_decay=("bias", "")), ValueError, r"no_decay must be words that are not empty, got \('bias', ''\)"),
        (dict(matrices=dict(params=[])), ValueError, "matrices must be options of a group without 'params'"),
        (dict(matrices={}, head="lm"), ValueError, "head must be the name of a module or parameter .* got 'lm'"),
        (dict(model=[nn.Parameter(torch.ones(1))]), TypeError, "pairs of name and parameter, got an item of .*Parameter"),
        (dict(model=[("a", nn.Parameter(torch.ones(1)))], matrices={}), TypeError, "names do not tell embeddings, got .*list"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(kwargs, error, message):
    with pytest.raises(error, match=message):
        precond.param_groups(**{"model": Transformer(), **kwargs})


@pytest.mark.parametrize("normalise", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_gains_of_weight_normalisation_are_neither_decayed_nor_matrices(normalise, named):
    """They have as many dimensions as their directions, but are of size 1 in all but one."""
    layers = [nn.Linear(4, 6), nn.Conv2d(3, 4, 3), nn.Linear(4, 1), nn.Linear(1, 4)]
    model = nn.Sequential(*(normalise(layer) for layer in layers), nn.Linear(6, 1, bias=False), nn.Linear(1, 6))
    for groups in [precond.param_groups(model.named_parameters() if named else model, 0.1)] + (
        [] if named else [precond.param_groups(model, 0.1, matrices={}, head="")]
    ):
        gains = {name for name, _ in model.named_parameters() if name.endswith(("_g", "original0"))}
        directions = {name for name, _ in model.named_parameters() if name.endswith(("_v", "original1"))}
        assert len(gains) == len(directions) == 4
        undecayed = next(names([group])[0] for group in groups if group["weight_decay"] == 0.0)
        decayed = {name for group in groups if group["weight_decay"] for name, _ in group["params"]}
        assert gains <= set(undecayed)
        assert decayed == directions | {"4.weight", "5.weight"}
