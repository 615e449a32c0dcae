"""The demo refuses what it cannot do, remembers what is done, goes on from there, and cleans up."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_smallseg.cli.main import main
from nnunetv2_smallseg.demo import phantom as phantom_module
from nnunetv2_smallseg.demo import pipeline, settings
from nnunetv2_smallseg.demo.console import Console, TrainingProgress, format_seconds
from nnunetv2_smallseg.demo.dataset import read_dataset
from nnunetv2_smallseg.demo.phantom import write_phantom
from nnunetv2_smallseg.demo.settings import DemoSettings
from nnunetv2_smallseg.errors import SmallSegError, UsageError

NAME = settings.PHANTOM_NAME
COMMANDS = [
    "nnUNetv2_extract_fingerprint",
    "smallseg",
    "nnUNetv2_preprocess",
    "nnUNetv2_train",
    "nnUNetv2_predict",
    "nnUNetv2_evaluate_folder",
]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("raw") / NAME)


@pytest.fixture(scope="module")
def small_template(tmp_path_factory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("template") / "small", num_training=5, num_held_back=2)


@pytest.fixture
def small_phantom(tmp_path, small_template) -> Path:
    return Path(shutil.copytree(small_template, tmp_path / "raw" / "Dataset007_Mine"))


# --- the steps, with commands that only leave behind what the real ones would --------------------------------------


class FakeCommands:
    """Stands in for ``run_logged``: records commands and writes their products."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.fail_at: str | None = None
        self.error: BaseException = SmallSegError("it failed")

    @property
    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    def __call__(self, command, environment, log, on_line, on_tick) -> None:
        self.calls.append(list(command))
        self.environments.append(dict(environment))
        name = "smallseg_plan" if command[0] == "smallseg" else command[0]
        on_tick()
        getattr(self, name, lambda *arguments: None)(list(command), environment, on_line)

    def product(self, environment, file: str, text: str = "{}") -> None:
        (dataset,) = [path for path in Path(environment["nnUNet_raw"]).iterdir() if path.name.startswith("Dataset")]
        path = Path(environment["nnUNet_preprocessed"], dataset.name, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def maybe_fail(self, command) -> None:
        if command[0] == self.fail_at:
            raise self.error

    def nnUNetv2_extract_fingerprint(self, command, environment, on_line) -> None:
        self.maybe_fail(command)
        self.product(environment, "dataset_fingerprint.json")

    def smallseg_plan(self, command, environment, on_line) -> None:
        self.maybe_fail(command)
        self.product(environment, "nnUNetSmallSegPlans.json")

    def nnUNetv2_preprocess(self, command, environment, on_line) -> None:
        self.maybe_fail(command)
        self.product(environment, "gt_segmentations/x")

    def nnUNetv2_train(self, command, environment, on_line) -> None:
        _, dataset, configuration, fold = command[:4]
        trainer = command[command.index("-tr") + 1]
        model = Path(environment["nnUNet_results"], dataset, f"{trainer}__nnUNetSmallSegPlans__{configuration}")
        (model / f"fold_{fold}").mkdir(parents=True, exist_ok=True)
        on_line("2026-01-01 00:00:00: Epoch 0 ")
        (model / f"fold_{fold}" / "checkpoint_best.pth").touch()
        self.maybe_fail(command)
        splits = Path(environment["nnUNet_preprocessed"], dataset, "splits_final.json")
        if not splits.exists():
            cases = [file.name[:-12] for file in sorted(Path(environment["nnUNet_raw"], dataset).glob("imagesTr/*"))]
            splits.write_text(json.dumps([{"train": cases[:-1], "val": cases[-1:]}] * 5))
        (model / f"fold_{fold}" / "checkpoint_final.pth").touch()

    def nnUNetv2_predict(self, command, environment, on_line) -> None:
        output = Path(command[command.index("-o") + 1])
        output.mkdir(parents=True)
        for file in Path(command[command.index("-i") + 1]).iterdir():
            (output / file.name.replace("_0000", "")).touch()
        self.maybe_fail(command)

    def nnUNetv2_evaluate_folder(self, command, environment, on_line) -> None:
        self.maybe_fail(command)
        references, predictions = Path(command[1]), Path(command[2])
        metrics = {"1": {"Dice": 0.75, "n_ref": 10, "n_pred": 12}}
        summary = {
            "foreground_mean": {"Dice": 0.75},
            "metric_per_case": [
                {"prediction_file": str(predictions / file.name), "metrics": metrics}
                for file in sorted(references.iterdir())
            ],
        }
        (predictions / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def fake(phantom, monkeypatch, tmp_path) -> FakeCommands:
    """Commands that do nothing, in an empty current folder, without a variable of nnU-Net set."""
    # Drawing it anew for every test would take most of the time.
    monkeypatch.setattr(phantom_module, "write_phantom", lambda folder, seed: shutil.copytree(phantom, folder))
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer", "nnUNet_compile"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return FakeCommands()


def run_demo(fake: FakeCommands, demo_settings: DemoSettings | None = None, **options) -> pipeline.DemoResult:
    options = {"workspace": "work", "device": "cpu", **options}
    return pipeline.run_demo(demo_settings or DemoSettings(), run_command=fake, **options)


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_phantom_goes_through_all_steps(fake, tmp_path):
    result = run_demo(fake)
    assert fake.names == COMMANDS
    work = tmp_path / "work"
    for environment in fake.environments:
        assert environment["nnUNet_raw"] == str(work / "nnUNet_raw")
        assert environment["nnUNet_preprocessed"] == str(work / "nnUNet_preprocessed")
        assert environment["nnUNet_results"] == str(work / "nnUNet_results")
        assert environment["nnUNet_extTrainer"].endswith("extension")
        assert int(environment["nnUNet_n_proc_DA"]) <= 2 and int(environment["nnUNet_def_n_proc"]) <= 2
    assert result.foreground_dice == 0.75
    assert sorted(result.cases) == [f"phantom_{index:03d}" for index in range(12, 16)]
    assert all(path.exists() for name, path in result.folders.items() if name != "logs")
    assert result.folders["references"] == work / "nnUNet_raw" / NAME / "labelsTs"
    # nnU-Net reads the folds from here only.
    raw, preprocessed = (work / folder / NAME / "splits_final.json" for folder in ("nnUNet_raw", "nnUNet_preprocessed"))
    assert raw.read_bytes() == preprocessed.read_bytes()


def test_settings_reach_the_commands(fake):
    trainer = "nnUNetTrainerSwinUMambaScratch"
    run_demo(fake, DemoSettings(trainer, "2.5d", "all", 3, 4, 5, (32, 64), 2))
    plan = " ".join(fake.calls[1])
    assert plan == (
        "smallseg plan -d 990 -plans_name nnUNetSmallSegPlans -patch_size 32 64 -batch_size 2 "
        "-num_epochs 3 -num_iterations 4 -num_val_iterations 5"
    )
    train = " ".join(fake.calls[3])
    assert train == f"nnUNetv2_train {NAME} 2.5d all -tr {trainer} -p nnUNetSmallSegPlans -device cpu"
    assert "-c 2.5d" in " ".join(fake.calls[4]) and "-f all" in " ".join(fake.calls[4])


def test_trainers_that_ignore_the_length_of_training_are_told(fake, capsys):
    run_demo(fake, DemoSettings("nnUNetTrainer"))
    assert "-num_epochs, -num_iterations and -num_val_iterations have no effect" in capsys.readouterr().err
    run_demo(fake, clean=True)
    assert "no effect" not in capsys.readouterr().err


def test_own_data_without_held_back_cases_predicts_the_validation_cases(fake, small_phantom, tmp_path):
    shutil.rmtree(small_phantom / "labelsTs")
    (small_phantom / "splits_final.json").unlink()
    before = files_below(small_phantom)
    result = run_demo(fake, dataset_folder="raw/Dataset007_Mine")
    assert list(result.cases) == ["phantom_004"]
    assert fake.environments[0]["nnUNet_raw"] == str(small_phantom.parent)
    assert "-d 7 " in " ".join(fake.calls[0])
    images = tmp_path / "work" / "validation_cases" / "images"
    assert files_below(images) == ["phantom_004_0000.nii.gz"]
    image = "phantom_004_0000.nii.gz"
    assert (images / image).read_bytes() == (small_phantom / "imagesTr" / image).read_bytes()
    assert files_below(small_phantom) == before


def test_validation_cases_are_copied_where_links_are_not_possible(fake, small_phantom, tmp_path, monkeypatch):
    def no_links(*arguments, **options):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    shutil.rmtree(small_phantom / "labelsTs")
    run_demo(fake, dataset_folder=small_phantom)
    files = list((tmp_path / "work" / "validation_cases").rglob("*.nii.gz"))
    assert len(files) == 2 and not any(file.is_symlink() for file in files)


def test_files_listed_in_dataset_json_are_found(fake, small_phantom):
    cases = {
        f"case{index}": {
            "images": [f"imagesTr/phantom_{index:03d}_0000.nii.gz"],
            "label": str(small_phantom / f"labelsTr/phantom_{index:03d}.nii.gz"),
        }
        for index in range(5)
    }
    description = json.loads((small_phantom / "dataset.json").read_text())
    (small_phantom / "dataset.json").write_text(json.dumps({**description, "dataset": cases}))
    (small_phantom / "splits_final.json").unlink()
    assert list(read_dataset(small_phantom).training) == sorted(cases)


def test_finished_steps_are_skipped_and_the_result_is_shown_again(fake, capsys):
    first = run_demo(fake)
    fake.calls.clear()
    assert run_demo(fake) == first
    assert fake.calls == []
    assert capsys.readouterr().err.count("finished before") == 7


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("error", [SmallSegError("it failed"), KeyboardInterrupt()], ids=["failed", "interrupted"])
def test_a_stopped_run_goes_on_at_the_step_that_stopped(command, error, fake):
    fake.fail_at, fake.error = command, error
    with pytest.raises(type(error)):
        run_demo(fake)
    fake.fail_at = None
    fake.calls.clear()
    run_demo(fake)
    assert fake.names == COMMANDS[COMMANDS.index(command) :]
    resumed = [call for call in fake.calls if call[0] == "nnUNetv2_train" and "--c" in call]
    assert len(resumed) == (command == "nnUNetv2_train")


def test_a_step_runs_again_with_all_later_ones_when_its_product_is_gone(fake, tmp_path):
    run_demo(fake)
    (tmp_path / "work" / "nnUNet_preprocessed" / NAME / "nnUNetSmallSegPlans.json").unlink()
    fake.calls.clear()
    run_demo(fake)
    assert fake.names == COMMANDS[1:]


def test_a_step_without_product_is_a_failure(fake, monkeypatch):
    monkeypatch.setattr(fake, "smallseg_plan", lambda *arguments: None, raising=False)
    with pytest.raises(SmallSegError, match=r"left no .*nnUNetSmallSegPlans.json"):
        run_demo(fake)


def test_other_settings_in_the_same_workspace_are_refused_and_clean_starts_anew(fake, tmp_path):
    run_demo(fake)
    state = (tmp_path / "work" / "demo_state.json").read_bytes()
    other = DemoSettings(num_epochs=1, patch_size=(32, 32))
    with pytest.raises(SmallSegError) as refused:
        run_demo(fake, other)
    for text in (f"-num_epochs: {settings.DEFAULT_NUM_EPOCHS} before, 1 now", "-patch_size", "--clean", "-o"):
        assert text in str(refused.value)
    assert (tmp_path / "work" / "demo_state.json").read_bytes() == state
    fake.calls.clear()
    run_demo(fake, other, clean=True)
    assert fake.names == COMMANDS and "--c" not in fake.calls[3]


def test_changed_data_are_noticed(fake, small_phantom):
    run_demo(fake, dataset_folder=small_phantom)
    with pytest.raises(SmallSegError, match=r"data set: .* before, phantom now"):
        run_demo(fake)
    file = small_phantom / "labelsTr" / "phantom_000.nii.gz"
    os.utime(file, ns=(0, 0))
    with pytest.raises(SmallSegError, match="have changed since"):
        run_demo(fake, dataset_folder=small_phantom)


def test_clean_removes_what_the_demo_wrote_and_nothing_else(fake, tmp_path):
    run_demo(fake)
    work = tmp_path / "work"
    (work / "notes.txt").write_text("mine")
    (work / "nnUNet_results" / "Dataset001_Mine").mkdir()
    (work / "nnUNet_preprocessed" / NAME / "stale").touch()
    fake.fail_at = COMMANDS[0]
    with pytest.raises(SmallSegError, match="it failed"):
        run_demo(fake, clean=True)
    assert (work / "notes.txt").read_text() == "mine"
    assert files_below(work / "nnUNet_results") == ["Dataset001_Mine"]
    assert not (work / "nnUNet_preprocessed").exists() and not (work / "predictions").exists()


def test_clean_does_nothing_special_in_a_new_workspace(fake):
    assert run_demo(fake, clean=True).foreground_dice == 0.75


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("content", ["thesis.tex", "demo_state.json"])
def test_foreign_folders_are_left_alone(clean, content, fake, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / content).write_text("years of work")
    with pytest.raises(SmallSegError, match="-o"):
        run_demo(fake, clean=clean)
    assert files_below(tmp_path / "work") == [content]
    assert (tmp_path / "work" / content).read_text() == "years of work"


def test_state_that_leads_elsewhere_is_refused(fake, tmp_path):
    run_demo(fake)
    file = tmp_path / "work" / "demo_state.json"
    state = json.loads(file.read_text())
    state["dataset"]["name"] = "../../precious"
    file.write_text(json.dumps(state))
    with pytest.raises(SmallSegError, match="is a path"):
        run_demo(fake, clean=True)


def test_two_demos_do_not_share_a_workspace(fake, tmp_path):
    def second_demo(*arguments):
        with pytest.raises(SmallSegError, match="another `smallseg demo` is at work"):
            run_demo(FakeCommands(), clean=True)
        raise KeyboardInterrupt

    fake.smallseg_plan = second_demo
    with pytest.raises(KeyboardInterrupt):
        run_demo(fake)
    assert (tmp_path / "work" / "nnUNet_preprocessed" / NAME / "dataset_fingerprint.json").exists()


def test_folders_that_cannot_be_made_are_an_error(fake, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        run_demo(fake, workspace="file")
    with pytest.raises(SmallSegError, match="cannot work in"):
        run_demo(fake, workspace="file/below")


# --- wrong arguments -------------------------------------------------------------------------------------------------


def write_dataset_json(folder: Path, **changes) -> None:
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**description, **changes}))


def remove_two_cases(folder: Path) -> None:
    (folder / "splits_final.json").unlink()
    for index in (3, 4):
        (folder / "imagesTr" / f"phantom_{index:03d}_0000.nii.gz").unlink()
        (folder / "labelsTr" / f"phantom_{index:03d}.nii.gz").unlink()


@pytest.mark.parametrize(
    ("spoil", "status", "message"),
    [
        (lambda folder: shutil.rmtree(folder), 2, "is not a folder"),
        (lambda folder: (folder / "dataset.json").unlink(), 2, "has no dataset.json"),
        (lambda folder: (folder / "dataset.json").write_text("{"), 1, "cannot be read"),
        (lambda folder: (folder / "dataset.json").write_text("{}"), 1, "lacks channel_names"),
        (lambda folder: (folder / "labelsTr" / "phantom_000.nii.gz").unlink(), 1, "phantom_000 lacks"),
        (lambda folder: write_dataset_json(folder, channel_names={"0": "T1", "1": "T2"}), 1, "_0001.nii.gz"),
        (lambda folder: write_dataset_json(folder, file_ending=".nrrd"), 1, "no training cases"),
        (lambda folder: (folder / "splits_final.json").write_text("[1]"), 1, "no list of folds"),
        (lambda folder: (folder / "splits_final.json").write_text('[{"train": ["x"], "val": []}]'), 1, "not there: x"),
        (lambda folder: (folder.parent / "Dataset007_Twin").mkdir(), 1, "more than one data set with number 007"),
        (remove_two_cases, 2, "too few"),
    ],
)
def test_unusable_data_sets_are_refused_before_anything_is_written(
    spoil, status, message, fake, small_phantom, tmp_path
):
    spoil(small_phantom)
    before = files_below(tmp_path)
    with pytest.raises(SmallSegError, match=message) as refused:
        run_demo(fake, dataset_folder=small_phantom)
    assert refused.value.exit_status == status
    assert files_below(tmp_path) == before and fake.calls == []


@pytest.mark.parametrize("name", ["Liver", "Dataset7_Liver", "Dataset0007_Liver", "Dataset007"])
def test_names_nnunet_does_not_take_are_refused(name, fake, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "dataset.json").write_text("{}")
    with pytest.raises(UsageError, match="DatasetXXX_Name"):
        run_demo(fake, dataset_folder=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-tr", "nnUNetTrainerSwinUMamaDScratch"], "Did you mean nnUNetTrainerSwinUMambaDScratch?"),
        (["-tr", "nnUNetTrainer_10epoch"], "Did you mean nnUNetTrainer_10epochs?"),
        (["-f", "1"], "use 0, or all"),
        (["-f", "-1"], "-f"),
        (["-f", "first"], "no fold"),
        (["-c", "3d_fullres"], "2.5d"),
        (["-device", "tpu"], "auto"),
        (["-num_epochs", "0"], "-num_epochs"),
        (["-patch_size", "64"], "-patch_size"),
        (["-batch_size", "two"], "-batch_size"),
        (["-epochs", "3"], "-epochs"),
        (["-i", "nowhere"], "is not a folder"),
    ],
)
def test_wrong_arguments_exit_with_2_and_one_message(arguments, message, fake, tmp_path, capsys):
    try:
        status = main(["demo", "-device", "cpu", *arguments])
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert files_below(tmp_path) == []


def test_cuda_that_is_not_there_is_refused(fake, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="-device cpu"):
        run_demo(fake, device="cuda")
    assert settings.resolve_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert settings.resolve_device("auto") == "cuda"
    assert files_below(tmp_path) == []


def test_missing_weights_are_told_before_anything_is_written(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("SMALLSEG_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.delenv("SMALLSEG_WEIGHTS_VMAMBA_TINY_IMAGENET", raising=False)
    with pytest.raises(SmallSegError, match="smallseg weights fetch"):
        run_demo(fake, DemoSettings("nnUNetTrainerSwinUMamba"))
    assert files_below(tmp_path) == []


def test_trainers_of_nnunet_and_of_other_folders_are_known(tmp_path):
    settings.check_trainer("nnUNetTrainer", None)
    settings.check_trainer("nnUNetTrainer_5epochs", None)
    (tmp_path / "mine.py").write_text("from elsewhere import MyTrainerX\n")
    settings.check_trainer("MyTrainerX", str(tmp_path))
    with pytest.raises(UsageError):
        settings.check_trainer("MyTrainerX", None)


def test_single_images_have_no_slabs(fake, tmp_path):
    folder = tmp_path / "raw" / "Dataset008_Photos"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for index in range(5):
        image = sitk.GetImageFromArray(np.zeros((16, 16), np.uint8))
        sitk.WriteImage(image, str(folder / "imagesTr" / f"p{index}_0000.png"))
        sitk.WriteImage(image, str(folder / "labelsTr" / f"p{index}.png"))
    description = {"channel_names": {"0": "gray"}, "labels": {"background": 0, "lesion": 1}, "numTraining": 5}
    (folder / "dataset.json").write_text(json.dumps({**description, "file_ending": ".png"}))
    with pytest.raises(UsageError, match="use -c 2d"):
        run_demo(fake, DemoSettings(configuration="2.5d"), dataset_folder=folder)
    assert not (tmp_path / "work").exists()


def test_volumes_have_slabs(fake, small_phantom):
    run_demo(fake, DemoSettings(configuration="2.5d"), dataset_folder=small_phantom)
    assert fake.calls[3][2] == "2.5d"


def test_data_and_workspace_are_kept_apart(fake, small_phantom):
    for workspace in (small_phantom.parent, small_phantom, small_phantom / "work"):
        with pytest.raises(UsageError, match="-o"):
            run_demo(fake, dataset_folder=small_phantom, workspace=workspace)


# --- what is printed -------------------------------------------------------------------------------------------------


def test_result_on_stdout_and_progress_on_stderr(fake, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "run_logged", fake)
    assert main(["demo", "-device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("foreground Dice: 0.750\n")
    for text in ("phantom_012  class 1  Dice 0.750", "summary: ", "model: ", "logs: ", "total time: ", "next:"):
        assert text in captured.out
    assert re.search(r"\[7/7\] evaluate: done in \d+ s", captured.err)


def test_dice_of_cases_without_lesion_is_explained():
    from nnunetv2_smallseg.cli.demo import describe

    assert describe({"Dice": math.nan, "n_ref": 0, "n_pred": 0}) == "no lesion, and none predicted"
    assert describe({"Dice": 0.0, "n_ref": 0, "n_pred": 7}) == "Dice 0.000 (no lesion, but 7 voxels predicted)"
    assert describe({"Dice": 0.5, "n_ref": 3, "n_pred": 7}) == "Dice 0.500"


def test_training_output_is_summed_up():
    progress = TrainingProgress(10)
    shown = [
        progress.read(line)
        for line in (
            "Epoch 5 is mentioned elsewhere",
            "2026-01-01 10:00:00.000000: Epoch 2 ",
            "2026-01-01 10:00:00.000000: Current learning rate: 0.001 ",
            "2026-01-01 10:00:00.000000: train_loss -0.1234 ",
            "2026-01-01 10:00:00.000000: Pseudo dice [np.float32(0.5), nan, np.float64(1e-1)] ",
            "2026-01-01 10:00:00.000000: predicting phantom_009 ",
        )
    ]
    assert shown == [None, None, None, None, "epoch 3/10, loss -0.1234, pseudo Dice 0.30", "validating phantom_009"]
    assert TrainingProgress(None).read("Pseudo dice [nan]") == "epoch 0, loss ?, pseudo Dice nan"
    assert format_seconds(7.6) == "8 s" and format_seconds(188) == "3 min 08 s"


def test_terminals_get_one_line_that_is_rewritten(monkeypatch):
    import io

    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    console = Console(2, stream)
    console.start(1, "train")
    console.update("epoch 1/2")
    console.finish()
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.endswith("[1/2] train: done in 0 s\n")
    assert "\r\x1b[K[1/2] train ... 0 s, epoch 1/2" in text
