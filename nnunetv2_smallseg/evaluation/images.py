"""Reading label maps, and checking that reference and prediction lie on the same grid.

NIfTI, MetaImage and NRRD through SimpleITK; PNG and BMP through Pillow, TIFF through tifffile. Arrays are (Z, Y, X) or
(Y, X), spacing in mm in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK

from nnunetv2_smallseg.errors import SmallSegError

__all__ = [
    "FILE_ENDINGS",
    "VOLUME_ENDINGS",
    "EvaluationError",
    "LabelImage",
    "check_geometry",
    "file_ending",
    "image_file",
    "label_files",
    "read_image",
    "read_labels",
]

# These hold a spacing themselves.
VOLUME_ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
PICTURE_ENDINGS = (".png", ".bmp")
TIFF_ENDINGS = (".tif", ".tiff")
FILE_ENDINGS = (*VOLUME_ENDINGS, *PICTURE_ENDINGS, *TIFF_ENDINGS)

# Headers are written with few digits; anything beyond is another grid.
SPACING_TOLERANCE = 1e-3  # relative
ORIGIN_TOLERANCE_MM = 0.1
DIRECTION_TOLERANCE = 1e-3


class EvaluationError(SmallSegError):
    """A folder, label map or probability file cannot be evaluated."""


@dataclass(frozen=True)
class LabelImage:
    """A label map.

    Attributes:
        path: File it was read from.
        array: Labels >= 0, (Z, Y, X) or (Y, X), an integer type.
        spacing: Voxel size in mm, in array order.
        origin: Position of the first voxel in mm, in the order of SimpleITK; None where the format holds none.
        direction: Direction cosines, flat, in the order of SimpleITK; None where the format holds none.
        has_spacing: False if the format holds no spacing and 1 was assumed.
    """

    path: Path
    array: np.ndarray
    spacing: tuple[float, ...]
    origin: tuple[float, ...] | None = None
    direction: tuple[float, ...] | None = None
    has_spacing: bool = True


def file_ending(path: Path) -> str | None:
    """The ending of a label file in lower case, one of ``FILE_ENDINGS``; None for any other file."""
    name = path.name.lower()
    return next((ending for ending in FILE_ENDINGS if name.endswith(ending)), None)


def label_files(folder: Path) -> dict[str, Path]:
    """The label files of a folder by case, sorted: the name without the ending.

    Raises:
        EvaluationError: If the folder does not exist, holds no label file, or two files for one case.
    """
    if not folder.is_dir():
        raise EvaluationError(f"{folder} is not a folder: give a folder with label maps ({', '.join(FILE_ENDINGS)})")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = file_ending(path)
        if ending is None or path.name.startswith("."):
            continue
        case = path.name[: -len(ending)]
        if case in files:
            raise EvaluationError(
                f"{folder} holds two files for the case {case}: {files[case].name} and {path.name}; remove one"
            )
        files[case] = path
    if not files:
        raise EvaluationError(f"{folder} holds no label maps: expected files ending in {', '.join(FILE_ENDINGS)}")
    return files


def read_labels(path: Path, spacing: Sequence[float] | None = None) -> LabelImage:
    """Reads a label map.

    Args:
        path: File ending in one of ``FILE_ENDINGS``.
        spacing: Voxel size in mm in array order for formats that hold none (PNG, BMP, TIFF); 1 by default. A TIFF
            volume has it in a JSON file of the same name, as nnU-Net writes it.
    Raises:
        EvaluationError: If the file cannot be read, is no 2D or 3D image of one channel, or holds NaN, fractions or
            negative values.
    """
    ending = file_ending(path)
    if ending is None:
        raise EvaluationError(f"{path} is no label map: expected a file ending in {', '.join(FILE_ENDINGS)}")
    try:
        image = _read_volume(path) if ending in VOLUME_ENDINGS else _read_picture(path, ending, spacing)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise EvaluationError(f"{path} cannot be read ({_last_line(error)}): write it anew") from error
    return image


def image_file(folder: Path, case: str) -> Path:
    """The image of a case: ``<case>_0000``, as nnU-Net names the first channel, or ``<case>``, with any known ending.

    Raises:
        EvaluationError: If there is none.
    """
    for name in (f"{case}_0000", case):
        for ending in FILE_ENDINGS:
            if (folder / f"{name}{ending}").is_file():
                return folder / f"{name}{ending}"
    raise EvaluationError(f"{folder} holds no image of the case {case}: expected {case}_0000 or {case} with an ending "
                          f"of {', '.join(FILE_ENDINGS)}")  # fmt: skip


def read_image(path: Path) -> np.ndarray:
    """Reads an image to be shown: (Z, Y, X), (Y, X) or colours (Y, X, 3).

    Raises:
        EvaluationError: If the file cannot be read.
    """
    ending = file_ending(path)
    try:
        if ending in PICTURE_ENDINGS:
            from PIL import Image

            with Image.open(path) as picture:
                return np.asarray(picture.convert("L" if picture.mode in ("1", "L", "I", "I;16") else "RGB"))
        if ending in TIFF_ENDINGS:
            import tifffile

            return tifffile.imread(path)
        return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    except (RuntimeError, OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read ({_last_line(error)}): write it anew") from error


def check_geometry(reference: LabelImage, prediction: LabelImage) -> None:
    """Checks that two label maps have the same shape, spacing, origin and direction.

    Raises:
        EvaluationError: Naming both files and what differs.
    """
    files = f"{reference.path} and {prediction.path}"
    if reference.array.shape != prediction.array.shape:
        raise EvaluationError(
            f"{files} have different shapes, {_text(reference.array.shape)} and {_text(prediction.array.shape)}; "
            "export the prediction on the grid of the reference"
        )
    checks = (
        ("spacing", [SPACING_TOLERANCE * value for value in reference.spacing]),
        ("origin", ORIGIN_TOLERANCE_MM),
        ("direction", DIRECTION_TOLERANCE),
    )
    for name, tolerance in checks:
        expected, found = getattr(reference, name), getattr(prediction, name)
        if expected is None or found is None or not (reference.has_spacing and prediction.has_spacing):
            continue
        if np.any(np.abs(np.subtract(expected, found)) > tolerance):
            raise EvaluationError(
                f"{files} lie on different grids: {name} {_text(expected)} and {_text(found)}; export the prediction "
                "on the grid of the reference, or correct the header that is wrong"
            )


def _last_line(error: Exception) -> str:
    """The end of a message: SimpleITK puts its own source lines before it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _text(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"


def _read_volume(path: Path) -> LabelImage:
    image = SimpleITK.ReadImage(str(path))
    if image.GetNumberOfComponentsPerPixel() != 1 or image.GetDimension() not in (2, 3):
        raise EvaluationError(
            f"{path} has {image.GetDimension()} dimensions and {image.GetNumberOfComponentsPerPixel()} channels: a "
            "label map has 2 or 3 dimensions and 1 channel"
        )
    array = SimpleITK.GetArrayFromImage(image)
    if np.issubdtype(array.dtype, np.floating) and path.name.lower().endswith((".nii", ".nii.gz")):
        import nibabel

        # SimpleITK turns NaN and infinite values of NIfTI files into 0 without a word.
        _check_finite(np.asanyarray(nibabel.load(path).dataobj), path)
    return LabelImage(
        path=path,
        array=_whole_numbers(array, path),
        spacing=image.GetSpacing()[::-1],
        origin=image.GetOrigin(),
        direction=image.GetDirection(),
    )


def _read_picture(path: Path, ending: str, spacing: Sequence[float] | None) -> LabelImage:
    # Imported here because most data sets are volumes and never need these.
    if ending in TIFF_ENDINGS:
        import tifffile

        array = tifffile.imread(path)
    else:
        from PIL import Image

        with Image.open(path) as picture:
            array = np.asarray(picture)  # of a picture with a palette its indices
    # A picture with a channel axis is a colour image; a volume with three slices would have them first.
    if array.ndim not in (2, 3) or (ending in PICTURE_ENDINGS and array.ndim != 2):
        raise EvaluationError(f"{path} has the shape {array.shape}: a label map is grey, (Y, X) or (Z, Y, X)")
    beside = path.with_name(path.name[: -len(ending)] + ".json")
    if spacing is None and array.ndim == 3 and beside.is_file():
        spacing = json.loads(beside.read_text())["spacing"]
    if spacing is not None and (len(spacing) != array.ndim or not all(value > 0 for value in spacing)):
        raise EvaluationError(
            f"the spacing {tuple(spacing)} does not fit {path} of shape {array.shape}: give one number above 0 an axis"
        )
    return LabelImage(
        path=path,
        array=_whole_numbers(array, path),
        spacing=tuple(float(value) for value in spacing) if spacing is not None else (1.0,) * array.ndim,
        has_spacing=spacing is not None,
    )


def _check_finite(array: np.ndarray, path: Path) -> None:
    if not np.isfinite(array).all():
        raise EvaluationError(
            f"{path} holds NaN or infinite values: a label map holds whole numbers from 0; find out what wrote it"
        )


def _whole_numbers(array: np.ndarray, path: Path) -> np.ndarray:
    """The array as labels in an integer type; raises for NaN, fractions and negative values."""
    if array.dtype == bool:
        return array.view(np.uint8)
    if np.issubdtype(array.dtype, np.floating):
        _check_finite(array, path)
        rounded = np.rint(array)
        if not np.array_equal(rounded, array):
            value = array[rounded != array].flat[0]
            raise EvaluationError(f"{path} holds {value:g}: a label map holds whole numbers; is it a probability map?")
        array = rounded.astype(np.int64)
    if np.issubdtype(array.dtype, np.signedinteger) and array.size and array.min() < 0:
        raise EvaluationError(f"{path} holds {array.min()}: labels are whole numbers from 0; find out what wrote it")
    return array.astype(np.uint8) if array.dtype.itemsize > 1 and array.max(initial=0) < 256 else array
