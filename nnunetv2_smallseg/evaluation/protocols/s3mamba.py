"""S³-Mamba (Wang et al., AAAI 2025): pooled foreground metrics of small, medium and large lesions.

No official code. The published pairs of IoU and DSC are those of one pooled confusion matrix. All foreground labels
count as lesion. The groups are those of the evaluated cases; the paper groups each whole data set before it takes 30 %
of each group as its test set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nnunetv2_smallseg.evaluation.size_groups import SHARES, share_groups

__all__ = ["evaluate_case", "pooled_metrics", "summarise"]

COUNTS = ("true_positive", "false_positive", "false_negative", "true_negative")


def evaluate_case(reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> dict[str, int]:
    """The four counts of the foreground of a case; ``spacing`` is not used."""
    reference, prediction = reference > 0, prediction > 0
    both = int((reference & prediction).sum())
    only_predicted, missed = int(prediction.sum()) - both, int(reference.sum()) - both
    return dict(
        zip(COUNTS, (both, only_predicted, missed, reference.size - both - only_predicted - missed), strict=True)
    )


def pooled_metrics(cases: Sequence[dict[str, int]]) -> dict[str, float | int | None]:
    """MIOU, DSC, ACC, SPE and SEN in percent of the pooled counts; None where the denominator is 0."""
    tp, fp, fn, tn = (sum(case[name] for case in cases) for name in COUNTS)
    shares = {
        "MIOU": (tp, tp + fp + fn),
        "DSC": (2 * tp, 2 * tp + fp + fn),
        "ACC": (tp + tn, tp + fp + fn + tn),
        "SPE": (tn, tn + fp),
        "SEN": (tp, tp + fn),
    }
    return {"num_cases": len(cases), **{name: 100 * a / b if b else None for name, (a, b) in shares.items()}}


def summarise(cases: Mapping[str, dict]) -> dict:
    """Metrics of the groups, by the lesion pixels of a case, and of all; cases without a lesion are in ``all`` only."""
    sizes = {name: case["true_positive"] + case["false_negative"] for name, case in cases.items()}
    groups = share_groups({name: size for name, size in sizes.items() if size})
    return {
        **{
            group: pooled_metrics([cases[name] for name, member in groups.items() if member == group])
            for group in SHARES
        },
        "all": pooled_metrics(list(cases.values())),
    }
