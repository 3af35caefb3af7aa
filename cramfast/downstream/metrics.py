"""Metrics of a task, by scikit-learn and scipy, as shares (0.85, not 85)."""

import math
import warnings

import numpy as np


def measure(metric: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """One metric of predictions (N,) against labels (N,): classes, of pearson and spearman scores.

    matthews, pearson and spearman are 0 where the formula gives no number: all predictions are the same.
    """
    if len(labels) < 2 and metric in ("pearson", "spearman"):  # of which scipy says that it is an error
        return 0.0
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of constant predictions, which are nothing to warn of here
        value = float(_METRICS[metric](predictions, labels))
    return 0.0 if math.isnan(value) else value


def evaluate(metrics: tuple[str, ...], outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics by name from a classifier's outputs (N, K), K = 1 for scores."""
    predictions = outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(axis=1)
    return {metric: measure(metric, predictions, labels) for metric in metrics}


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return (predictions == labels).mean()


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score  # slow to import, and needed after training only

    return f1_score(labels, predictions, zero_division=0)


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(labels, predictions)


def _pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import pearsonr

    return pearsonr(predictions.astype(np.float64), labels.astype(np.float64)).statistic


def _spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return spearmanr(predictions, labels).statistic


_METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
