"""What all trainers of this package share; a system's file says only what is special about it.

Everything goes through the hooks of nnU-Net's ``nnUNetTrainer`` (2.8): nothing of nnU-Net is changed or copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_smallseg.architectures.segmentation_network import SegmentationNetwork
from nnunetv2_smallseg.architectures.slab import SlabNetwork
from nnunetv2_smallseg.augmentation.in_plane import blur_in_plane
from nnunetv2_smallseg.errors import CommandStopped, SmallSegError
from nnunetv2_smallseg.plans.configurations import num_slices, resolve, training_schedule
from nnunetv2_smallseg.pretrained.load import load_pretrained
from nnunetv2_smallseg.trainers.schedules import CosineSchedule

__all__ = ["SmallSegTrainer", "network_builder"]


@contextmanager
def stop_on_user_error() -> Iterator[None]:
    """Turns an error that the user can mend into the end of the command: message, exit status 1, no traceback."""
    try:
        yield
    except SmallSegError as error:
        raise CommandStopped(f"error: {error}") from None


def network_builder(network_class: type[SegmentationNetwork]) -> Callable[..., nn.Module]:
    """nnU-Net's hook ``build_network_architecture`` for a 2D network: as it is for ``2d``, around slabs for ``2.5d``.

    Args:
        network_class: A 2D network.
    Returns:
        A function with nnU-Net's arguments that builds a network for (B, C, H, W), or for (B, C, S, H, W) if the
        configuration's patches have S slices. It raises ``CommandStopped`` for a three-dimensional configuration.
    """

    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        with stop_on_user_error():
            slices = num_slices(configuration_manager.configuration, "of this model")
        if slices == 1:
            return network_class(num_input_channels, num_output_channels, enable_deep_supervision)
        network = network_class(num_input_channels * slices, num_output_channels * slices, enable_deep_supervision)
        return SlabNetwork(network, slices)

    return build_network_architecture


def tolerate_unused_parameters(wrapped: DistributedDataParallel) -> DistributedDataParallel:
    """The same network wrapped so that parameters without gradient are no error.

    Frozen parameters, and heads whose output the loss does not see, get none; nnU-Net's own wrapper fails on them in
    the second iteration.
    """
    return DistributedDataParallel(wrapped.module, device_ids=wrapped.device_ids, find_unused_parameters=True)


class SmallSegTrainer(nnUNetTrainer):
    """nnU-Net's trainer for the 2D networks of this package, on slices and on 2.5D slabs.

    A subclass sets ``build_network_architecture = staticmethod(network_builder(Network))`` and overrides the class
    attributes below. The schedule (epochs and iterations) is nnU-Net's unless the plans say otherwise (``smallseg plan
    -num_epochs``).

    Attributes:
        weights: Name of the pretrained weight file (``smallseg weights list``), or None to start at random.
        adapt_input_channels: Fit the first convolution of the weight file to the data's number of channels.
        freeze_encoder_epochs: Epochs in which the pretrained part of the encoder is not trained.
        supervise_deeply: Whether the loss sees outputs at several resolutions.
        learning_rate: Rate of the first epoch; falls along a cosine.
        min_learning_rate: Rate the cosine ends at.
        decay: Weight decay of AdamW; norms, biases and what the network exempts have none.
        adam_epsilon: Term that keeps AdamW's denominator from 0.
    """

    weights: str | None = None
    adapt_input_channels: bool = True
    freeze_encoder_epochs: int = 0
    supervise_deeply: bool = True
    learning_rate: float = 1e-4
    min_learning_rate: float = 1e-6
    decay: float = 0.05
    adam_epsilon: float = 1e-5

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        # Before nnU-Net creates the output folder: a wrong configuration must leave nothing behind.
        with stop_on_user_error():
            resolved = resolve(plans, configuration)
            self.num_slices = num_slices(resolved, configuration)
            schedule = training_schedule(resolved, configuration)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = self.supervise_deeply
        self.initial_lr = self.learning_rate
        self.weight_decay = self.decay
        for name, value in schedule.items():
            setattr(self, name, value)
        self._weights_from_checkpoint = False
        self._encoder_is_frozen = False

    @property
    def unwrapped_network(self) -> nn.Module:
        """The network without the wrappers of distributed training and compilation."""
        network = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    @property
    def planar_network(self) -> SegmentationNetwork:
        """The 2D network, also where it segments slabs."""
        network = self.unwrapped_network
        return network.network if isinstance(network, SlabNetwork) else network

    def initialize(self) -> None:
        """Builds network, optimizer and loss; no weight file is read here."""
        super().initialize()
        if self.is_ddp:
            self.network = tolerate_unused_parameters(self.network)
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

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, CosineSchedule]:
        """AdamW with a cosine over the epochs this training has; no decay where the network asks for none."""
        network = self.unwrapped_network
        exempt = network.no_weight_decay()
        decayed = [parameter for name, parameter in network.named_parameters() if name not in exempt]
        undecayed = [parameter for name, parameter in network.named_parameters() if name in exempt]
        optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}],
            lr=self.initial_lr,
            weight_decay=self.weight_decay,
            eps=self.adam_epsilon,
        )
        return optimizer, CosineSchedule(optimizer, self.initial_lr, self.min_learning_rate, self.num_epochs)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switches deep supervision; stays off for trainers without it, also after nnU-Net's final validation."""
        self.unwrapped_network.decoder.deep_supervision = enabled and self.enable_deep_supervision

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        """Scales of the targets follow the network's outputs, not the plan's; slices are never pooled."""
        if not self.enable_deep_supervision:
            return None
        through_plane = [] if self.num_slices == 1 else [1.0]
        return [[*through_plane, 1 / s, 1 / s] for s in self.planar_network.deep_supervision_strides]

    @contextmanager
    def _slab_seen_in_plane(self) -> Iterator[None]:
        """Shows nnU-Net's rules for augmentation the plane of a slab only."""
        slab = self.configuration_manager
        in_plane = {**slab.configuration, "patch_size": slab.patch_size[1:]}
        self.configuration_manager = ConfigurationManager(in_plane)
        try:
            yield
        finally:
            self.configuration_manager = slab

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:
        """nnU-Net's 2D rules, also for slabs: rotate, scale and mirror within the plane only."""
        if self.num_slices == 1:
            return super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        with self._slab_seen_in_plane():
            rotation, _, initial, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        axes = tuple(axis + 1 for axis in axes)
        self.inference_allowed_mirroring_axes = axes
        self.print_to_log_file(f"slab of {self.num_slices} slices: augmented and mirrored within the plane only")
        return rotation, True, [self.num_slices, *initial], axes

    @staticmethod
    def get_training_transforms(patch_size, *arguments, **options) -> BasicTransform:
        """nnU-Net's training transforms; on slabs the blur acts within the plane as well."""
        transforms = nnUNetTrainer.get_training_transforms(patch_size, *arguments, **options)
        return transforms if len(patch_size) == 2 else blur_in_plane(transforms)
