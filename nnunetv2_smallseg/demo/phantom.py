"""A synthetic data set with small lesions, for the demo, for tests and for trying settings without patient data.

Each volume is a body with smooth texture and noise, a vessel that crosses the slices, and spherical lesions of known
centre and diameter. In a single slice the vessel looks like a small lesion; its neighbours tell them apart. Two
patients have no lesion, because false alarms show only there.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.files import write_json

__all__ = ["LESION_DIAMETERS_MM", "Case", "draw_case", "write_phantom"]

# Ordered so that any four in a row hold a lesion of 12 mm or more: a patient with nothing but specks would make the
# Dice of a short training meaningless.
LESION_DIAMETERS_MM = (20.0, 3.0, 8.0, 5.0, 16.0, 4.0, 10.0, 6.0, 12.0)
LESIONS_PER_CASE = 4

# Mean intensities in HU, and the spreads of texture and noise. The vessel is about as bright as the smallest
# lesions appear, which fill their voxels only in part.
AIR_HU, BODY_HU, LESION_HU, VESSEL_HU = -400.0, 40.0, 130.0, 70.0
TEXTURE_HU, NOISE_HU = 8.0, 9.0
TEXTURE_LENGTH_MM = 6.0

# Clearance of a lesion's surface from the body's, the vessel's and other lesions' surfaces.
CLEARANCE_MM = 3.0
PLACING_ATTEMPTS = 2000
SUBSAMPLES = (5, 4, 4)


@dataclass(frozen=True)
class Lesion:
    """A sphere: centre (z, y, x) in mm from the centre of the first voxel, and diameter in mm."""

    centre_mm: tuple[float, float, float]
    diameter_mm: float


@dataclass(frozen=True)
class Case:
    """A patient: ``image`` (Z, Y, X) int16 in HU, ``labels`` (Z, Y, X) uint8 with lesions as 1, and the lesions."""

    image: np.ndarray
    labels: np.ndarray
    lesions: tuple[Lesion, ...]


@dataclass(frozen=True)
class _Anatomy:
    """Body and vessel of a patient, in mm: an ellipsoid, and a tube whose axis winds through the slices."""

    body_centre: np.ndarray
    body_semi_axes: np.ndarray
    vessel_start: np.ndarray
    vessel_sway: np.ndarray
    vessel_period: float
    vessel_radius: float

    def body_depth(self, points: np.ndarray) -> np.ndarray:
        """Depth of points (..., 3) below the body's surface in mm, never more than it is; negative outside."""
        scaled = (points - self.body_centre) / self.body_semi_axes
        return (1.0 - np.sqrt((scaled**2).sum(-1))) * self.body_semi_axes.min()

    def vessel_distance(self, points: np.ndarray) -> np.ndarray:
        """In-plane distance of points (..., 3) from the vessel's surface in mm; negative inside."""
        phase = 2.0 * np.pi * points[..., 0] / self.vessel_period
        axis = self.vessel_start + self.vessel_sway * np.sin(phase)[..., None]
        return np.sqrt(((points[..., 1:] - axis) ** 2).sum(-1)) - self.vessel_radius


def draw_case(
    generator: np.random.Generator,
    diameters_mm: tuple[float, ...],
    *,
    shape: tuple[int, int, int] = (22, 96, 96),
    spacing: tuple[float, float, float] = (2.5, 1.0, 1.0),
    noise_hu: float = NOISE_HU,
) -> Case:
    """Draws one patient.

    Args:
        generator: Source of all randomness.
        diameters_mm: Diameter of each lesion in mm; empty for a patient without any.
        shape: Voxels (Z, Y, X).
        spacing: Voxel size (z, y, x) in mm.
        noise_hu: Standard deviation of the noise of each voxel.
    Raises:
        ValueError: If the lesions do not fit into the body.
    """
    voxel = np.asarray(spacing)
    extent = (np.asarray(shape) - 1) * voxel
    anatomy = _draw_anatomy(generator, extent)
    lesions = _place_lesions(generator, diameters_mm, anatomy, extent, voxel)

    image = np.full(shape, AIR_HU)
    positions = np.stack(np.indices(shape), -1) * voxel
    # Both surfaces run steeply through the slices, so the edge is about one in-plane voxel wide.
    body = np.clip(0.5 + anatomy.body_depth(positions) / voxel[1], 0.0, 1.0)
    vessel = np.clip(0.5 - anatomy.vessel_distance(positions) / voxel[1], 0.0, 1.0) * body
    texture = gaussian_filter(generator.standard_normal(shape), TEXTURE_LENGTH_MM / voxel)
    image += body * (BODY_HU - AIR_HU + TEXTURE_HU * texture / texture.std())
    image += vessel * (VESSEL_HU - BODY_HU)
    labels = np.zeros(shape, dtype=np.uint8)
    for lesion in lesions:
        box = _lesion_box(lesion, shape, voxel)
        share = _lesion_share(lesion, box, voxel)
        image[box] += share * (LESION_HU - BODY_HU) * generator.uniform(0.85, 1.15)
        labels[box][share >= 0.5] = 1
    image += noise_hu * generator.standard_normal(shape)
    return Case(np.rint(image).astype(np.int16), labels, tuple(lesions))


def _draw_anatomy(generator: np.random.Generator, extent: np.ndarray) -> _Anatomy:
    """Body and vessel for a volume of ``extent`` (z, y, x) mm."""
    centre = extent / 2 + generator.uniform(-2.0, 2.0, 3)
    # Longer than the volume along z, so that every slice shows body.
    semi_axes = extent * np.array([1.0, 0.45, 0.46]) * generator.uniform(0.94, 1.0, 3)
    return _Anatomy(
        body_centre=centre,
        body_semi_axes=semi_axes,
        vessel_start=centre[1:] + generator.uniform(-0.35, 0.35, 2) * semi_axes[1:],
        vessel_sway=generator.uniform(-6.0, 6.0, 2),
        vessel_period=generator.uniform(50.0, 90.0),
        vessel_radius=generator.uniform(2.0, 3.5),
    )


def _place_lesions(
    generator: np.random.Generator,
    diameters_mm: tuple[float, ...],
    anatomy: _Anatomy,
    extent: np.ndarray,
    voxel: np.ndarray,
) -> list[Lesion]:
    """Puts lesions at random into the body, largest first, clear of its surface, the vessel and each other."""
    placed: list[Lesion] = []
    for diameter in sorted(diameters_mm, reverse=True):
        radius = diameter / 2
        # Half a voxel outside the first and last slice belongs to the volume too; a lesion must not leave it.
        lowest, highest = radius - voxel / 2, extent + voxel / 2 - radius
        fits = (lowest <= highest).all()
        for _ in range(PLACING_ATTEMPTS if fits else 0):
            centre = generator.uniform(lowest, highest)
            # Near the middle of a slice: otherwise a lesion as thin as a slice fills no voxel by half and vanishes.
            centre[0] = (np.rint(centre[0] / voxel[0]) + generator.uniform(-0.2, 0.2)) * voxel[0]
            if (
                lowest[0] <= centre[0] <= highest[0]
                and anatomy.body_depth(centre) >= radius + CLEARANCE_MM
                and anatomy.vessel_distance(centre) >= radius + CLEARANCE_MM
                and all(
                    np.linalg.norm(centre - other.centre_mm) >= radius + other.diameter_mm / 2 + CLEARANCE_MM
                    for other in placed
                )
            ):
                placed.append(Lesion(tuple(round(float(value), 3) for value in centre), float(diameter)))
                break
        else:
            raise ValueError(
                f"no room for a lesion of {diameter} mm among {sorted(diameters_mm)} mm in a volume of "
                f"{np.round(extent, 1).tolist()} mm: use fewer or smaller lesions, or a larger volume"
            )
    return placed


def _lesion_box(lesion: Lesion, shape: tuple[int, ...], voxel: np.ndarray) -> tuple[slice, ...]:
    """The voxels around a lesion, one more on each side than it reaches."""
    centre, radius = np.asarray(lesion.centre_mm), lesion.diameter_mm / 2
    first = np.maximum(np.floor((centre - radius) / voxel).astype(int) - 1, 0)
    last = np.minimum(np.ceil((centre + radius) / voxel).astype(int) + 1, np.asarray(shape) - 1)
    return tuple(slice(int(start), int(stop) + 1) for start, stop in zip(first, last, strict=True))


def _lesion_share(lesion: Lesion, box: tuple[slice, ...], voxel: np.ndarray) -> np.ndarray:
    """The share of each voxel of ``box`` that a lesion fills, by subsampling: partial volume."""
    total = np.zeros([part.stop - part.start for part in box])
    index = np.stack(np.meshgrid(*(np.arange(part.start, part.stop) for part in box), indexing="ij"), -1)
    for step in np.ndindex(*SUBSAMPLES):
        points = (index + (np.asarray(step) + 0.5) / SUBSAMPLES - 0.5) * voxel
        total += ((points - lesion.centre_mm) ** 2).sum(-1) <= (lesion.diameter_mm / 2) ** 2
    return total / np.prod(SUBSAMPLES)


def write_phantom(
    folder: str | Path,
    *,
    seed: int = 2024,
    num_training: int = 12,
    num_held_back: int = 4,
    shape: tuple[int, int, int] = (22, 96, 96),
    spacing: tuple[float, float, float] = (2.5, 1.0, 1.0),
    noise_hu: float = NOISE_HU,
) -> Path:
    """Writes the phantom as an nnU-Net raw data set.

    The second training case and the last case held back have no lesion; the others have four each, and the diameters
    of ``LESION_DIAMETERS_MM`` are dealt out in turn. The last sixth of the training cases validates the one fold of
    ``splits_final.json``. ``lesions.json`` tells what was drawn. Everything is written under a temporary name beside
    ``folder`` and renamed at the end.

    Args:
        folder: Folder of the data set, such as ``.../Dataset990_SmallLesionPhantom``; it must not exist.
        seed: Same seed, same files.
        num_training: Cases in ``imagesTr``, at least 4.
        num_held_back: Cases in ``imagesTs``, at least 2.
        shape: Voxels (Z, Y, X).
        spacing: Voxel size (z, y, x) in mm.
        noise_hu: Standard deviation of the noise of each voxel; more of it hides small lesions.
    Returns:
        ``folder``.
    Raises:
        ValueError: If there are too few cases.
        SmallSegError: If ``folder`` exists.
    """
    folder = Path(folder)
    if num_training < 4 or num_held_back < 2:
        raise ValueError(
            f"num_training={num_training}, num_held_back={num_held_back}: use at least 4 and 2, so that both parts "
            "hold a patient with and one without lesions"
        )
    if os.path.lexists(folder):
        raise SmallSegError(f"{folder} exists already: remove it or choose another folder for the phantom")
    # nnU-Net takes every folder named Dataset990* for this data set, so the temporary name begins otherwise.
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (partial / name).mkdir(parents=True)

    names = [f"phantom_{index:03d}" for index in range(num_training + num_held_back)]
    without_lesion = {1, len(names) - 1}
    lesions, dealt = [], 0
    for index, name in enumerate(names):
        count = 0 if index in without_lesion else LESIONS_PER_CASE
        diameters = tuple(LESION_DIAMETERS_MM[(dealt + k) % len(LESION_DIAMETERS_MM)] for k in range(count))
        dealt += count
        generator = np.random.default_rng([seed, index])
        case = draw_case(generator, diameters, shape=shape, spacing=spacing, noise_hu=noise_hu)
        subset = "Tr" if index < num_training else "Ts"
        _write_volume(case.image, spacing, partial / f"images{subset}" / f"{name}_0000.nii.gz")
        _write_volume(case.labels, spacing, partial / f"labels{subset}" / f"{name}.nii.gz")
        lesions += [
            {"case": name, "centre_mm": list(lesion.centre_mm), "diameter_mm": lesion.diameter_mm}
            for lesion in case.lesions
        ]

    num_validation = num_training // 6 or 1
    training, validation = names[: num_training - num_validation], names[num_training - num_validation : num_training]
    write_json(
        {
            "name": "SmallLesionPhantom",
            "description": f"Synthetic small lesions, drawn by nnunetv2-smallseg with seed {seed}",
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "lesion": 1},
            "numTraining": num_training,
            "file_ending": ".nii.gz",
        },
        partial / "dataset.json",
    )
    write_json([{"train": training, "val": validation}], partial / "splits_final.json")
    write_json(
        {
            "seed": seed,
            "axes": "z, y, x",
            "spacing_mm": list(spacing),
            "cases_without_lesion": [names[index] for index in sorted(without_lesion)],
            "lesions": lesions,
        },
        partial / "lesions.json",
    )
    partial.rename(folder)
    return folder


def _write_volume(array: np.ndarray, spacing: tuple[float, ...], file: Path) -> None:
    """Writes (Z, Y, X) with its spacing (z, y, x) in mm."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(tuple(reversed(spacing)))
    sitk.WriteImage(image, str(file), useCompression=True)
