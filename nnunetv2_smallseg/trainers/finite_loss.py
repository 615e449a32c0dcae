"""Stops a training whose loss is no number, and names the cases: nnU-Net would go on to the last epoch.

Mixed precision makes a loss or gradient overflow now and then; the gradient scaler leaves such a step out, and training
goes on. NaN in an image, or weights that are no numbers any more, never get better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from nnunetv2_smallseg.errors import CommandStopped

__all__ = ["FiniteLoss", "all_finite"]

# Names of cases a message lists.
NAMES_SHOWN = 10


class FiniteLoss:
    """Looks at the loss of every step, which nnU-Net brings to the CPU anyway; goes before nnU-Net's trainer.

    Attributes:
        max_non_finite_losses: Steps in a row without a finite loss that end the training. Ten of them make the scaler
            of the gradients a thousand times smaller, which is more than any overflow of gradients needs.
    """

    max_non_finite_losses: int = 10
    _non_finite_losses: int = 0

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step.

        Raises:
            CommandStopped: If the loss is not finite, and an image or the weights are the reason, or it was not finite
                ``max_non_finite_losses`` times in a row.
        """
        result = super().train_step(batch)
        if math.isfinite(float(result["loss"])):
            self._non_finite_losses = 0
            return result
        self._non_finite_losses += 1
        what = self._described(result["loss"], batch)
        _stop_for_images(what, batch)
        if not all_finite(self.unwrapped_network.state_dict().values()):
            raise CommandStopped(
                f"error: {what}, and the weights of the network are no longer finite: training cannot go on. The "
                "checkpoints of earlier epochs are whole: go on from them by the same command with --c. If it happens "
                "again with these cases, look at their images and labels; else lower initial_lr in a subclass of "
                f"{type(self).__name__}."
            )
        if self._non_finite_losses >= self.max_non_finite_losses:
            raise CommandStopped(
                f"error: {what}, for the {self._non_finite_losses}th time in a row: training cannot go on. Look at the "
                "images and labels of these cases, and in the log at those before; the same command with --c goes on "
                "from the last checkpoint."
            )
        self.print_to_log_file(f"WARNING: {what}. Now and then that is an overflow of mixed precision, and harmless.")
        return result

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's step.

        Raises:
            CommandStopped: If the loss is not finite because of an image.
        """
        result = super().validation_step(batch)
        if not math.isfinite(float(result["loss"])):
            what = self._described(result["loss"], batch, "validation ")
            _stop_for_images(what, batch)
            self.print_to_log_file(f"WARNING: {what}.")
        return result

    def _described(self, loss: object, batch: Mapping, kind: str = "") -> str:
        """What happened, where, and to which cases."""
        data = batch["data"]
        return (
            f"the {kind}loss in epoch {self.current_epoch} is {float(loss)} (cases {_names(batch['keys'])}; values of "
            f"their images from {float(data.min()):g} to {float(data.max()):g})"
        )


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all numbers in all tensors are finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())


def _stop_for_images(what: str, batch: Mapping) -> None:
    """Raises ``CommandStopped`` if images of a batch (B, C, ...) hold NaN or infinite values."""
    bad = [key for key, image in zip(batch["keys"], batch["data"], strict=True) if not all_finite([image])]
    if bad:
        raise CommandStopped(
            f"error: {what}, because the preprocessed images of {_names(bad)} hold NaN or infinite values: no network "
            "can be trained with them. Mend these images in nnUNet_raw, extract the fingerprint anew "
            "(nnUNetv2_extract_fingerprint --clean --verify_dataset_integrity), plan and preprocess again."
        )


def _names(cases: Sequence[str]) -> str:
    names = sorted(set(map(str, cases)))
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {len(names) - NAMES_SHOWN} more" * (len(names) > NAMES_SHOWN))
