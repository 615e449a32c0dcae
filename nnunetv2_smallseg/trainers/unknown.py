"""The hint for a misspelt trainer, where nnU-Net looks for it and would only say that there is none."""

from __future__ import annotations

import logging
from typing import NoReturn

from nnunetv2_smallseg import registry
from nnunetv2_smallseg.errors import did_you_mean

__all__ = ["refuse_unknown_name"]

logger = logging.getLogger(__name__)


def refuse_unknown_name(name: str) -> NoReturn:
    """``__getattr__`` of the module that nnU-Net searches (PEP 562).

    nnU-Net asks the module whether it has the trainer. If the name is nearly one of ours, that one is logged. A trainer
    of that name in another folder of ``nnUNet_extTrainer`` is found all the same.

    Raises:
        AttributeError: Always; this is how a module says that it does not have a name.
    """
    hint = did_you_mean(name, registry.trainers(), 0.85) if name.startswith("nnUNetTrainer") else ""
    if hint:
        logger.warning("nnunetv2_smallseg has no trainer %s.%s `smallseg trainers` lists all.", name, hint)
    raise AttributeError(f"nnunetv2_smallseg has no trainer {name}")
