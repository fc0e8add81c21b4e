"""``python -m bench COMMAND``."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "cpu": "speed of the CPU backend against torch.optim, with targets",
    "parts": "what averages, masks and statistics in the pass of a step cost on the CPU, with targets",
    "matrices": "speed of the methods with matrix products on the CPU, with targets",
    "gpu": "speed of the GPU backends against torch.optim, with targets",
    "products": "speed of Muon's products on a GPU against torch's, with targets",
    "exact": "what exact division and square root cost on a GPU",
    "codegen": "machine code of the GPU kernels, without a GPU",
    "errors": "worst errors of every rule against float64, in ulp",
    "quality": "training quality of the formats against float32, over seeds; an hour or more",
    "lost": "what rounding loses of updates over a training in bfloat16, in a picture",
    "orthogonal": "singular values and rounding of Muon's iteration, and its operations",
    "theory": "the tables of the theory, expected against measured",
    "claims": "what the papers claim, tried: searches that end at no edge, reports on other seeds; an hour",
    "scaling": "bytes and operations of each rank in a step of Muon on shards, and bytes of all it holds, on paper",
    "plans": "host time and memory of plans for the shards of models of 70 billion and a trillion parameters",
    "demo": "train a small GPT with torch's AdamW and with ours",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, add_help=len(sys.argv) < 3)
    listing = "\n".join(f"  {name:12}{what}" for name, what in COMMANDS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"commands:\n{listing}\n\npython -m bench COMMAND --help"
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    name = parser.parse_known_args()[0].command
    # Only the command's own imports: each needs other packages.
    module = importlib.import_module(f".{name}", __package__)
    command = argparse.ArgumentParser(prog=f"python -m bench {name}", description=module.__doc__)
    module.add_arguments(command)
    module.run(command.parse_args(sys.argv[2:]))


if __name__ == "__main__":
    main()
