"""Wrong inputs to every command and to the trainers: what is said, the exit status, and that nothing is half-written.

A row of ``ROWS`` is a world (``wrong_inputs_world.py``), broken by ``change``, and a command line in which ``{}``
stands for the world's folder. To add one, write ``Wrong(name, command, says, ...)``.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import fnmatch
import http.client
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import wrong_inputs_world as world_module
from conftest import ROOT
from dataset_files import write_kits, write_nifti
from PIL import Image
from wrong_inputs_world import DATASET, FOLDERS, PLANS, TRAINER, World

import nnunetv2_smallseg.trainers
from nnunetv2_smallseg.cli.main import COMMANDS, main
from nnunetv2_smallseg.environment import extension_folder
from nnunetv2_smallseg.errors import CommandStopped
from nnunetv2_smallseg.pretrained import entries

Change = Callable[[World], object]


@dataclass(frozen=True)
class Wrong:
    """A wrong input and what has to become of it.

    Attributes:
        name: For people.
        command: Command line.
        says: What the message has to hold: the cause with its value, and the next step.
        status: 1 for a failure, 2 for wrong usage.
        change: Breaks the world first.
        leaves: Patterns of files that may be new afterwards, each for a reason given beside it.
        traceback: Whether the message is nnU-Net's own, which comes with one; then the documentation has to name it.
    """

    name: str
    command: str
    says: tuple[str, ...]
    status: int = 1
    change: Change | None = None
    leaves: tuple[str, ...] = ()
    traceback: bool = False


# ------------------------------------------------------------------------------------------------ ways to break a world


def text(path: str, content: str | bytes) -> Change:
    """Writes a file."""

    def change(world: World) -> None:
        file = world / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def both(*changes: Change) -> Change:
    def change(world: World) -> None:
        for one in changes:
            one(world)

    return change


def set_variable(name: str, value: str) -> Change:
    return lambda world: world.monkeypatch.setenv(name, value.replace("{}", str(world.folder)))


def unset(name: str) -> Change:
    return lambda world: world.monkeypatch.delenv(name)


def remove(path: str) -> Change:
    def change(world: World) -> None:
        if (world / path).is_dir():
            shutil.rmtree(world / path)
        else:
            (world / path).unlink()

    return change


def voxels(path: str, change_array: Callable, dtype: type = np.float32, affine: np.ndarray | None = None) -> Change:
    """Changes the voxels of a NIfTI file."""

    def change(world: World) -> None:
        image = nibabel.load(world / path)
        array = change_array(np.asarray(image.dataobj).astype(dtype))
        (world / path).unlink()
        write_nifti(world / path, array, image.affine if affine is None else affine)

    return change


def with_value(value: float) -> Callable:
    def change(array: np.ndarray) -> np.ndarray:
        array[0, 0, 0] = value
        return array

    return change


def twice(array: np.ndarray) -> np.ndarray:
    """A fourth axis."""
    return np.stack([array, array], -1)


def truncated(path: str, length: int) -> Change:
    return lambda world: (world / path).write_bytes((world / path).read_bytes()[:length])


def small_entry(world: World) -> None:
    """A published file of 1000 bytes, so that the hash of another one is made in no time."""
    small = dataclasses.replace(entries.ENTRIES[0], size_bytes=1000)
    world.monkeypatch.setattr(entries, "ENTRIES", (small, *entries.ENTRIES[1:]))


def picture(path: str, array: np.ndarray) -> Change:
    return lambda world: Image.fromarray(array).save(world / path)


def edited(path: str, change: Callable[[dict], object]) -> Change:
    return lambda world: world.edit(world / path, change)


def kits(change: Change | None = None) -> Change:
    """Two cases of KiTS23, the second one broken."""

    def prepare(world: World) -> None:
        write_kits(world / "kits", numbers=range(2))
        if change is not None:
            change(world)

    return prepare


def converted(change: Change) -> Change:
    """A finished conversion, then broken."""

    def prepare(world: World) -> None:
        assert world.run(CONVERT).status == 0
        change(world)

    return prepare


def full_disk(world: World) -> None:
    """No file gets onto the disk."""

    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    world.monkeypatch.setattr(os, "fsync", fsync)


def offline(world: World) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("network is unreachable")

    world.monkeypatch.setattr(urllib.request, "urlopen", refuse)


def full_disk_while_downloading(world: World) -> None:
    class FullDisk(io.RawIOBase):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    original = pathlib.Path.open
    world.monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"x" * 100))
    world.monkeypatch.setattr(
        pathlib.Path,
        "open",
        lambda path, *rest, **options: FullDisk() if path.suffix == ".part" else original(path, *rest, **options),
    )


def lost_connection(world: World) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            raise http.client.IncompleteRead(b"")

    world.monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Broken())


class RunsCode:
    """A pickle that runs a command when it is loaded."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("smallseg_was_attacked",)


def saved(path: str, content: object) -> Change:
    return lambda world: torch.save(content, world / path)


def ours(change: Change | None = None) -> Change:
    """nnU-Net knows our folder of trainers."""

    def prepare(world: World) -> None:
        world.monkeypatch.setenv("nnUNet_extTrainer", str(extension_folder()))
        if change is not None:
            change(world)

    return prepare


def plan(change: Callable[[dict], object]) -> Change:
    """Changes the plans of the volumes."""
    return ours(edited(f"preprocessed/{DATASET}/{PLANS}.json", change))


def planar(**settings: object) -> Change:
    """Changes the configuration 2d."""
    return plan(lambda plans: plans["configurations"]["2d"].update(settings))


def slab(**settings: object) -> Change:
    """Changes the configuration 2.5d."""
    return plan(lambda plans: plans["configurations"]["2.5d"].update(settings))


def checkpoint(of: str = TRAINER, classes: int = 2, channels: int = 1, named: str = TRAINER) -> Change:
    """A checkpoint of ``TRAINER`` that holds the network of another trainer, or another network."""
    return ours(lambda world: world.write_checkpoint(of, classes, channels, named))


# ------------------------------------------------------------------------------------------------------------ the table

DEMO = "smallseg demo -o {}/work -device cpu "
CONVERT = "smallseg convert images-masks {}/source -d 903 -name Mine -np 1 "
KITS = "smallseg convert kits23 {}/kits -d 904 -np 1"
KITS_IMAGE, KITS_LABEL = (f"kits/dataset/case_00001/{name}.nii.gz" for name in ("imaging", "segmentation"))
PLAN = "smallseg plan -d 901 "
FINGERPRINT = f"preprocessed/{DATASET}/dataset_fingerprint.json"
RAW = f"raw/{DATASET}"
PREPROCESSED = f"preprocessed/{DATASET}/{PLANS}_2d"
VMAMBA = "weights/vssmtiny_dp01_ckpt_epoch_292.pth"
IMPORT = "smallseg weights import-official {}/ckpt.pth -o {}/out.pth"
EVALUATE = "smallseg evaluate -ref {}/ref -pred {}/pred -o {}/out -np 1 --no_report "
REPORT = EVALUATE.replace(" --no_report", "")
PICTURES = "smallseg evaluate -ref {}/source/masks -pred {}/source/masks -o {}/out -np 1 --no_report "
CASE = "pred/case1.nii.gz"
TRAIN = f"nnUNetv2_train 901 2d 0 -device cpu -p {PLANS} -tr {TRAINER}"
PREDICT = (
    "nnUNetv2_predict -d 901 -i {}/raw/Dataset901_Lesions/imagesTr -o {}/out -c 2d -f 0 "
    f"-tr {TRAINER} -p {PLANS} -device cpu -npp 0 -nps 0"
)
# What was converted is whole and stays: the report lists what failed, and the same command goes on from there.
FINISHED_CASES = ("raw/Dataset90[34]_*",)
# nnU-Net makes this folder before it looks at anything.
PREDICTION_FOLDER = ("out/",)
# nnU-Net makes the folder of a training, with its log, before it loads checkpoints.
TRAINING_LOG = ("results/*/", "results/*/fold_0/training_log_*.txt", "results/*/fold_0/debug.json")
# What was measured is kept in a hidden file, which the same command goes on from.
PROGRESS = (f"preprocessed/{DATASET}/.lesion_fingerprint_progress.jsonl",)
KEPT = "Mend or replace their files and start the same command again"

GENERAL = [
    Wrong("no command", "smallseg", ("COMMAND",), 2),
    Wrong("misspelt command", "smallseg tranin", ("'tranin'", "Did you mean trainers?"), 2),
    Wrong("env: unknown shell", "smallseg env --shell bsh", ("'bsh'", "Did you mean bash?"), 2),
    Wrong("env: argument", "smallseg env fish", ("unknown argument: fish", "smallseg env --help"), 2),
    Wrong("trainers: misspelt flag", "smallseg trainers --jsno", ("--jsno", "Did you mean --json?"), 2),
    Wrong("doctor: misspelt flag", "smallseg doctor --jsn", ("--jsn", "Did you mean --json?"), 2),
]

DOCTOR = [
    *(
        Wrong(f"doctor: {name} not set", "smallseg doctor", (f"failure  {name} ", f"export {name}="), 1,
              ours(unset(name)))
        for name in FOLDERS
    ),
    Wrong("doctor: relative folder", "smallseg doctor", ("data is not absolute", "with an absolute path"), 1,
          ours(set_variable("nnUNet_results", "data"))),
    Wrong("doctor: file for a folder", "smallseg doctor", ("is not a folder", "point nnUNet_raw to a folder"), 1,
          ours(set_variable("nnUNet_raw", "{}/raw/Dataset901_Lesions/dataset.json"))),
    Wrong("doctor: no trainers", "smallseg doctor", ("nnU-Net will not find our trainers", 'eval "$(smallseg env)"')),
    Wrong("doctor: damaged weights", "smallseg doctor", ("it has 1 bytes", "weights fetch"), 1,
          ours(text(VMAMBA, "x"))),
]  # fmt: skip

DEMOS = [
    Wrong("demo: misspelt trainer", DEMO + "-tr nnUNetTrainerSwinUmamba",
          ("'nnUNetTrainerSwinUmamba'", "Did you mean nnUNetTrainerSwinUMamba?"), 2),
    Wrong("demo: 3D configuration", DEMO + "-c 3d_fullres", ("'3d_fullres'", "2.5d"), 2),
    Wrong("demo: fold of the phantom", DEMO + "-f 7", ("-f 7", "use 0, or all"), 2),
    Wrong("demo: fold is a word", DEMO + "-f x", ("'x' is no fold", "or all"), 2),
    Wrong("demo: negative fold", DEMO + "-f -1", ("'-1' is no fold",), 2),
    Wrong("demo: no epochs", DEMO + "-num_epochs 0", ("'0' is not a positive number",), 2),
    Wrong("demo: half an epoch", DEMO + "-num_epochs 1.5", ("'1.5' is not a positive number",), 2),
    Wrong("demo: epochs for ever", DEMO + "-num_epochs 99999999999999999999", ("1 to a million",), 2),
    Wrong("demo: one side of a patch", DEMO + "-patch_size 32", ("-patch_size", "expected 2"), 2),
    Wrong("demo: file for a folder", "smallseg demo -o {}/raw/Dataset901_Lesions/dataset.json",
          ("is a file", "name a folder"), 2),
    Wrong("demo: below a file", "smallseg demo -device cpu -o {}/raw/Dataset901_Lesions/dataset.json/work",
          ("Not a directory", "name another -o")),
    Wrong("demo: foreign folder", "smallseg demo -o {}/raw", ("is not empty", "name another folder"), 2),
    Wrong("demo: no such data set", DEMO + "-i {}/raw/Dataset999_None", ("Dataset999_None is not a folder",), 2),
    Wrong("demo: parent of a data set", DEMO + "-i {}/raw", ("named 'raw'", "DatasetXXX_Name"), 2),
    Wrong("demo: damaged dataset.json", DEMO + f"-i {{}}/{RAW}", ("dataset.json cannot be read", "Mend the file"), 1,
          text(f"{RAW}/dataset.json", "{")),
    Wrong("demo: incomplete dataset.json", DEMO + f"-i {{}}/{RAW}", ("lacks channel_names", "add them"), 1,
          text(f"{RAW}/dataset.json", "{}")),
    Wrong("demo: image without label", DEMO + f"-i {{}}/{RAW}", ("case2 lacks", "add the file"), 1,
          remove(f"{RAW}/labelsTr/case2.nii.gz")),
    Wrong("demo: damaged image", DEMO + f"-c 2.5d -i {{}}/{RAW}", ("cannot read", "Replace the damaged file"), 1,
          text(f"{RAW}/imagesTr/case0_0000.nii.gz", "x")),
    Wrong("demo: 2.5d on pictures", DEMO + "-c 2.5d -i {}/raw/Dataset902_Pictures", ("single images", "use -c 2d"), 2),
    Wrong("demo: fold missing in the splits", DEMO + f"-f 3 -i {{}}/{RAW}", ("-f 3", "has 1 fold(s)"), 2,
          text(f"{RAW}/splits_final.json", '[{"train": ["case0"], "val": ["case1"]}]')),
    Wrong("demo: splits of other cases", DEMO + f"-i {{}}/{RAW}", ("names cases that are not there: caseX", "Mend"), 1,
          text(f"{RAW}/splits_final.json", '[{"train": ["caseX"], "val": ["case1"]}]')),
    Wrong("demo: weights not here", DEMO + "-tr nnUNetTrainerSwinUMamba",
          ("not on this machine", "smallseg weights fetch vmamba_tiny_imagenet", "nnUNetTrainerSwinUMambaScratch")),
    Wrong("demo: full disk", DEMO, ("No space left on device", "Free space"), 1, full_disk,
          ("work/", "work/demo.lock")),  # the folder, and the empty file that keeps other demos out
]  # fmt: skip
if not torch.cuda.is_available():
    DEMOS.append(Wrong("demo: no GPU", "smallseg demo -o {}/work -device cuda", ("no usable GPU", "-device cpu"), 2))

CONVERSIONS = [
    Wrong("convert: misspelt name", "smallseg convert kits32 {}/source -d 903", ("'kits32'", "mean kits23?"), 2),
    Wrong("convert: no source", "smallseg convert kits23 -d 903", ("smallseg convert NAME SRC -d ID",), 2),
    Wrong("convert: no number", "smallseg convert kits23 {}/source", ("-d is missing", "-d 901"), 2),
    Wrong("convert: number 0", "smallseg convert kits23 {}/source -d 0", ("'0' is not a positive number",), 2),
    Wrong("convert: number 1000", "smallseg convert kits23 {}/source -d 1000", ("-d 1000", "1 to 999"), 2),
    Wrong("convert: number taken", "smallseg convert kits23 {}/source -d 901",
          ("taken by Dataset901_Lesions", "another number"), 2),
    Wrong("convert: impossible name", "smallseg convert images-masks {}/source -d 903 -name ../x", ("'../x'",), 2),
    Wrong("convert: no name", "smallseg convert images-masks {}/source -d 903", ("-name MyLesions",), 2),
    Wrong("convert: another's option", "smallseg convert kits23 {}/source -d 903 --weak", ("--weak", "uls23"), 2),
    Wrong("convert: no such folder", "smallseg convert kits23 {}/nowhere -d 903", ("nowhere is no folder",), 2),
    Wrong("convert: empty folder", "smallseg convert kits23 {}/empty -d 903", ("no folder case_XXXXX", "clone")),
    Wrong("convert: nnUNet_raw not set", CONVERT, ("nnUNet_raw is not set", "export nnUNet_raw="), 1,
          unset("nnUNet_raw")),
    Wrong("convert: nnUNet_raw is a file", CONVERT, ("Not a directory", "name a folder"), 1,
          set_variable("nnUNet_raw", "{}/raw/Dataset901_Lesions/dataset.json")),
    Wrong("convert: file for a folder", CONVERT, ("Dataset903_Mine exists", "another number"), 2,
          text("raw/Dataset903_Mine", "x")),
    Wrong("convert: link for a folder", CONVERT, ("is a link", "Remove it"), 2,
          lambda world: (world / "raw/Dataset903_Mine").symlink_to(world / "empty")),
    Wrong("convert: threshold", CONVERT + "-threshold 300", ("-threshold 300", "0 to 254"), 2),
    Wrong("convert: no processes", CONVERT + "-np 0", ("'0' is not a positive number",), 2),
    Wrong("convert: misspelt option", CONVERT + "-treshold 3", ("-treshold", "Did you mean -threshold?"), 2),
    Wrong("convert: other options than before", CONVERT + "-threshold 3", ("other options", "--overwrite"), 2,
          converted(lambda world: None)),
    Wrong("convert: damaged picture", CONVERT, ("picture1.png is no image", KEPT), 1,
          text("source/images/picture1.png", b"\x89PNG\r\n garbage"), FINISHED_CASES),
    Wrong("convert: truncated mask", CONVERT, ("picture1.png is damaged", KEPT), 1,
          truncated("source/masks/picture1.png", 50), FINISHED_CASES),
    Wrong("convert: mask of another size", CONVERT, ("9 x 9 pixels, its image 16 x 16", KEPT), 1,
          picture("source/masks/picture1.png", np.zeros((9, 9), np.uint8)), FINISHED_CASES),
    Wrong("convert: unknown label in a picture", CONVERT + "-classes lesion", ("unknown values 7", "0, 1", KEPT), 1,
          picture("source/masks/picture1.png", np.full((16, 16), 7, np.uint8)), FINISHED_CASES),
    Wrong("convert: NaN in the image", KITS, ("case_00001", "NaN or infinite", KEPT), 1,
          kits(voxels(KITS_IMAGE, with_value(np.nan))), FINISHED_CASES),
    Wrong("convert: infinite image", KITS, ("case_00001", "NaN or infinite", KEPT), 1,
          kits(voxels(KITS_IMAGE, with_value(np.inf))), FINISHED_CASES),
    Wrong("convert: unknown label", KITS, ("unknown values 9 (1 voxels)", "0, 1, 2, 3", KEPT), 1,
          kits(voxels(KITS_LABEL, with_value(9))), FINISHED_CASES),
    Wrong("convert: half a label", KITS, ("fractions, such as 0.5", KEPT), 1,
          kits(voxels(KITS_LABEL, with_value(0.5))), FINISHED_CASES),
    Wrong("convert: label of another shape", KITS, ("(6, 8, 4) and (5, 8, 4)", KEPT), 1,
          kits(voxels(KITS_LABEL, lambda array: array[:-1])), FINISHED_CASES),
    Wrong("convert: label of another geometry", KITS, ("mm apart", KEPT), 1,
          kits(voxels(KITS_LABEL, lambda array: array, affine=np.eye(4))), FINISHED_CASES),
    Wrong("convert: 4D image", KITS, ("dimensions [6, 8, 4, 2]", "single 3D volume", KEPT), 1,
          kits(voxels(KITS_IMAGE, twice)), FINISHED_CASES),
    Wrong("convert: truncated volume", KITS, ("not downloaded completely", KEPT), 1,
          kits(truncated(KITS_IMAGE, 200)), FINISHED_CASES),
    Wrong("convert: no volume", KITS, ("truncated: 5 bytes", KEPT), 1, kits(text(KITS_IMAGE, "hello")), FINISHED_CASES),
    Wrong("convert: full disk", CONVERT, ("No space left on device", "Finished cases are kept"), 1, full_disk,
          # Folders and the journal: the same command goes on, and nothing else takes them for a data set.
          ("raw/Dataset903_Mine/", "raw/Dataset903_Mine/imagesTr/", "raw/Dataset903_Mine/.conversion_journal.jsonl")),
    Wrong("check: no such data set", "smallseg convert --check 950", ("950", "no data set with this number"), 2),
    Wrong("check: not converted", "smallseg convert --check 901", ("is no finished conversion",), 2),
    Wrong("check: changed file", "smallseg convert --check 903", ("picture1", "--overwrite"), 1,
          converted(text("raw/Dataset903_Mine/labelsTr/picture1.png", "x"))),
    Wrong("check: damaged report", "smallseg convert --check 903", ("cannot be read", "--overwrite"), 1,
          converted(text("raw/Dataset903_Mine/conversion_report.json", "{"))),
    Wrong("check: empty report", "smallseg convert --check 903", ("'cases'", "--overwrite"), 1,
          converted(text("raw/Dataset903_Mine/conversion_report.json", "{}"))),
    Wrong("check: damaged splits", "smallseg convert --check 903", ("splits_final.json cannot be read",), 1,
          converted(text("raw/Dataset903_Mine/splits_final.json", "{"))),
    Wrong("check: report leads elsewhere", "smallseg convert --check 903", ("'../../x'", "was changed"), 1,
          converted(edited("raw/Dataset903_Mine/conversion_report.json",
                           lambda report: report["cases"]["picture1"]["files"].update({"../../x": {}})))),
]  # fmt: skip

AGAIN = "nnUNetv2_extract_fingerprint -d 901"
PLANS_ROWS = [
    *(Wrong(f"plan: {name} not set", PLAN, (f"{name} is not set", f"export {name}="), 1, unset(name))
      for name in FOLDERS[:2]),
    Wrong("plan: variable set to nothing", PLAN, ("nnUNet_preprocessed is not set",), 1,
          set_variable("nnUNet_preprocessed", "")),
    Wrong("plan: no data set", "smallseg plan", ("-d",), 2),
    Wrong("plan: unknown number", "smallseg plan -d 950", ("'950'", DATASET), 2),
    Wrong("plan: misspelt data set", "smallseg plan -d Dataset901_Lesion", (f"Did you mean {DATASET}?",), 2),
    Wrong("plan: name without number", "smallseg plan -d Lesions", (f"Did you mean {DATASET}?",), 2),
    Wrong("plan: two data sets of a number", PLAN, ("several data sets have the number 901", "rename"), 1,
          text("raw/Dataset901_Other/dataset.json", "{}")),
    Wrong("plan: no fingerprint", PLAN, ("has no fingerprint yet", AGAIN), 1, remove(FINGERPRINT)),
    Wrong("plan: damaged fingerprint", PLAN, ("dataset_fingerprint.json cannot be read", AGAIN), 1,
          text(FINGERPRINT, "{")),
    Wrong("plan: incomplete fingerprint", PLAN, ("lacks spacings", AGAIN), 1, text(FINGERPRINT, "{}")),
    Wrong("plan: NaN in the fingerprint", PLAN, ("holds nan at", "0.mean", "Find and mend it", AGAIN), 1,
          edited(FINGERPRINT, lambda f: f["foreground_intensity_properties_per_channel"]["0"].update(mean=np.nan))),
    Wrong("plan: no dataset.json", PLAN, ("dataset.json does not exist",), 1, remove(f"{RAW}/dataset.json")),
    Wrong("plan: damaged dataset.json", PLAN, ("dataset.json cannot be read", "Mend it"), 1,
          text(f"{RAW}/dataset.json", "{")),
    Wrong("plan: incomplete dataset.json", PLAN, ("lacks channel_names", "Mend it"), 1,
          text(f"{RAW}/dataset.json", "{}")),
    Wrong("plan: no images", PLAN, ("imagesTr holds no images named CASE_0000.nii.gz",), 1, remove(f"{RAW}/imagesTr")),
    Wrong("plan: damaged image", PLAN, ("case0_0000.nii.gz", "Replace the damaged file"), 1,
          text(f"{RAW}/imagesTr/case0_0000.nii.gz", "x")),
    Wrong("plan: even number of slices", PLAN + "-num_slices 2", ("slices is 2", "odd and at least 3"), 2),
    Wrong("plan: negative slices", PLAN + "-num_slices -3", ("'-3' is not a positive number",), 2),
    Wrong("plan: a thousand slices", PLAN + "-num_slices 1001", ("-num_slices 1001", "3 or 5 are usual"), 2),
    Wrong("plan: slices of pictures", "smallseg plan -d 902 -num_slices 3", ("single images", "leave out"), 2),
    Wrong("plan: no batch", PLAN + "-batch_size 0", ("'0' is not a positive number",), 2),
    Wrong("plan: huge batch", PLAN + "-batch_size 1000000000", ("1 to a million",), 2),
    Wrong("plan: flat patch", PLAN + "-patch_size 0 32", ("'0' is not a positive number",), 2),
    Wrong("plan: misspelt option", PLAN + "-num_ep 3", ("-num_ep", "Did you mean -num_epochs?"), 2),
    Wrong("plan: 1e3 epochs", PLAN + "-num_epochs 1e3", ("'1e3' is not a positive number",), 2),
    *(Wrong(f"plan: plans called {name!r}", PLAN + f"-plans_name {name or repr('')}", ("-plans_name", "use letters"), 2)
      for name in ("../../evil", "a/b", "", "dataset", ".hidden")),
    Wrong("plan: plans of nnU-Net", PLAN + "-plans_name nnUNetPlans", ("by ExperimentPlanner", "another"), 2,
          text(f"preprocessed/{DATASET}/nnUNetPlans.json",
               '{"configurations": {}, "experiment_planner_used": "ExperimentPlanner"}')),
    Wrong("plan: damaged plans", PLAN, (f"{PLANS}.json cannot be read", "another -plans_name"), 1,
          text(f"preprocessed/{DATASET}/{PLANS}.json", '{"experiment')),
    Wrong("plan: workers of nnU-Net", PLAN, ("nnUNet_n_proc_DA is 0", "unset it"), 1,
          set_variable("nnUNet_n_proc_DA", "0")),
    Wrong("plan: full disk", PLAN, ("No space left on device", "make room there"), 1, full_disk),
    Wrong("plan: folder for a file", PLAN + "-plans_name Mine", ("Mine.json: Is a directory", "remove it"), 1,
          lambda world: (world.preprocessed / "Mine.json").mkdir()),
]  # fmt: skip

SWITCHES = [
    Wrong("plan: misspelt sampling", PLAN + "-lesion_sampling lesions", ("'lesions'", "Did you mean lesion?"), 2),
    Wrong("plan: jitter", PLAN + "-lesion_jitter 2", ("lesion_jitter: 2.0", "from 0"), 2),
    Wrong("plan: jitter is no number", PLAN + "-lesion_jitter nan", ("lesion_jitter: nan", "from 0"), 2),
]

LESIONS = "smallseg fingerprint -d 901 -np 1 --raw "
FINGERPRINTS = [
    *(Wrong(f"fingerprint: {name} not set", LESIONS, (name, "export"), 1, unset(name)) for name in FOLDERS[:2]),
    Wrong("fingerprint: misspelt data set", LESIONS.replace("901", "Dataset901_Lesion"),
          (f"Did you mean {DATASET}?",), 2),
    Wrong("fingerprint: misspelt plans", LESIONS + "-p nnUNetSmallPlans", ("nnUNetSmallPlans", "smallseg plan")),
    Wrong("fingerprint: damaged plans", LESIONS, ("cannot be read", "smallseg plan -d 901"), 1,
          text(f"preprocessed/{DATASET}/{PLANS}.json", "{")),
    Wrong("fingerprint: misspelt configuration", LESIONS + "-c 2.5dd", ("'2.5dd'", "Did you mean 2.5d?")),
    Wrong("fingerprint: descending bins", LESIONS + "-size_bins 10 5", ("[10.0, 5.0]", "ascend"), 2),
    Wrong("fingerprint: misspelt option", LESIONS + "-size_bin 5", ("Did you mean -size_bins?",), 2),
    Wrong("fingerprint: damaged label", LESIONS, ("case2.nii.gz", "write it anew"), 1,
          both(remove(PREPROCESSED), text(f"{RAW}/labelsTr/case2.nii.gz", "x")), PROGRESS),
    Wrong("fingerprint: half a label", LESIONS, ("case2.nii.gz", "no whole numbers"), 1,
          both(remove(PREPROCESSED), voxels(f"{RAW}/labelsTr/case2.nii.gz", with_value(0.5))), PROGRESS),
    Wrong("fingerprint: unknown label", LESIONS, ("case2", "7", "dataset.json"), 1,
          both(remove(PREPROCESSED), voxels(f"{RAW}/labelsTr/case2.nii.gz", with_value(7), np.uint8)), PROGRESS),
    Wrong("fingerprint: damaged case", LESIONS, ("the preprocessed case case0", "nnUNetv2_preprocess"), 1, None,
          PROGRESS),
    Wrong("fingerprint: damaged splits", LESIONS, ("splits_final.json holds no list of folds", "remove it"), 1,
          text(f"preprocessed/{DATASET}/splits_final.json", "[]")),
    Wrong("fingerprint: file for a folder", LESIONS + "-o {}/p.csv", ("p.csv", "-o"), 1, text("p.csv", "")),
    Wrong("fingerprint: full disk", LESIONS, ("No space left on device", "-o"), 1,
          both(remove(PREPROCESSED), full_disk), PROGRESS),
]  # fmt: skip

WEIGHTS = [
    Wrong("weights: no action", "smallseg weights", ("ACTION",), 2),
    Wrong("weights: misspelt action", "smallseg weights fetsch x", ("Did you mean fetch?",), 2),
    Wrong("weights: misspelt name", "smallseg weights fetch vmamba_tiny",
          ("'vmamba_tiny'", "Did you mean vmamba_tiny_imagenet?"), 2),
    Wrong("weights: absent", "smallseg weights verify vmamba_tiny_imagenet",
          ("not on this machine", "smallseg weights fetch")),
    Wrong("weights: truncated", "smallseg weights verify vmamba_tiny_imagenet",
          ("it has 7 bytes and should have 91649482", "Delete it and run"), 1, text(VMAMBA, b"PK\x03\x04xxx")),
    Wrong("weights: wrong hash", "smallseg weights verify vmamba_tiny_imagenet", ("sha256 is 541b3e", "Delete it"), 1,
          both(small_entry, text(VMAMBA, bytes(1000)))),
    Wrong("weights: file for a folder", "smallseg weights list", ("is not a folder", "Set it to the folder"), 1,
          set_variable("SMALLSEG_WEIGHTS", "{}/raw/Dataset901_Lesions/dataset.json")),
    Wrong("weights: no network", "smallseg weights fetch vmamba_tiny_imagenet",
          ("network is unreachable", "By hand"), 1, offline),
    Wrong("weights: connection lost", "smallseg weights fetch vmamba_tiny_imagenet", ("connection lost after 0",), 1,
          lost_connection),
    Wrong("weights: full disk", "smallseg weights fetch vmamba_tiny_imagenet",
          ("No space left on device", "Free space"), 1, full_disk_while_downloading),
    Wrong("import: no file", IMPORT, ("No such file", "Check path")),
    Wrong("import: text", IMPORT, ("not a PyTorch checkpoint", "check the path"), 1, text("ckpt.pth", "hello")),
    Wrong("import: web page", IMPORT, ("a web page", "Download"), 1, text("ckpt.pth", "<html>")),
    Wrong("import: truncated", IMPORT, ("damaged or incomplete", "Download or copy it again"), 1,
          both(saved("ckpt.pth", {"a": torch.zeros(99)}), truncated("ckpt.pth", 300))),
    Wrong("import: another network", IMPORT, ("neither Swin-UMamba nor SwinUMambaD", "checkpoint_final.pth"), 1,
          saved("ckpt.pth", {"conv.weight": torch.zeros(3)})),
    Wrong("import: runs code", IMPORT, ("was not loaded", "mkdir", "If you trust the file"), 1,
          saved("ckpt.pth", {"state_dict": {"a": torch.zeros(1)}, "other": RunsCode()})),
    Wrong("import: output is there", IMPORT, ("out.pth exists", "--overwrite"), 1,
          both(text("ckpt.pth", "x"), text("out.pth", "x"))),
    Wrong("import: output is a folder", "smallseg weights import-official {}/ckpt.pth -o {}/ref", ("is a folder",), 1,
          text("ckpt.pth", "x")),
]  # fmt: skip

EVALUATIONS = [
    Wrong("evaluate: nothing", "smallseg evaluate", ("-ref, -pred, -o",), 2),
    Wrong("evaluate: no reference", EVALUATE.replace("/ref ", "/reff "), ("reff is not a folder", ".nii.gz")),
    Wrong("evaluate: empty folder", EVALUATE.replace("{}/pred", "{}/empty"), ("holds no label maps", ".nii.gz")),
    Wrong("evaluate: no common case", EVALUATE, ("no case in common", "same name"), 1,
          lambda world: [file.rename(file.with_name(f"x{file.name}")) for file in (world / "pred").iterdir()]),
    Wrong("evaluate: case missing", EVALUATE, ("case1", "Add the files, or skip"), 1, remove(CASE)),
    Wrong("evaluate: another shape", EVALUATE, ("(6, 16, 16) and (6, 16, 15)", "grid of the reference"), 1,
          voxels(CASE, lambda array: array[:-1])),
    Wrong("evaluate: another spacing", EVALUATE, ("(3, 0.8, 0.8) and (1, 1, 1)", "correct the header"), 1,
          voxels(CASE, lambda array: array, affine=np.eye(4))),
    Wrong("evaluate: NaN", EVALUATE, ("case1.nii.gz holds NaN",), 1, voxels(CASE, with_value(np.nan))),
    Wrong("evaluate: infinite", EVALUATE, ("case1.nii.gz holds NaN or infinite",), 1, voxels(CASE, with_value(np.inf))),
    Wrong("evaluate: half a label", EVALUATE, ("holds 0.5", "probability map"), 1, voxels(CASE, with_value(0.5))),
    Wrong("evaluate: negative label", EVALUATE, ("holds -1", "from 0"), 1, voxels(CASE, with_value(-1), np.int16)),
    Wrong("evaluate: 4D", EVALUATE, ("has 4 dimensions", "2 or 3 dimensions"), 1, voxels(CASE, twice)),
    Wrong("evaluate: label outside dataset.json", EVALUATE + f"-djfile {{}}/{RAW}/dataset.json",
          ("labels [5]", "[0, 1] are known"), 1, voxels(CASE, with_value(5))),
    Wrong("evaluate: damaged volume", EVALUATE, ("case1.nii.gz cannot be read", "write it anew"), 1, text(CASE, "xx")),
    Wrong("evaluate: damaged picture", PICTURES, ("picture1.png cannot be read", "write it anew"), 1,
          text("source/masks/picture1.png", b"\x89PNG\r\n")),
    Wrong("evaluate: colour picture", PICTURES, ("(16, 16, 3)", "grey"), 1,
          picture("source/masks/picture1.png", np.zeros((16, 16, 3), np.uint8))),
    Wrong("evaluate: no dataset.json", EVALUATE + "-djfile {}/none.json", ("none.json", "-djfile")),
    Wrong("evaluate: damaged dataset.json", EVALUATE + "-djfile {}/x.json", ("x.json", "-djfile"), 1,
          text("x.json", "{")),
    Wrong("evaluate: same name twice", EVALUATE.replace("-o", "{}/pred -o"), ("named pred", "NAME=FOLDER"), 2),
    Wrong("evaluate: impossible name", EVALUATE.replace("{}/pred", "'a b={}/pred'"), ("'a b'", "use letters"), 2),
    *(Wrong(f"evaluate: {option}", EVALUATE + option, says, 2) for option, says in {
        "-tolerance -1": ("-1.0", "0 mm or more"), "-tolerance inf": ("inf", "0 mm or more"),
        "-match_threshold 2": ("2.0", "[0, 1)"), "-connectivity 7": ("7", "6, 18, 26"),
        "-size_bins 10 5": ("[10.0, 5.0]", "ascend"), "-size_bins nan": ("[nan]", "ascend"),
        "-np 0": ("'0' is not a positive number",), "--protocol uls": ("Did you mean uls23?",),
        "-l -1": ("-1 is no label", "from 0"), "-spacing 1 1 1": ("(1.0, 1.0, 1.0)", "hold their own"),
        "-both_empty maybe": ("'maybe'", "undefined"), "--jsn": ("Did you mean --json?",),
    }.items()),
    Wrong("evaluate: spacing of one axis", PICTURES + "-spacing 1", ("(1.0,)", "one number above 0 an axis")),
    Wrong("evaluate: no spacing", PICTURES + "-spacing 1 0", ("(1.0, 0.0)", "above 0")),
    Wrong("evaluate: background only", EVALUATE + "-l 0", ("no foreground label", "-l")),
    Wrong("evaluate: no instances", EVALUATE + "--instances {}/none", ("none is not a folder",)),
    Wrong("evaluate: no probabilities", EVALUATE + "--probabilities", ("case0.npz is missing", "--save_probabilities")),
    Wrong("evaluate: damaged probabilities", EVALUATE + "--probabilities", ("no archive of numpy", "predict anew"), 1,
          text("pred/case0.npz", "x")),
    Wrong("evaluate: no table of patients", REPORT + "-patients {}/none.csv", ("none.csv", "columns case and patient")),
    Wrong("evaluate: table that is no text", REPORT + "-patients {}/p.csv", ("UTF-8", "columns case and patient"), 1,
          text("p.csv", b"\xff\xfe\x00")),
    Wrong("evaluate: case without patient", REPORT + "-patients {}/p.csv", ("2 of 3 cases", "case1", "Add every"), 1,
          text("p.csv", "case,patient\ncase0,a\n")),
    Wrong("evaluate: no images", REPORT + "-images {}/none", ("none is not a folder", "-images")),
    Wrong("evaluate: image missing", REPORT + "-images {}/empty", ("no image of the case case0", "case0_0000")),
    Wrong("evaluate: output is a file", EVALUATE.replace("{}/out", "{}/p.csv/out"), ("p.csv is a file", "-o"), 2,
          text("p.csv", "")),
    Wrong("evaluate: full disk", EVALUATE, ("No space left on device", "another folder"), 1, full_disk, ("out/",)),
]  # fmt: skip

TRAININGS = [
    Wrong("train: misspelt configuration", TRAIN.replace(" 2d ", " 2.5dd "), ("'2.5dd'", "mean 2.5d?"), 1, ours()),
    Wrong("train: 3D configuration missing", TRAIN.replace(" 2d ", " 3d_fullres "), ("'3d_fullres'", "smallseg plan"),
          1, ours()),
    Wrong("train: 3D configuration", TRAIN, ("three-dimensional", "2.5d"), 1,
          planar(spacing=[3.0, 0.8, 0.8], patch_size=[16, 32, 32])),
    Wrong("train: 2.5d on pictures", TRAIN.replace("901 2d", "902 2.5d"), ("'2.5d'", "use 2d"), 1, ours()),
    Wrong("train: negative fold", TRAIN.replace(" 0 ", " -1 "), ("no fold -1", "or all"), 1, ours()),
    Wrong("train: damaged splits", TRAIN, ("splits_final.json holds no fold 0", "Mend it"), 1,
          ours(text(f"preprocessed/{DATASET}/splits_final.json", '[{"training": []}]'))),
    Wrong("train: splits of other cases", TRAIN, ("names 1 cases that are not in", "caseX", "nnUNetv2_preprocess"), 1,
          ours(text(f"preprocessed/{DATASET}/splits_final.json", '[{"train": ["case0"], "val": ["caseX"]}]'))),
    Wrong("train: not preprocessed", TRAIN,
          ("not preprocessed", f"nnUNetv2_preprocess -d 901 -plans_name {PLANS} -c 2d"), 1,
          ours(remove(PREPROCESSED))),
    Wrong("train: 2.5d not preprocessed", TRAIN.replace(" 2d ", " 2.5d "), (f"-plans_name {PLANS} -c 2d",), 1,
          ours(remove(PREPROCESSED))),
    Wrong("train: nnUNet_results not set", TRAIN, ("nnUNet_results is not set", "export"), 1,
          ours(unset("nnUNet_results"))),
    Wrong("train: NaN in the plans", TRAIN, ("mean of the intensities of channel 0 is nan", "Mend it"), 1,
          plan(lambda p: p["foreground_intensity_properties_per_channel"]["0"].update(mean=np.nan))),
    Wrong("train: no epochs", TRAIN, ("num_epochs: 0", "1 to a million"), 1, planar(training={"num_epochs": 0})),
    Wrong("train: unknown setting", TRAIN, ("epochs: 3", "Did you mean num_epochs?"), 1,
          planar(training={"epochs": 3})),
    Wrong("train: unknown switch", TRAIN, ("lesion_sampling: 'all'", "'size_bin'"), 1,
          planar(training={"lesion_sampling": "all"})),
    Wrong("train: even slab", TRAIN.replace(" 2d ", " 2.5d "), ("slices is 4", "odd"), 1, slab(patch_size=[4, 32, 32])),
    Wrong("train: lost parent", TRAIN.replace(" 2d ", " 2.5d "), ("'2dd'", "Did you mean 2d?"), 1,
          slab(inherits_from="2dd")),
    Wrong("train: its own parent", TRAIN.replace(" 2d ", " 2.5d "), ("no configuration '2.5d'",), 1,
          slab(inherits_from="2.5d")),
    Wrong("train: no patch", TRAIN, ("patch_size None", "smallseg plan"), 1, planar(patch_size=None)),
    Wrong("train: patch of one axis", TRAIN, ("patch_size [32]", "smallseg plan"), 1, planar(patch_size=[32])),
    Wrong("train: negative patch", TRAIN, ("patch_size [-32, 32]", "positive"), 1, planar(patch_size=[-32, 32])),
    Wrong("train: no batch", TRAIN, ("batch_size 0", "positive"), 1, planar(batch_size=0)),
    Wrong("train: unknown option of the network", TRAIN, ("witdhs", "Its options are", "correct the plans"), 1,
          planar(network_options={"HUNet": {"witdhs": 1}}), TRAINING_LOG),
    Wrong("train: plans of nnU-Net 1", TRAIN, ("nnU-Net 1", "smallseg plan"), 1,
          ours(text(f"preprocessed/{DATASET}/{PLANS}.json", '{"plans_per_stage": {}}'))),
    Wrong("train: goes on with another network", TRAIN + " --c", ("does not fit HUNet", "train anew without --c"), 1,
          checkpoint("nnUNetTrainerMambaAHNet"), TRAINING_LOG),
    Wrong("train: goes on with other classes", TRAIN + " --c", ("another number of classes", "without --c"), 1,
          checkpoint(classes=5), TRAINING_LOG),
    Wrong("train: goes on with other channels", TRAIN + " --c", ("(8, 3, 3, 3)", "(8, 1, 3, 3)"), 1,
          checkpoint(channels=3), TRAINING_LOG),
    Wrong("train: weights not here", TRAIN.replace(TRAINER, "nnUNetTrainerSwinUMamba"),
          ("not on this machine", "smallseg weights fetch"), 1, ours(), TRAINING_LOG),
    Wrong("predict: another network", PREDICT, ("does not fit HUNet", "plans.json"), 1,
          checkpoint("nnUNetTrainerMambaAHNet"), PREDICTION_FOLDER),
    Wrong("predict: other classes", PREDICT, ("another number of classes", "dataset.json"), 1, checkpoint(classes=5),
          PREDICTION_FOLDER),
]  # fmt: skip
if not torch.cuda.is_available():
    TRAININGS.append(Wrong("train: no GPU", TRAIN.replace("cpu", "cuda"), ("no usable GPU", "-device cpu"), 1, ours()))

# nnU-Net ends these itself, before it asks a trainer; docs/troubleshooting.md says what they mean.
STOCK = [
    Wrong("nnU-Net: trainers unknown", TRAIN, ("Could not find requested nnunet trainer",), traceback=True),
    Wrong("nnU-Net: misspelt trainer", TRAIN.replace(TRAINER, "nnUNetTrainerSwinUmamba"),
          ("Did you mean nnUNetTrainerSwinUMamba?", "Could not find requested nnunet trainer"), 1, ours(), (), True),
    Wrong("nnU-Net: trainer of the checkpoint unknown", PREDICT,
          ("Did you mean nnUNetTrainerSvANet?", "Could not find requested nnunet trainer"), 1,
          checkpoint(named="nnUNetTrainerSvaNet"), PREDICTION_FOLDER, True),
    Wrong("nnU-Net: unknown data set", TRAIN.replace("901", "950"), ("Could not find a dataset with the ID 950",), 1,
          ours(), (), True),
    Wrong("nnU-Net: unknown plans", TRAIN.replace(PLANS, "nnUNetSmallPlans"), ("nnUNetSmallPlans.json",), 1, ours(), (),
          True),
    Wrong("nnU-Net: damaged plans", TRAIN, ("JSONDecodeError",), 1,
          ours(text(f"preprocessed/{DATASET}/{PLANS}.json", "{")), (), True),
    Wrong("nnU-Net: fold is a word", TRAIN.replace(" 0 ", " x "), ("invalid literal for int",), 1, ours(), (), True),
    Wrong("nnU-Net: nnUNet_preprocessed not set", TRAIN, ("nnUNet_preprocessed is not defined",), 1,
          ours(unset("nnUNet_preprocessed")), (), True),
    Wrong("nnU-Net: validation before training", TRAIN + " --val", ("Cannot run validation",), 1, ours(), TRAINING_LOG,
          True),
    Wrong("nnU-Net: foreign -pretrained_weights", TRAIN + " -pretrained_weights {}/ckpt.pth",
          ("is missing in the pretrained model weights",), 1,
          ours(saved("ckpt.pth", {"network_weights": {"a": torch.zeros(1)}})), TRAINING_LOG, True),
    Wrong("nnU-Net: no model", PREDICT, ("No such file or directory", "dataset.json"), 1, ours(), PREDICTION_FOLDER,
          True),
    Wrong("nnU-Net: damaged checkpoint", PREDICT, ("OSError: [Errno 22] Invalid argument",), 1,
          both(checkpoint(), lambda world: truncated(str(world.checkpoint.relative_to(world.folder)), 5000)(world)),
          PREDICTION_FOLDER, True),
]  # fmt: skip

ROWS = [
    *GENERAL,
    *DOCTOR,
    *DEMOS,
    *CONVERSIONS,
    *PLANS_ROWS,
    *SWITCHES,
    *FINGERPRINTS,
    *WEIGHTS,
    *EVALUATIONS,
    *TRAININGS,
    *STOCK,
]


# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """The world every test gets a copy of."""
    folder = tmp_path_factory.mktemp("world")
    world_module.build(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_n_proc_DA", "1")
        for name in FOLDERS:
            patch.setenv(name, str(folder / name[len("nnUNet_") :]))
        world_module.write_plans(folder)
    return folder


@contextmanager
def world_at(folder: Path, template: Path, monkeypatch, capsys):
    shutil.copytree(template, folder, dirs_exist_ok=True)
    for name in FOLDERS:
        monkeypatch.setenv(name, str(folder / name[len("nnUNet_") :]))
    monkeypatch.setenv("SMALLSEG_WEIGHTS", str(folder / "weights"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    monkeypatch.chdir(folder)
    yield World(folder, monkeypatch, capsys)


@pytest.fixture
def world(template, tmp_path, monkeypatch, capsys):
    with world_at(tmp_path / "world", template, monkeypatch, capsys) as made:
        yield made


def quick_doctor(world: World) -> None:
    """Without the checks that take seconds and are not about wrong inputs."""
    from nnunetv2_smallseg import doctor

    kept = {name: check for name, check in doctor.CHECKS.items() if name not in ("trainers", "scan back ends")}
    world.monkeypatch.setattr(doctor, "CHECKS", kept)


def half_written(before: dict[str, bytes], after: dict[str, bytes], leaves: tuple[str, ...]) -> list[str]:
    """What was changed, removed, or is new without being allowed to."""
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return sorted(name for name in changed if name in before or not any(fnmatch.fnmatch(name, p) for p in leaves))


def test_the_table_covers_every_command():
    programs = {row.command.split()[1] for row in ROWS if row.command.startswith("smallseg ")}
    assert {command.__name__.rpartition(".")[2] for command in COMMANDS} <= programs
    assert len(ROWS) >= 60
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_wrong_input(row, world):
    if row.command.startswith("smallseg doctor"):
        quick_doctor(world)
    if row.change is not None:
        row.change(world)
    before = world.tree()
    result = world.run(row.command)
    after = world.tree()
    shown = f"\n{result.output[-2000:]}\n{result.errors[-3000:]}"
    said = result.text if "doctor" in row.command else result.errors
    assert result.status == row.status, shown
    assert [part for part in row.says if part not in said] == [], shown
    assert ("Traceback" in result.text) is row.traceback, shown
    assert half_written(before, after, row.leaves) == []
    assert not [name for name in after if name.endswith(".part")]


TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()


@pytest.mark.parametrize("row", STOCK, ids=lambda row: row.name)
def test_messages_of_nnunet_are_documented(row):
    assert row.says[-1] in TROUBLESHOOTING.replace("\n", " ")


@contextmanager
def unprivileged():
    """As a user who may not write here: permissions do not bind root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.name == "nt", reason="permissions are others on Windows")
@pytest.mark.parametrize(
    "command",
    [
        PLAN + "-plans_name Other",
        CONVERT,
        EVALUATE,
        "smallseg weights fetch vmamba_tiny_imagenet",
        DEMO,
    ],
    ids=lambda command: command.split()[1],
)
def test_no_permission(command, template, monkeypatch, capsys):
    """The folders can be read by everybody and written by nobody."""
    place = Path(tempfile.mkdtemp(prefix="smallseg_test_"))  # pytest's own folder is closed to other users
    try:
        with world_at(place, template, monkeypatch, capsys) as world:
            monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"x"))
            # Everything is imported first: the unprivileged user may not be able to read this environment.
            world.run(command.replace("{}/", "{}/elsewhere/") + " -xyz")
            with monkeypatch.context() as patch:
                full_disk(World(place, patch, capsys))
                world.run(command)
            shutil.rmtree(place)
            shutil.copytree(template, place)
            for path in (place, *place.rglob("*")):
                path.chmod(0o555 if path.is_dir() else 0o444)
            before = world.tree()
            with unprivileged():
                result = world.run(command)
            assert result.status == 1, result.text
            assert "Permission denied" in result.errors
            assert "Traceback" not in result.text
            assert "ermission" in result.errors.replace("Permission denied", "") or "folder" in result.errors
            assert world.tree() == before
    finally:
        for path in (place, *place.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(place)


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        ("smallseg plan -d 950", 2, "there is no data set '950'"),
        (TRAIN.replace(" 2d ", " 3d "), 1, "no configuration '3d'"),
    ],
    ids=["smallseg", "nnUNetv2_train"],
)
def test_as_a_user_starts_it(line, status, says, world):
    world.monkeypatch.setenv("nnUNet_extTrainer", str(extension_folder()))
    program, *words = line.split()
    finished = subprocess.run(
        [str(Path(sys.executable).with_name(program)), *words], capture_output=True, text=True, check=False
    )
    assert finished.returncode == status
    assert says in finished.stderr
    assert "Traceback" not in finished.stderr


def test_plans_from_before_nnunet_2_2_still_train(world):
    """They name the network by ``UNet_class_name``; nnU-Net builds the rest from them, and so do our trainers."""

    def old_format(plans: dict) -> None:
        planar_configuration = plans["configurations"]["2d"]
        network = planar_configuration.pop("architecture")["arch_kwargs"]
        planar_configuration.update(
            UNet_class_name="PlainConvUNet",
            UNet_base_num_features=network["features_per_stage"][0],
            n_conv_per_stage_encoder=network["n_conv_per_stage"],
            n_conv_per_stage_decoder=network["n_conv_per_stage_decoder"],
            num_pool_per_axis=[2, 2],
            pool_op_kernel_sizes=network["strides"],
            conv_kernel_sizes=network["kernel_sizes"],
            unet_max_num_features=max(network["features_per_stage"]),
        )

    plan(old_format)(world)
    plans = {**json.loads(world.plans.read_text()), "continue_training": False}
    dataset_json = json.loads((world.preprocessed / "dataset.json").read_text())
    for name in (TRAINER, "nnUNetTrainerAmplification"):
        with pytest.warns(UserWarning, match="old nnU-Net plans format"):
            trainer = getattr(nnunetv2_smallseg.trainers, name)(
                copy.deepcopy(plans), "2.5d", 0, dataset_json, torch.device("cpu")
            )
            trainer.initialize()


def test_main_does_not_hide_our_own_mistakes(monkeypatch, capsys):
    """A traceback is for those who mend the program: only what users can mend is turned into a message."""
    from nnunetv2_smallseg.cli import trainers

    def fail() -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(trainers, "trainer_rows", fail)
    with pytest.raises(KeyError):
        main(["trainers"])


@pytest.mark.parametrize("name", ["nnUNetTrainerHUNet", "nnUNetTrainerAHNetRecon", "nnUNetTrainerAmplification"])
def test_trainers_stop_at_an_image_with_nan(name, world):
    """One of our networks, one with a loss of its own, and nnU-Net's network, each by its real step."""
    plans = {**json.loads(world.plans.read_text()), "continue_training": False}
    dataset_json = json.loads((world.preprocessed / "dataset.json").read_text())
    trainer = getattr(nnunetv2_smallseg.trainers, name)(plans, "2d", 0, dataset_json, torch.device("cpu"))
    trainer.initialize()
    patch = trainer.configuration_manager.patch_size
    scales = trainer._get_deep_supervision_scales() or [[1.0, 1.0]]
    targets = [torch.zeros(2, 1, *(round(n * s) for n, s in zip(patch, scale, strict=True))) for scale in scales]
    images = torch.randn(2, 1, *patch, generator=torch.Generator().manual_seed(0))
    images[1, 0, 5, 5] = np.nan
    target = targets if trainer.enable_deep_supervision else targets[0]
    with pytest.raises(CommandStopped, match="images of lesion7 hold NaN"):
        trainer.train_step({"data": images, "target": target, "keys": ["lesion3", "lesion7"]})
