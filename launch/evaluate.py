"""Evaluate a model with an adapter: python launch/evaluate.py --help; under the deepspeed launcher on several GPUs."""

import sys

from fvae_dist.cli import evaluate_command

if __name__ == "__main__":
    sys.exit(evaluate_command())
