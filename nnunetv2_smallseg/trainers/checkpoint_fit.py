"""Says why a checkpoint does not fit a network, where PyTorch would list every tensor in a traceback.

Training with ``--c``, validation and ``nnUNetv2_predict`` all load checkpoints by ``load_state_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from nnunetv2_smallseg.architectures.slab import SlabNetwork
from nnunetv2_smallseg.errors import stop_on_user_error
from nnunetv2_smallseg.pretrained.agreement import disagreements, refuse

__all__ = ["explain_misfits"]

# Part of the names of the layers whose first axis is the classes, in nnU-Net's networks and ours.
HEADS = ".seg_layers."


def explain_misfits(network: nn.Module) -> nn.Module:
    """Lets a network refuse state dicts of another one with a message for users; returns the network."""
    network.register_load_state_dict_pre_hook(_refuse_misfit)
    return network


def _refuse_misfit(
    network: nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str, metadata: dict, strict: bool, *_: list
) -> None:
    """PyTorch's hook. ``CommandStopped`` if a tensor is missing, left over, or of another shape."""
    if not strict:
        return
    expected = {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}
    problems = disagreements(expected, state_dict, adaptable="")
    problems += [f"{name} is not part of the network" for name in state_dict if name not in expected]
    inner = network.network if isinstance(network, SlabNetwork) else network
    reason = f"the checkpoint does not fit {type(inner).__name__}"
    if problems and all(HEADS in problem for problem in problems):
        reason += ": it was trained for another number of classes"
    with stop_on_user_error():
        refuse(
            problems,
            f"{reason}. {len(problems)} of {len(expected)} tensors do not agree:",
            "A checkpoint goes with the trainer, plans and data set it was trained with, and with plans.json and "
            "dataset.json beside it: use these, or train anew without --c.",
        )
