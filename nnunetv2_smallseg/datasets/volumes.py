"""NIfTI volumes: read with every claim of the header checked, written with the geometry bit for bit.

Headers are nibabel's; voxels are read straight into one array, so that a volume is in memory once, and never more than
the limit, whatever a header or an archive claims.
"""

from __future__ import annotations

import gzip
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from nnunetv2_smallseg.datasets.archives import Source, decompressed, read_into
from nnunetv2_smallseg.errors import CaseError

__all__ = ["GIBIBYTE", "Volume", "cropped", "geometry_difference", "read_volume", "same_geometry"]

GIBIBYTE = 1 << 30
HEADER_BYTES = 348
# Extensions of the header, and what may follow the voxels, are kilobytes where they exist.
MAX_EXTRA_BYTES = 1 << 24
# Fast and nearly as small as the default 9: voxels of CT and MR are noise in their low bits.
COMPRESSION_LEVEL = 3


@dataclass(frozen=True)
class Volume:
    """A volume with its geometry.

    Attributes:
        array: Voxels (X, Y, Z) as stored.
        header: Header of the file it comes from; the geometry of ``array``.
        file: File of the disk that holds exactly this volume in a form nnU-Net reads, to be copied as it is; None when
            it has to be written.
    """

    array: np.ndarray
    header: nibabel.Nifti1Header
    file: Path | None = None

    @property
    def affine(self) -> np.ndarray:
        """Voxel indices to mm, (4, 4)."""
        return self.header.get_best_affine()

    @property
    def spacing(self) -> tuple[float, ...]:
        """Mm per voxel, in the order of the axes of ``array``."""
        return tuple(float(value) for value in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return self.array.shape

    @property
    def orientation(self) -> str:
        """Where the axes point to, such as ``RAS``."""
        return "".join(nibabel.aff2axcodes(self.affine))

    def is_orthonormal(self) -> bool:
        """Whether the axes stand at right angles as exactly as SimpleITK demands."""
        directions = self.affine[:3, :3] / self.spacing
        return bool(np.abs(directions.T @ directions - np.eye(3)).max() < 1e-4)

    def with_array(self, array: np.ndarray) -> Volume:
        """Another volume of the same geometry."""
        return replace(self, array=array, file=None)

    def write(self, target: Path) -> None:
        """Writes it as ``.nii.gz``; the same volume always gives the same bytes."""
        if self.file is not None:
            shutil.copyfile(self.file, target)
            return
        array = self.array.astype(self.array.dtype.newbyteorder("<"), copy=False)
        header = self.header.as_byteswapped("<")
        header.set_data_dtype(array.dtype)
        header.set_data_shape(array.shape)
        header.set_slope_inter(1, 0)
        header["magic"] = b"n+1"
        header["vox_offset"] = HEADER_BYTES + 4
        header["cal_min"] = header["cal_max"] = 0
        with target.open("wb") as stream, gzip.GzipFile("", "wb", COMPRESSION_LEVEL, stream, mtime=0) as packed:
            packed.write(header.binaryblock + bytes(4))
            for slice_ in np.moveaxis(array, -1, 0):  # NIfTI's order is Fortran's: the first axis runs fastest
                packed.write(slice_.tobytes(order="F"))


def read_volume(source: Source, limit: int) -> Volume:
    """Reads a single-file NIfTI-1 volume, plain or gzip.

    Args:
        source: File or member of an archive.
        limit: Most bytes its voxels may take, unpacked.
    Returns:
        The volume; trailing axes of length 1 are dropped, scale factors applied.
    Raises:
        CaseError: If it is no such file, is damaged, truncated, larger than ``limit``, not one 3D volume of numbers,
            or has no usable geometry.
    """
    with source.open() as raw:
        stream = decompressed(raw)
        header = _read_header(stream, str(source))
        shape = _volume_shape(header, str(source))
        dtype = header.get_data_dtype()
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if size > limit:
            raise CaseError(f"{source} claims {size:,} bytes of voxels; the limit is {limit:,}")
        offset = int(header["vox_offset"]) - HEADER_BYTES
        if not 0 <= offset <= MAX_EXTRA_BYTES:
            raise CaseError(f"{source}: the voxels begin at byte {offset + HEADER_BYTES}, which cannot be")
        read_into(stream, memoryview(bytearray(offset)), str(source))
        array = np.empty(shape, dtype, order="F")
        read_into(stream, memoryview(array.reshape(-1, order="F").view(np.uint8)), str(source))
        # Reading to the end checks the checksums of gzip and zip.
        if len(stream.read(MAX_EXTRA_BYTES + 1)) > MAX_EXTRA_BYTES:
            raise CaseError(f"{source} goes on after its voxels: the file is damaged, or its header is")
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    scaled = np.isfinite(slope) and slope != 0 and (slope, intercept) != (1.0, 0.0)
    if scaled:
        array = array * slope + (intercept if np.isfinite(intercept) else 0.0)
    ready = source.member is None and source.path.name.endswith(".nii.gz")
    ready = ready and not scaled and int(header["dim"][0]) == 3
    return Volume(array, header, source.path if ready else None)


def _read_header(stream, name: str) -> nibabel.Nifti1Header:
    block = stream.read(HEADER_BYTES)
    if len(block) < HEADER_BYTES:
        raise CaseError(f"{name} is truncated: {len(block)} bytes. Download it again.")
    try:
        header = nibabel.Nifti1Header(block, check=False)
        header.get_data_dtype()
    except (HeaderDataError, ImageFileError, ValueError, KeyError) as error:
        raise CaseError(f"{name} is no NIfTI-1 file: {error}") from error
    if int(header["sizeof_hdr"]) != HEADER_BYTES or header["magic"].item() != b"n+1":
        raise CaseError(f"{name} is no single-file NIfTI-1 file")
    return header


def _volume_shape(header: nibabel.Nifti1Header, name: str) -> tuple[int, int, int]:
    """The three lengths, after every check that needs no voxel."""
    sizes = [int(size) for size in header["dim"]]
    num_axes = sizes[0]
    if not 3 <= num_axes <= 7 or min(sizes[1 : num_axes + 1]) < 1 or max(sizes[4 : num_axes + 1], default=1) > 1:
        raise CaseError(f"{name} has the dimensions {sizes[1 : max(num_axes, 0) + 1]}: a single 3D volume is expected")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise CaseError(f"{name} holds voxels of type {dtype}: one number a voxel is expected, not a colour")
    try:
        affine = header.get_best_affine()
    except (HeaderDataError, ValueError) as error:
        raise CaseError(f"{name} has no usable geometry: {error}") from error
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or lengths.min() < 1e-6 or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise CaseError(f"{name} has no usable geometry: affine {affine[:3].tolist()}")
    return sizes[1], sizes[2], sizes[3]


def geometry_difference(first: Volume, second: Volume) -> float:
    """How far the same voxel lies apart in two volumes of equal shape, at most over all voxels, in mm."""
    corners = np.stack(np.meshgrid(*[(0, size - 1) for size in first.shape], indexing="ij"), -1).reshape(-1, 3)
    shift = first.affine - second.affine
    return float(np.linalg.norm(corners @ shift[:3, :3].T + shift[:3, 3], axis=1).max())


def same_geometry(first: Volume, second: Volume) -> bool:
    """Whether every reader sees the same geometry: headers hold two descriptions, and readers differ in which they use.

    SimpleITK and nibabel both know ``sform`` and ``qform`` but prefer them in a different order.
    """
    headers = first.header, second.header
    for code, matrix in (("sform_code", "get_sform"), ("qform_code", "get_qform")):
        used = [int(header[code]) > 0 for header in headers]
        if used[0] != used[1]:
            return False
        if all(used) and not np.array_equal(*(getattr(header, matrix)() for header in headers)):
            return False
    return np.array_equal(first.affine, second.affine)


def cropped(volume: Volume, start: tuple[int, ...], size: tuple[int, ...]) -> Volume:
    """A box of a volume; positions in mm stay what they are.

    Args:
        volume: The volume.
        start: First voxel of the box, per axis.
        size: Voxels of the box, per axis.
    """
    box = tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))
    header = volume.header.copy()
    # Both descriptions of the geometry keep their codes; only the position of the first voxel moves.
    if header["sform_code"] > 0:
        affine = header.get_sform()
        affine[:3, 3] += affine[:3, :3] @ start
        header.set_sform(affine, int(header["sform_code"]))
    if header["qform_code"] > 0:
        offset = header.get_qform()
        offset = offset[:3, 3] + offset[:3, :3] @ start
        header["qoffset_x"], header["qoffset_y"], header["qoffset_z"] = offset
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        # Only now is the position no longer what readers assume for a file without geometry.
        affine = volume.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ start
        header.set_sform(affine, 1)
    return Volume(np.asfortranarray(volume.array[box]), header)
