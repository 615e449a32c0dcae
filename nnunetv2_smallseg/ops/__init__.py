"""The selective scan and SS2D: two operators, several back ends. See ``docs/scans.md``."""

from nnunetv2_smallseg.ops.backend_reference import selective_scan_reference
from nnunetv2_smallseg.ops.dispatch import (
    BACKENDS,
    ENVIRONMENT_VARIABLE,
    backend_availability,
    chosen_backend_name,
    requested_backend,
    self_check,
)
from nnunetv2_smallseg.ops.scan import selective_scan
from nnunetv2_smallseg.ops.ss2d import ss2d
from nnunetv2_smallseg.ops.ss2d_composed import ss2d_reference

__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "backend_availability",
    "chosen_backend_name",
    "requested_backend",
    "selective_scan",
    "selective_scan_reference",
    "self_check",
    "ss2d",
    "ss2d_reference",
]
