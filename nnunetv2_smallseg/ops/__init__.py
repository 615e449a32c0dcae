"""The selective scan: one operator, several back ends. See ``docs/scans.md``."""

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

__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "backend_availability",
    "chosen_backend_name",
    "requested_backend",
    "selective_scan",
    "selective_scan_reference",
    "self_check",
]
