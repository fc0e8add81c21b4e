"""What the examples train on, and the model of those that have none: seconds on a CPU, and no network."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Scikit-learn's 1797 digits of 8 x 8 pixels, 1500 of them for training.

    They are shuffled here, once: a resumed run has the batches of the uninterrupted one without a sampler's state.
    """
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(classes)[order]
    return TensorDataset(x[:1500], y[:1500]), TensorDataset(x[1500:], y[1500:])


@functools.cache
def source_code() -> Tensor:
    """The bytes of the standard library's modules."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in modules)), dtype=torch.uint8).long()


def windows(count: int, length: int, seed: int, held_out: bool = False) -> Tensor:
    """So many pieces of source code from random places: of its last tenth if ``held_out``, otherwise of the rest."""
    text = source_code()
    split = len(text) * 9 // 10
    text = text[split:] if held_out else text[:split]
    starts = torch.randint(len(text) - length, (count,), generator=torch.Generator().manual_seed(seed))
    return text[starts[:, None] + torch.arange(length)]


class ByteModel(nn.Module):
    """A small causal transformer that predicts the next byte."""

    def __init__(self, width: int = 128, layers: int = 2, context: int = 64) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, windows: Tensor) -> Tensor:
        """The mean loss of every byte but the first, given those before it."""
        x, y = windows[:, :-1], windows[:, 1:]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        hidden = self.tokens(x) + self.positions.weight[: x.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), y.flatten())
