"""Every trainer of the registry, one body: discovery, training steps on slices and slabs, recipe, weights, resuming."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shrink_networks
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunetv2_smallseg import registry, trainers
from nnunetv2_smallseg.architectures.slab import SlabNetwork
from nnunetv2_smallseg.errors import CommandStopped
from nnunetv2_smallseg.plans.configurations import is_volume, resolve
from nnunetv2_smallseg.trainers import base
from nnunetv2_smallseg.trainers.schedules import CosineSchedule
from nnunetv2_smallseg.trainers.slabs import SlabTrainer

NAMES = list(registry.trainers())
every_trainer = pytest.mark.parametrize("name", NAMES)
OWN_NETWORK = [name for name in NAMES if registry.trainer(name).network is not None]
every_trainer_of_our_networks = pytest.mark.parametrize("name", OWN_NETWORK)
every_configuration = pytest.mark.parametrize("configuration", ["2d", "2.5d"])


class LoadedNothing:
    """Stands for the report of loading weights where the file itself is not the point."""

    @staticmethod
    def summary() -> str:
        return "weights replaced by the test"


@pytest.fixture
def without_weight_file(monkeypatch) -> list:
    """Records requests for pretrained weights instead of reading files."""
    requests = []

    def load(network, weights, **options):
        requests.append((network, weights, options))
        return LoadedNothing

    monkeypatch.setattr(base, "load_pretrained", load)
    return requests


def make(
    name: str, workspace, configuration: str = "2d", plans: dict | None = None, **dataset_changes
) -> nnUNetTrainer:
    plans = copy.deepcopy(plans or workspace.plans())
    plans["continue_training"] = False
    shrink_networks(plans)
    dataset_json = {**workspace.dataset_json(), **dataset_changes}
    return getattr(trainers, name)(plans, configuration, 0, dataset_json, torch.device("cpu"))


def target_scales(trainer: nnUNetTrainer) -> list[list[float]]:
    """Scale of each target, relative to the patch."""
    return trainer._get_deep_supervision_scales() or [[1.0] * len(trainer.configuration_manager.patch_size)]


def random_batch(trainer: nnUNetTrainer, channels: int = 1, heads: int = 1) -> dict:
    """A batch as the data loader gives it: random images and labels at every scale of deep supervision."""
    generator = torch.Generator().manual_seed(0)
    patch = trainer.configuration_manager.patch_size
    scales = target_scales(trainer)
    targets = []
    for scale in scales:
        size = [round(voxels * factor) for voxels, factor in zip(patch, scale, strict=True)]
        targets.append(torch.randint(0, 2, (2, heads, *size), generator=generator))
    images = torch.randn((2, channels, *patch), generator=generator)
    return {"data": images, "target": targets if trainer.enable_deep_supervision else targets[0], "keys": ["a", "b"]}


@every_trainer
def test_nnunet_finds_the_installed_class(name, nnunet_folders):
    assert recursive_find_trainer_class_by_name(name) is getattr(trainers, name)


@every_trainer
def test_signatures_are_those_of_nnunet(name):
    trainer = getattr(trainers, name)
    assert list(inspect.signature(trainer.__init__).parameters) == list(
        inspect.signature(nnUNetTrainer.__init__).parameters
    )
    assert isinstance(inspect.getattr_static(trainer, "build_network_architecture"), staticmethod)
    assert list(inspect.signature(trainer.build_network_architecture).parameters) == list(
        inspect.signature(nnUNetTrainer.build_network_architecture).parameters
    )


@every_trainer
def test_registry_tells_the_truth(name, nnunet_folders):
    entry = registry.trainer(name)
    trainer = make(name, nnunet_folders)
    trainer.initialize()
    if entry.network is None:
        stock = nnUNetTrainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 2)
        assert str(trainer.network) == str(stock)
    else:
        assert type(trainer.planar_network).__name__ == entry.network
    assert getattr(trainer, "weights", None) == entry.weights


@every_trainer
@every_configuration
def test_a_step_lowers_the_loss_and_validation_runs(name, configuration, nnunet_folders, without_weight_file):
    torch.manual_seed(0)
    trainer = make(name, nnunet_folders, configuration)
    trainer.initialize()
    trainer.network.eval()  # without stochastic depth, so that losses compare
    batch = random_batch(trainer)
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(3)]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        result = trainer.validation_step(batch)
    assert np.isfinite(result["loss"])
    voxels = np.prod(trainer.configuration_manager.patch_size) * 2
    assert 0 < result["tp_hard"].sum() + result["fp_hard"].sum() + result["fn_hard"].sum() <= voxels


@every_trainer
@every_configuration
def test_data_loader_gives_targets_of_the_outputs_size(name, configuration, nnunet_folders, without_weight_file):
    trainer = make(name, nnunet_folders, configuration)
    trainer.initialize()
    trainer.network.eval()  # in training mode some return a reconstruction of the image, too
    loaders = trainer.get_dataloaders()
    with torch.no_grad():
        for loader in loaders:
            batch = next(loader)
            outputs = trainer.network(batch["data"])
            outputs = outputs if trainer.enable_deep_supervision else [outputs]
            targets = batch["target"] if trainer.enable_deep_supervision else [batch["target"]]
            assert [output.shape[2:] for output in outputs] == [target.shape[2:] for target in targets]


@every_trainer
def test_saved_model_predicts_the_same_logits(name, nnunet_folders, without_weight_file):
    trainer = make(name, nnunet_folders, "2.5d")
    trainer.initialize()
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    for part, content in (("plans", trainer.plans_manager.plans), ("dataset", trainer.dataset_json)):
        with open(f"{trainer.output_folder_base}/{part}.json", "w") as file:
            json.dump(content, file)
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    assert predictor.allowed_mirroring_axes == (1, 2)
    slab = torch.randn(1, 1, *trainer.configuration_manager.patch_size)
    trainer.set_deep_supervision_enabled(False)
    with torch.no_grad():
        torch.testing.assert_close(predictor.network.eval()(slab), trainer.network.eval()(slab), rtol=0, atol=1e-5)
    # Slabs thinner than S slices are padded by nnU-Net and cropped again.
    logits = predictor.predict_sliding_window_return_logits(torch.randn(1, 1, 64, 64))
    assert logits.shape == (2, 1, 64, 64)


@every_trainer_of_our_networks
def test_deep_supervision_stays_off_where_the_trainer_has_none(name, nnunet_folders):
    trainer = make(name, nnunet_folders)
    trainer.initialize()
    trainer.set_deep_supervision_enabled(False)
    assert trainer.planar_network.deep_supervision is False
    trainer.set_deep_supervision_enabled(True)  # as nnU-Net does after its final validation
    assert trainer.planar_network.deep_supervision is trainer.supervise_deeply
    scales = trainer._get_deep_supervision_scales()
    expected = [[1 / s, 1 / s] for s in registry.network(registry.trainer(name).network).deep_supervision_strides]
    assert scales == (expected if trainer.supervise_deeply else None)


@every_trainer
def test_stock_plans_work_whatever_their_patch(name, nnunet_folders, without_weight_file):
    plans = nnunet_folders.plans("nnUNetPlans")
    # nnU-Net's own network takes multiples of its strides only, which is what nnU-Net plans.
    patch_size = [40, 56] if registry.trainer(name).network else [32, 64]
    plans["configurations"]["2d"].update(patch_size=patch_size, batch_size=2)
    plans["configurations"]["2d"].pop("training", None)  # another test may have shortened them
    trainer = make(name, nnunet_folders, "2d", plans)
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (1000, 250)
    trainer.initialize()
    assert np.isfinite(trainer.train_step(random_batch(trainer))["loss"])


@every_trainer
def test_regions_and_ignore_label(name, nnunet_folders, without_weight_file):
    labels = {"background": 0, "lesion": [1, 2], "core": 2, "ignore": 3}
    trainer = make(name, nnunet_folders, labels=labels, regions_class_order=[1, 2])
    trainer.initialize()
    batch = random_batch(trainer, heads=3)  # two regions and the ignore mask
    assert np.isfinite(trainer.train_step(batch)["loss"])
    trainer = make(name, nnunet_folders, labels={"background": 0, "lesion": 1, "ignore": 2})
    trainer.initialize()
    batch = random_batch(trainer)
    for target in batch["target"] if trainer.enable_deep_supervision else [batch["target"]]:
        target[..., 0] = 2
    assert np.isfinite(trainer.train_step(batch)["loss"])


@every_trainer
@every_configuration
def test_cascade_input(name, configuration, nnunet_folders, without_weight_file):
    """The segmentation of an earlier stage arrives as further channels, one for each label."""
    plans = nnunet_folders.plans()
    plans["configurations"]["cascade"] = {"inherits_from": configuration, "previous_stage": "2d"}
    trainer = make(name, nnunet_folders, "cascade", plans)
    folder = Path(trainer.folder_with_segs_from_previous_stage)
    folder.mkdir(parents=True)
    trainer.initialize()
    dataset, _ = trainer.get_tr_and_val_datasets()
    for key in sorted({case for split in trainer.do_split() for case in split}):
        segmentation = type(dataset)(trainer.preprocessed_dataset_folder, [key]).load_case(key)[1]
        type(dataset).save_seg(np.asarray(segmentation)[0], str(folder / key))
    assert trainer.num_input_channels == 2
    training, _ = trainer.get_dataloaders()
    batch = next(training)
    assert batch["data"].shape[1] == 2
    assert set(batch["data"][:, 1].unique().tolist()) <= {0.0, 1.0}
    assert np.isfinite(trainer.train_step(batch)["loss"])


@every_trainer
def test_3d_configurations_are_refused_before_anything_is_written(name, nnunet_folders, tmp_path):
    plans = nnunet_folders.plans("nnUNetPlans")
    assert is_volume(resolve(plans, "3d_fullres"))
    if not getattr(trainers, name).accepts_volumes:
        with pytest.raises(CommandStopped, match="'3d_fullres' is three-dimensional") as stopped:
            make(name, nnunet_folders, "3d_fullres", plans)
        assert "2.5d" in str(stopped.value)
    with pytest.raises(CommandStopped, match=r"no configuration '2.5d'.*smallseg plan|no slices to stack"):
        make(name, nnunet_folders, "2.5d", nnunet_folders.plans("nnUNetPlans"))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", [name for name in NAMES if "SwinUMamba" in name])
def test_optimizer_follows_the_paper(name, nnunet_folders, shared):
    facts = json.loads((shared / "reference" / "swin_umamba" / "training_facts.json").read_text())
    trainer = make(name, nnunet_folders)
    trainer.initialize()
    decayed, exempt = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert decayed["lr"] == exempt["lr"] == facts["optimizer"]["lr"]
    assert decayed["weight_decay"] == facts["optimizer"]["weight_decay"]
    assert exempt["weight_decay"] == 0
    assert decayed["eps"] == facts["optimizer"]["eps"]
    assert list(decayed["betas"]) == facts["optimizer"]["betas"]
    assert trainer.freeze_encoder_epochs == max(0, facts["freeze_encoder_epochs"][name.removeprefix("nnUNetTrainer")])
    assert trainer.supervise_deeply == facts["deep_supervision"]["enabled"][name.removeprefix("nnUNetTrainer")]


@every_trainer_of_our_networks
def test_optimizer_holds_every_parameter_once(name, nnunet_folders):
    trainer = make(name, nnunet_folders)
    trainer.initialize()
    held = [id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in trainer.network.parameters()}
    exempt = {id(parameter) for parameter in trainer.optimizer.param_groups[-1]["params"]}
    without_decay = [group for group in trainer.optimizer.param_groups if group["weight_decay"] == 0]
    assert bool(without_decay) is not trainer.decay_everything
    if without_decay:
        names = trainer.unwrapped_network.no_weight_decay()
        assert exempt == {id(parameter) for key, parameter in trainer.network.named_parameters() if key in names}


def test_cosine_equals_the_official_schedule(shared):
    facts = json.loads((shared / "reference" / "swin_umamba" / "training_facts.json").read_text())["scheduler"]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = CosineSchedule(optimizer, 1e-4, facts["eta_min"], facts["T_max"])
    for epoch, rate in facts["lr_at_epoch"].items():
        schedule.step(int(epoch))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-9)
    assert schedule.rate(2000) == facts["eta_min"]


def test_cosine_ends_with_the_training(nnunet_folders):
    trainer = make("nnUNetTrainerSwinUMambaD", nnunet_folders)
    trainer.initialize()
    assert trainer.num_epochs == trainer.lr_scheduler.num_epochs == 2  # from the plans
    assert trainer.lr_scheduler.rate(2) == trainer.min_learning_rate


@every_trainer_of_our_networks
def test_encoder_is_frozen_in_the_first_epochs_only(name, nnunet_folders, without_weight_file):
    plans = nnunet_folders.plans()
    plans["configurations"]["2d"]["training"] = {"num_epochs": 100}
    trainer = make(name, nnunet_folders, plans=plans)
    trainer.initialize()
    encoder = list(trainer.planar_network.encoder_parameters())
    others = {id(parameter) for parameter in trainer.network.parameters()} - {id(parameter) for parameter in encoder}
    for epoch in (0, 9, 10, 11, 3):
        trainer.current_epoch = epoch
        trainer.logger.local_logger.my_fantastic_logging["lrs"] = [0.0] * epoch
        trainer.on_train_epoch_start()
        frozen = epoch < trainer.freeze_encoder_epochs
        assert {parameter.requires_grad for parameter in encoder} == {not frozen}
        assert all(parameter.requires_grad for parameter in trainer.network.parameters() if id(parameter) in others)
        assert trainer.network.training
    before = [parameter.clone() for parameter in encoder]
    trainer.train_step(random_batch(trainer))  # epoch 3
    moved = [not torch.equal(old, new) for old, new in zip(before, encoder, strict=True)]
    assert any(moved) is (trainer.freeze_encoder_epochs == 0)


PRETRAINED = [name for name in NAMES if registry.trainer(name).weights]


@pytest.mark.parametrize("name", PRETRAINED)
@every_configuration
def test_weights_are_read_once_before_the_first_epoch(name, configuration, nnunet_folders, without_weight_file):
    trainer = make(name, nnunet_folders, configuration)
    trainer.initialize()
    assert without_weight_file == []
    trainer.on_train_start()
    [(network, weights, options)] = without_weight_file
    assert network is trainer.planar_network
    assert weights == registry.trainer(name).weights
    assert options == {"adapt_input_channels": True}


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_missing_weight_file_stops_training(name, nnunet_folders, monkeypatch, tmp_path):
    monkeypatch.setenv("SMALLSEG_WEIGHTS", str(tmp_path / "weights"))
    trainer = make(name, nnunet_folders)
    with pytest.raises(CommandStopped, match=f"smallseg weights fetch {registry.trainer(name).weights}"):
        trainer.on_train_start()


@pytest.mark.parametrize("name", PRETRAINED)
def test_resuming_and_foreign_checkpoints_need_no_weight_file(name, nnunet_folders, without_weight_file, tmp_path):
    trainer = make(name, nnunet_folders)
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    resumed = make(name, nnunet_folders)
    resumed.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    resumed.on_train_start()
    assert without_weight_file == []
    for key, tensor in trainer.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[key]), key


def test_weights_can_be_transferred_to_other_classes(nnunet_folders, without_weight_file, tmp_path):
    """``nnUNetv2_train -pretrained_weights`` with a model of another number of classes."""
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    name = "nnUNetTrainerSwinUMamba"
    trainer = make(name, nnunet_folders, labels={"background": 0, "a": 1, "b": 2, "c": 3})
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    other = make(name, nnunet_folders)
    other.initialize()
    load_pretrained_weights(other.network, str(tmp_path / "checkpoint.pth"))
    assert torch.equal(other.network.stem.conv.weight, trainer.network.stem.conv.weight)
    other.on_train_start()
    assert without_weight_file == []


def test_slab_augmentation_stays_within_the_plane(nnunet_folders):
    trainer = make("nnUNetTrainerSwinUMambaD", nnunet_folders, "2.5d")
    rotation, dummy_2d, initial, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    planar = make("nnUNetTrainerSwinUMambaD", nnunet_folders, "2d")
    planar_rotation, _, planar_initial, _ = planar.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert (rotation, list(initial)) == (planar_rotation, [3, *planar_initial])
    assert dummy_2d is True
    assert axes == trainer.inference_allowed_mirroring_axes == (1, 2)
    assert trainer.configuration_manager.patch_size == [3, 64, 64]


@pytest.mark.parametrize("slices", [3, 5])
def test_all_slices_of_a_slab_are_transformed_alike(slices, nnunet_folders):
    """Equal slices stay equal, whatever was drawn, apart from noise, which is independent in every voxel."""
    trainer = make("nnUNetTrainerSwinUMambaD", nnunet_folders, "2.5d")
    transforms = trainer.get_training_transforms([slices, 32, 32], (-3.0, 3.0), None, (1, 2), True)
    transforms.transforms = [
        transform
        for transform in transforms.transforms
        if "GaussianNoise" not in type(getattr(transform, "transform", transform)).__name__
    ]
    torch.manual_seed(0)
    image = torch.randn(2, 1, 48, 48).expand(-1, slices, -1, -1)
    labels = torch.randint(0, 2, (1, 1, 48, 48), dtype=torch.int16).expand(-1, slices, -1, -1)
    changed = 0
    for _ in range(60):
        result = transforms(image=image.clone(), segmentation=labels.clone())
        assert result["image"].shape == (2, slices, 32, 32)
        torch.testing.assert_close(result["image"], result["image"][:, :1].expand(-1, slices, -1, -1))
        assert torch.equal(result["segmentation"], result["segmentation"][:, :1].expand(-1, slices, -1, -1))
        changed += not torch.equal(result["image"], image[:, :, 8:40, 8:40])
    assert changed > 40


S3_MAMBA = [name for name in NAMES if "S3Mamba" in name]


@pytest.mark.parametrize("name", S3_MAMBA)
def test_recipe_of_s3_mamba(name, nnunet_folders):
    trainer = make(name, nnunet_folders)
    trainer.initialize()
    decayed, exempt = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.01, 0)
    assert decayed["eps"] == 1e-8
    rates = [trainer.lr_scheduler.rate(epoch) for epoch in range(trainer.num_epochs + 1)]
    assert rates == pytest.approx([1e-4, 5e-5, 0.0])
    assert trainer.freeze_encoder_epochs == 0


@pytest.mark.parametrize("name", S3_MAMBA)
def test_s3_mamba_without_its_attention_has_no_deep_supervision(name, nnunet_folders):
    """nnU-Net's loss would be not a number: it gives the last of the outputs no weight."""
    trainer = make(name, nnunet_folders)
    trainer.configuration_manager.configuration["network_options"][registry.trainer(name).network]["use_tcma"] = False
    trainer.initialize()
    assert target_scales(trainer) == [[1.0, 1.0]]
    assert np.isfinite(trainer.train_step(random_batch(trainer))["loss"])
    trainer.set_deep_supervision_enabled(True)
    assert trainer.planar_network.deep_supervision is False


def test_unknown_network_options_stop_the_command(nnunet_folders):
    trainer = make("nnUNetTrainerSwinUMambaD", nnunet_folders)
    trainer.configuration_manager.configuration["network_options"] = {"SwinUMambaD": {"widht": 3}}
    with pytest.raises(CommandStopped, match=r"widht.*widths"):
        trainer.initialize()


def test_nnunets_own_network_on_slices_slabs_and_volumes(nnunet_folders):
    """What trainers of nnU-Net's own network are built on."""

    class AnyDimension(SlabTrainer):
        accepts_volumes = True

    plans = nnunet_folders.plans("nnUNetPlans")
    plans["continue_training"] = False
    plans["configurations"]["2.5d"] = nnunet_folders.plans()["configurations"]["2.5d"]
    patches = {"2d": [64, 64], "2.5d": [3, 64, 64], "3d_fullres": [16, 64, 64]}
    for configuration, patch in patches.items():
        own = copy.deepcopy(plans)
        own["configurations"][configuration]["patch_size"] = patch
        own["configurations"]["2d"]["batch_size"] = 2
        trainer = AnyDimension(own, configuration, 0, nnunet_folders.dataset_json(), torch.device("cpu"))
        trainer.initialize()
        batch = random_batch(trainer)
        assert np.isfinite(trainer.train_step(batch)["loss"])
        assert [tuple(output.shape[2:]) for output in trainer.network(batch["data"])] == [
            tuple(target.shape[2:]) for target in batch["target"]
        ]
        assert isinstance(trainer.network, SlabNetwork) is (configuration == "2.5d")
        assert isinstance(trainer.optimizer, torch.optim.SGD)


def test_stopping_a_command_is_an_error_for_library_users():
    with pytest.raises(Exception, match="reason"):
        raise CommandStopped("reason")
    assert issubclass(CommandStopped, SystemExit)
