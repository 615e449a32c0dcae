"""Sets of 2D images with masks: one plan function a layout.

Images become 8-bit PNG (colour as three channels in one file, as nnU-Net reads them), masks PNG with 0 and 1. Images
and masks are paired by name, never by order, and have to have the same size. The same image under two names is reported
and kept on one side of every fold by the engine.
"""

from __future__ import annotations

import csv
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from nnunetv2_smallseg.datasets.archives import Source
from nnunetv2_smallseg.datasets.cases import Case, Converted, Plan, Problem, case_identifier
from nnunetv2_smallseg.datasets.pictures import Picture, is_colour, read_label_map, read_mask, read_picture
from nnunetv2_smallseg.datasets.splits import NUM_FOLDS, Splits, grouped_folds, patient_folds
from nnunetv2_smallseg.datasets.trees import existing_folder, folders_below, visible_files
from nnunetv2_smallseg.errors import CaseError, DatasetError, UsageError

__all__ = ["Listing", "Pair", "plan_busi", "plan_cvc", "plan_fives", "plan_isic", "plan_pairs", "plan_polypgen",
           "plan_tissuenet", "read_pair"]  # fmt: skip

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
MASK_SUFFIXES = ("", "_mask", "_segmentation", "_label", "_gt")


@dataclass(frozen=True)
class Pair:
    """An image and the masks whose union is its label."""

    name: str
    image: Path
    masks: tuple[Path, ...]
    patient: str
    subset: str
    test: bool = False


@dataclass
class Listing:
    """Pairs of a data set, and what does not pair."""

    pairs: list[Pair] = field(default_factory=list)
    skipped: list[Problem] = field(default_factory=list)
    failed: list[Problem] = field(default_factory=list)

    def add(
        self, name: str, image: Path | None, masks: Sequence[Path], patient: str, subset: str, test: bool = False
    ) -> None:
        """Adds a pair, or the problem that a part of it is missing."""
        if image is None:
            self.failed.append(Problem(masks[0].name, subset, "mask without image"))
        elif not masks:
            self.skipped.append(Problem(image.name, subset, "image without mask"))
        else:
            try:
                self.pairs.append(Pair(case_identifier(name), image, tuple(masks), patient, subset, test))
            except CaseError as error:
                self.failed.append(Problem(image.name, subset, str(error)))


def read_pair(
    image: Path, masks: Sequence[Path], num_channels: int, threshold: int, num_classes: int | None = None
) -> Converted:
    """Reads an image and the union of its masks.

    Args:
        image: The image.
        masks: Masks of one structure each; a single label map where ``num_classes`` is given.
        num_channels: 1 or 3; images of the other kind are refused.
        threshold: Mask values above it are foreground.
        num_classes: Highest label of a label map; None for masks.
    Raises:
        CaseError: If a file is damaged, of another kind, or of another size.
    """
    picture = read_picture(Source(image), num_channels)
    label = np.zeros(picture.array.shape[:2], np.uint8)
    notes = []
    for path in masks:
        mask, undecided = (read_label_map(Source(path)), 0) if num_classes else read_mask(Source(path), threshold)
        if mask.shape != label.shape:
            raise CaseError(
                f"{path.name} has {mask.shape[1]} x {mask.shape[0]} pixels, its image {label.shape[1]} x "
                f"{label.shape[0]}: is it the mask of another image?"
            )
        # Outlines blur in JPEG; this many pixels between black and white are more than an outline.
        if undecided > 0.1 * max(int((mask > 0).sum()), 1):
            notes.append(f"{path.name}: {undecided} pixels are grey, decided by the threshold {threshold}")
        label = mask if num_classes else np.maximum(label, mask)
    return Converted((picture,), Picture(label), notes=tuple(notes))


def _plan(
    listing: Listing,
    structure: str,
    num_channels: int,
    expected: str,
    threshold: int = 127,
    classes: Sequence[str] = (),
    folds: Callable[[list[dict]], Splits | None] = patient_folds,
    notes: Iterable[str] = (),
) -> Plan:
    if not listing.pairs:
        raise DatasetError(f"no image with a mask found; expected: {expected}")
    names = classes or (structure,)
    num_classes = len(classes) or None
    channels = ("red", "green", "blue") if num_channels == 3 else ("grey",)
    return Plan(
        cases=[
            Case(
                identifier=pair.name,
                read=partial(read_pair, pair.image, pair.masks, num_channels, threshold, num_classes),
                patient=pair.patient,
                subset=pair.subset,
                sources=(str(pair.image), *map(str, pair.masks)),
                test=pair.test,
            )
            for pair in listing.pairs
        ],
        labels={"background": 0, **{name: value for value, name in enumerate(names, 1)}},
        channel_names={str(number): name for number, name in enumerate(channels)},
        file_ending=".png",
        lesion_values=tuple(range(1, len(names) + 1)),
        skipped=listing.skipped,
        failed=listing.failed,
        folds=folds,
        notes=list(notes),
    )


def _folders_named(root: Path, pattern: str) -> list[tuple[Path, re.Match]]:
    """Folders below ``root`` with such a name."""
    matches = ((folder, re.fullmatch(pattern, folder.name)) for folder in folders_below(root))
    return [(folder, match) for folder, match in matches if match]


def _by_stem(folder: Path, pattern: str, *endings: str) -> dict[str, Path]:
    """Files by the first group of ``pattern``, which their names without ending match entirely."""
    found = {}
    for path in visible_files(folder, *(endings or IMAGE_ENDINGS)):
        match = re.fullmatch(pattern, path.stem)
        if match:
            found[match[1]] = path
    return found


# ----------------------------------------------------------------------------------------------------------------- ISIC


ISIC = {
    2018: (
        r"ISIC2018_Task1-2_(Training|Validation|Test)_Input",
        "ISIC2018_Task1_{}_GroundTruth",
    ),
    2017: (
        r"ISIC-2017_(Training|Validation|Test_v2)_Data",
        "ISIC-2017_{}_Part1_GroundTruth",
    ),
}


def plan_isic(source: str | Path, year: int) -> Plan:
    """Lists the cases of ISIC 2018 task 1 or ISIC 2017 part 1.

    Training and validation images are for training, with the official validation set as the one fold; test images go
    to ``imagesTs``.

    Args:
        source: Folder that holds the unpacked archives.
        year: 2017 or 2018.
    Raises:
        UsageError: If ``source`` is no folder.
        DatasetError: If the archives are not there.
    """
    root = existing_folder(source, f"ISIC {year}")
    images_pattern, masks_name = ISIC[year]
    listing = Listing()
    for folder, match in _folders_named(root, images_pattern):
        part = match[1].split("_")[0]
        # Other files there: LICENSE.txt, ATTRIBUTION.txt, *_superpixels.png, a table.
        images = _by_stem(folder, r"(ISIC_\d{7})", ".jpg", ".jpeg")
        masks: dict[str, Path] = {}
        for mask_folder, _ in _folders_named(root, re.escape(masks_name.format(match[1]))):
            masks |= _by_stem(mask_folder, r"(ISIC_\d{7})_segmentation", ".png")
        for name in sorted({*images, *masks}):
            found = [masks[name]] if name in masks else []
            listing.add(name, images.get(name), found, name, part, test=part == "Test")
    expected = f"{images_pattern} and {masks_name.format('...')} below {root}"
    return _plan(listing, "lesion", 3, expected, folds=official_fold)


def official_fold(records: list[dict]) -> Splits | None:
    """One fold: the official training and validation sets; folds of our own if one of them is missing."""
    parts: dict[str, list[str]] = {"Training": [], "Validation": []}
    for record in sorted(records, key=lambda record: record["case"]):
        parts[record["subset"]].append(record["case"])
    if not all(parts.values()):
        return patient_folds(records)
    return [{"train": parts["Training"], "val": parts["Validation"]}]


# --------------------------------------------------------------------------------------------------------- polyps, eyes


def plan_cvc(source: str | Path) -> Plan:
    """Lists the cases of CVC-ClinicDB.

    Its 612 frames come from 29 videos, so that random folds leak. With the table ``metadata.csv`` of the copy on Kaggle
    (columns ``frame_id``, ``sequence_id``) folds keep sequences together; without it they are five runs of consecutive
    frames, which divide at most four sequences.

    Raises:
        UsageError: If ``source`` is no folder.
        DatasetError: If the images are not there.
    """
    root = existing_folder(source, "CVC-ClinicDB")
    trees = [folder for folder in folders_below(root) if (folder / "Original").is_dir()]
    trees = [folder for folder in trees if (folder / "Ground Truth").is_dir()]
    expected = f"Original/1.tif ... and Ground Truth/1.tif ... below {root}"
    if not trees:
        raise DatasetError(f"no image with a mask found; expected: {expected}")
    images = {int(number): path for number, path in _by_stem(trees[0] / "Original", r"(\d+)").items()}
    masks = {int(number): path for number, path in _by_stem(trees[0] / "Ground Truth", r"(\d+)").items()}
    numbers = sorted({*images, *masks})
    sequences = _cvc_sequences(root)
    notes = [f"{trees[1]} holds the images a second time; {trees[0]} was taken"] if len(trees) > 1 else []
    if not set(numbers) <= set(sequences):
        notes.append(
            "no table of sequences (metadata.csv with frame_id and sequence_id): folds are runs of consecutive frames, "
            "and up to four video sequences are in two folds"
        )
        length = -(-len(numbers) // NUM_FOLDS)
        sequences = {number: f"run {place // length + 1}" for place, number in enumerate(numbers)}
    listing = Listing()
    for number in numbers:
        found = [masks[number]] if number in masks else []
        listing.add(f"cvc_{number:03d}", images.get(number), found, f"sequence {sequences[number]}", "CVC-ClinicDB")
    return _plan(listing, "polyp", 3, expected, notes=notes)


def _cvc_sequences(root: Path) -> dict[int, str]:
    for folder in folders_below(root):
        path = folder / "metadata.csv"
        if path.is_file():
            try:
                with path.open(newline="", encoding="utf-8-sig") as stream:
                    return {int(row["frame_id"]): row["sequence_id"] for row in csv.DictReader(stream)}
            except (ValueError, KeyError, TypeError, csv.Error) as error:
                raise DatasetError(f"{path} has no columns frame_id and sequence_id with numbers: {error}") from error
    return {}


def plan_polypgen(source: str | Path) -> Plan:
    """Lists the single frames of PolypGen; one fold for each of the six centres, because patients are not named.

    Raises:
        UsageError: If ``source`` is no folder.
        DatasetError: If the images are not there.
    """
    root = existing_folder(source, "PolypGen")
    listing = Listing()
    for folder, match in _folders_named(root, r"data_(C\d)"):
        centre = match[1]
        images = _by_stem(folder / f"images_{centre}", "(.+)") if (folder / f"images_{centre}").is_dir() else {}
        masks = _by_stem(folder / f"masks_{centre}", "(.+)_mask") if (folder / f"masks_{centre}").is_dir() else {}
        for name in sorted({*images, *masks}):
            found = [masks[name]] if name in masks else []
            listing.add(f"{centre}_{name}", images.get(name), found, f"centre {centre}", centre)
    return _plan(
        listing,
        "polyp",
        3,
        f"data_C1/images_C1/*.jpg and data_C1/masks_C1/*_mask.jpg below {root}",
        folds=grouped_folds,
        notes=["video sequences (sequenceData) are not converted"],
    )


def plan_fives(source: str | Path) -> Plan:
    """Lists the cases of FIVES: official training and test sets, folds alike in disease.

    Raises:
        UsageError: If ``source`` is no folder.
        DatasetError: If the images are not there.
    """
    root = existing_folder(source, "FIVES")
    diseases = {"A": "AMD", "D": "diabetic retinopathy", "G": "glaucoma", "N": "normal"}
    listing = Listing()
    for folder, match in _folders_named(root, "train|test"):
        if not ((folder / "Original").is_dir() and (folder / "Ground truth").is_dir()):
            continue
        images = _by_stem(folder / "Original", r"(\d+_[ADGN])")
        masks = _by_stem(folder / "Ground truth", r"(\d+_[ADGN])")
        for name in sorted({*images, *masks}):
            found = [masks[name]] if name in masks else []
            case = f"{match[0]}_{int(name[:-2]):03d}_{name[-1]}"
            listing.add(case, images.get(name), found, case, diseases[name[-1]], test=match[0] == "test")
    return _plan(listing, "vessel", 3, f"train/Original/1_A.png and train/Ground truth/1_A.png below {root}")


# ----------------------------------------------------------------------------------------------------------- ultrasound


def plan_busi(source: str | Path) -> Plan:
    """Lists the cases of BUSI (BUID in some papers): the union of all masks of an image is its label.

    Raises:
        UsageError: If ``source`` is no folder.
        DatasetError: If the images are not there.
    """
    root = existing_folder(source, "BUSI (Dataset_BUSI_with_GT)")
    listing = Listing()
    for folder, match in _folders_named(root, "benign|malignant|normal"):
        kind = match[0]
        images = _by_stem(folder, rf"{kind} \((\d+)\)", ".png")
        masks: dict[str, list[Path]] = {}
        for path in visible_files(folder, ".png"):
            found = re.fullmatch(rf"{kind} \((\d+)\)_mask(_\d+)?", path.stem)
            if found:
                masks.setdefault(found[1], []).append(path)
        for number in sorted({*images, *masks}, key=int):
            name = f"{kind}_{int(number):03d}"
            listing.add(name, images.get(number), masks.get(number, []), name, kind)
    return _plan(
        listing,
        "lesion",
        1,
        f"benign/benign (1).png and benign/benign (1)_mask.png below {root}",
        notes=["near-duplicates are known in this data set; only identical images are found here"],
    )


# ------------------------------------------------------------------------------------------------------------ TissueNet


TISSUENET_PARTS = {"train": "Training", "val": "Validation", "test": "Test"}
MAX_ROW_BYTES = 1 << 28


def plan_tissuenet(source: str | Path, structure: str = "cell") -> Plan:
    """Lists the cases of TissueNet 1.1: two channels (nucleus, cell), as 32-bit TIFF, because a scale would be ours.

    Args:
        source: Folder that holds ``tissuenet_v1.1_train.npz``, ``..._val.npz``, ``..._test.npz``.
        structure: ``cell`` or ``nucleus``: what becomes label 1. Instance numbers are not kept.
    Raises:
        UsageError: If ``source`` is no folder, or ``structure`` is another.
        DatasetError: If the files are not there.
    """
    if structure not in ("cell", "nucleus"):
        raise UsageError(f"-structure {structure}: use cell or nucleus")
    root = existing_folder(source, "TissueNet")
    cases: list[Case] = []
    failed: list[Problem] = []
    for folder in folders_below(root):
        for path in visible_files(folder, ".npz"):
            match = re.fullmatch(r"tissuenet_.*(train|val|test)", path.stem)
            if not match:
                continue
            part = TISSUENET_PARTS[match[1]]
            try:
                with closing(_Rows(path, "X.npy")) as images, closing(_Rows(path, "y.npy")) as labels:
                    shape, labels_shape = images.shape, labels.shape
                if len(shape) != 4 or shape[3] != 2 or labels_shape != shape:
                    raise CaseError(f"{path} holds X {shape} and y {labels_shape}; expected (images, Y, X, 2) twice")
            except CaseError as error:
                failed.append(Problem(path.name, part, str(error)))
                continue
            for row in range(shape[0]):
                name = f"tissuenet_{match[1]}_{row:04d}"
                cases.append(
                    Case(
                        identifier=name,
                        read=partial(read_tissuenet, path, row, ("cell", "nucleus").index(structure)),
                        patient=name,
                        subset=part,
                        sources=(f"{path}[{row}]",),
                        test=part == "Test",
                    )
                )
    if not cases and not failed:
        raise DatasetError(f"no tissuenet_v1.1_train.npz, ..._val.npz or ..._test.npz below {root}")
    return Plan(
        cases=cases,
        labels={"background": 0, structure: 1},
        channel_names={"0": "nucleus", "1": "cell"},
        file_ending=".tif",
        lesion_values=(1,),
        failed=failed,
        folds=official_fold,
    )


class _Rows:
    """Rows of an array in an ``.npz`` file, read forward without ever holding the array.

    Rows are asked for in order, so that a compressed file is unpacked once by each worker process.
    """

    def __init__(self, path: Path, member: str) -> None:
        self.path, self.member = path, member
        self._files = ExitStack()
        self._start()

    def close(self) -> None:
        """Closes the file."""
        self._files.close()

    def _start(self) -> None:
        self.close()
        name = f"{self.path}[{self.member}]"
        try:
            archive = self._files.enter_context(zipfile.ZipFile(self.path))
            self._stream = self._files.enter_context(archive.open(self.member))
            version = np.lib.format.read_magic(self._stream)
            if version not in ((1, 0), (2, 0)):
                raise CaseError(f"{name} has the unknown format version {version}")
            read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
            self.shape, fortran, self._dtype = read_header(self._stream)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise CaseError(f"{name} is no array that can be read: {error}") from error
        self._row_bytes = int(np.prod(self.shape[1:], dtype=object)) * self._dtype.itemsize
        if fortran or self._dtype.hasobject or not self.shape or not 0 < self._row_bytes <= MAX_ROW_BYTES:
            raise CaseError(f"{name} is no array of numbers in rows: {self.shape}, {self._dtype}")
        self._next = 0

    def read(self, row: int) -> np.ndarray:
        """A row; fastest if it is behind the one read before."""
        if row < self._next:
            self._start()
        try:
            while self._next <= row:
                content = self._stream.read(self._row_bytes)
                if len(content) < self._row_bytes:
                    raise CaseError(f"{self.path}[{self.member}] ends in row {self._next} of {self.shape[0]}")
                self._next += 1
        except (OSError, zipfile.BadZipFile, EOFError) as error:
            raise CaseError(f"{self.path}[{self.member}] is damaged: {error}") from error
        return np.frombuffer(content, self._dtype).reshape(self.shape[1:])


# Of this process; a worker keeps its place in the file from one case to the next.
_open_rows: dict[tuple[Path, str], _Rows] = {}


def read_tissuenet(path: Path, row: int, label_channel: int) -> Converted:
    """Reads an image and its label.

    Args:
        path: The ``.npz`` file.
        row: Number of the image.
        label_channel: 0 for whole cells, 1 for nuclei: the order of ``y``, which is not that of ``X``.
    Raises:
        CaseError: If the file is damaged.
    """
    values = {}
    for member in ("X.npy", "y.npy"):
        if (path, member) not in _open_rows:
            _open_rows[path, member] = _Rows(path, member)
        try:
            values[member] = _open_rows[path, member].read(row)
        except CaseError:
            _open_rows.pop((path, member)).close()
            raise
    instances = values["y.npy"][..., label_channel]
    if instances.dtype.kind == "f" and not np.isfinite(instances).all():
        raise CaseError("the label holds NaN or infinite values")
    image = values["X.npy"].astype(np.float32)
    channels = tuple(Picture(np.ascontiguousarray(image[..., channel]), "tif") for channel in range(2))
    return Converted(channels, Picture((instances > 0).astype(np.uint8), "tif"))


# ------------------------------------------------------------------------------------------------------ any folder pair


def plan_pairs(
    source: str | Path,
    images: str = "images",
    masks: str = "masks",
    test_images: str | None = None,
    test_masks: str | None = None,
    threshold: int = 127,
    classes: Sequence[str] = (),
    grey: bool = False,
    notes: Sequence[str] = (),
) -> Plan:
    """Lists pairs of a folder of images and a folder of masks.

    A mask is named like its image, or with ``_mask``, ``_segmentation``, ``_label`` or ``_gt`` behind the name.

    Args:
        source: Folder that holds both.
        images: Folder of the images below ``source``.
        masks: Folder of the masks below ``source``.
        test_images: Folder of test images.
        test_masks: Folder of their masks.
        threshold: Mask values above it are foreground.
        classes: Names of the labels 1, 2, ... if masks hold labels (values or palette indices); else one structure.
        grey: Images are grey, also where stored as colour; by default the first image decides.
        notes: Messages for the user.
    Raises:
        UsageError: If a folder is not there, or options contradict each other.
        DatasetError: If nothing pairs.
    """
    root = existing_folder(source, "images and masks")
    if (test_images is None) != (test_masks is None):
        raise UsageError("-test_images and -test_masks go together")
    if not 0 <= threshold <= 254:
        raise UsageError(f"-threshold {threshold}: use 0 to 254")
    if "background" in classes or len(set(classes)) != len(classes):
        raise UsageError(f"-classes {' '.join(classes)}: name every label but the background, each once")
    listing = Listing()
    _list_pairs(root, images, masks, False, listing)
    if test_images is not None and test_masks is not None:
        _list_pairs(root, test_images, test_masks, True, listing)
    colour = not grey and bool(listing.pairs) and is_colour(Source(listing.pairs[0].image))
    expected = f"{images}/NAME.png and {masks}/NAME.png (or NAME_mask.png) below {root}"
    return _plan(listing, "lesion", 3 if colour else 1, expected, threshold, tuple(classes), notes=notes)


def _list_pairs(root: Path, images: str, masks: str, test: bool, listing: Listing) -> None:
    folders = [existing_folder(root / name, f"images or masks (-images, -masks): {name}") for name in (images, masks)]
    found = [_by_stem(folder, "(.+)") for folder in folders]
    unused = set(found[1])
    for name, image in found[0].items():
        names = [name + suffix for suffix in MASK_SUFFIXES if name + suffix in found[1]]
        if folders[0] == folders[1]:
            if any(name.endswith(suffix) and name.removesuffix(suffix) in found[0] for suffix in MASK_SUFFIXES[1:]):
                continue  # the mask of another file
            names = [other for other in names if other != name]
            unused.discard(name)
        unused -= set(names)
        subset = "test" if test else "training"
        if len(names) > 1:
            listing.failed.append(Problem(image.name, subset, f"several masks: {', '.join(names)}"))
        else:
            listing.add(name, image, [found[1][other] for other in names], name, subset, test)
    for name in sorted(unused):
        listing.add(name, None, [found[1][name]], name, "test" if test else "training")
