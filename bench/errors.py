"""Worst errors of every rule against float64, in fp32 ulp of the operands, over seeds and mixes of dtypes.

Fails where one is beyond its tolerance in tests/optimizers.py. Steep rules are held to what operands a few ulp away give.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from optimizers import ALL_RULES
from test_parity import DTYPES
from test_parity import run as worst_error
from tqdm import tqdm

import precond


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=10, help="default 10")


def run(arguments: argparse.Namespace) -> None:
    warnings.simplefilter("ignore", precond.PrecisionWarning)
    print("| rule | worst error of p and states, ulp | |\n|---|---|---|")
    for row in tqdm(ALL_RULES, desc="rules", leave=False):
        worst = 0.0
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            for dtypes in DTYPES:
                worst = max(worst, worst_error(row, [(5,), (70_001,), (33, 65)], *dtypes))
        print(f"| {row.rule} | {worst:.2f} | {'steep' if row.steep else ''} |")
