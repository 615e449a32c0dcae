"""Further entries for nnU-Net's checkpoints, written and read in the same file at the same moment.

nnU-Net builds the content of a checkpoint inside ``save_checkpoint`` and has no hook for it. Adding to the file
afterwards would write it twice and leave a moment in which it is there without our entry. The optimizer's state is the
one part of a checkpoint that takes more: PyTorch offers hooks for saving and loading it, and everything that does not
know our entry reads past it.
"""

from __future__ import annotations

from torch.optim import Optimizer

__all__ = ["STATE_KEY", "CheckpointState"]

# checkpoint["optimizer_state"][STATE_KEY]
STATE_KEY = "smallseg"


class CheckpointState:
    """Keeps what ``checkpoint_state`` returns in every checkpoint, for any trainer it is mixed into.

    Mixins that need an entry inherit from this class and extend both methods, calling ``super()``.

    Attributes:
        frozen_checkpoint_state: If set, checkpoints hold this instead of what ``checkpoint_state`` would say now.
    """

    frozen_checkpoint_state: dict | None = None

    def checkpoint_state(self) -> dict:
        """What a checkpoint is to hold besides nnU-Net's entries: plain Python values, arrays and tensors."""
        return {}

    def restore_checkpoint_state(self, state: dict) -> None:
        """Takes over what ``checkpoint_state`` gave; ``{}`` for a checkpoint of another trainer.

        nnU-Net has read epoch and log of the checkpoint by then, and the network's weights.
        """

    def initialize(self) -> None:
        """Builds network, optimizer and loss, and lets the optimizer's state carry ours."""
        super().initialize()
        self.optimizer.register_state_dict_post_hook(self._add_to_optimizer_state)
        self.optimizer.register_load_state_dict_pre_hook(self._take_from_optimizer_state)

    def _add_to_optimizer_state(self, optimizer: Optimizer, state: dict) -> dict:
        ours = self.checkpoint_state() if self.frozen_checkpoint_state is None else self.frozen_checkpoint_state
        return {**state, STATE_KEY: ours} if ours else state

    def _take_from_optimizer_state(self, optimizer: Optimizer, state: dict) -> None:
        self.restore_checkpoint_state(state.get(STATE_KEY, {}))
