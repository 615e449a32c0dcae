"""The whole way of a user through the stock commands: plan, preprocess, train, resume, predict, evaluate."""

from __future__ import annotations

import json

import pytest

TRAINER = "nnUNetTrainerSwinUMambaDScratch"


@pytest.fixture(scope="module", params=[("2d", "nnUNetPlans"), ("2.5d", "nnUNetSmallSegPlans")], ids=" ".join)
def trained(request, nnunet_workspace):
    """A model trained for two epochs by ``nnUNetv2_train``: 2d on nnU-Net's own plans, 2.5d on ours."""
    workspace, (configuration, plans_name) = nnunet_workspace, request.param
    shorten(workspace, plans_name, 2)
    model_options = ("-tr", TRAINER, "-p", plans_name, "-device", "cpu")
    train = ("nnUNetv2_train", workspace.number, configuration, 0, *model_options)
    finished = workspace.run(*train)
    model = workspace.results / f"{TRAINER}__{plans_name}__{configuration}"
    return workspace, configuration, plans_name, train, model, finished


def shorten(workspace, plans_name: str, num_epochs: int) -> None:
    """Writes small batches and a short schedule into plans; nnU-Net's planner has no options for that."""
    plans = workspace.plans(plans_name)
    plans["configurations"]["2d"]["batch_size"] = 2
    plans["configurations"]["2d"]["training"] = {
        "num_epochs": num_epochs,
        "num_iterations_per_epoch": 2,
        "num_val_iterations_per_epoch": 1,
    }
    (workspace.preprocessed / f"{plans_name}.json").write_text(json.dumps(plans))


def test_training_validates_and_predicts(trained, tmp_path):
    workspace, configuration, plans_name, _, model, finished = trained
    assert "Epoch 1" in finished.stdout
    assert "Mean Validation Dice" in finished.stdout
    assert (model / "fold_0" / "checkpoint_final.pth").is_file()
    assert (model / "fold_0" / "validation" / "summary.json").is_file()
    raw = workspace.folder / "raw" / workspace.dataset
    predictions = tmp_path / "predictions"
    workspace.run("nnUNetv2_predict", "-d", workspace.number, "-i", raw / "imagesTs", "-o", predictions, "-c",
                  configuration, "-tr", TRAINER, "-p", plans_name, "-f", 0, "-device", "cpu",
                  "-npp", 1, "-nps", 1)  # fmt: skip
    workspace.run("nnUNetv2_evaluate_folder", raw / "labelsTs", predictions, "-djfile", model / "dataset.json",
                  "-pfile", model / "plans.json")  # fmt: skip
    summary = json.loads((predictions / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2


def test_training_resumes(trained):
    """A finished training goes on when the plans ask for more epochs; the first two are not repeated."""
    workspace, _, plans_name, train, model, _ = trained
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
    finished = nnunet_workspace.run("nnUNetv2_train", nnunet_workspace.number, *arguments, "-tr", TRAINER,
                                    "-device", "cpu", status=1)  # fmt: skip
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


def test_missing_weights_end_without_traceback(nnunet_workspace, tmp_path):
    nnunet_workspace.environment["SMALLSEG_WEIGHTS"] = str(tmp_path)
    finished = nnunet_workspace.run("nnUNetv2_train", nnunet_workspace.number, "2d", "all", "-tr",
                                    "nnUNetTrainerSwinUMambaD", "-p", nnunet_workspace.plans_name, "-device", "cpu",
                                    status=1)  # fmt: skip
    assert "smallseg weights fetch vmamba_tiny_imagenet" in finished.stderr
    assert "Traceback" not in finished.stderr
