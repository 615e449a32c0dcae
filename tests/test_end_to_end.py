"""The whole way of a user through the stock commands: plan, preprocess, train, resume, predict, evaluate."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_networks

from nnunetv2_smallseg.architectures.swin_umamba import SwinUMambaD, to_official

SCRATCH = "nnUNetTrainerSwinUMambaDScratch"
PRETRAINED = "nnUNetTrainerSwinUMambaD"
RUNS = [("2d", "nnUNetPlans", SCRATCH), ("2.5d", "nnUNetSmallSegPlans", PRETRAINED)]
FILE_VARIABLE = "SMALLSEG_WEIGHTS_VMAMBA_TINY_IMAGENET"


@pytest.fixture(scope="module", params=RUNS, ids=" ".join)
def trained(request, nnunet_workspace, tmp_path_factory):
    """A model trained for two epochs by ``nnUNetv2_train``; the pretrained one needs its weight file only here."""
    workspace, (configuration, plans_name, trainer) = nnunet_workspace, request.param
    shorten(workspace, plans_name, 2)
    train = ("nnUNetv2_train", workspace.number, configuration, 0, "-tr", trainer, "-p", plans_name, "-device", "cpu")
    if trainer == PRETRAINED:
        workspace.environment[FILE_VARIABLE] = str(weight_file(tmp_path_factory.mktemp("weights") / "vmamba.pth"))
    finished = workspace.run(*train)
    workspace.environment.pop(FILE_VARIABLE, None)
    model = workspace.results / f"{trainer}__{plans_name}__{configuration}"
    return workspace, request.param, train, model, finished


def weight_file(path: Path) -> Path:
    """A random VMamba-Tiny in the layout of the published file."""
    state = to_official(SwinUMambaD(3, 2).state_dict())
    encoder = {name.removeprefix("vssm_encoder."): tensor for name, tensor in state.items() if "vssm_encoder" in name}
    renamed = {re.sub(r"^downsamples\.(\d)", r"layers.\1.downsample", name): tensor for name, tensor in encoder.items()}
    extra = {"norm.weight": (768,), "norm.bias": (768,), "head.weight": (1000, 768), "head.bias": (1000,)}
    torch.save({"model": renamed | {name: torch.zeros(shape) for name, shape in extra.items()}}, path)
    return path


def shorten(workspace, plans_name: str, num_epochs: int) -> None:
    """Writes small batches and a short schedule into plans; nnU-Net's planner has no options for that.

    The networks get small where no pretrained weights have to fit.
    """
    plans = workspace.plans(plans_name)
    if plans_name == "nnUNetPlans":
        plans["configurations"]["2d"]["network_options"] = small_networks()
    plans["configurations"]["2d"]["batch_size"] = 2
    plans["configurations"]["2d"]["training"] = {
        "num_epochs": num_epochs,
        "num_iterations_per_epoch": 2,
        "num_val_iterations_per_epoch": 1,
    }
    (workspace.preprocessed / f"{plans_name}.json").write_text(json.dumps(plans))


def test_training_validates_and_predicts(trained, tmp_path):
    workspace, (configuration, plans_name, trainer), _, model, finished = trained
    assert "Epoch 1" in finished.stdout
    assert "Mean Validation Dice" in finished.stdout
    if trainer == PRETRAINED:  # a slab of three slices of one channel takes the RGB patch embedding as it is
        assert "208 tensors loaded" in finished.stdout
        assert "The pretrained encoder is frozen until epoch 10" in finished.stdout
    assert (model / "fold_0" / "checkpoint_final.pth").is_file()
    assert (model / "fold_0" / "validation" / "summary.json").is_file()
    raw = workspace.folder / "raw" / workspace.dataset
    predictions = tmp_path / "predictions"
    workspace.run("nnUNetv2_predict", "-d", workspace.number, "-i", raw / "imagesTs", "-o", predictions, "-c",
                  configuration, "-tr", trainer, "-p", plans_name, "-f", 0, "-device", "cpu",
                  "-npp", 0, "-nps", 0)  # fmt: skip
    workspace.run("nnUNetv2_evaluate_folder", raw / "labelsTs", predictions, "-djfile", model / "dataset.json",
                  "-pfile", model / "plans.json")  # fmt: skip
    summary = json.loads((predictions / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2


def test_training_resumes(trained):
    """A finished training goes on when the plans ask for more epochs; the first two are not repeated."""
    workspace, (_, plans_name, _), train, model, _ = trained
    shorten(workspace, plans_name, 3)
    resumed = workspace.run(*train, "--c")
    assert "Epoch 2" in resumed.stdout
    assert "Epoch 1 " not in resumed.stdout.replace("\n", " \n")
    assert "Epoch 0" not in resumed.stdout
    assert (model / "fold_0" / "checkpoint_final.pth").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("3d_fullres", 0, "-p", "nnUNetPlans"), "'3d_fullres' is three-dimensional"),
        (("2.5d", 0, "-p", "nnUNetPlans"), "no configuration '2.5d'"),
    ],
)
def test_wrong_configurations_end_without_traceback(nnunet_workspace, arguments, message):
    finished = nnunet_workspace.run("nnUNetv2_train", nnunet_workspace.number, *arguments, "-tr", SCRATCH,
                                    "-device", "cpu", status=1)  # fmt: skip
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


def test_missing_weights_end_without_traceback(nnunet_workspace, tmp_path):
    environment = {**nnunet_workspace.environment, "SMALLSEG_WEIGHTS": str(tmp_path)}
    workspace = replace(nnunet_workspace, environment=environment)
    shorten(workspace, workspace.plans_name, 2)
    finished = workspace.run("nnUNetv2_train", workspace.number, "2d", "all", "-tr", PRETRAINED, "-p",
                             workspace.plans_name, "-device", "cpu", status=1)  # fmt: skip
    assert "smallseg weights fetch vmamba_tiny_imagenet" in finished.stderr
    assert "Traceback" not in finished.stderr
