"""Every trainer of the registry through nnU-Net's own commands: train, resume, validate, predict, on small networks.

The commands run in this process, by the functions behind ``nnUNetv2_train`` and ``nnUNetv2_predict``, and nnU-Net's
worker processes are threads: starting processes would take longer than all other tests. ``test_end_to_end.py`` starts
them as a user does. By default each trainer is tested in one configuration, with ``-m "slow or not slow"`` in both.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import shrink_networks
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
from nnunetv2.run.run_training import run_training_entry

from nnunetv2_smallseg import registry
from nnunetv2_smallseg.trainers import base

PLANS_NAME = "nnUNetShortPlans"


def write_short_plans(workspace, num_epochs: int) -> None:
    """Plans for ``num_epochs`` epochs of two iterations on small networks."""
    plans = {**workspace.plans(), "plans_name": PLANS_NAME}
    shrink_networks(plans)
    plans["configurations"]["2d"]["training"] = {
        "num_epochs": num_epochs,
        "num_iterations_per_epoch": 2,
        "num_val_iterations_per_epoch": 1,
    }
    (workspace.preprocessed / f"{PLANS_NAME}.json").write_text(json.dumps(plans))


class WeightsReplaced:
    """Stands for the report of loading weights: the file itself is not the point here."""

    @staticmethod
    def summary() -> str:
        return "weights replaced by the test"


def cells() -> list:
    """All trainers and configurations; each trainer has one that is not marked as slow, in turn."""
    configurations = ("2d", "2.5d")
    return [
        pytest.param(name, configuration, marks=() if row % 2 == column else pytest.mark.slow)
        for row, name in enumerate(registry.trainers())
        for column, configuration in enumerate(configurations)
    ]


@pytest.mark.parametrize(("name", "configuration"), cells())
def test_train_resume_validate_predict(name, configuration, nnunet_folders, command, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(base, "load_pretrained", lambda *arguments, **options: WeightsReplaced)
    train = (nnunet_folders.number, configuration, 0, "-tr", name, "-p", PLANS_NAME, "-device", "cpu")

    write_short_plans(nnunet_folders, 1)
    command(run_training_entry, *train)
    model = tmp_path / "results" / nnunet_folders.dataset / f"{name}__{PLANS_NAME}__{configuration}"
    first = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False, map_location="cpu")
    assert first["current_epoch"] == 1
    case_results = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())["metric_per_case"]
    assert len(case_results) == 1

    write_short_plans(nnunet_folders, 2)
    capsys.readouterr()
    command(run_training_entry, *train, "--c")
    printed = capsys.readouterr().out
    assert "Epoch 1" in printed
    assert "Epoch 0" not in printed
    final = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False, map_location="cpu")
    assert final["current_epoch"] == 2
    assert any(not torch.equal(final["network_weights"][key], value) for key, value in first["network_weights"].items())

    images = nnunet_folders.folder / "raw" / nnunet_folders.dataset / "imagesTs"
    image = min(images.iterdir())
    (tmp_path / "input").mkdir()
    shutil.copy(image, tmp_path / "input")
    command(predict_entry_point, "-d", nnunet_folders.number, "-i", tmp_path / "input", "-o", tmp_path / "output",
            "-c", configuration, "-tr", name, "-p", PLANS_NAME, "-f", 0, "-device", "cpu", "-npp", 0, "-nps", 0,
            "--disable_tta")  # fmt: skip
    [prediction] = (tmp_path / "output").glob("*.nii.gz")
    segmentation = sitk.ReadImage(str(prediction))
    assert segmentation.GetSize() == sitk.ReadImage(str(image)).GetSize()
    assert set(np.unique(sitk.GetArrayFromImage(segmentation))) <= {0, 1}
