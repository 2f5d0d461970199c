"""Task suites, worst-group metrics and their reports; `evaluate.py` is what `fvae-dist evaluate` does."""
