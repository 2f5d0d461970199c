"""Evaluate a model with an adapter: python launch/evaluate.py --help; under the deepspeed launcher on several GPUs."""

from fvae_dist.cli import evaluate_command
from fvae_dist.training.leaving import leave

if __name__ == "__main__":
    leave(evaluate_command())
