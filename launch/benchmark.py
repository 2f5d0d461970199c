"""Measure layers, training steps and attention: python launch/benchmark.py --help."""

import sys

from fvae_dist.cli import benchmark_command

if __name__ == "__main__":
    sys.exit(benchmark_command())
