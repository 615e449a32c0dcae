"""What all trainers with networks of this package share; a system's file says only what is special about it."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_smallseg.architectures.segmentation_network import SegmentationNetwork
from nnunetv2_smallseg.architectures.slab import SlabNetwork
from nnunetv2_smallseg.errors import stop_on_user_error
from nnunetv2_smallseg.plans.configurations import network_options, num_slices
from nnunetv2_smallseg.pretrained.load import load_pretrained
from nnunetv2_smallseg.trainers.checkpoint_fit import explain_misfits
from nnunetv2_smallseg.trainers.schedules import CosineSchedule
from nnunetv2_smallseg.trainers.slabs import SlabTrainer

__all__ = ["SmallSegTrainer", "network_builder"]


def network_builder(network_class: type[SegmentationNetwork], **options: object) -> Callable[..., nn.Module]:
    """nnU-Net's hook ``build_network_architecture`` for a 2D network: as it is for ``2d``, around slabs for ``2.5d``.

    Args:
        network_class: A 2D network.
        options: Keyword arguments for its constructor; the plans may hold others, which come first
            (``network_options`` of a configuration).
    Returns:
        A function with nnU-Net's arguments that builds a network for (B, C, H, W), or for (B, C, S, H, W) if the
        configuration's patches have S slices. It raises ``CommandStopped`` for a three-dimensional configuration and
        for options in the plans that the network does not have.
    """
    parameters = inspect.signature(network_class).parameters.values()
    configurable = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]

    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        configuration = configuration_manager.configuration
        with stop_on_user_error():
            slices = num_slices(configuration, "of this model")
            planned = network_options(configuration, network_class.__name__, configurable)
        network = network_class(
            num_input_channels * slices, num_output_channels * slices, enable_deep_supervision, **{**options, **planned}
        )
        return explain_misfits(network if slices == 1 else SlabNetwork(network, slices))

    return build_network_architecture


class SmallSegTrainer(SlabTrainer):
    """nnU-Net's trainer for the 2D networks of this package, on slices and on 2.5D slabs.

    A subclass sets ``build_network_architecture = staticmethod(network_builder(Network))`` and overrides the class
    attributes below.

    Attributes:
        weights: Name of the pretrained weight file (``smallseg weights list``), or None to start at random.
        adapt_input_channels: Fit the first convolution of the weight file to the data's number of channels.
        freeze_encoder_epochs: Epochs in which the pretrained part of the encoder is not trained.
        supervise_deeply: Whether the loss sees outputs at several resolutions.
        learning_rate: Rate of the first epoch; falls along a cosine.
        min_learning_rate: Rate the cosine ends at.
        decay: Weight decay of AdamW; norms, biases and what the network exempts have none.
        decay_everything: Decay all parameters instead.
        adam_epsilon: Term that keeps AdamW's denominator from 0.
    """

    weights: str | None = None
    adapt_input_channels: bool = True
    freeze_encoder_epochs: int = 0
    supervise_deeply: bool = True
    learning_rate: float = 1e-4
    min_learning_rate: float = 1e-6
    decay: float = 0.05
    decay_everything: bool = False
    adam_epsilon: float = 1e-5

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = self.supervise_deeply
        self.initial_lr = self.learning_rate
        self.weight_decay = self.decay
        self._weights_from_checkpoint = False
        self._encoder_is_frozen = False

    @property
    def planar_network(self) -> SegmentationNetwork:
        """The 2D network, also where it segments slabs."""
        network = self.unwrapped_network
        return network.network if isinstance(network, SlabNetwork) else network

    def initialize(self) -> None:
        """Builds network, optimizer and loss; no weight file is read here."""
        super().initialize()
        self.unwrapped_network.register_load_state_dict_post_hook(self._note_loaded_checkpoint)

    def _note_loaded_checkpoint(self, module: nn.Module, incompatible_keys: object) -> None:
        self._weights_from_checkpoint = True

    def on_train_start(self) -> None:
        """Reads the pretrained weights, once, unless a checkpoint has already filled the network."""
        if not self.was_initialized:
            self.initialize()
        if self.weights is not None and not self._weights_from_checkpoint:
            with stop_on_user_error():
                report = load_pretrained(
                    self.planar_network, self.weights, adapt_input_channels=self.adapt_input_channels
                )
            self.print_to_log_file(report.summary())
        super().on_train_start()

    def on_train_epoch_start(self) -> None:
        """Freezes the encoder in the first epochs. The rule knows only the epoch, so resuming needs nothing else."""
        freeze = self.current_epoch < self.freeze_encoder_epochs
        for parameter in self.planar_network.encoder_parameters():
            parameter.requires_grad_(not freeze)
        super().on_train_epoch_start()
        if freeze != self._encoder_is_frozen:
            self.print_to_log_file(
                f"The pretrained encoder is {'frozen until' if freeze else 'trained from'} epoch "
                f"{self.freeze_encoder_epochs if freeze else self.current_epoch}."
            )
            self._encoder_is_frozen = freeze

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, object]:
        """AdamW with the trainer's schedule; no decay where the network asks for none, unless ``decay_everything``."""
        network = self.unwrapped_network
        exempt = set() if self.decay_everything else network.no_weight_decay()
        decayed = [parameter for name, parameter in network.named_parameters() if name not in exempt]
        undecayed = [parameter for name, parameter in network.named_parameters() if name in exempt]
        groups = [{"params": decayed}] + ([{"params": undecayed, "weight_decay": 0.0}] if undecayed else [])
        optimizer = torch.optim.AdamW(groups, lr=self.initial_lr, weight_decay=self.weight_decay, eps=self.adam_epsilon)
        return optimizer, self.build_schedule(optimizer)

    def build_schedule(self, optimizer: torch.optim.Optimizer) -> object:
        """The learning-rate schedule, whose ``step(epoch)`` sets the rate: here a cosine over this training."""
        return CosineSchedule(optimizer, self.initial_lr, self.min_learning_rate, self.num_epochs)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switches deep supervision; stays off for trainers without it, also after nnU-Net's final validation."""
        super().set_deep_supervision_enabled(enabled and self.enable_deep_supervision)

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        """Scales of the targets follow the network's outputs, not the plan's; slices are never pooled."""
        if not self.enable_deep_supervision:
            return None
        through_plane = [] if self.num_slices == 1 else [1.0]
        return [[*through_plane, 1 / s, 1 / s] for s in self.planar_network.deep_supervision_strides]
