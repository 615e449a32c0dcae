"""Planning: what the plans file holds, that stock nnU-Net reads it, and what wrong calls answer."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from feature_datasets import extract_fingerprint
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage.io import imsave

from nnunetv2_smallseg.cli.main import main
from nnunetv2_smallseg.errors import SmallSegError, UsageError
from nnunetv2_smallseg.plans.configurations import num_slices, resolve, slab_configuration
from nnunetv2_smallseg.plans.switches import training_settings

PLANAR = {"patch_size": [64, 96], "spacing": [1.0, 1.0], "batch_size": 4}


def test_slab_configuration_changes_the_patch_only():
    assert slab_configuration(PLANAR, 5) == {"inherits_from": "2d", "patch_size": [5, 64, 96]}


@pytest.mark.parametrize("slices", [-3, 0, 1, 2, 4])
def test_slabs_have_a_centre_slice(slices):
    with pytest.raises(UsageError, match=f"{slices}, but must be odd"):
        slab_configuration(PLANAR, slices)


def test_spacing_tells_slabs_from_3d():
    assert num_slices(PLANAR, "2d") == 1
    assert num_slices({**PLANAR, "patch_size": [3, 64, 96]}, "2.5d") == 3
    with pytest.raises(SmallSegError, match="'3d_fullres' is three-dimensional"):
        num_slices({"patch_size": [32, 64, 96], "spacing": [2.0, 1.0, 1.0]}, "3d_fullres")
    with pytest.raises(SmallSegError, match="odd"):
        num_slices({**PLANAR, "patch_size": [4, 64, 96]}, "2.5d")


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("num_epoch", 5, "num_epochs, num_iterations_per_epoch"),
        ("num_epochs", 0, "a whole number from 1 to a million"),
        ("num_epochs", "5", "a whole number from 1 to a million"),
        ("num_epochs", True, "a whole number from 1 to a million"),
        ("deep_supervision_targets", "lesions", "'nearest' or 'lesion'"),
        ("deep_supervision_targets", None, "'nearest' or 'lesion'"),
        ("lesion_sampling", "size", "'voxel' or 'lesion' or 'size_bin'"),
        ("lesion_jitter", 1.5, "a number from 0"),
        ("lesion_jitter", True, "a number from 0"),
        ("lesion_labels", [], "a list of labels above 0"),
        ("lesion_labels", [0], "a list of labels above 0"),
        ("lesion_labels", 2, "a list of labels above 0"),
        ("checkpoint_every_minutes", 0, "a positive number of minutes"),
        ("checkpoint_every_minutes", "10", "a positive number of minutes"),
        ("seed", -1, "an integer of at least 0"),
    ],
)
def test_impossible_training_settings_are_refused(setting, value, allowed):
    assert training_settings(PLANAR, "2d") == {}
    possible = {"num_epochs": 5, "deep_supervision_targets": "lesion", "lesion_jitter": 0, "lesion_labels": None,
                "checkpoint_every_minutes": 2.5, "seed": 0}  # fmt: skip
    assert training_settings({"training": possible}, "2d") == possible
    with pytest.raises(UsageError, match=f"'2d'.*{setting}.*{re.escape(repr(value))}.*{allowed}"):
        training_settings({**PLANAR, "training": {setting: value}}, "2d")


def test_inheritance_is_resolved_as_nnunet_does():
    planar = {**PLANAR, "architecture": {}}
    plans = {"plans_name": "p", "configurations": {"2d": planar, "2.5d": slab_configuration(planar, 3)}}
    expected = PlansManager(plans).get_configuration("2.5d").configuration
    expected.pop("inherits_from")
    assert resolve(plans, "2.5d") == expected


def test_plans_of_a_volume(nnunet_workspace):
    plans = nnunet_workspace.plans()
    assert list(plans["configurations"]) == ["2d", "2.5d"]
    planar = plans["configurations"]["2d"]
    assert planar["patch_size"] == [64, 64]
    assert planar["batch_size"] == 2
    assert planar["training"] == {
        "num_epochs": 2,
        "num_iterations_per_epoch": 2,
        "num_val_iterations_per_epoch": 1,
    }
    slab = PlansManager(plans).get_configuration("2.5d")
    assert slab.patch_size == [3, 64, 64]
    assert slab.data_identifier == "nnUNetSmallSegPlans_2d"


def test_planning_again_keeps_foreign_configurations(nnunet_folders, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    name = "PlansWithExtra"
    assert smallseg("plan", "-d", nnunet_folders.number, "-plans_name", name) == 0
    path = nnunet_folders.preprocessed / f"{name}.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["2d_big"] = {"inherits_from": "2d", "batch_size": 64}
    path.write_text(json.dumps(plans))
    capsys.readouterr()
    status = smallseg(
        "plan", "-d", nnunet_folders.dataset, "-plans_name", name, "-num_slices", 5, "-patch_size", 40, 70,
        "-lesion_sampling", "size_bin", "-lesion_jitter", 0.25, "-lesion_labels", 1, "-num_epochs", 7
    )  # fmt: skip
    assert status == 0
    printed = capsys.readouterr().out
    assert str(path) in printed
    assert "5 x 64 x 96" in printed
    configurations = nnunet_folders.plans(name)["configurations"]
    assert configurations["2d"]["patch_size"] == [64, 96]
    assert configurations["2d"]["training"] == {
        "lesion_sampling": "size_bin",
        "lesion_jitter": 0.25,
        "lesion_labels": [1],
        "num_epochs": 7,
    }
    assert configurations["2.5d"]["patch_size"] == [5, 64, 96]
    assert configurations["2d_big"] == {"inherits_from": "2d", "batch_size": 64}
    # The network of the plans, which nnU-Net's own trainer builds, fits the patch that was asked for.
    strides = np.prod(configurations["2d"]["architecture"]["arch_kwargs"]["strides"], axis=0)
    assert [size % stride for size, stride in zip([64, 96], strides, strict=True)] == [0, 0]


def test_single_images_get_2d_only(tmp_path, nnunet_workspace, quick_nnunet, monkeypatch, capsys):
    dataset = tmp_path / "raw" / "Dataset992_Pictures"
    generator = np.random.default_rng(0)
    for folder, high in (("imagesTr", 255), ("labelsTr", 2)):
        (dataset / folder).mkdir(parents=True)
        for case in range(3):
            suffix = "_0000" if folder == "imagesTr" else ""
            values = generator.integers(0, high, (70, 90), dtype=np.uint8)
            imsave(dataset / folder / f"case{case}{suffix}.png", values, check_contrast=False)
    description = {"channel_names": {"0": "grey"}, "labels": {"background": 0, "cell": 1}, "numTraining": 3,
                   "file_ending": ".png"}  # fmt: skip
    (dataset / "dataset.json").write_text(json.dumps(description))
    for name in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    environment = {**nnunet_workspace.environment, "nnUNet_raw": str(tmp_path / "raw"),
                   "nnUNet_preprocessed": str(tmp_path / "preprocessed")}  # fmt: skip
    workspace = type(nnunet_workspace)(tmp_path, environment, 992, "Dataset992_Pictures")
    assert smallseg("plan", "-d", 992) == 1
    assert "nnUNetv2_extract_fingerprint -d 992" in capsys.readouterr().err
    extract_fingerprint(992)
    assert smallseg("plan", "-d", 992, "-num_slices", 3) == 2
    assert "single images" in capsys.readouterr().err
    assert not (workspace.preprocessed / "nnUNetSmallSegPlans.json").exists()
    assert smallseg("plan", "-d", 992) == 0
    assert list(workspace.plans()["configurations"]) == ["2d"]
    assert workspace.plans()["configurations"]["2d"]["patch_size"] == [96, 96]
    refused = workspace.run("nnUNetv2_train", 992, "2.5d", 0, "-tr", "nnUNetTrainerSwinUMambaDScratch", "-p",
                            "nnUNetSmallSegPlans", "-device", "cpu", status=1)  # fmt: skip
    assert "no slices to stack: use 2d" in refused.stderr
    assert "Traceback" not in refused.stderr


def smallseg(*arguments: object) -> int:
    """Runs ``smallseg`` in this process; returns its exit status."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        return stop.code


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("-d", 345), 2, "there is no data set '345'"),
        (("-d", "Dataset345_No"), 2, "there is no data set 'Dataset345_No'"),
        (("-d", "colon"), 2, "there is no data set 'colon'"),
        (("-d", 991, "-num_slices", 4), 2, "4, but must be odd"),
        (("-d", 991, "-plans_name", "nnUNetPlans"), 2, "choose another -plans_name"),
        (("-d", 991, "-patch_size", 0, 64), 2, "not a positive number"),
        (("-d", 991, "-patchsize", 64, 64), 2, "Did you mean -patch_size?"),
        (("-d", 991, "-num_epochs", 0), 2, "'0' is not a positive number"),
        (("-d", 991, "-lesion_sampling", "sizes"), 2, "invalid choice: 'sizes'"),
        ((), 2, "required: -d"),
    ],
)
def test_wrong_calls(nnunet_folders, arguments, status, message, capsys):
    before = sorted(nnunet_folders.preprocessed.iterdir())
    assert smallseg("plan", *arguments) == status
    assert message in capsys.readouterr().err
    assert sorted(nnunet_folders.preprocessed.iterdir()) == before


def test_no_augmentation_processes(nnunet_folders, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert smallseg("plan", "-d", 991) == 1
    assert "nnUNet_n_proc_DA is 0" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_unset_variables(nnunet_folders, variable, monkeypatch, capsys):
    monkeypatch.delenv(variable)
    assert smallseg("plan", "-d", 991) == 1
    assert f"export {variable}=" in capsys.readouterr().err
