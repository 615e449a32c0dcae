"""The curriculum inside trainings: batches, epochs, checkpoints, several processes."""

from __future__ import annotations

import copy
import json
import math
import random
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_networks
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss, DC_and_topk_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed, multiprocessing

from nnunetv2_smallseg.data.curriculum import Curriculum
from nnunetv2_smallseg.errors import CommandStopped
from nnunetv2_smallseg.losses.weighted import SampleWeightedLoss, WeightedDice, WeightedDiceCELoss
from nnunetv2_smallseg.trainers import nnUNetTrainerCurriculum, nnUNetTrainerSwinUMambaDScratch
from nnunetv2_smallseg.trainers.curriculum import CurriculumMixin, with_sample_weights
from nnunetv2_smallseg.trainers.slabs import SlabTrainer


class OnStockTrainer(CurriculumMixin, nnUNetTrainer):
    """nnU-Net's trainer as it is, with the curriculum."""


class OnSwinUMamba(CurriculumMixin, nnUNetTrainerSwinUMambaDScratch):
    """A trainer of ours, without deep supervision."""


class Even(nnUNetTrainerCurriculum):
    """All weights 1."""

    min_curriculum_weight = 1.0


def make(trainer: type, workspace, configuration: str = "2d", plans: dict | None = None, **dataset_changes):
    plans = copy.deepcopy(plans or workspace.plans())
    plans["continue_training"] = False
    for settings in plans["configurations"].values():
        settings["network_options"] = small_networks()
    plans["configurations"]["2d"]["patch_size"] = [32, 32]
    if "2.5d" in plans["configurations"]:
        plans["configurations"]["2.5d"]["patch_size"] = [3, 32, 32]
    made = trainer(plans, configuration, 0, {**workspace.dataset_json(), **dataset_changes}, torch.device("cpu"))
    made.num_epochs, made.num_iterations_per_epoch, made.num_val_iterations_per_epoch = 4, 3, 1
    return made


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what nnU-Net's data loader draws from
    torch.manual_seed(seed)


def run_epoch(trainer: nnUNetTrainer, seed: int) -> None:
    """One turn of nnU-Net's ``run_training``."""
    seed_everything(seed)
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    steps = range(trainer.num_iterations_per_epoch)
    trainer.on_train_epoch_end([trainer.train_step(next(trainer.dataloader_train)) for _ in steps])
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    trainer.on_epoch_end()


def log_of(trainer: nnUNetTrainer) -> str:
    return Path(trainer.log_file).read_text()


def test_an_epoch_measures_logs_and_draws(nnunet_folders):
    trainer = make(nnUNetTrainerCurriculum, nnunet_folders)
    trainer.on_train_start()
    curriculum = trainer.curriculum
    assert curriculum.keys == sorted(trainer.do_split()[0])  # and the loader's own keys are found in train_step
    assert 0 < curriculum.fractions.max() < 0.1
    assert not curriculum.seen.any()
    run_epoch(trainer, 0)
    assert curriculum.seen.any()
    assert (curriculum.mean_loss[curriculum.seen] > 0).all()
    assert curriculum.fractions[curriculum.seen].min() > 0  # patches without lesion are not measured
    assert "Curriculum weights" in log_of(trainer)
    values = trainer.logger.get_value("curriculum_weight_small", step=None)
    assert len(values) == 1
    assert values[0] < trainer.logger.get_value("curriculum_weight_large", step=-1)
    for name in ("curriculum.png", "progress.png"):
        assert (Path(trainer.output_folder) / name).stat().st_size > 1000
    run_epoch(trainer, 1)
    assert len(trainer.logger.get_value("curriculum_spread", step=None)) == 2
    assert not list(Path(trainer.output_folder).glob(".*"))


def test_lesion_sizes_are_those_of_the_phantom(nnunet_folders):
    import SimpleITK as sitk

    trainer = make(nnUNetTrainerCurriculum, nnunet_folders)
    trainer.on_train_start()
    for key, fraction in zip(trainer.curriculum.keys, trainer.curriculum.fractions, strict=True):
        labels = sitk.GetArrayFromImage(
            sitk.ReadImage(str(nnunet_folders.folder / "raw" / nnunet_folders.dataset / "labelsTr" / f"{key}.nii.gz"))
        )
        assert fraction == pytest.approx((labels == 1).mean(), rel=0.2, abs=1e-6)  # cropped and resampled


def test_all_weights_one_trains_exactly_as_without(nnunet_folders):
    states = []
    for kind in (SlabTrainer, Even):
        seed_everything(1)
        trainer = make(kind, nnunet_folders)
        trainer.on_train_start()
        run_epoch(trainer, 2)
        states.append((trainer.network.state_dict(), trainer.logger.get_value("val_losses", step=-1)))
    (stock, stock_loss), (even, even_loss) = states
    assert stock_loss == even_loss
    assert all(torch.equal(tensor, even[name]) for name, tensor in stock.items())


def test_weights_change_the_training(nnunet_folders):
    states = []
    for kind in (Even, nnUNetTrainerCurriculum):
        seed_everything(1)
        trainer = make(kind, nnunet_folders)
        trainer.on_train_start()
        run_epoch(trainer, 2)
        states.append(trainer.network.state_dict())
    assert any(not torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_resuming_goes_on_bit_by_bit(nnunet_folders, tmp_path):
    whole = make(nnUNetTrainerCurriculum, nnunet_folders)
    whole.on_train_start()
    for epoch in range(2):
        run_epoch(whole, epoch)
    whole.current_epoch -= 1  # as at the end of on_epoch_end, before it counts on
    whole.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    whole.current_epoch += 1
    resumed = make(nnUNetTrainerCurriculum, nnunet_folders)
    resumed.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    resumed.on_train_start()
    assert resumed.curriculum.state_dict() == whole.curriculum.state_dict()
    for epoch in range(2, 4):
        run_epoch(whole, epoch)
        run_epoch(resumed, epoch)
        assert resumed._epoch_weights.tobytes() == whole._epoch_weights.tobytes()
    assert resumed.curriculum.state_dict() == whole.curriculum.state_dict()
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name
    key = "curriculum_weight_large"
    assert resumed.logger.get_value(key, step=None) == whole.logger.get_value(key, step=None)


def test_checkpoints_stay_those_of_nnunet(nnunet_folders, tmp_path):
    trainer = make(nnUNetTrainerCurriculum, nnunet_folders)
    trainer.on_train_start()
    run_epoch(trainer, 0)
    nnUNetTrainer.save_checkpoint(trainer, str(tmp_path / "stock.pth"))
    trainer.save_checkpoint(str(tmp_path / "own.pth"))
    stock, own = (torch.load(tmp_path / name, weights_only=False) for name in ("stock.pth", "own.pth"))
    # Both are written by nnU-Net, in one go: our entry comes through the optimizer's state.
    assert own["optimizer_state"]["smallseg"] == {"curriculum_state": trainer.curriculum.state_dict()}
    assert stock.keys() == own.keys()
    assert all(torch.equal(tensor, own["network_weights"][name]) for name, tensor in stock["network_weights"].items())
    for part in ("logging", "init_args", "current_epoch", "trainer_name", "inference_allowed_mirroring_axes"):
        assert repr(stock[part]) == repr(own[part])
    Path(trainer.output_folder).mkdir(exist_ok=True)
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    assert torch.equal(next(predictor.network.parameters()), next(trainer.network.parameters()))


def test_a_checkpoint_without_state_starts_from_the_sizes(nnunet_folders, tmp_path):
    old = make(SlabTrainer, nnunet_folders)
    old.on_train_start()
    for epoch in range(2):
        run_epoch(old, epoch)
    old.save_checkpoint(str(tmp_path / "old.pth"))
    trainer = make(nnUNetTrainerCurriculum, nnunet_folders)
    trainer.load_checkpoint(str(tmp_path / "old.pth"))
    trainer.current_epoch = 2
    trainer.on_train_start()
    assert "the checkpoint has no state of it; it starts from the lesion sizes" in log_of(trainer)
    assert not trainer.curriculum.seen.any()
    run_epoch(trainer, 2)  # the log takes values although earlier epochs have none
    values = trainer.logger.get_value("curriculum_spread", step=None)
    assert [math.isnan(value) for value in values] == [True, True, False]


def test_a_checkpoint_of_other_cases(nnunet_folders, tmp_path):
    trainer = make(nnUNetTrainerCurriculum, nnunet_folders)
    trainer.on_train_start()
    first = trainer.curriculum.keys[0]
    trainer.curriculum = Curriculum({first: 0.1, "elsewhere": 0.2})
    trainer.curriculum.observe([(first, 0.5)])
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    resumed = make(nnUNetTrainerCurriculum, nnunet_folders)
    resumed.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    resumed.on_train_start()
    number = len(resumed.curriculum.keys)
    assert f"the checkpoint knows 1 of {number} training cases" in log_of(resumed)
    assert resumed.curriculum.seen.tolist() == [True] + [False] * (number - 1)


@pytest.mark.parametrize("kind", [OnStockTrainer, OnSwinUMamba])
def test_other_trainers(kind, nnunet_folders):
    trainer = make(kind, nnunet_folders)
    trainer.on_train_start()
    run_epoch(trainer, 0)
    assert trainer.curriculum.seen.any()


@pytest.mark.parametrize("configuration", ["2.5d", "3d_fullres"])
def test_slabs_and_volumes(configuration, nnunet_folders):
    plans = nnunet_folders.plans("nnUNetPlans" if configuration == "3d_fullres" else None)
    plans["configurations"].get("3d_fullres", {})["patch_size"] = [16, 32, 32]
    trainer = make(nnUNetTrainerCurriculum, nnunet_folders, configuration, plans)
    trainer.on_train_start()
    run_epoch(trainer, 0)
    assert trainer.curriculum.seen.any()


def test_regions(nnunet_folders):
    labels = {"background": 0, "lesion": [1, 2], "core": 2}
    trainer = make(nnUNetTrainerCurriculum, nnunet_folders, labels=labels, regions_class_order=[1, 2])
    trainer.on_train_start()
    run_epoch(trainer, 0)
    assert trainer.curriculum.seen.any()


@pytest.mark.parametrize(
    ("labels", "options", "channels"),
    [
        ({"background": 0, "lesion": [1, 2], "core": 2, "ignore": 3}, {"regions_class_order": [1, 2]}, 3),
        ({"background": 0, "lesion": 1, "ignore": 2}, {}, 1),
    ],
)
def test_ignore_label(labels, options, channels, nnunet_folders):
    trainer = make(nnUNetTrainerCurriculum, nnunet_folders, labels=labels, **options)
    trainer.initialize()
    trainer.curriculum = Curriculum({"a": 0.1, "b": 0.2})
    trainer.on_train_epoch_start()
    targets = []
    for scale in trainer._get_deep_supervision_scales():
        target = torch.zeros(2, channels, *[round(32 * factor) for factor in scale])
        target[0, 0, 0, 0] = 1
        if channels == 1:
            target[:, :, 1:] = 2
        else:
            target[:, -1, 1:] = 1
        targets.append(target)
    batch = {"data": torch.randn(2, 1, 32, 32), "target": targets, "keys": ["a", "b"]}
    trainer._register_logged_keys()
    trainer.on_train_epoch_end([trainer.train_step(batch)])
    assert trainer.curriculum.seen.tolist() == [True, False]


def test_lesion_labels(nnunet_folders):
    class OnlyTwo(nnUNetTrainerCurriculum):
        lesion_labels = (2,)

    labels = {"background": 0, "organ": 1, "lesion": 2}
    trainer = make(OnlyTwo, nnunet_folders, labels=labels)
    trainer.on_train_start()
    run_epoch(trainer, 0)
    assert not trainer.curriculum.fractions.any()  # the phantom has label 1 only
    assert not trainer.curriculum.seen.any()
    with pytest.raises(CommandStopped, match=r"lesion_labels of OnlyTwo is \(2,\).*labels of the data set, \[1\]"):
        make(OnlyTwo, nnunet_folders).initialize()
    regions = {"background": 0, "whole": [1, 2], "core": 2}
    trainer = make(OnlyTwo, nnunet_folders, labels=regions, regions_class_order=[1, 2])
    trainer.initialize()
    assert trainer.loss.loss.lesion_channels == (1,)
    OnlyTwo.lesion_labels = (1,)
    with pytest.raises(CommandStopped, match="every region of the data set holds other labels too"):
        make(OnlyTwo, nnunet_folders, labels=regions, regions_class_order=[1, 2]).initialize()


def test_unknown_cases_are_an_error(nnunet_folders):
    trainer = make(nnUNetTrainerCurriculum, nnunet_folders)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    with pytest.raises(KeyError, match="elsewhere"):
        trainer.train_step({**batch, "keys": ["elsewhere"] * len(batch["keys"])})


def test_other_losses_are_refused():
    options = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    for loss in (
        DC_and_topk_loss(options, {"k": 10}),
        DC_and_CE_loss(options, {}),  # SoftDiceLoss
        DC_and_CE_loss(options, {"weight": torch.ones(2)}, dice_class=MemoryEfficientSoftDiceLoss),
        torch.nn.CrossEntropyLoss(),
    ):
        with pytest.raises(NotImplementedError, match="cannot weigh the samples of this loss"):
            with_sample_weights(loss)


def test_compiled_losses_stay_compiled():
    options = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    stock = DC_and_CE_loss(options, {}, dice_class=MemoryEfficientSoftDiceLoss)
    stock.dc = torch.compile(stock.dc)
    assert isinstance(with_sample_weights(stock).loss.dice, torch._dynamo.OptimizedModule)


class Parent:
    """The least that the mixin needs of a trainer; its processes train without a GPU."""

    current_epoch, num_epochs, device, local_rank = 3, 4, torch.device("cpu"), 0

    def __init__(self, is_ddp: bool) -> None:
        self.is_ddp = is_ddp
        self.loss = SampleWeightedLoss(WeightedDiceCELoss(WeightedDice(batch_dice=True, ddp=is_ddp)))
        self.logger = self
        self.curriculum = Curriculum({"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1})

    def on_train_epoch_start(self) -> None:
        pass

    def train_step(self, batch: dict) -> dict:
        return {"loss": self.loss(batch["data"], batch["target"])}

    def on_train_epoch_end(self, outputs: list[dict]) -> None:
        pass

    def log(self, *arguments) -> None:
        pass

    def print_to_log_file(self, *arguments) -> None:
        pass


class Small(CurriculumMixin, Parent):
    pass


def batches(rank: int) -> list[dict]:
    """Two batches of a process; case b is seen by both."""
    generator = torch.Generator().manual_seed(rank)
    return [
        {
            "keys": np.array([["a", "b"], ["b", "d"]][rank]),
            "data": torch.randn((2, 2, 8, 8), generator=generator),
            "target": torch.randint(0, 2, (2, 1, 8, 8), generator=generator),
        }
        for _ in range(2)
    ]


def train_an_epoch(trainer: Small, steps: list[dict]) -> dict:
    for _ in range(2):
        trainer.on_train_epoch_start()
        trainer.on_train_epoch_end([trainer.train_step(batch) for batch in steps])
    return {"state": trainer.curriculum.state_dict(), "weights": trainer.curriculum.weights(1.0).tolist()}


def train_beside_each_other(rank: int, port: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    trainer = Small(is_ddp=True)
    Path(folder, f"{rank}.json").write_text(json.dumps(train_an_epoch(trainer, batches(rank))))
    distributed.barrier()  # gloo of PyTorch 2.7 may wait forever for a process that is gone
    distributed.destroy_process_group()


def test_two_processes_have_the_table_of_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(train_beside_each_other, (port, str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first == train_an_epoch(Small(is_ddp=False), batches(0) + batches(1))
    assert first["state"]["seen"] == [True, True, False, True]
