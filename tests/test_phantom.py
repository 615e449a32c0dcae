"""The phantom is what its sidecar says, the same for the same seed, and a data set nnU-Net takes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter, label

from nnunetv2_smallseg.demo import settings
from nnunetv2_smallseg.demo.phantom import LESION_DIAMETERS_MM, draw_case, write_phantom
from nnunetv2_smallseg.errors import SmallSegError

NAME = settings.PHANTOM_NAME


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("raw") / NAME)


def read_array(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def test_phantom_has_the_layout_of_a_raw_data_set(phantom):
    description = json.loads((phantom / "dataset.json").read_text())
    assert set(description) >= {"channel_names", "labels", "numTraining", "file_ending"}
    assert description["numTraining"] == 12 == len(list(phantom.glob("imagesTr/*_0000.nii.gz")))
    assert len(list(phantom.glob("imagesTs/*_0000.nii.gz"))) == len(list(phantom.glob("labelsTs/*.nii.gz"))) == 4
    (fold,) = json.loads((phantom / "splits_final.json").read_text())
    assert len(fold["train"]) + len(fold["val"]) == 12 and not set(fold["train"]) & set(fold["val"])
    image = sitk.ReadImage(str(phantom / "imagesTr" / "phantom_000_0000.nii.gz"))
    assert image.GetSpacing() == (1.0, 1.0, 2.5) and image.GetSize() == (96, 96, 22)
    assert [path.name for path in phantom.parent.iterdir()] == [NAME]


def test_phantom_passes_the_integrity_check_of_nnunet(phantom, monkeypatch, capsys):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    verify_dataset_integrity(str(phantom), num_processes=1)
    output = capsys.readouterr().out
    assert "verify_dataset_integrity Done" in output and "Error" not in output and "Warning" not in output


def test_phantom_is_the_same_for_the_same_seed_only(phantom, tmp_path):
    again = write_phantom(tmp_path / "again", seed=settings.PHANTOM_SEED)
    files = sorted(path.relative_to(phantom) for path in phantom.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for file in files:
        assert (phantom / file).read_bytes() == (again / file).read_bytes(), file
    other = write_phantom(tmp_path / "other", seed=1, num_training=4, num_held_back=2)
    image = "imagesTr/phantom_000_0000.nii.gz"
    assert not np.array_equal(read_array(phantom / image), read_array(other / image))


def test_lesions_are_where_and_as_large_as_listed(phantom):
    sidecar = json.loads((phantom / "lesions.json").read_text())
    spacing = np.array(sidecar["spacing_mm"])
    for file in sorted(phantom.glob("labelsT*/*.nii.gz")):
        labels = read_array(file)
        components, count = label(labels, np.ones((3, 3, 3)))
        listed = [lesion for lesion in sidecar["lesions"] if lesion["case"] == file.name.removesuffix(".nii.gz")]
        assert count == len(listed)
        for lesion in listed:
            centre = np.array(lesion["centre_mm"])
            component = components[tuple(np.rint(centre / spacing).astype(int))]
            assert component > 0
            inside = np.argwhere(components == component)
            assert np.abs(inside.mean(0) * spacing - centre).max() < 0.7
            diameter = (6 * len(inside) * spacing.prod() / math.pi) ** (1 / 3)
            # A tenth, or the 0.9 mm that the edge of a sphere as thin as a slice may lose.
            assert abs(diameter - lesion["diameter_mm"]) < max(0.1 * lesion["diameter_mm"], 0.9)


def test_every_size_occurs_in_training_and_held_back(phantom):
    lesions = json.loads((phantom / "lesions.json").read_text())["lesions"]
    assert min(LESION_DIAMETERS_MM) == 3.0 and max(LESION_DIAMETERS_MM) == 20.0
    for subset in ("imagesTr", "imagesTs"):
        cases = {file.name.removesuffix("_0000.nii.gz") for file in phantom.glob(f"{subset}/*")}
        assert {lesion["diameter_mm"] for lesion in lesions if lesion["case"] in cases} == set(LESION_DIAMETERS_MM)


def test_two_patients_have_no_lesion_one_trained_on_one_held_back(phantom):
    empty = [file for file in sorted(phantom.glob("labelsT*/*.nii.gz")) if not read_array(file).any()]
    assert sorted(file.parent.name for file in empty) == ["labelsTr", "labelsTs"]
    names = [file.name.removesuffix(".nii.gz") for file in empty]
    assert sorted(names) == json.loads((phantom / "lesions.json").read_text())["cases_without_lesion"]
    (fold,) = json.loads((phantom / "splits_final.json").read_text())
    assert set(names) & set(fold["train"])


def test_lesions_stand_out_and_a_vessel_crosses_the_slices(phantom):
    image = read_array(phantom / "imagesTr" / "phantom_000_0000.nii.gz")
    labels = read_array(phantom / "labelsTr" / "phantom_000.nii.gz")
    body = (image > -100) & (labels == 0)
    assert 60 < image[labels == 1].mean() - image[body].mean() < 110
    smooth = gaussian_filter(np.where(labels == 1, 40.0, image), (0, 1, 1))
    assert (smooth.max((1, 2)) > 55).all()


@pytest.mark.parametrize("seed", range(12))
def test_there_is_room_for_all_sizes_whatever_the_seed(seed):
    case = draw_case(np.random.default_rng(seed), LESION_DIAMETERS_MM[:4])
    assert len(case.lesions) == 4 and case.labels.max() == 1


def test_phantom_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="at least 4 and 2"):
        write_phantom(tmp_path / "x", num_training=3)
    with pytest.raises(ValueError, match="no room for a lesion of 60"):
        draw_case(np.random.default_rng(0), (60.0,))
    (tmp_path / "there").mkdir()
    with pytest.raises(SmallSegError, match="exists already"):
        write_phantom(tmp_path / "there")


def test_phantom_leaves_nothing_under_its_name_when_interrupted(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sitk, "WriteImage", fail)
        with pytest.raises(KeyboardInterrupt):
            write_phantom(tmp_path / NAME)
    assert not (tmp_path / NAME).exists()
    write_phantom(tmp_path / NAME, num_training=4, num_held_back=2)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
