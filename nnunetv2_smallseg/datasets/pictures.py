"""2D images and masks: read with every size checked before pixels are, written as PNG or TIFF.

nnU-Net reads PNG and TIFF of one, three or four channels, and wants labels that hold 0, 1, 2, ... It refuses JPEG.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nnunetv2_smallseg.datasets.archives import Source
from nnunetv2_smallseg.errors import CaseError

__all__ = ["Picture", "is_colour", "read_label_map", "read_mask", "read_picture"]

MAX_PIXELS = 1 << 27
MAX_FILE_BYTES = 1 << 30
GREY_MODES = ("1", "L", "LA", "La")
COLOUR_MODES = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "YCbCr", "CMYK", "LAB", "HSV")


@dataclass(frozen=True)
class Picture:
    """A 2D image.

    Attributes:
        array: (Y, X) or (Y, X, channels).
        format: ``png`` for 8 bits a channel, ``tif`` for any number type.
    """

    array: np.ndarray
    format: str = "png"

    def with_array(self, array: np.ndarray) -> Picture:
        """A picture of other values."""
        return replace(self, array=array)

    def write(self, target: Path) -> None:
        """Writes it; the same picture always gives the same bytes."""
        if self.format == "png":
            from PIL import Image

            Image.fromarray(self.array).save(target, format="PNG")
        else:
            import tifffile

            tifffile.imwrite(target, self.array, photometric="minisblack", software=None, metadata=None)


def _open(source: Source):
    """A PIL image whose claims about its size are believable; pixels are not read yet."""
    from PIL import Image, UnidentifiedImageError

    with source.open() as stream:
        content = stream.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise CaseError(f"{source} is larger than {MAX_FILE_BYTES:,} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is our own
            image = Image.open(io.BytesIO(content))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        # Pillow's own message names an object in memory.
        reason = "its content is that of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise CaseError(f"{source} is no image that can be read: {reason}") from error
    if image.width * image.height > MAX_PIXELS:
        raise CaseError(f"{source} claims {image.width} x {image.height} pixels; the limit is {MAX_PIXELS:,}")
    if getattr(image, "n_frames", 1) != 1:
        raise CaseError(f"{source} holds {image.n_frames} images; one is expected")
    return image


def _pixels(image, source: Source, mode: str | None = None) -> np.ndarray:
    try:
        return np.array(image if mode is None else image.convert(mode))
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise CaseError(f"{source} is damaged or was not downloaded completely: {error}") from error


def read_picture(source: Source, num_channels: int | None = None) -> Picture:
    """Reads an image.

    Args:
        source: PNG, JPEG, TIFF, BMP.
        num_channels: 3 for colour; 1 for grey, where colour files that hold grey are accepted; None for the file's own.
    Raises:
        CaseError: If the file is damaged or of the other kind.
    """
    image = _open(source)
    if num_channels is None:
        return Picture(_pixels(image, source))
    if image.mode not in GREY_MODES + COLOUR_MODES:
        raise CaseError(f"{source} has pixels of type {image.mode}: 8 bits a channel are expected")
    if num_channels == 3:
        if image.mode in GREY_MODES:
            raise CaseError(f"{source} is a grey image, and colour is expected")
        return Picture(_pixels(image, source, "RGB"))
    if image.mode in GREY_MODES:
        return Picture(_pixels(image, source, "L"))
    colours = _pixels(image, source, "RGB")
    if np.array_equal(colours[..., 0], colours[..., 1]) and np.array_equal(colours[..., 0], colours[..., 2]):
        return Picture(np.ascontiguousarray(colours[..., 0]))
    raise CaseError(f"{source} is a colour image, and grey is expected")


def read_mask(source: Source, threshold: int = 127) -> tuple[np.ndarray, int]:
    """Reads the mask of one structure.

    Palette images count by index where these are 0 and 1 only. Grey masks of 0 and 1 are taken as they are; all others
    are foreground above ``threshold``, because JPEG and resized masks hold values between 0 and 255.

    Returns:
        (Y, X) of 0 and 1, and how many pixels were in the middle half between 0 and 255, so that the threshold decided.
    Raises:
        CaseError: If the file is damaged.
    """
    image = _open(source)
    if image.mode in ("P", "1"):
        indices = _pixels(image, source).astype(np.uint8)
        if indices.max(initial=0) <= 1:
            return indices, 0
    if image.mode.startswith(("I", "F")):
        values = _pixels(image, source)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 255:
            raise CaseError(f"{source} holds values from {values.min():g} to {values.max():g}: 0 to 255 are expected")
    else:
        # The brightest channel, so that a coloured mask on black counts.
        values = _pixels(image, source, "L" if image.mode in GREY_MODES else "RGB")
        values = values.max(axis=2) if values.ndim == 3 else values
    if values.max(initial=0) <= 1:
        return values.astype(np.uint8), 0
    return (values > threshold).astype(np.uint8), int(((values >= 64) & (values < 192)).sum())


def read_label_map(source: Source) -> np.ndarray:
    """Reads a mask whose values, or palette indices, are labels: (Y, X)."""
    image = _open(source)
    if image.mode not in ("P", "L", "1") and not image.mode.startswith("I"):
        raise CaseError(f"{source} has pixels of type {image.mode}: a grey or palette image of labels is expected")
    values = _pixels(image, source)
    return values.astype(np.uint8) if values.dtype == bool else values


def is_colour(source: Source) -> bool:
    """Whether an image is stored with colours; ``CaseError`` if it cannot be read."""
    return _open(source).mode not in GREY_MODES
