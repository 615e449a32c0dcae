"""Invented archives, names and damaged files: a clear error or a whole data set, and nothing written elsewhere."""

from __future__ import annotations

import gzip
import io
import os
import re
import tempfile
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dataset_files import nifti_bytes, volume_pair, write_uls
from PIL import Image

from nnunetv2_smallseg.datasets import engine, images_2d, uls23
from nnunetv2_smallseg.datasets.archives import Source, only_member, zip_members
from nnunetv2_smallseg.datasets.cases import case_identifier
from nnunetv2_smallseg.datasets.check import differences
from nnunetv2_smallseg.datasets.pictures import read_label_map, read_mask, read_picture
from nnunetv2_smallseg.datasets.volumes import read_volume
from nnunetv2_smallseg.errors import CaseError, SmallSegError

pytest.importorskip("hypothesis", reason="pip install hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LIMIT = 1 << 20
# The same examples every time: a test that fails has to fail for everyone.
fuzzed = settings(
    max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
converted = settings(fuzzed, max_examples=30)  # each example converts a data set

BASE = "liver_0_lesion_01_sample_0"
parts = st.one_of(
    st.sampled_from(["..", ".", "", "/", "C:", "images", "labels", "~", "CON", BASE, "liver_1_lesion_01_sample_0"]),
    st.text(max_size=8),
)
member_names = st.builds(
    lambda pieces, separator, ending: separator.join(pieces) + ending,
    st.lists(parts, min_size=1, max_size=4),
    st.sampled_from(["/", "\\", "//"]),
    st.sampled_from([".nii.gz", "", ".zip", "/"]),
)
file_names = st.binary(min_size=1, max_size=12).filter(lambda name: not set(name) & set(b"\0/"))
image, label = volume_pair(1, (8, 8, 4))
IMAGE = nifti_bytes(image[..., None].astype(np.float32))


@contextmanager
def sandbox():
    """A folder; afterwards nothing may have changed in it but below ``raw``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bystander").write_text("unchanged")
        yield folder
        allowed = {"bystander", "source", "raw"}
        assert {path.name for path in folder.iterdir()} <= allowed
        assert (folder / "bystander").read_text() == "unchanged"


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def convert_and_check(plan_function, folder: Path) -> dict | None:
    """Converts if there is something to convert; whatever was written has to be as reported."""
    before = files_below(folder / "source")
    target = folder / "raw" / "Dataset901_Fuzz"
    try:
        outcome = engine.convert(plan_function(), target, {})
    except SmallSegError as error:
        assert str(error)
        return None
    finally:
        assert files_below(folder / "source") == before
    assert not [path for path in target.rglob("*") if path.name.endswith(".part")]
    assert {path.parent.name for path in target.glob("*/*")} <= {"imagesTr", "labelsTr", "imagesTs", "labelsTs"}
    if outcome.report["cases"]:
        assert list(filter(None, differences(target, outcome.report))) == []
    return outcome.report


@converted
@given(st.lists(member_names, max_size=5))
def test_names_in_archives(names):
    with sandbox() as folder:
        write_uls(folder / "source", {"LiTS": [BASE]})
        archive_path = folder / "source" / "ULS23" / "LiTS" / "images" / "images.zip"
        with zipfile.ZipFile(archive_path, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the same name twice
            for name in names:
                archive.writestr(zipfile.ZipInfo(name), b"" if name.endswith("/") else IMAGE)
        report = convert_and_check(lambda: uls23.plan(folder / "source"), folder)
        assert report is not None and BASE in report["cases"]
        for member in zip_members(archive_path)[0]:
            assert ".." not in re.split(r"[/\\]", member.filename)
            assert not member.filename.startswith(("/", "\\"))


@converted
@given(st.data())
def test_damaged_archives(data):
    """Bytes of an archive of images and of the zip around a label, changed or cut."""
    with sandbox() as folder:
        write_uls(folder / "source", {"LiTS": [BASE, "liver_1_lesion_01_sample_0"]})
        images = folder / "source" / "ULS23" / "LiTS" / "images"
        moved = images / "liver_1_lesion_01_sample_0.nii.gz"
        with zipfile.ZipFile(images / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(moved, moved.name)
        moved.unlink()
        victim = data.draw(st.sampled_from(sorted((folder / "source").rglob("*.zip"))))
        content = bytearray(victim.read_bytes())
        for position, value in data.draw(
            st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=6)
        ):
            content[position] = value
        victim.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
        convert_and_check(lambda: uls23.plan(folder / "source"), folder)


@fuzzed
@given(st.data())
def test_damaged_volumes(data):
    """A volume that is read has the size its header claims, below the limit; everything else is a clear error."""
    content = bytearray(gzip.decompress(nifti_bytes(image)))
    for position, value in data.draw(st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), max_size=4)):
        content[position] = value
    content = bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    packed = gzip.compress(content, 1) if data.draw(st.booleans()) else content
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.nii.gz"
        path.write_bytes(packed[: data.draw(st.integers(0, len(packed)) | st.just(len(packed)))])
        try:
            volume = read_volume(Source(path), LIMIT)
        except CaseError as error:
            assert str(path) in str(error)
            return
        assert volume.array.ndim == 3 and volume.array.size <= LIMIT
        assert np.isfinite(volume.affine).all()
        volume.with_array(volume.array).write(path)
        again = nibabel.load(path)
        assert again.shape == volume.shape
        assert np.array_equal(np.asarray(again.dataobj), volume.array, equal_nan=volume.array.dtype.kind == "f")
        assert np.array_equal(again.affine, volume.affine)


@fuzzed
@given(st.binary(max_size=60) | st.data())
def test_damaged_pictures(source):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12)).save(buffer, "PNG")
    content = source if isinstance(source, bytes) else bytearray(buffer.getvalue())
    if not isinstance(source, bytes):
        position = st.integers(0, len(content) - 1)
        for place, value in source.draw(st.lists(st.tuples(position, st.integers(0, 255)), max_size=4)):
            content[place] = value
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.png"
        path.write_bytes(content)
        for read in (read_picture, lambda s: read_picture(s, 1), read_mask, read_label_map):
            try:
                read(Source(path))
            except CaseError as error:
                assert str(error)


@converted
@given(st.lists(file_names, min_size=1, max_size=6, unique=True))
def test_names_of_files(names):
    """Any bytes a file system takes as a name: converted under a safe name, or refused with a reason."""
    with sandbox() as folder:
        picture, mask = io.BytesIO(), io.BytesIO()
        Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12)).save(picture, "PNG")
        Image.fromarray(np.eye(8, 12, dtype=np.uint8) * 255).save(mask, "PNG")
        for part, content in (("images", picture), ("masks", mask)):
            (folder / "source" / part).mkdir(parents=True)
            for name in names:
                try:
                    (folder / "source" / part / os.fsdecode(name + b".png")).write_bytes(content.getvalue())
                except OSError:  # this file system does not take any bytes
                    return
        report = convert_and_check(lambda: images_2d.plan_pairs(folder / "source"), folder)
        for case in (report or {"cases": {}})["cases"]:
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", case)


@fuzzed
@given(st.text())
def test_case_identifiers(name):
    try:
        identifier = case_identifier(name)
    except CaseError:
        return
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", identifier)
    assert case_identifier(identifier) == identifier


@fuzzed
@given(st.lists(member_names, max_size=4, unique=True))
def test_archives_of_one_file(names):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.nii.gz.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for member in names:
                archive.writestr(zipfile.ZipInfo(member), b"")
        try:
            source = only_member(path, ".nii.gz")
        except CaseError as error:
            assert str(path) in str(error)
        else:
            assert source.member.endswith(".nii.gz")
        assert sorted(os.listdir(name)) == ["a.nii.gz.zip"]
