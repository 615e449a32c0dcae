"""What became of each tensor when a checkpoint was loaded into a network."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LoadReport"]

SHOWN_NAMES = 8


@dataclass(frozen=True)
class LoadReport:
    """The outcome of loading a checkpoint into the pretrained part of a network, its encoder or more.

    Attributes:
        network: Class name of the network.
        checkpoint: What was loaded.
        matched: Network entries that hold the checkpoint's values unchanged.
        adapted: Network entries computed from the checkpoint's values.
        unused: Checkpoint entries that were read past.
        missing: Entries of that part of the network that keep their own initialisation.
    """

    network: str
    checkpoint: str
    matched: tuple[str, ...]
    adapted: tuple[str, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]

    def summary(self) -> str:
        """A few lines for the training log."""
        lines = [
            f"{self.network}: {len(self.matched)} tensors loaded from {self.checkpoint}, {len(self.adapted)} adapted, "
            f"{len(self.missing)} of the pretrained part left at their own initialisation"
        ]
        for label, names in (
            ("adapted to the input channels", self.adapted),
            ("own initialisation", self.missing),
            ("unused in the checkpoint", self.unused),
        ):
            if names:
                more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
                lines.append(f"  {label}: {', '.join(names[:SHOWN_NAMES])}{more}")
        return "\n".join(lines)
