"""What every metric is where its formula has no answer: empty reference, empty prediction, both.

The one place for these values; the metrics ask here. ``nan`` means undefined: an empty field in the tables, and left
out of means, whose counts say so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nnunetv2_smallseg.errors import UsageError

__all__ = ["BOTH_EMPTY_RULES", "RULES", "EmptyRule", "value_if_empty"]

UNDEFINED = math.nan


@dataclass(frozen=True)
class EmptyRule:
    """Values of a metric without a region in both, in the reference only, in the prediction only.

    None: the formula itself gives the value.
    """

    both: float | None
    reference: float | None
    prediction: float | None


# The value for two empty masks of the metrics that have one by convention only. The challenges disagree: nnU-Net and
# most papers leave such cases out, KiTS23 counts 1, ULS23 counts 0.
BOTH_EMPTY_RULES: dict[str, float] = {"undefined": UNDEFINED, "one": 1.0, "zero": 0.0}

RULES: dict[str, EmptyRule] = {
    # Both empty: by the named rule.
    "dice": EmptyRule(both=UNDEFINED, reference=0.0, prediction=0.0),
    "iou": EmptyRule(both=UNDEFINED, reference=0.0, prediction=0.0),
    "f2": EmptyRule(both=UNDEFINED, reference=0.0, prediction=0.0),
    "nsd": EmptyRule(both=UNDEFINED, reference=0.0, prediction=0.0),
    # There is nothing to find, or nothing was found.
    "sensitivity": EmptyRule(both=UNDEFINED, reference=UNDEFINED, prediction=0.0),
    "precision": EmptyRule(both=UNDEFINED, reference=0.0, prediction=UNDEFINED),
    # Defined whatever is empty, by all voxels that count.
    "specificity": EmptyRule(both=None, reference=None, prediction=None),
    "mae": EmptyRule(both=None, reference=None, prediction=None),
    # One surface or none: no distance. Such cases are counted, not given an invented distance.
    "assd_mm": EmptyRule(both=UNDEFINED, reference=UNDEFINED, prediction=UNDEFINED),
    "hd_mm": EmptyRule(both=UNDEFINED, reference=UNDEFINED, prediction=UNDEFINED),
    "hd95_mm": EmptyRule(both=UNDEFINED, reference=UNDEFINED, prediction=UNDEFINED),
    # A share of no volume.
    "ravd": EmptyRule(both=UNDEFINED, reference=UNDEFINED, prediction=None),
    # Lesion-wise.
    "detection_recall": EmptyRule(both=UNDEFINED, reference=UNDEFINED, prediction=0.0),
    "detection_precision": EmptyRule(both=UNDEFINED, reference=0.0, prediction=UNDEFINED),
    "detection_f1": EmptyRule(both=UNDEFINED, reference=0.0, prediction=0.0),
    "panoptic_quality": EmptyRule(both=UNDEFINED, reference=0.0, prediction=0.0),
    "segmentation_quality": EmptyRule(both=UNDEFINED, reference=UNDEFINED, prediction=UNDEFINED),
    "recognition_quality": EmptyRule(both=UNDEFINED, reference=0.0, prediction=0.0),
}

BY_NAMED_RULE = ("dice", "iou", "f2", "nsd")


def value_if_empty(metric: str, reference: bool, prediction: bool, both_empty: str = "undefined") -> float | None:
    """The value of a metric where a mask is empty.

    Args:
        metric: Name of the metric, a key of ``RULES``.
        reference: Whether the reference is empty.
        prediction: Whether the prediction is empty.
        both_empty: Name of the rule for two empty masks, a key of ``BOTH_EMPTY_RULES``.
    Returns:
        The value, ``nan`` if undefined; None if the formula is to be used.
    Raises:
        UsageError: If there is no such rule.
    """
    if both_empty not in BOTH_EMPTY_RULES:
        raise UsageError(f"no rule for empty cases is called {both_empty!r}: choose from {', '.join(BOTH_EMPTY_RULES)}")
    rule = RULES[metric]
    if reference and prediction:
        return BOTH_EMPTY_RULES[both_empty] if metric in BY_NAMED_RULE else rule.both
    if reference:
        return rule.reference
    return rule.prediction if prediction else None
