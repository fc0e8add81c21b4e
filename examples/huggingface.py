"""Hugging Face's Trainer, a Llama in bfloat16: 24-bit weights, 8-bit moments, and clipping inside the step.

python examples/huggingface.py
python examples/huggingface.py --resume examples-out/huggingface/checkpoint-60
"""

from __future__ import annotations

import argparse

import torch
from tiny import windows
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import precond

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--save-every", type=int, default=60)
parser.add_argument("--output", default="examples-out/huggingface")
parser.add_argument("--resume", help="a checkpoint, such as examples-out/huggingface/checkpoint-60")
args = parser.parse_args()

set_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
# The model itself is in bfloat16, not autocast over float32 (bf16=True): split24 keeps what its weights lack.
model = LlamaForCausalLM(config).to(torch.bfloat16)

trainer = Trainer(
    model,
    TrainingArguments(
        args.output,
        max_steps=args.steps,
        save_steps=args.save_every,
        eval_strategy="steps",
        eval_steps=args.save_every,
        eval_on_start=True,
        logging_steps=20,
        per_device_train_batch_size=8,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        weight_decay=0.1,  # the Trainer makes the groups, without decay for biases and norms
        max_grad_norm=0,  # the optimizer clips
        report_to=[],
        use_cpu=True,
    ),
    train_dataset=[{"input_ids": window, "labels": window} for window in windows(1024, 64, seed=1)],
    eval_dataset=[{"input_ids": window, "labels": window} for window in windows(32, 64, seed=0, held_out=True)],
    # The Trainer passes neither learning_rate nor betas to a class that it is given: they stand here.
    optimizer_cls_and_kwargs=(
        precond.AdamW,
        dict(lr=3e-3, betas=(0.9, 0.99), weight_format="split24", state_format="int8", max_grad_norm=1.0),
    ),
)
trainer.train(resume_from_checkpoint=args.resume)

optimizer = trainer.optimizer.optimizer  # inside of Accelerate's wrapper
states = [tensor for state in optimizer.state.values() for tensor in state.values() if isinstance(tensor, torch.Tensor)]
held = sum(tensor.nbytes for tensor in [*states, *model.parameters()]) / model.num_parameters()
print(f"weights and states: {held:.2f} bytes per parameter")
losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
print("held-out loss:", ", ".join(f"{loss:.4f} at step {step}" for step, loss in losses.items()))
