"""A linear probe: what a logistic regression can read off features, on texts that it was not fitted to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

_NO_SPREAD = 1e-6  # a feature whose standard deviation is below it is constant
_MOST_ITERATIONS = 200


def split_rows(num_rows: int, test_share: float, seed: int) -> Tensor:
    """Which rows are for the test, (num_rows,) bool: round(test_share * num_rows) of them, drawn with `seed`."""
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    is_test_N = torch.zeros(num_rows, dtype=torch.bool)
    is_test_N[order[: round(test_share * num_rows)]] = True
    return is_test_N


def probe(features_NF: Tensor, classes_N: Tensor, is_test_N: Tensor, l2: float = 1e-3) -> Tensor:
    """Fit a multinomial logistic regression to the rows that are not for the test, and try it on those that are.

    Features are standardised by the rows of the fit; the loss is the mean cross entropy + l2 / 2 |W|^2, minimised by
    L-BFGS from zero in float64, so that the result depends on nothing but the arguments. Constant features tell the
    largest class.

    Args:
        features_NF: (N, F), any floating dtype.
        classes_N: class numbers from 0, (N,).
        is_test_N: (N,) bool.
        l2: weight of the penalty, > 0; biases have none.

    Returns:
        1 where the test's class is found, else 0, (number of test rows,), float64.

    Raises:
        ValueError: nothing to fit to or to test, fewer than two classes among the rows of the fit, or features that
            are not finite.
    """
    features = features_NF.double()
    if not features.isfinite().all():
        raise ValueError("features are not finite")
    own, other = features[~is_test_N], features[is_test_N]
    classes = classes_N[~is_test_N]
    if not len(own) or not len(other) or len(classes.unique()) < 2:
        raise ValueError(f"{len(own)} rows to fit to, {len(other)} to test, {len(classes.unique())} classes: too few")
    mean, deviation = own.mean(0), own.std(0, correction=0)
    deviation = torch.where(deviation < _NO_SPREAD, torch.inf, deviation)
    own, other = (own - mean) / deviation, (other - mean) / deviation
    weight = torch.zeros(own.shape[1], int(classes_N.max()) + 1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(weight.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_MOST_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(own @ weight + bias, classes) + 0.5 * l2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[arg-type]
    with torch.no_grad():
        return ((other @ weight + bias).argmax(1) == classes_N[is_test_N]).double()
