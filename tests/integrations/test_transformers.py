"""Hugging Face's Trainer trains a Llama of 3,000 parameters."""

from __future__ import annotations

import pytest
import torch
from support.methods import ALL

import precond

LR = 3e-3


@pytest.fixture(scope="module")
def transformers(library):
    module = library("transformers")
    module.utils.logging.set_verbosity_error()
    return module


def train(
    transformers, folder, optimizer, *, dtype=torch.float32, resume=None, cls_and_kwargs=None, callbacks=None, **options
):
    """The weights after six steps, half of them of a checkpoint where one is named."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    tokens = torch.randint(0, 32, (24, 12), generator=torch.Generator().manual_seed(1))
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=6,
        save_steps=3,
        learning_rate=LR,
        warmup_steps=2,
        weight_decay=0.1,
        per_device_train_batch_size=4,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **{"max_grad_norm": 0.5, **options},
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        eval_dataset=[{"input_ids": row, "labels": row} for row in tokens[:4]],
        optimizers=(None if optimizer is None else optimizer(model), None),
        optimizer_cls_and_kwargs=cls_and_kwargs,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_the_trainer_takes_the_class_in_the_place_of_torchs(transformers, tmp_path, options):
    """With its own groups, of parameters that decay and that do not."""
    kwargs = dict(lr=LR, eps=1e-5)
    theirs, ours = (
        train(transformers, tmp_path / cls.__module__, None, cls_and_kwargs=(cls, kwargs), **options)
        for cls in (torch.optim.AdamW, precond.AdamW)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_factory_gives_hidden_matrices_another_method(transformers, tmp_path):
    """What the Trainer makes itself is what its caller makes."""
    options = dict(
        matrices=dict(optimizer=precond.Muon, lr=0.02), rest=dict(optimizer=precond.AdamW, lr=LR), weight_decay=0.1
    )
    given = train(transformers, tmp_path / "given", lambda model: precond.Grouped.for_model(model, **options))
    made = train(
        transformers, tmp_path / "made", None, cls_and_kwargs=(lambda: precond.Grouped.for_model, options), resume=None
    )
    assert not [name for name, value in given.items() if not torch.equal(value, made[name])]


def test_gradients_are_released_with_the_trainers_accumulation(transformers, tmp_path):
    runs = []
    for released in (False, True):

        def make(model, released=released):
            optimizer = precond.AdamW(model.parameters(), lr=LR, weight_format="split24", state_format="int8")
            if released:
                precond.release_gradients(model, optimizer, accumulation_steps=3)
            return optimizer

        options = dict(gradient_accumulation_steps=3, max_grad_norm=0.0, dtype=torch.bfloat16)
        runs.append(train(transformers, tmp_path / str(released), make, **options))
    assert not [name for name, value in runs[0].items() if not torch.equal(value, runs[1][name])]


@pytest.mark.parametrize("method", [method for method in ALL if not method.closure], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(transformers, tmp_path, method):
    straight = train(transformers, tmp_path, method.make, dtype=method.dtype)
    resumed = train(transformers, tmp_path, method.make, dtype=method.dtype, resume=f"{tmp_path}/checkpoint-3")
    assert all(value.isfinite().all() for value in straight.values())
    assert not [name for name, value in straight.items() if not torch.equal(value, resumed[name])]


SCHEDULE_FREE = [
    (precond.ScheduleFreeAdamW, dict(lr=LR), torch.float32),
    (precond.ScheduleFreeSGD, dict(lr=0.1, weight_format="split24", state_format="fp32"), torch.bfloat16),
]


@pytest.mark.parametrize(("cls", "kwargs", "dtype"), SCHEDULE_FREE, ids=lambda x: getattr(x, "__name__", ""))
def test_the_trainer_evaluates_the_average_of_a_schedule_free_optimizer_and_trains_on_as_before(
    transformers, tmp_path, cls, kwargs, dtype
):
    """It calls ``eval`` and ``train``, and a checkpoint that it saves after an evaluation resumes bit for bit."""
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, optimizer=None, model=None, **_):
            optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
            groups = optimizer.param_groups
            assert not any(group["train_mode"] for group in groups)
            p = groups[0]["params"][0]
            y, z = optimizer.state[p]["y"], optimizer.state[p]["z"]
            x = y + (1 - 1 / 0.9) * (z - y.float())
            torch.testing.assert_close(p.detach().float(), x, rtol=2.0**-6, atol=1e-5)  # y without its remainder
            seen.append(state.global_step)

    def run(folder, resume=None, **options):
        return train(
            transformers,
            tmp_path / folder,
            None,
            dtype=dtype,
            resume=resume,
            cls_and_kwargs=(cls, kwargs),
            callbacks=[Watch()],
            lr_scheduler_type="constant",
            **options,
        )

    evaluated = dict(eval_strategy="steps", eval_steps=3)
    without = run("without")
    assert not seen
    straight = run("straight", **evaluated)
    assert seen == [3, 6]
    resumed = run("straight", resume=f"{tmp_path}/straight/checkpoint-3", **evaluated)
    assert not [name for name, value in straight.items() if not torch.equal(value, resumed[name])]
    # The last evaluation leaves the average; without one y is left.
    assert any(not torch.equal(value, straight[name]) for name, value in without.items())
    late = run("late", eval_strategy="steps", eval_steps=6)
    assert not [name for name, value in straight.items() if not torch.equal(value, late[name])]
