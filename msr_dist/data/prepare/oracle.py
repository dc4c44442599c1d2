"""Metrics of known probabilities: what the best possible model would reach on exactly these rows."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def best_possible(probability: Floats, label: Bools) -> dict[str, float]:
    """AUC, log loss and rows of `probability` `[N]` against `label` `[N]`; no AUC where only one class occurs."""
    if not len(label):
        return {"rows": 0}
    log_loss = -float(np.mean(np.log(np.where(label, probability, 1 - probability))))
    found = {"log_loss": log_loss, "rows": len(label)}
    return found if label.all() or not label.any() else {"auc": auc(probability, label), **found}


# Says the same as msr_dist.metrics.grouped_auc, which this package cannot use: preparing works without torch.
def auc(score: Floats, label: Bools) -> float:
    """Area under the ROC curve; equal scores count half."""
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    # The mean rank of each group of equal scores, from 1.
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    ones = int(label.sum())
    return float((ranks[label].sum() - ones * (ones + 1) / 2) / (ones * (len(label) - ones)))
