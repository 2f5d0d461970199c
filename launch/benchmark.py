"""Measure layers, training steps and attention: python launch/benchmark.py --help."""

from fvae_dist.cli import benchmark_command
from fvae_dist.training.leaving import leave

if __name__ == "__main__":
    leave(benchmark_command())
