"""The whole way from a raw data set to an evaluated model, through nnU-Net's own commands.

Each step is a process of its own whose output goes to a log file. A state file remembers the finished steps, so that a
run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_smallseg.demo import settings as defaults
from nnunetv2_smallseg.demo.commands import interrupted_by_signals, run_logged
from nnunetv2_smallseg.demo.console import Console, TrainingProgress
from nnunetv2_smallseg.demo.dataset import RawDataset, check_fold, holds_single_images, link_cases, read_dataset
from nnunetv2_smallseg.demo.settings import PLANS_NAME, DemoSettings
from nnunetv2_smallseg.demo.workspace import State, Workspace
from nnunetv2_smallseg.environment import EXTENSION_VARIABLE, extended_value
from nnunetv2_smallseg.errors import SmallSegError, UsageError
from nnunetv2_smallseg.files import replacing

__all__ = ["DemoResult", "run_demo"]

CommandRunner = Callable[[Sequence[str], Mapping[str, str], Path, Callable[[str], None], Callable[[], None]], None]

# Every worker process loads PyTorch anew: two are quick enough and stay below 4 GB.
NUM_PROCESSES = 2


@dataclass(frozen=True)
class DemoResult:
    """What a finished demo leaves behind.

    Attributes:
        foreground_dice: nnU-Net's mean over classes of the mean over cases; cases with neither reference nor
            prediction do not count.
        cases: Case -> class -> nnU-Net's metrics of that case.
        folders: What lies where, by description.
        seconds: Time of all steps together, those of earlier runs included.
        next_commands: What to try next.
    """

    foreground_dice: float
    cases: dict[str, dict[str, dict[str, float]]]
    folders: dict[str, Path]
    seconds: float
    next_commands: list[str]


@dataclass(frozen=True)
class Step:
    """A step: name in state and logs, title for people, what it does, and a file that exists once it is done."""

    name: str
    title: str
    action: Callable[[], None]
    product: Path


class Demo:
    """One run in one workspace. ``run_demo`` checks everything first; the methods here assume it."""

    def __init__(
        self,
        settings: DemoSettings,
        workspace: Workspace,
        dataset: RawDataset | None,
        device: str,
        run_command: CommandRunner,
    ) -> None:
        """``dataset`` is None for the phantom, which the first step writes."""
        self.settings = settings
        self.workspace = workspace
        self.given_dataset = dataset
        self.device = device
        self.run_command = run_command
        self.dataset_folder = workspace.raw / defaults.PHANTOM_NAME if dataset is None else dataset.folder
        self.console = Console(len(self.steps()))
        self.current_step = ""

    @property
    def dataset(self) -> RawDataset:
        """The raw data set; the phantom only once it is written."""
        return self.given_dataset or read_dataset(self.dataset_folder)

    @property
    def name(self) -> str:
        """DatasetXXX_Name."""
        return self.dataset_folder.name

    @property
    def number(self) -> str:
        """The XXX of DatasetXXX_Name as nnU-Net's commands take it."""
        return str(int(self.name[7:10]))

    @property
    def model(self) -> Path:
        """Folder of the trained model."""
        return self.workspace.model(self.name, self.settings)

    @property
    def model_options(self) -> list[str]:
        """Options that name the model to ``nnUNetv2_train`` and ``nnUNetv2_predict``."""
        return ["-tr", self.settings.trainer, "-p", PLANS_NAME, "-device", self.device]

    def initial_state(self) -> State:
        """The state before the first step."""
        if self.given_dataset is None:
            source, identity = "phantom", f"seed {defaults.PHANTOM_SEED}"
        else:
            source, identity = str(self.given_dataset.folder), self.given_dataset.identity
        return State(self.settings.as_options(), {"name": self.name, "source": source, "identity": identity})

    def steps(self) -> list[Step]:
        """All steps in order."""
        workspace, preprocessed = self.workspace, self.workspace.preprocessed / self.name
        fold = workspace.fold(self.name, self.settings)
        steps = [
            Step("phantom", "write the phantom data set", self.write_phantom, self.dataset_folder / "dataset.json"),
            Step("fingerprint", "check the data", self.fingerprint, preprocessed / "dataset_fingerprint.json"),
            Step("plan", "plan", self.plan, preprocessed / f"{PLANS_NAME}.json"),
            Step("preprocess", "preprocess", self.preprocess, preprocessed / "gt_segmentations"),
            Step("train", f"train {self.settings.trainer}", self.train, fold / "checkpoint_final.pth"),
            Step("predict", "predict", self.predict, workspace.predictions),
            Step("evaluate", "evaluate", self.evaluate, workspace.summary),
        ]
        return steps if self.given_dataset is None else steps[1:]

    def run(self, state: State) -> None:
        """Runs what ``state`` does not list as finished, and lists it there."""
        if not defaults.trains_by_plan(self.settings.trainer):
            self.console.message(
                f"note: {self.settings.trainer} is none of our trainers and trains as long as it does by itself: "
                "-num_epochs, -num_iterations and -num_val_iterations have no effect on it"
            )
        complete = True
        for number, step in enumerate(self.steps(), start=1):
            # A step whose product was removed runs again, and so does everything that builds on it.
            complete = complete and step.name in state.finished and step.product.exists()
            if complete:
                self.console.skip(number, step.title, state.finished[step.name])
                continue
            if state.finished.pop(step.name, None) is not None:
                self.workspace.save_state(state)
            self.current_step = step.name
            self.console.start(number, step.title)
            try:
                step.action()
            except BaseException:
                self.console.clear()
                raise
            if not step.product.exists():
                self.console.clear()
                raise SmallSegError(
                    f"the step {step.title!r} ended without an error but left no {step.product}: see "
                    f"{self.workspace.logs / step.name}.log, and run the same command again with --clean"
                )
            state.finished[step.name] = round(self.console.finish(), 1)
            self.workspace.save_state(state)

    def call(self, *command: str, on_line: Callable[[str], None] = lambda line: None) -> None:
        """Runs a console command in the environment of the demo."""
        log = self.workspace.logs / f"{self.current_step}.log"
        self.run_command(command, self.environment(), log, on_line, self.console.tick)

    def environment(self) -> dict[str, str]:
        """The environment of all commands: folders of the workspace, our trainers, few workers, no network."""
        environment = {
            **os.environ,
            "nnUNet_raw": str(self.dataset_folder.parent),
            "nnUNet_preprocessed": str(self.workspace.preprocessed),
            "nnUNet_results": str(self.workspace.results),
            EXTENSION_VARIABLE: extended_value(os.environ.get(EXTENSION_VARIABLE)),
            "nnUNet_n_proc_DA": "1" if self.device == "cpu" else str(NUM_PROCESSES),
            "nnUNet_def_n_proc": "1",
            "nnUNet_wandb_enabled": "0",
            # Progress arrives at once, and a training that lost its demo stops at its next line of output.
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",
        }
        # Compiling takes longer than so short a training gains by it.
        environment.setdefault("nnUNet_compile", "false")
        # Threads that spin while they wait starve the workers beside them: several times slower on two busy cores.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        return environment

    def write_phantom(self) -> None:
        """Writes the phantom, under a temporary name first."""
        from nnunetv2_smallseg.demo.phantom import write_phantom

        if self.dataset_folder.exists():
            shutil.rmtree(self.dataset_folder)
        write_phantom(self.dataset_folder, seed=defaults.PHANTOM_SEED)

    def fingerprint(self) -> None:
        """Integrity check and fingerprint; a fingerprint of an interrupted run is not trusted."""
        self.call(
            "nnUNetv2_extract_fingerprint",
            *("-d", self.number, "-np", str(NUM_PROCESSES), "--verify_dataset_integrity", "--clean", "--no_pbar"),
        )

    def plan(self) -> None:
        """Plans, with the length of the training."""
        settings = self.settings
        self.call(
            *("smallseg", "plan", "-d", self.number, "-plans_name", PLANS_NAME),
            *("-patch_size", *map(str, settings.patch_size), "-batch_size", str(settings.batch_size)),
            *("-num_epochs", str(settings.num_epochs), "-num_iterations", str(settings.num_iterations)),
            *("-num_val_iterations", str(settings.num_val_iterations)),
        )

    def preprocess(self) -> None:
        """Preprocesses for both configurations; 2.5d uses the data of 2d."""
        self.call(
            "nnUNetv2_preprocess",
            *("-d", self.number, "-plans_name", PLANS_NAME, "-c", "2d", "-np", str(NUM_PROCESSES), "--no_pbar"),
        )
        if self.dataset.splits is not None:
            # nnU-Net looks for the folds beside the preprocessed data only.
            target = self.workspace.preprocessed / self.name / "splits_final.json"
            with replacing(target) as partial:
                shutil.copyfile(self.dataset_folder / "splits_final.json", partial)

    def train(self) -> None:
        """Trains, going on from a checkpoint if there is one; ends with nnU-Net's validation."""
        settings = self.settings
        fold = self.workspace.fold(self.name, settings)
        resume = any((fold / f"checkpoint_{kind}.pth").is_file() for kind in ("final", "latest", "best"))
        progress = TrainingProgress(settings.num_epochs if defaults.trains_by_plan(settings.trainer) else None)

        def show(line: str) -> None:
            if news := progress.read(line):
                self.console.update(news)

        self.call(
            *("nnUNetv2_train", self.name, settings.configuration, str(settings.fold), *self.model_options),
            *(["--c"] if resume else []),
            on_line=show,
        )

    def predict(self) -> None:
        """Predicts the cases held back, or the validation cases of the fold if the data set holds none back."""
        dataset, workspace = self.dataset, self.workspace
        images = dataset.folder / "imagesTs"
        if not dataset.held_back:
            images = workspace.validation_cases / "images"
            shutil.rmtree(workspace.validation_cases, ignore_errors=True)
            cases = {name: dataset.training[name] for name in self.validation_names()}
            link_cases(cases, dataset.file_ending, images, self.reference_folder())
        # A half-done prediction would be mixed with the new one.
        shutil.rmtree(workspace.predictions, ignore_errors=True)
        self.call(
            *("nnUNetv2_predict", "-d", self.number, "-i", str(images), "-o", str(workspace.predictions)),
            *("-c", self.settings.configuration, *self.model_options, "-f", str(self.settings.fold)),
            # No workers: loading PyTorch in each takes longer than the few cases of a demo.
            *("-npp", "0", "-nps", "0", "--disable_progress_bar"),
        )

    def validation_names(self) -> list[str]:
        """The validation cases of the fold, as nnU-Net's training used them."""
        if self.settings.fold == "all":
            return list(self.dataset.training)
        file = self.workspace.preprocessed / self.name / "splits_final.json"
        return json.loads(file.read_text(encoding="utf-8"))[int(self.settings.fold)]["val"]

    def reference_folder(self) -> Path:
        """The references of the predicted cases."""
        if self.dataset.held_back:
            return self.dataset_folder / "labelsTs"
        return self.workspace.validation_cases / "labels"

    def evaluate(self) -> None:
        """Evaluates by nnU-Net's own metrics."""
        self.call(
            *("nnUNetv2_evaluate_folder", str(self.reference_folder()), str(self.workspace.predictions)),
            *("-djfile", str(self.model / "dataset.json"), "-pfile", str(self.model / "plans.json"), "-np", "1"),
        )

    def result(self, state: State) -> DemoResult:
        """Reads what the finished steps left."""
        summary = json.loads(self.workspace.summary.read_text(encoding="utf-8"))
        ending = self.dataset.file_ending
        cases = {
            Path(case["prediction_file"]).name.removesuffix(ending): case["metrics"]
            for case in summary["metric_per_case"]
        }
        folders = {
            "raw data": self.dataset_folder,
            "plans": self.workspace.preprocessed / self.name / f"{PLANS_NAME}.json",
            "model": self.workspace.fold(self.name, self.settings),
            "predictions": self.workspace.predictions,
            "references": self.reference_folder(),
            "summary": self.workspace.summary,
            "logs": self.workspace.logs,
        }
        return DemoResult(
            foreground_dice=summary["foreground_mean"]["Dice"],
            cases=cases,
            folders=folders,
            seconds=sum(state.finished.values()),
            next_commands=self.next_commands(),
        )

    def next_commands(self) -> list[str]:
        """What a user may try after this run."""
        other = next(name for name in defaults.CONFIGURATIONS if name != self.settings.configuration)
        commands = ["smallseg trainers"]
        if self.given_dataset is None:
            commands += [
                f"smallseg demo -c {other} -o {self.workspace.folder.name}_{other}",
                "smallseg demo -i nnUNet_raw/DatasetXXX_Name -o my_demo",
            ]
        else:
            commands += [
                f"nnUNetv2_extract_fingerprint -d {self.number}",
                f"smallseg plan -d {self.number}",
            ]
        return commands


def run_demo(
    settings: DemoSettings,
    *,
    dataset_folder: str | Path | None = None,
    workspace: str | Path = defaults.DEFAULT_WORKSPACE,
    device: str = "auto",
    clean: bool = False,
    run_command: CommandRunner | None = None,
) -> DemoResult:
    """Runs the demo, or what is left of it, and reads its result.

    Args:
        settings: What to train.
        dataset_folder: Folder of a raw data set; None for the phantom.
        workspace: Folder to work in; created if needed.
        device: ``auto``, ``cpu`` or ``cuda``.
        clean: Start anew, removing what an earlier demo wrote into ``workspace``.
        run_command: Runs a console command (default: ``run_logged``).
    Raises:
        UsageError: If an argument is wrong; nothing has been written then.
        SmallSegError: If the data set is damaged, ``workspace`` holds a demo with other settings, or a step fails.
    """
    place = Workspace(workspace)
    place.check_usable()
    dataset = None if dataset_folder is None else _checked_dataset(Path(dataset_folder), place, settings)
    if dataset is None and settings.fold not in (0, "all"):
        raise UsageError(f"-f {settings.fold}: the phantom has one fold: use 0, or all")
    defaults.check_trainer(settings.trainer, os.environ.get(EXTENSION_VARIABLE))
    demo = Demo(settings, place, dataset, defaults.resolve_device(device), run_command or run_logged)
    state = _matching_state(demo, place, clean)
    try:
        place.folder.mkdir(parents=True, exist_ok=True)
        with place.locked(), interrupted_by_signals():
            if clean and (former := place.load_state()) is not None:
                place.clean(former)
            place.save_state(state)
            demo.run(state)
            return demo.result(state)
    except OSError as error:
        raise SmallSegError(
            f"cannot work in {place.folder}: {error}. Free space or mend permissions there, then run the same command "
            "again; or name another -o."
        ) from error


def _checked_dataset(folder: Path, place: Workspace, settings: DemoSettings) -> RawDataset:
    """The user's data set, fit for the settings and apart from the workspace."""
    dataset = read_dataset(folder)
    if place.folder == dataset.folder or place.folder in dataset.folder.parents:
        raise UsageError(f"-i {dataset.folder} lies inside the workspace -o {place.folder}: name another -o")
    if dataset.folder in place.folder.parents:
        raise UsageError(f"-o {place.folder} lies inside the data set -i {dataset.folder}: name another -o")
    check_fold(dataset, settings.fold)
    if settings.configuration == "2.5d" and holds_single_images(dataset):
        raise UsageError(
            f"-c 2.5d stacks neighbouring slices, but {dataset.name} holds single images, which have none: use -c 2d"
        )
    return dataset


def _matching_state(demo: Demo, place: Workspace, clean: bool) -> State:
    """The state to go on from: the recorded one if it fits, else a new one."""
    new, recorded = demo.initial_state(), place.load_state()
    if clean or recorded is None:
        return new
    if differences := recorded.differences(new):
        raise SmallSegError(
            f"{place.folder} holds a demo with other settings:\n"
            + "\n".join(f"    {line}" for line in differences)
            + "\n  Use the settings of before to go on, --clean to start anew there, or another -o."
        )
    return recorded
