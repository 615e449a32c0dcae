"""Planning for a trainer and a GPU: what is chosen, why, that stock nnU-Net accepts it, and what wrong calls answer."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import small_networks
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_smallseg import registry, trainers
from nnunetv2_smallseg.cli.main import main
from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.plans import network_planner
from nnunetv2_smallseg.plans.configurations import resolve
from nnunetv2_smallseg.plans.memory import TrainingMemory, training_memory
from nnunetv2_smallseg.plans.network_planner import needed_gib, plan_for_network, usable_bytes

GIB = 2**30
PARAMETERS = 0.25 * GIB


@pytest.fixture
def planning(nnunet_folders, tmp_path, monkeypatch) -> SimpleNamespace:
    """A folder with a fingerprint of the test's own, where planning is as a user's."""
    folder = tmp_path / "preprocessed" / nnunet_folders.dataset
    folder.mkdir(parents=True)
    fingerprint = json.loads((nnunet_folders.preprocessed / "dataset_fingerprint.json").read_text())
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")

    def write_fingerprint(shape: tuple, spacing: tuple) -> None:
        number = len(fingerprint["spacings"])
        content = {**fingerprint, "spacings": [spacing] * number, "shapes_after_crop": [shape] * number}
        (folder / "dataset_fingerprint.json").write_text(json.dumps(content))

    def write_lesions(count: int, extent_mm: tuple | None) -> None:
        lesions = {"count": count, "extent_mm": {"p95": extent_mm and list(extent_mm)}}
        (folder / "lesion_fingerprint.json").write_text(json.dumps({"lesions": {"all": lesions}}))

    def plan(trainer: str, target: float, **options) -> dict:
        return plan_for_network(nnunet_folders.number, trainer, target, **options)[1]

    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    return SimpleNamespace(
        folder=folder, number=nnunet_folders.number, fingerprint=write_fingerprint, lesions=write_lesions, plan=plan
    )


@pytest.fixture
def made_up_memory(monkeypatch) -> list:
    """Replaces the prediction by 32 KiB a pixel, and half of that with checkpointing; records what was asked."""
    asked = []

    def memory(trainer_class, plans, name, dataset_json, *, grad_checkpointing: bool = False) -> TrainingMemory:
        configuration = resolve(plans, name)
        asked.append((name, configuration["patch_size"], configuration["batch_size"]))
        pixels = np.prod(configuration["patch_size"][-2:]) * configuration["batch_size"]
        activations = int(pixels * 2**15 / (2 if grad_checkpointing else 1))
        return TrainingMemory(int(PARAMETERS), 0, 0, activations, 0, 0, 0, "backward")

    monkeypatch.setattr(network_planner, "training_memory", memory)
    return asked


def step_bytes(configuration: dict) -> int:
    return int(np.prod(configuration["patch_size"][-2:]) * configuration["batch_size"] * 2**15 + PARAMETERS)


def test_choices_follow_the_memory(planning, made_up_memory):
    """Two patches as large as the images, 320 x 256 pixels, take 5.25 GiB, at 32 KiB for each pixel."""
    planning.fingerprint((200, 320, 256), (3.0, 0.8, 0.8))
    plans = {target: planning.plan("nnUNetTrainerSwinUMamba", target) for target in (3.0, 7.0, 12.0, 24.0, 2000.0)}
    chosen = {target: plan["configurations"]["2d"] for target, plan in plans.items()}
    for target, configuration in chosen.items():
        planned = configuration["planning"]
        assert planned["predicted_step_bytes"] == step_bytes(configuration) <= usable_bytes(target)
        assert planned["predicted_gb"] <= target
        assert planned["gpu_memory_target_gb"] == target
        assert all(size % registry.network("SwinUMamba").stride == 0 for size in configuration["patch_size"])
        strides = np.prod(configuration["architecture"]["arch_kwargs"]["strides"], axis=0)
        assert all(size % stride == 0 for size, stride in zip(configuration["patch_size"], strides, strict=True))
        slab = resolve(plans[target], "2.5d")
        assert slab["patch_size"] == [3, *configuration["patch_size"]]
        assert slab["data_identifier"] == configuration["data_identifier"] == "nnUNetSmallSegPlans_2d"
        assert plans[target]["plans_name"] == f"nnUNetSmallSegPlans_SwinUMamba_{target:g}GB"
    pixels = [np.prod(configuration["patch_size"]) for configuration in chosen.values()]
    batches = [configuration["batch_size"] for configuration in chosen.values()]
    assert pixels == sorted(pixels)
    assert pixels[0] < pixels[1] == 320 * 256
    assert batches[0] == batches[1] == 2 < batches[2] < batches[3] < batches[4]
    # One more would not fit; with any amount of memory nnU-Net's 5 % of the data set is the limit, in slabs, too.
    configuration = chosen[24.0]
    assert step_bytes({**configuration, "batch_size": configuration["batch_size"] + 1}) > usable_bytes(24)
    cases = json.loads((planning.folder / "dataset.json").read_text())["numTraining"]
    limit = 0.05 * cases * 200
    assert batches[4] == round(limit)
    assert resolve(plans[2000.0], "2.5d")["batch_size"] == round(limit / 3)
    reasons = "\n".join(chosen[3.0]["planning"]["reasons"])
    more = {"patch_size": (224, 160), "batch_size": 2}  # the next larger that nnU-Net proposes
    assert f"224 x 160 would need {needed_gib(step_bytes(more)):.1f} GB" in reasons
    assert "224 x 160 would fit" in reasons
    assert "set_grad_checkpointing" in reasons
    assert f"smallseg fingerprint -d {planning.number}" in reasons
    assert len(made_up_memory) <= 40  # five plans of two configurations


def test_patches_cover_lesions(planning, made_up_memory):
    planning.fingerprint((200, 512, 512), (3.0, 0.5, 0.5))
    free = planning.plan("nnUNetTrainerSwinUMamba", 2.0)["configurations"]["2d"]
    planning.lesions(40, (30.0, 40.0, 64.0))  # 80 x 128 voxels, and the same again around them
    tight = planning.plan("nnUNetTrainerSwinUMamba", 4.0)["configurations"]["2d"]
    assert tight["batch_size"] == 2
    assert tight["patch_size"][0] >= 160
    assert tight["patch_size"][1] >= 256
    assert "40 x 64 mm), 160 x 256 voxels" in "\n".join(tight["planning"]["reasons"])
    assert np.prod(free["patch_size"]) < 160 * 256
    # With less memory two patches of this size do not fit: one, then none, and the error names what would do.
    single = planning.plan("nnUNetTrainerSwinUMamba", 2.3)["configurations"]["2d"]
    assert single["batch_size"] == 1
    assert single["patch_size"][0] >= 160
    assert "two patches do not fit" in "\n".join(single["planning"]["reasons"])
    with pytest.raises(SmallSegError, match=r"does not fit 1 GB in 2d.*needs at least [\d.]+ GB") as refused:
        planning.plan("nnUNetTrainerSwinUMamba", 1.0)
    least = float(str(refused.value).split("-gpu_memory_target ")[1].split()[0])
    assert planning.plan("nnUNetTrainerSwinUMamba", least)["configurations"]["2d"]["batch_size"] == 1
    # A patch that was given overrules the lesions, and lesions larger than the images ask for the images.
    assert planning.plan("nnUNetTrainerSwinUMamba", 2.0, patch_size=(96, 100))["configurations"]["2d"][
        "patch_size"
    ] == [96, 128]
    planning.lesions(1, (30.0, 400.0, 400.0))
    assert planning.plan("nnUNetTrainerSwinUMamba", 30.0)["configurations"]["2d"]["patch_size"] == [512, 512]
    planning.lesions(0, None)
    assert planning.plan("nnUNetTrainerSwinUMamba", 2.0)["configurations"]["2d"]["patch_size"] == free["patch_size"]


def test_nnunets_own_network_gets_the_strides_of_its_patch(planning, made_up_memory):
    planning.fingerprint((1, 600, 400), (999.0, 1.0, 1.0))  # single images
    plans = planning.plan("nnUNetTrainerAmplification", 4.0, batch_size=3)
    assert list(plans["configurations"]) == ["2d"]
    configuration = plans["configurations"]["2d"]
    assert configuration["batch_size"] == 3
    settings = configuration["architecture"]["arch_kwargs"]
    strides = np.prod(settings["strides"], axis=0)
    assert settings["n_stages"] == len(settings["strides"])
    assert all(size % stride == 0 for size, stride in zip(configuration["patch_size"], strides, strict=True))
    assert step_bytes(configuration) <= usable_bytes(4.0)


def test_other_preprocessing_gets_data_of_its_own(planning, made_up_memory):
    name = "nnUNetSmallSegPlans"
    assert main(["plan", "-d", str(planning.number)]) == 0
    shared = planning.plan("nnUNetTrainerHUNet", 8.0)["configurations"]["2d"]
    assert shared["data_identifier"] == f"{name}_2d"
    path = planning.folder / f"{name}.json"
    edited = json.loads(path.read_text())
    edited["configurations"]["2d"]["spacing"] = [2.0, 2.0]
    path.write_text(json.dumps(edited))
    own = planning.plan("nnUNetTrainerHUNet", 8.0)["configurations"]["2d"]
    assert own["data_identifier"] == f"{name}_HUNet_8GB_2d"
    assert "nnUNetSmallSegPlans preprocesses otherwise" in "\n".join(own["planning"]["reasons"])


def test_stock_functions_accept_the_plans(planning, nnunet_folders, capsys, monkeypatch):
    """The command, nnU-Net's preprocessing, and a training step on its data, on a small network."""
    trainer, name = "nnUNetTrainerHUNet", "nnUNetSmallSegPlans_HUNet_1.5GB"
    command = ["plan", "-d", str(planning.number), "-tr", trainer, "-gpu_memory_target", "1.5", "-batch_size", "2",
               "-patch_size", "64", "64"]  # fmt: skip
    assert main(command) == 0
    # Options of the network in the plans are kept, and planned for.
    path = planning.folder / f"{name}.json"
    large = json.loads(path.read_text())
    large["configurations"]["2d"]["network_options"] = small_networks()
    path.write_text(json.dumps(large))
    capsys.readouterr()
    assert main(command) == 0
    printed = capsys.readouterr().out
    plans = json.loads(path.read_text())
    assert plans["configurations"]["2d"]["network_options"]["HUNet"] == {"base_channels": 8}
    planned = plans["configurations"]["2d"]["planning"]
    assert planned["predicted_step_bytes"] < large["configurations"]["2d"]["planning"]["predicted_step_bytes"]
    assert f"memory {planned['predicted_gb']:.2f} of 1.5 GB" in printed
    assert all(reason in printed for reason in planned["reasons"])
    assert f"-tr {trainer} -p {name}" in printed

    (planning.folder / "gt_segmentations").mkdir()
    shutil.copy(nnunet_folders.preprocessed / "dataset.json", planning.folder)
    preprocess_dataset(planning.number, name, ["2d"], [1])
    assert main(command) == 0
    assert "preprocessed already" in capsys.readouterr().out
    trained = getattr(trainers, trainer)(
        {**plans, "continue_training": False}, "2.5d", 0, json.loads((planning.folder / "dataset.json").read_text()),
        torch.device("cpu"),
    )  # fmt: skip
    trained.initialize()
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    training, _ = trained.get_dataloaders()
    batch = next(training)
    assert list(batch["data"].shape) == [2, 1, 3, 64, 64]
    assert np.isfinite(trained.train_step(batch)["loss"])
    assert PlansManager(plans).get_configuration("2.5d").batch_size == 2
    # What was predicted is what the final plans take.
    memory = training_memory(getattr(trainers, trainer), plans, "2.5d", trained.dataset_json)
    assert memory.total == plans["configurations"]["2.5d"]["planning"]["predicted_step_bytes"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("-tr", "nnUNetTrainerSwinUmamba"), 2, "did you mean nnUNetTrainerSwinUMamba"),
        (("-tr", "SwinMamba"), 2, "nnUNetTrainerSwinUMamba"),
        (("-tr", "xyz"), 2, "there is no trainer 'xyz': smallseg trainers lists"),
        (("-gpu_memory_target", 8), 2, "-gpu_memory_target needs -tr"),
        (("-tr", "nnUNetTrainerHUNet", "-gpu_memory_target", 0), 2, "0 is not a positive number"),
        (("-tr", "nnUNetTrainerHUNet", "-gpu_memory_target", -3), 2, "not a positive number"),
        (("-tr", "nnUNetTrainerHUNet", "-gpu_memory_target", "lots"), 2, "invalid positive_number value: 'lots'"),
        (("-tr", "nnUNetTrainerHUNet", "-gpu_memory_target", 0.4), 1, "needs at least"),
    ],
)
def test_wrong_calls(planning, made_up_memory, arguments, status, message, capsys):
    before = sorted(planning.folder.iterdir())
    try:
        found = main(["plan", "-d", str(planning.number), *map(str, arguments)])
    except SystemExit as stop:  # argparse
        found = stop.code
    assert found == status
    assert message in capsys.readouterr().err
    assert not [path for path in planning.folder.iterdir() if "Plans" in path.name]
    assert set(before) <= set(planning.folder.iterdir())


def test_a_damaged_lesion_fingerprint_is_an_error(planning, made_up_memory):
    (planning.folder / "lesion_fingerprint.json").write_text("{}")
    with pytest.raises(SmallSegError, match="write it again with smallseg fingerprint"):
        planning.plan("nnUNetTrainerHUNet", 8.0)
