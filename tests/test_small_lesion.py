"""Switches for small lesions: what they do in nnU-Net's pipeline, from class or plans, in log and debug.json."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)

from nnunetv2_smallseg import trainers
from nnunetv2_smallseg.errors import CommandStopped
from nnunetv2_smallseg.losses.deep_supervision_targets import downsample_labels
from nnunetv2_smallseg.plans.switches import SWITCHES
from nnunetv2_smallseg.trainers.slabs import SlabTrainer

LABELS = {
    "labels": ({"background": 0, "lesion": 1, "core": 2}, {}),
    "ignore": ({"background": 0, "lesion": 1, "core": 2, "ignore": 3}, {"ignore_label": 3}),
    "regions": ({"background": 0, "lesion": [1, 2], "core": 2}, {"regions": True}),
    "regions with ignore": (
        {"background": 0, "lesion": [1, 2], "core": 2, "ignore": 3},
        {"regions": True, "ignore_channel": True},
    ),
}


def all_plans(workspace) -> dict:
    """nnU-Net's plans with 2d, 2.5d, 3d_fullres, 3d_lowres and a cascade, for small patches and a narrow network."""
    plans = copy.deepcopy(workspace.plans("nnUNetPlans"))
    plans["continue_training"] = False
    add_configurations(plans)
    return plans


def add_configurations(plans: dict) -> None:
    configurations = plans["configurations"]
    for name, patch in (("2d", [64, 64]), ("3d_fullres", [16, 64, 64])):
        configurations[name].update(patch_size=patch, batch_size=2)
        network = configurations[name]["architecture"]["arch_kwargs"]
        network["features_per_stage"] = [8] * network["n_stages"]
    configurations["2.5d"] = {"inherits_from": "2d", "patch_size": [3, 64, 64]}
    configurations["3d_lowres"] = {"inherits_from": "3d_fullres"}
    configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}


def make(workspace, name: str, configuration: str, plans: dict | None = None, **dataset_changes):
    dataset_json = {**workspace.dataset_json(), **dataset_changes}
    plans = plans or all_plans(workspace)
    return getattr(trainers, name)(plans, configuration, 0, dataset_json, torch.device("cpu"))


def give_earlier_stage(trainer) -> None:
    """Writes the segmentations of the stage before, as its training would."""
    folder = Path(trainer.folder_with_segs_from_previous_stage)
    folder.mkdir(parents=True)
    dataset, _ = trainer.get_tr_and_val_datasets()
    for key in sorted({case for split in trainer.do_split() for case in split}):
        segmentation = type(dataset)(trainer.preprocessed_dataset_folder, [key]).load_case(key)[1]
        type(dataset).save_seg(np.asarray(segmentation)[0], str(folder / key))


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("configuration", ["2d", "2.5d", "3d_cascade_fullres"])
def test_pipelines_make_targets_with_all_lesions(configuration, kind, nnunet_folders):
    """What training and validation do to a patch with a lesion of two voxels, for every kind of label."""
    labels, options = LABELS[kind]
    order = {"regions_class_order": [1, 2]} if "regions" in options else {}
    trainer = make(nnunet_folders, "nnUNetTrainerSmallLesionTargets", configuration, labels=labels, **order)
    trainer.initialize()
    if trainer.is_cascaded:
        give_earlier_stage(trainer)
    scales = trainer._get_deep_supervision_scales()
    shape = (1 + trainer.is_cascaded, *trainer.configuration_manager.patch_size)
    segmentation = torch.zeros(shape, dtype=torch.int16)
    segmentation[..., 1, 1:3] = 2
    segmentation[..., 20:50, 20:50] = 1
    segmentation[..., 60, 60] = -1
    if trainer.label_manager.has_ignore_label:
        segmentation[0, ..., :30, 40:] = 3
    training, validation = trainer.get_dataloaders()
    for loader in (training, validation):
        size = loader.data_loader.patch_size if configuration != "2d" else loader.data_loader.patch_size[1:]
        patch = torch.zeros((len(segmentation), *map(int, size)), dtype=torch.int16)
        inside = tuple(slice((big - small) // 2, (big - small) // 2 + small)
                       for big, small in zip(patch.shape[1:], shape[1:], strict=True))  # fmt: skip
        patch[(slice(None), *inside)] = segmentation
        torch.manual_seed(0)
        transforms = loader.data_loader.transforms
        given = transforms(image=torch.randn(1, *patch.shape[1:]), segmentation=patch)["segmentation"]
        assert len(given) == len(scales)
        expected = downsample_labels(given[0], scales, **options)
        stock = DownsampleSegForDSTransform(scales)(segmentation=given[0])["segmentation"]
        for target, ours, nearest in zip(given, expected, stock, strict=True):
            assert torch.equal(target, ours)
            assert (target.shape, target.dtype) == (nearest.shape, nearest.dtype)
        assert any(not torch.equal(target, nearest) for target, nearest in zip(given, stock, strict=True))


def check_a_training_step(trainer) -> None:
    """Loaders give the targets of the switch, and the network learns from them."""
    trainer.initialize()
    if trainer.is_cascaded:
        give_earlier_stage(trainer)
    scales = trainer._get_deep_supervision_scales()
    for loader in trainer.get_dataloaders():
        batch = next(loader)
        for sample in range(2):
            full = batch["target"][0][sample]
            for target, expected in zip(batch["target"], downsample_labels(full, scales), strict=True):
                assert torch.equal(target[sample], expected)
    assert np.isfinite(trainer.train_step(batch)["loss"])


@pytest.mark.parametrize("configuration", ["3d_fullres", "3d_lowres", "3d_cascade_fullres"])
def test_both_strategies_in_3d(configuration, nnunet_folders):
    check_a_training_step(make(nnunet_folders, "nnUNetTrainerSmallLesion", configuration))


def test_both_strategies_on_residual_encoder_plans(nnunet_folders, tmp_path, monkeypatch):
    preprocessed = tmp_path / "preprocessed" / nnunet_folders.dataset
    preprocessed.mkdir(parents=True)
    shutil.copy(nnunet_folders.preprocessed / "dataset_fingerprint.json", preprocessed)
    with monkeypatch.context() as planning:
        planning.setenv("nnUNet_preprocessed", str(preprocessed.parent))
        planning.setenv("nnUNet_n_proc_DA", "1")
        plans = nnUNetPlannerResEncM(nnunet_folders.number).plan_experiment()
    plans["continue_training"] = False
    add_configurations(plans)
    for configuration in ("2d", "2.5d", "3d_fullres"):
        trainer = make(nnunet_folders, "nnUNetTrainerSmallLesion", configuration, plans)
        check_a_training_step(trainer)
        assert "ResidualEncoderUNet" in str(trainer.network)


def test_plans_set_the_switches_of_every_trainer_and_the_log_shows_them(nnunet_folders):
    plans = all_plans(nnunet_folders)
    values = {"deep_supervision_targets": "lesion", "lesion_sampling": "size_bin", "lesion_jitter": 0.25}
    plans["configurations"]["2d"]["training"] = {**values, "num_epochs": 3}
    defaults = {name: getattr(SlabTrainer, name) for name in SWITCHES}
    assert defaults == {"deep_supervision_targets": "nearest", "lesion_sampling": "voxel", "lesion_jitter": 0.5}
    trainer = make(nnunet_folders, "nnUNetTrainerCurriculum", "2d", plans)
    trainer.on_train_start()
    folder = Path(trainer.output_folder)
    debug = json.loads((folder / "debug.json").read_text())
    [line] = [line for line in Path(trainer.log_file).read_text().splitlines() if "Switches of" in line]
    assert set(SWITCHES) == set(values)
    for name, value in values.items():
        assert getattr(trainer, name) == value != defaults[name]
        assert debug[name] == str(value)
        assert f"{name} = {value}" in line
    assert trainer.num_epochs == 3
    assert "LesionTargetsTransform" in str(trainer.dataloader_train.data_loader.transforms)
    assert type(trainer).deep_supervision_targets == "nearest"  # other trainings of this process are not concerned


def test_wrong_switches_stop_the_command(nnunet_folders, monkeypatch, tmp_path):
    plans = all_plans(nnunet_folders)
    plans["configurations"]["2d"]["training"] = {"deep_supervision_targets": "max"}
    with pytest.raises(CommandStopped, match=r"'2d'.*deep_supervision_targets: 'max'.*'nearest' or 'lesion'"):
        make(nnunet_folders, "nnUNetTrainerSmallLesion", "2d", plans)
    monkeypatch.setattr(trainers.nnUNetTrainerSmallLesion, "deep_supervision_targets", "max")
    with pytest.raises(CommandStopped, match=r"nnUNetTrainerSmallLesion.*'nearest' or 'lesion'"):
        make(nnunet_folders, "nnUNetTrainerSmallLesion", "2d")
    assert not (tmp_path / "results").exists()


def test_without_deep_supervision_the_switch_is_said_to_have_no_effect(nnunet_folders):
    plans = all_plans(nnunet_folders)
    plans["configurations"]["2d"]["training"] = {"deep_supervision_targets": "lesion"}
    trainer = make(nnunet_folders, "nnUNetTrainerHUNet", "2d", plans)
    trainer.enable_deep_supervision = False
    trainer.initialize()
    trainer.get_dataloaders()
    assert "deep_supervision_targets = lesion has no effect" in Path(trainer.log_file).read_text()
