"""Reading an nnU-Net raw data set far enough to run the demo on it, with every problem named before anything runs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_smallseg.errors import SmallSegError, UsageError

__all__ = ["RawDataset", "check_fold", "holds_single_images", "link_cases", "read_dataset"]

# nnU-Net's split when the data set brings none.
DEFAULT_NUM_FOLDS = 5


@dataclass(frozen=True)
class RawCase:
    """Files of a case: one image a channel, and the reference."""

    images: tuple[Path, ...]
    labels: Path


@dataclass(frozen=True)
class RawDataset:
    """An nnU-Net raw data set.

    Attributes:
        folder: Absolute path of its folder.
        file_ending: Ending of its files, with the dot.
        training: Training cases by name.
        held_back: Cases of ``imagesTs`` by name; empty unless ``labelsTs`` holds exactly their references.
        splits: Content of its own ``splits_final.json``; None when nnU-Net makes the folds.
        identity: Checksum that changes when any of its files does.
    """

    folder: Path
    file_ending: str
    training: dict[str, RawCase]
    held_back: dict[str, RawCase]
    splits: list[dict[str, list[str]]] | None
    identity: str

    @property
    def name(self) -> str:
        """Name of the folder, DatasetXXX_Name."""
        return self.folder.name

    @property
    def number(self) -> int:
        """The XXX of DatasetXXX_Name."""
        return int(self.name[7:10])


def read_dataset(folder: str | Path) -> RawDataset:
    """Reads a raw data set.

    Raises:
        UsageError: If ``folder`` is no folder, is not named DatasetXXX_Name, or has no ``dataset.json``.
        SmallSegError: If the data set is incomplete or contradicts itself.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise UsageError(f"-i {folder} is not a folder: name the folder of an nnU-Net raw data set (DatasetXXX_Name)")
    if not re.fullmatch(r"Dataset\d{3}_.+", folder.name):
        raise UsageError(
            f"-i {folder}: the folder is named {folder.name!r}, but nnU-Net wants DatasetXXX_Name with three digits, "
            "such as Dataset101_Liver. Rename it, or name the data set's folder rather than its parent."
        )
    if not (folder / "dataset.json").is_file():
        raise UsageError(
            f"-i {folder} has no dataset.json: see 'dataset conversion' in nnU-Net's documentation for what a raw "
            "data set holds"
        )
    same_number = [
        other.name for other in folder.parent.iterdir() if other.name.startswith(folder.name[:10]) and other.is_dir()
    ]
    if len(same_number) > 1:
        raise SmallSegError(
            f"{folder.parent} holds more than one data set with number {folder.name[7:10]}: "
            f"{', '.join(sorted(same_number))}. nnU-Net cannot tell them apart: move or renumber all but one."
        )
    description = _read_json(folder / "dataset.json")
    missing = [key for key in ("channel_names", "labels", "numTraining", "file_ending") if key not in description]
    if missing:
        raise SmallSegError(f"{folder / 'dataset.json'} lacks {', '.join(missing)}: nnU-Net needs them, so add them")
    ending, channels = description["file_ending"], len(description["channel_names"])
    if "dataset" in description:
        training = {
            name: RawCase(
                tuple(_listed_path(folder, image) for image in entry["images"]), _listed_path(folder, entry["label"])
            )
            for name, entry in description["dataset"].items()
        }
    else:
        training = _cases_in_folders(folder, "Tr", ending, channels)
    if not training:
        raise SmallSegError(
            f"{folder} has no training cases: expected images named CASE_0000{ending} in {folder / 'imagesTr'}"
        )
    for name, case in training.items():
        absent = [file for file in (*case.images, case.labels) if not file.is_file()]
        if absent:
            raise SmallSegError(f"training case {name} lacks {absent[0]}: add the file or remove the case")
    held_back = _cases_in_folders(folder, "Ts", ending, channels)
    references = {file.name for file in folder.glob(f"labelsTs/*{ending}")}
    if references != {case.labels.name for case in held_back.values()}:
        held_back = {}
    splits = _read_splits(folder / "splits_final.json", training)
    return RawDataset(folder, ending, training, held_back, splits, _identity(folder, training, held_back))


def _read_json(file: Path) -> dict | list:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SmallSegError(f"{file} cannot be read: {error}. Mend the file.") from error


def _listed_path(folder: Path, text: str) -> Path:
    """A path of the optional list in ``dataset.json``: may use variables and be relative to the data set's folder."""
    return Path(os.path.abspath(folder / os.path.expandvars(text)))


def _cases_in_folders(folder: Path, subset: str, ending: str, channels: int) -> dict[str, RawCase]:
    """The cases of ``imagesTr`` or ``imagesTs`` (``subset`` Tr or Ts) by name, whether or not their files are there."""
    pattern = re.compile(r"(.+)_\d{4}" + re.escape(ending))
    matches = [pattern.fullmatch(file.name) for file in sorted(folder.glob(f"images{subset}/*{ending}"))]
    return {
        name: RawCase(
            tuple(folder / f"images{subset}" / f"{name}_{channel:04d}{ending}" for channel in range(channels)),
            folder / f"labels{subset}" / f"{name}{ending}",
        )
        for name in sorted({match[1] for match in matches if match})
    }


def _read_splits(file: Path, training: dict[str, RawCase]) -> list[dict[str, list[str]]] | None:
    """The folds a data set brings along; None if it has none."""
    if not file.is_file():
        return None
    splits = _read_json(file)
    try:
        unknown = sorted(
            {case for split in splits for part in ("train", "val") for case in split[part]} - set(training)
        )
    except (KeyError, TypeError):
        raise SmallSegError(
            f'{file} is no list of folds: expected [{{"train": [cases], "val": [cases]}}, ...]. Mend or remove it.'
        ) from None
    if unknown:
        raise SmallSegError(f"{file} names cases that are not there: {', '.join(unknown[:5])}. Mend or remove it.")
    return splits


def _identity(folder: Path, training: dict[str, RawCase], held_back: dict[str, RawCase]) -> str:
    """Checksum over descriptions, and over name, length and time of every image and reference.

    Reading all voxels of a large data set would take minutes at each start.
    """
    digest = hashlib.sha256()
    for file in (folder / "dataset.json", folder / "splits_final.json"):
        digest.update(file.read_bytes() if file.is_file() else b"")
    for cases in (training, held_back):
        for name, case in sorted(cases.items()):
            for file in (*case.images, case.labels):
                if file.is_file():
                    status = file.stat()
                    digest.update(f"{name}/{file.name}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def check_fold(dataset: RawDataset, fold: int | str) -> None:
    """Checks that the data set has the fold.

    Raises:
        UsageError: If it has not, with the folds there are.
    """
    if fold == "all":
        return
    num_folds = DEFAULT_NUM_FOLDS if dataset.splits is None else len(dataset.splits)
    if int(fold) >= num_folds:
        origin = "nnU-Net makes five" if dataset.splits is None else "so many are in its splits_final.json"
        raise UsageError(
            f"-f {fold}: {dataset.name} has {num_folds} fold(s) ({origin}): use 0 to {num_folds - 1}, or all"
        )
    if dataset.splits is None and len(dataset.training) < num_folds:
        raise UsageError(
            f"-f {fold}: {dataset.name} has {len(dataset.training)} training case(s), too few for nnU-Net's "
            f"{num_folds} folds. Use -f all, or put a splits_final.json into {dataset.folder}."
        )


def holds_single_images(dataset: RawDataset) -> bool:
    """Whether the cases are single images rather than volumes, as nnU-Net's own reader sees the first one.

    Raises:
        SmallSegError: If nnU-Net cannot read it.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    images = [str(file) for file in next(iter(dataset.training.values())).images]
    # nnU-Net reports each reader it tries on both streams.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            description = _read_json(dataset.folder / "dataset.json")
            reader = determine_reader_writer_from_dataset_json(description, images[0])
            array, _ = reader().read_images(images)  # (C, Z, Y, X)
        except Exception as error:
            raise SmallSegError(f"nnU-Net cannot read {images[0]}: {error}. Replace the damaged file.") from error
    return array.shape[1] == 1


def link_cases(cases: dict[str, RawCase], ending: str, images: Path, labels: Path) -> None:
    """Fills two new folders with links to the images and references of ``cases``, or with copies where links fail."""
    for folder in (images, labels):
        folder.mkdir(parents=True)
    for name, case in cases.items():
        for channel, file in enumerate(case.images):
            _link(file, images / f"{name}_{channel:04d}{ending}")
        _link(case.labels, labels / f"{name}{ending}")


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source)
    except OSError:
        # Windows without the right to link, or a file system without links.
        shutil.copy2(source, target)
