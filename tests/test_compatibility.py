"""Every trainer with every feature of nnU-Net: trains, validates, saves, and predicts as before after loading.

One body over the registry. By default every trainer meets two of the features and every feature several trainers;
``pytest -m "slow or not slow" tests/test_compatibility.py`` runs all, and ``python scripts/compatibility.py`` writes
what it found into ``docs/compatibility.md``.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from dataclasses import dataclass
from pathlib import Path

import feature_datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, Threads, small_networks
from feature_datasets import DATASETS, PATCH_SIZE
from nnunetv2.ensembling.ensemble import entry_point_ensemble_folders
from nnunetv2.evaluation.find_best_configuration import find_best_configuration_entry_point
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor, predict_entry_point
from nnunetv2.model_sharing.entry_points import export_pretrained_model_entry, install_from_zip_entry_point
from nnunetv2.run.run_training import run_training_entry
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_smallseg import registry, trainers
from nnunetv2_smallseg.plans.planner import DEFAULT_PLANS_NAME
from nnunetv2_smallseg.trainers import base

CONFIGURATIONS = ("2d", "2.5d")
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Feature:
    """What a cell of the matrix asks of a trainer.

    Attributes:
        data: Data set it is trained on.
        patch_size: Height and width of a patch; None for that of the plans.
        batch_size: None for that of the plans.
        cascade: Whether the segmentation of an earlier stage is input, too.
    """

    data: str = "labels"
    patch_size: tuple[int, int] | None = None
    batch_size: int | None = None
    cascade: bool = False


FEATURES = {
    "labels, 1 channel": Feature(),
    "regions": Feature("regions"),
    "ignore label": Feature("ignore"),
    "cascade": Feature(cascade=True),
    "2 channels": Feature("two channels"),
    "4 channels": Feature("four channels"),
    "batch size 1": Feature(batch_size=1),
    # Multiples of 16, because nnU-Net's own network takes nothing else; ours are tested with any size, too.
    "patch 48 x 80": Feature(patch_size=(48, 80)),
    "1 or 2 slices": Feature("thin"),
    "class missing in the fold": Feature("missing class"),
    "case without foreground": Feature("no foreground"),
}


def cells() -> list:
    """All trainers, configurations and features; all but a diagonal are marked as slow."""
    found = []
    for row, name in enumerate(registry.trainers()):
        for configuration in CONFIGURATIONS:
            for column, feature in enumerate(FEATURES):
                shift = len(FEATURES) // 2 * CONFIGURATIONS.index(configuration)
                quick = (row + shift) % len(FEATURES) == column
                marks = () if quick else (pytest.mark.slow,)
                found.append(pytest.param(name, configuration, feature, marks=marks))
    return found


@pytest.fixture(scope="module")
def feature_workspace(tmp_path_factory):
    """nnU-Net's folders; data sets are prepared in them when they are first asked for."""
    folder = tmp_path_factory.mktemp("features")
    prepared = set()
    with pytest.MonkeyPatch.context() as patch:
        for part in ("raw", "preprocessed"):
            (folder / part).mkdir()
            patch.setenv(f"nnUNet_{part}", str(folder / part))
        patch.setenv("nnUNet_extTrainer", str(ROOT / "nnunetv2_smallseg" / "extension"))
        patch.setattr(multiprocessing, "get_context", lambda method: Threads)

        def workspace(data: str) -> Path:
            """The preprocessed data set."""
            dataset = DATASETS[data]
            if data not in prepared:
                patch.setenv("nnUNet_n_proc_DA", "1")
                feature_datasets.prepare(dataset, folder)
                prepared.add(data)
            patch.setenv("nnUNet_n_proc_DA", "0")
            return folder / "preprocessed" / dataset.name

        yield workspace


def plans_for(preprocessed: Path, feature: Feature) -> dict:
    """Plans of a data set, changed to what the feature asks for, with small networks."""
    plans = json.loads((preprocessed / f"{DEFAULT_PLANS_NAME}.json").read_text())
    plans["continue_training"] = False  # as nnUNetv2_train sets it
    planar, slab = (plans["configurations"][name] for name in CONFIGURATIONS)
    planar["network_options"] = small_networks()
    if feature.patch_size is not None:
        planar["patch_size"] = list(feature.patch_size)
        slab["patch_size"] = [slab["patch_size"][0], *feature.patch_size]
    if feature.batch_size is not None:
        planar["batch_size"] = feature.batch_size
    if feature.cascade:
        for name in CONFIGURATIONS:
            plans["configurations"][f"{name} cascade"] = {"inherits_from": name, "previous_stage": "2d"}
    return plans


def write_previous_stage(trainer) -> None:
    """The labels themselves as the predictions of an earlier stage."""
    folder = Path(trainer.folder_with_segs_from_previous_stage)
    folder.mkdir(parents=True, exist_ok=True)
    dataset_class = infer_dataset_class(trainer.preprocessed_dataset_folder)
    dataset = dataset_class(trainer.preprocessed_dataset_folder)
    for case in dataset.identifiers:
        segmentation = dataset.load_case(case)[1]
        dataset_class.save_seg(np.asarray(segmentation)[0], str(folder / case))


def predictor_of(trainer, network: torch.nn.Module | None = None) -> nnUNetPredictor:
    """A predictor with the trained network, or with what was saved."""
    predictor = nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    if network is None:
        predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    else:
        predictor.manual_initialization(
            network, trainer.plans_manager, trainer.configuration_manager, [network.state_dict()],
            trainer.dataset_json, type(trainer).__name__, trainer.inference_allowed_mirroring_axes,
        )  # fmt: skip
    return predictor


@pytest.mark.parametrize(("name", "configuration", "feature"), cells())
def test_trainer_with_feature(
    name, configuration, feature, feature_workspace, quick_nnunet, tmp_path, monkeypatch, record_property
):
    record_property("cell", json.dumps([name, configuration, list(FEATURES).index(feature), feature]))
    wanted = FEATURES[feature]
    preprocessed = feature_workspace(wanted.data)
    plans = plans_for(preprocessed, wanted)
    dataset_json = json.loads((preprocessed / "dataset.json").read_text())
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setattr(base, "load_pretrained", lambda *arguments, **options: WeightsReplaced)
    trainer = getattr(trainers, name)(
        plans, f"{configuration} cascade" if wanted.cascade else configuration, 0, dataset_json, torch.device("cpu")
    )
    try:
        if wanted.cascade:
            write_previous_stage(trainer)
        trainer.run_training()
        trainer.perform_actual_validation()
    except NotImplementedError as error:
        # Only what the trainer names: a message that is about something else is no excuse.
        record_property("not implemented", str(error))
        assert feature.split(",")[0] in str(error)
        return

    fold = Path(trainer.output_folder)
    validation = json.loads((fold / "validation" / "summary.json").read_text())
    assert len(validation["metric_per_case"]) == 1
    losses = trainer.logger.local_logger.my_fantastic_logging
    assert np.isfinite(losses["train_losses"] + losses["val_losses"]).all()
    assert (fold / "checkpoint_final.pth").is_file()

    # Two windows in a slice, and in 2.5d fewer slices than a slab where the data are thin.
    height, width = PATCH_SIZE
    image = torch.randn(trainer.num_input_channels, 2 if wanted.data == "thin" else 3, height, width + 9)
    trainer.set_deep_supervision_enabled(False)
    before = predictor_of(trainer, trainer.network).predict_sliding_window_return_logits(image)
    after = predictor_of(trainer).predict_sliding_window_return_logits(image)
    assert after.shape == (trainer.label_manager.num_segmentation_heads, *image.shape[1:])
    # nnU-Net sums windows in half precision, on the CPU as well: equal inputs give equal sums.
    torch.testing.assert_close(after, before, rtol=0, atol=TOLERANCE)


class WeightsReplaced:
    """Stands for the report of loading weights: the file itself is not the point here."""

    @staticmethod
    def summary() -> str:
        return "weights replaced by the test"


def test_every_feature_is_tested_by_default_in_both_configurations():
    quick = {cell.values[1:] for cell in cells() if not cell.marks}
    assert quick == {(configuration, feature) for configuration in CONFIGURATIONS for feature in FEATURES}


SHARED_PLANS = "nnUNetSharedPlans"


def chains() -> list:
    """All trainers with all folds; one trainer with two folds without the mark ``slow``."""
    everything = [pytest.param(name, range(5), marks=pytest.mark.slow) for name in registry.trainers()]
    return [pytest.param("nnUNetTrainerMambaAHNet", range(2)), *everything]


@pytest.mark.parametrize(("name", "folds"), chains())
def test_folds_ensembles_and_shared_models(
    name, folds, feature_workspace, command, monkeypatch, tmp_path, record_property
):
    """What follows trainings: the best configuration, ensembles, models as zip files, weights for other trainings."""
    record_property("commands", json.dumps([name, len(folds)]))
    preprocessed = feature_workspace("labels")
    dataset = DATASETS["labels"]
    plans = {**plans_for(preprocessed, Feature()), "plans_name": SHARED_PLANS}
    (preprocessed / f"{SHARED_PLANS}.json").write_text(json.dumps(plans))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setattr(base, "load_pretrained", lambda *arguments, **options: WeightsReplaced)
    results, which = tmp_path / "results" / dataset.name, ("-tr", name, "-p", SHARED_PLANS)

    def train(configuration: str, fold: object, *options: object) -> None:
        command(run_training_entry, dataset.number, configuration, fold, *which, "-device", "cpu", *options)

    for configuration in CONFIGURATIONS:
        for fold in folds:
            train(configuration, fold, "--npz")
    train("2d", "all")
    command(find_best_configuration_entry_point, dataset.number, *which, "-c", *CONFIGURATIONS, "-np", 1, "-f", *folds)
    assert (results / "inference_instructions.txt").is_file()
    assert list((results / "ensembles").iterdir())

    model = results / f"{name}__{SHARED_PLANS}__2d"
    summary = model / "fold_0" / "validation" / "summary.json"
    for choice in ((), ("--val_best",)):
        summary.unlink()
        train("2d", 0, "--val", *choice)
        assert summary.is_file()

    def predict(output: str, configuration: str, *chosen: object) -> np.ndarray:
        command(predict_entry_point, "-d", dataset.number, "-i", tmp_path / "input", "-o", tmp_path / output, "-c",
                configuration, *which, "-f", *chosen, "-device", "cpu", "-npp", 0, "-nps", 0, "--disable_tta",
                "--save_probabilities")  # fmt: skip
        [probabilities] = (tmp_path / output).glob("*.npz")
        return np.load(probabilities)["probabilities"]

    (tmp_path / "input").mkdir()
    shutil.copy(preprocessed.parents[1] / "raw" / dataset.name / "imagesTr" / "case_0_0000.nii.gz", tmp_path / "input")
    planar, slab = (predict(configuration, configuration, *folds) for configuration in CONFIGURATIONS)
    assert np.isfinite(predict("all", "2d", "all")).all()
    command(entry_point_ensemble_folders, "-i", tmp_path / "2d", tmp_path / "2.5d", "-o", tmp_path / "both",
            "-np", 1, "--save_npz")  # fmt: skip
    [ensemble] = (tmp_path / "both").glob("*.npz")
    np.testing.assert_allclose(np.load(ensemble)["probabilities"], (planar + slab) / 2, atol=1e-3)

    command(export_pretrained_model_entry, "-d", dataset.number, "-o", tmp_path / "model.zip", "-c", "2d", *which,
            "-f", *folds)  # fmt: skip
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "elsewhere"))
    command(install_from_zip_entry_point, tmp_path / "model.zip")
    np.testing.assert_array_equal(predict("installed", "2d", *folds), planar)

    slab_model = f"{name}__{SHARED_PLANS}__2.5d/fold_0/checkpoint_final.pth"
    train("2.5d", 0, "-pretrained_weights", results / slab_model)
    assert (tmp_path / "elsewhere" / dataset.name / slab_model).is_file()
