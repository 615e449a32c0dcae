"""Tiny data sets in the layouts the converters read, made of invented voxels."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import nibabel
import numpy as np

AFFINE = np.diag([0.8, 0.8, 3.0, 1.0])


def nifti_bytes(array: np.ndarray, affine: np.ndarray = AFFINE) -> bytes:
    """A gzip-compressed NIfTI file."""
    image = nibabel.Nifti1Image(array, affine, dtype=array.dtype)
    image.header.set_sform(affine, 1)
    image.header.set_qform(affine, 1)
    return gzip.compress(image.to_bytes(), 1, mtime=0)


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(nifti_bytes(array, affine))


def volume_pair(seed: int, shape=(6, 8, 4), label: int = 1, lowest: int = -900) -> tuple[np.ndarray, np.ndarray]:
    """An image (int16) and a label (uint8) with one lesion."""
    random = np.random.default_rng(seed)
    image = random.integers(lowest, 400, shape, np.int16)
    reference = np.zeros(shape, np.uint8)
    reference[2:4, 3:5, shape[2] // 2] = label
    return image, reference


def write_kits(root: Path, numbers=range(5), shape=(6, 8, 4)) -> None:
    for number in numbers:
        image, label = volume_pair(number, shape, label=2)
        folder = root / "dataset" / f"case_{number:05d}"
        write_nifti(folder / "imaging.nii.gz", image.astype(np.float64))
        write_nifti(folder / "segmentation.nii.gz", label)


def write_atlas(root: Path, numbers=(0, 1, 2, 10, 37)) -> None:
    for number in numbers:
        image, label = volume_pair(number, label=2, lowest=0)
        write_nifti(root / "train" / "imagesTr" / f"im{number}.nii.gz", image)
        write_nifti(root / "train" / "labelsTr" / f"lb{number}.nii.gz", label)


def write_uls(root: Path, names: dict[str, list[str]], test=(), shape=(8, 8, 4), weak_slice: int = 2) -> None:
    """Images and zipped labels of the given subsets, 4D float32 as published."""
    for subset, bases in names.items():
        for base in bases:
            # Not hash(): it differs from one process to the next.
            image, label = volume_pair(int(hashlib.sha256(base.encode()).hexdigest()[:8], 16), shape)
            assert label.any(axis=(0, 1)).nonzero()[0].tolist() == [weak_slice]
            write_nifti(root / "ULS23" / subset / "images" / f"{base}.nii.gz", image[..., None].astype(np.float32))
            folder = (
                root / "annotations" / subset / ("labels_grabcut" if subset in ("DeepLesion", "CCC18") else "labels")
            )
            folder.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(folder / f"{base}.nii.gz.zip", "w") as archive:
                archive.writestr(f"{base}.nii.gz", nifti_bytes(label[..., None].astype(np.float32)))
    (root / "baseline_model").mkdir(exist_ok=True)
    (root / "baseline_model" / "train_test_split.json").write_text(json.dumps({"train": [], "test": list(test)}))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
