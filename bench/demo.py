"""Train a small byte-level GPT on the standard library's source twice: torch's fused AdamW, then precond's.

Same seed, same batches, same model; only the optimizer differs. Prints a table and draws a PNG.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import precond


def standard_library_text(limit: int = 8 << 20) -> Tensor:
    """Up to ``limit`` bytes of Python source, in the order of the paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts or "dist-packages" in path.parts:
            continue
        text += path.read_bytes()
        if len(text) >= limit:
            break
    if len(text) < 1 << 20:
        raise RuntimeError(f"expected more than 1 MB of Python source under {root}, got {len(text)} bytes")
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder over bytes."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4, context: int = 128) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.positions.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(x)))


@dataclasses.dataclass
class Run:
    """One training run."""

    name: str
    losses: list[float]
    step_ms: list[float]
    held_out: float
    state_bytes: float
    seconds: float


def batch(text: Tensor, size: int, context: int, generator: torch.Generator, device: torch.device):
    starts = torch.randint(len(text) - context - 1, (size,), generator=generator)
    windows = text[starts[:, None] + torch.arange(context + 1)].long().to(device)
    return windows[:, :-1], windows[:, 1:]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())


def train(
    name: str,
    make,
    text: Tensor,
    steps: int,
    arguments: argparse.Namespace,
    quiet: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    held_out_batches: int = 8,
) -> Run:
    device = torch.device(arguments.device)
    torch.manual_seed(seed)
    model = GPT(arguments.width, arguments.layers, context=arguments.context).to(device, dtype)
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=max(steps, 2))
    generator = torch.Generator().manual_seed(seed + 1)
    split = len(text) * 9 // 10
    losses, step_ms = [], []
    started = time.perf_counter()
    bar = tqdm(range(steps), desc=name, disable=quiet, mininterval=0.5)
    for _ in bar:
        x, y = batch(text[:split], arguments.batch, arguments.context, generator, device)
        loss = loss_of(model, x, y)
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())  # waits for the device
        before = time.perf_counter()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        step_ms.append((time.perf_counter() - before) * 1e3)
        schedule.step()
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        held_out = statistics.mean(
            loss_of(model, *batch(text[split:], arguments.batch, arguments.context, generator, device)).item()
            for _ in range(held_out_batches if not quiet else 1)
        )
    states = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor) and t.dim() > 0]
    parameters = sum(p.numel() for p in model.parameters())
    bytes_each = sum(t.numel() * t.element_size() for t in states) / parameters
    return Run(name, losses, step_ms, held_out, bytes_each, seconds)


def draw(runs: list[Run], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = ["#9aa5b1", "#c2410c"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=[3, 2], layout="constrained")
    for run, colour, style, width in zip(runs, colours, ["-", "--"], [4.0, 1.5], strict=True):
        left.plot(run.losses, style, color=colour, linewidth=width, label=run.name)
    left.set(xlabel="step", ylabel="training loss, nats per byte", title="Same seed, same batches: the same curve")
    left.legend(frameon=False, loc="upper right")
    inset = left.inset_axes((0.42, 0.42, 0.55, 0.33))
    differences = [max(abs(a - b), 1e-9) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
    inset.semilogy(differences, color="#334155", linewidth=1)
    inset.set_title("difference of the two losses", fontsize=9)
    inset.tick_params(labelsize=8)

    steady = [run.step_ms[len(run.step_ms) // 10 :] for run in runs]
    positions = range(len(runs))
    boxes = right.boxplot(steady, positions=positions, widths=0.5, showfliers=False, patch_artist=True)
    for box, colour in zip(boxes["boxes"], colours, strict=True):
        box.set(facecolor=colour, edgecolor="#334155")
    for line in boxes["medians"]:
        line.set(color="white", linewidth=2)
    for position, values in zip(positions, steady, strict=True):
        right.annotate(
            f"{statistics.median(values):.2f} ms",
            (position, statistics.median(values)),
            xytext=(48, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    right.set_xticks(list(positions), [run.name for run in runs])
    right.set(ylabel="optimizer step, ms", title="Time of optimizer.step()", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if any"
    )
    parser.add_argument("--steps", type=int, default=400, help="steps of each run (default 400)")
    parser.add_argument("--minutes", type=float, default=3.0, help="cut the steps so that both runs fit (default 3)")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step (default 16)")
    parser.add_argument("--context", type=int, default=128, help="bytes per sequence (default 128)")
    parser.add_argument("--width", type=int, default=128, help="model width (default 128)")
    parser.add_argument("--layers", type=int, default=4, help="default 4")
    parser.add_argument("--out", type=Path, default=Path("demo-out/demo.png"), help="where to draw")


def affordable_steps(text: Tensor, make, arguments: argparse.Namespace) -> int:
    """As many steps as asked for, or as fit into the minutes twice."""
    trial = train("trial", make, text, 6, arguments, quiet=True)
    fits = int(arguments.minutes * 60 / 2 / (trial.seconds / 6) * 0.85)
    return max(2, min(arguments.steps, fits))


def run(arguments: argparse.Namespace) -> None:
    text = standard_library_text()
    common = dict(lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    makers = {
        "torch.optim.AdamW(fused=True)": lambda params: torch.optim.AdamW(params, **common, fused=True),
        "precond.AdamW": lambda params: precond.AdamW(params, **common),
    }
    steps = affordable_steps(text, makers["precond.AdamW"], arguments)
    cut = (
        ""
        if steps == arguments.steps
        else f" (cut from {arguments.steps} to stay within {arguments.minutes:g} minutes)"
    )
    print(f"{len(text) / 1e6:.1f} MB of Python source, {steps} steps per run{cut}, on {arguments.device}")
    runs = [train(name, make, text, steps, arguments) for name, make in makers.items()]

    largest = max(abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True))
    header = f"{'':32} {'final loss':>11} {'held out':>9} {'step, ms':>9} {'state bytes/param':>18} {'run, s':>7}"
    print(f"\n{header}\n{'-' * len(header)}")
    for r in runs:
        final = statistics.mean(r.losses[-10:])
        print(
            f"{r.name:32} {final:11.4f} {r.held_out:9.4f} {statistics.median(r.step_ms):9.3f} "
            f"{r.state_bytes:18.2f} {r.seconds:7.1f}"
        )
    print(f"\nlargest difference of the two loss curves: {largest:.2e}")
    parameters = sum(p.numel() for p in GPT(arguments.width, arguments.layers, context=arguments.context).parameters())
    draw(runs, arguments.out, f"Byte-level GPT, {parameters / 1e6:.2f}M parameters, {len(text) / 1e6:.1f} MB of source")
    print(f"drawn in {arguments.out}")
