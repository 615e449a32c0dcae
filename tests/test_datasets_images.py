"""Converters of 2D images: layouts, masks of every kind, duplicates, splits, damaged files, any folder pair."""

from __future__ import annotations

import json
import multiprocessing.dummy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from nnunetv2_smallseg.cli.main import main
from nnunetv2_smallseg.datasets import images_2d, registry
from nnunetv2_smallseg.datasets.archives import Source
from nnunetv2_smallseg.datasets.convert import convert_dataset
from nnunetv2_smallseg.datasets.pictures import MAX_PIXELS, read_label_map, read_mask, read_picture
from nnunetv2_smallseg.datasets.splits import patients_on_both_sides
from nnunetv2_smallseg.errors import CaseError, DatasetError, UsageError


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """An empty nnUNet_raw."""
    folder = tmp_path / "raw"
    folder.mkdir()
    monkeypatch.setenv("nnUNet_raw", str(folder))
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    return folder


def colours(seed: int, shape=(12, 16)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*shape, 3), np.uint8)


def disc(seed: int, shape=(12, 16)) -> np.ndarray:
    """0 and 1."""
    label = np.zeros(shape, np.uint8)
    row = 2 + seed % 5
    label[row : row + 3, 4:8] = 1
    return label


def save(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def make_isic(root: Path, year: int) -> None:
    names = {
        2018: ("ISIC2018_Task1-2_{}_Input", "ISIC2018_Task1_{}_GroundTruth", ("Training", "Validation", "Test")),
        2017: ("ISIC-2017_{}_Data", "ISIC-2017_{}_Part1_GroundTruth", ("Training", "Validation", "Test_v2")),
    }[year]
    for part_number, part in enumerate(names[2]):
        images, masks = root / names[0].format(part), root / names[1].format(part)
        for number in range(3):
            seed = 10 * part_number + number
            save(images / f"ISIC_{seed:07d}.jpg", colours(seed), quality=95)
            save(masks / f"ISIC_{seed:07d}_segmentation.png", 255 * disc(seed))
        save(images / "ISIC_0000000_superpixels.png", colours(99))
        (images / "LICENSE.txt").write_text("text")


def make_cvc(root: Path) -> None:
    for number in range(1, 21):
        save(root / "Original" / f"{number}.tif", colours(number))
        save(root / "Ground Truth" / f"{number}.tif", 255 * disc(number))


def make_polypgen(root: Path) -> None:
    for centre in range(1, 7):
        folder = root / "PolypGen2021_MultiCenterData_v3" / f"data_C{centre}"
        for number in range(2):
            save(folder / f"images_C{centre}" / f"{number}_endocv.jpg", colours(10 * centre + number), quality=95)
            mask = 255 * disc(number).repeat(4, 0).repeat(4, 1)
            save(folder / f"masks_C{centre}" / f"{number}_endocv_mask.jpg", mask[::4, ::4], quality=60)


def make_fives(root: Path) -> None:
    top = root / "FIVES A Fundus Image Dataset for AI-based Vessel Segmentation"
    for part, start in (("train", 0), ("test", 50)):
        for number in range(8):
            name = f"{number + 1}_{'ADGN'[number % 4]}.png"
            save(top / part / "Original" / name, colours(start + number))
            save(top / part / "Ground truth" / name, np.stack([255 * disc(number)] * 3, axis=-1))


def make_busi(root: Path) -> None:
    for start, kind in enumerate(("benign", "malignant", "normal")):
        for number in range(1, 4):
            grey = np.stack([colours(100 * start + number)[..., 0]] * 3, axis=-1)
            save(root / "Dataset_BUSI_with_GT" / kind / f"{kind} ({number}).png", grey)
            mask = disc(number) if kind != "normal" else np.zeros((12, 16), np.uint8)
            save(root / "Dataset_BUSI_with_GT" / kind / f"{kind} ({number})_mask.png", mask.astype(bool))
    second = np.zeros((12, 16), np.uint8)
    second[0, 0] = 255
    save(root / "Dataset_BUSI_with_GT" / "benign" / "benign (1)_mask_1.png", second)


def make_tissuenet(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for seed, (part, size, save_array) in enumerate(
        (("train", 16, np.savez), ("val", 8, np.savez_compressed), ("test", 8, np.savez_compressed))
    ):
        random = np.random.default_rng(seed)
        images = random.random((5, size, size, 2)).astype(np.float32) * 3000
        labels = random.integers(0, 4, (5, size, size, 2)).astype(np.int32) * 100
        save_array(root / f"tissuenet_v1.1_{part}.npz", X=images, y=labels, meta=np.arange(5))


def make_pairs(root: Path) -> None:
    for number in range(6):
        save(root / "images" / f"slice {number}.png", colours(number)[..., 0])
        save(root / "masks" / f"slice {number}_mask.png", 255 * disc(number))


MAKERS: dict[str, Callable[[Path], None]] = {
    "isic2018": lambda root: make_isic(root, 2018),
    "isic2017": lambda root: make_isic(root, 2017),
    "cvc-clinicdb": make_cvc,
    "polypgen": make_polypgen,
    "fives": make_fives,
    "tissuenet": make_tissuenet,
    "busi": make_busi,
    "lungs-ct": make_pairs,
    "images-masks": make_pairs,
}
COUNTS = {"isic2018": (6, 3), "isic2017": (6, 3), "cvc-clinicdb": (20, 0), "polypgen": (12, 0), "fives": (8, 8),
          "tissuenet": (10, 5), "busi": (9, 0), "lungs-ct": (6, 0), "images-masks": (6, 0)}  # fmt: skip


def pixels(path: Path) -> np.ndarray:
    from skimage import io

    return io.imread(path)


def test_every_registered_2d_set_is_tested():
    assert set(MAKERS) == {entry.name for entry in registry.CONVERTERS if entry.module == "images_2d"}


@pytest.mark.parametrize("name", MAKERS)
def test_sets_convert_and_pass_nnunets_check(name, tmp_path, raw, monkeypatch, capsys):
    from nnunetv2.experiment_planning import verify_dataset_integrity as module

    MAKERS[name](tmp_path / "source")
    command = ["convert", name, str(tmp_path / "source"), "-d", "901", "-np", "1"]
    command += ["-name", "Mine"] if name == "images-masks" else []
    assert main([*command, "--dry-run"]) == 0
    training, test = COUNTS[name]
    assert f"would write {training} training cases and {test} test cases" in capsys.readouterr().out
    assert not list(raw.iterdir())
    assert main(command) == 0
    (folder,) = raw.iterdir()
    report = json.loads((folder / "conversion_report.json").read_text())
    assert (report["training_cases"], report["test_cases"], report["cases_failed"]) == (training, test, 0)
    assert report["duplicates"] == []
    splits = json.loads((folder / "splits_final.json").read_text())
    assert patients_on_both_sides(splits, {case: r["patient"] for case, r in report["cases"].items()}) == []
    monkeypatch.setattr(module, "multiprocessing", SimpleNamespace(get_context=lambda kind: multiprocessing.dummy))
    module.verify_dataset_integrity(str(folder), 1)
    assert main(["convert", "--check", "901"]) == 0
    description = json.loads((folder / "dataset.json").read_text())
    assert name == "images-masks" or {"licence", "reference", "citation"} <= set(description)


def test_isic_pixels_and_official_folds(tmp_path, raw):
    make_isic(tmp_path / "source", 2018)
    outcome = convert_dataset("isic2018", tmp_path / "source", 901)
    folder = outcome.folder
    source = tmp_path / "source" / "ISIC2018_Task1-2_Training_Input" / "ISIC_0000001.jpg"
    assert np.array_equal(pixels(folder / "imagesTr" / "ISIC_0000001_0000.png"), np.array(Image.open(source)))
    assert np.array_equal(pixels(folder / "labelsTr" / "ISIC_0000001.png"), disc(1))
    (fold,) = json.loads((folder / "splits_final.json").read_text())
    assert outcome.messages == ["train fold 0 only: for higher numbers nnU-Net draws a split of its own"]
    assert fold == {
        "train": [f"ISIC_000000{number}" for number in range(3)],
        "val": [f"ISIC_000001{number}" for number in range(3)],
    }


def test_cvc_with_and_without_the_table_of_sequences(tmp_path, raw):
    make_cvc(tmp_path / "source")
    outcome = convert_dataset("cvc-clinicdb", tmp_path / "source", 901)
    assert "no table of sequences" in outcome.messages[0]
    folds = json.loads((outcome.folder / "splits_final.json").read_text())
    runs = sorted([int(case[-3:]) for case in fold["val"]] for fold in folds)
    assert runs == [list(range(first, first + 4)) for first in range(1, 21, 4)]
    rows = "".join(f"{number},{(number - 1) // 2}\n" for number in range(1, 21))
    (tmp_path / "source" / "metadata.csv").write_text("frame_id,sequence_id\n" + rows)
    report = convert_dataset("cvc-clinicdb", tmp_path / "source", 902).report
    assert report["cases"]["cvc_003"]["patient"] == report["cases"]["cvc_004"]["patient"] == "sequence 1"
    (tmp_path / "source" / "metadata.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DatasetError, match="no columns frame_id"):
        images_2d.plan_cvc(tmp_path / "source")


def test_polypgen_folds_are_centres(tmp_path, raw):
    make_polypgen(tmp_path / "source")
    outcome = convert_dataset("polypgen", tmp_path / "source", 901)
    folds = json.loads((outcome.folder / "splits_final.json").read_text())
    assert sorted({case[:2] for case in fold["val"]} == {fold["val"][0][:2]} for fold in folds) == [True] * 6
    for label in (outcome.folder / "labelsTr").iterdir():
        assert set(np.unique(pixels(label))) == {0, 1}


def test_busi_unites_masks_and_takes_grey_stored_as_colour(tmp_path, raw):
    make_busi(tmp_path / "source")
    folder = convert_dataset("busi", tmp_path / "source", 901).folder
    expected = disc(1)
    expected[0, 0] = 1
    assert np.array_equal(pixels(folder / "labelsTr" / "benign_001.png"), expected)
    assert pixels(folder / "imagesTr" / "benign_001_0000.png").shape == (12, 16)
    assert not pixels(folder / "labelsTr" / "normal_001.png").any()


@pytest.mark.parametrize(("structure", "channel"), [("cell", 0), ("nucleus", 1)])
def test_tissuenet_values_are_exact(tmp_path, raw, structure, channel):
    make_tissuenet(tmp_path / "source")
    folder = convert_dataset("tissuenet", tmp_path / "source", 901, structure=structure, num_processes=2).folder
    for part, place in (("train", "Tr"), ("val", "Tr"), ("test", "Ts")):
        with np.load(tmp_path / "source" / f"tissuenet_v1.1_{part}.npz") as arrays:
            for row in range(5):
                name = f"tissuenet_{part}_{row:04d}"
                for number in range(2):
                    image = pixels(folder / f"images{place}" / f"{name}_{number:04d}.tif")
                    assert np.array_equal(image, arrays["X"][row, ..., number])
                label = pixels(folder / f"labels{place}" / f"{name}.tif")
                assert np.array_equal(label, arrays["y"][row, ..., channel] > 0)


def test_tissuenet_damaged_files(tmp_path, raw):
    make_tissuenet(tmp_path / "source")
    path = tmp_path / "source" / "tissuenet_v1.1_val.npz"
    path.write_bytes(path.read_bytes()[:-50])
    np.savez(tmp_path / "source" / "tissuenet_v1.1_test.npz", X=np.array([{"a": 1}] * 3), y=np.zeros(3))
    report = convert_dataset("tissuenet", tmp_path / "source", 901).report
    assert report["cases_written"] == 5
    assert len(report["failed"]) == 2
    assert any("no array" in problem["reason"] for problem in report["failed"])
    with pytest.raises(UsageError, match="cell or nucleus"):
        images_2d.plan_tissuenet(tmp_path / "source", "membrane")
    with pytest.raises(DatasetError, match="no tissuenet"):
        images_2d.plan_tissuenet(raw)


def test_problems_are_named_case_by_case(tmp_path, raw, capsys):
    root = tmp_path / "source"
    for number in range(8):
        save(root / "images" / f"{number}.png", colours(number))
        save(root / "masks" / f"{number}.png", 255 * disc(number))
    save(root / "images" / "0.png", colours(7))  # the same as 7
    save(root / "masks" / "1.png", 255 * disc(1, (16, 12)))
    save(root / "images" / "2.png", colours(2)[..., 0])
    (root / "masks" / "3.png").unlink()
    (root / "images" / "4.png").unlink()
    (root / "images" / "5.png").write_bytes((root / "images" / "5.png").read_bytes()[:200])
    (root / "masks" / "6.png").write_bytes(b"not an image")
    save(root / "masks" / "7_mask.png", disc(7))
    save(root / "images" / "8.png", colours(8))
    save(root / "masks" / "8.png", 255 * disc(8))
    (root / "images" / "._8.png").write_bytes(b"macOS")
    save(root / "images" / "9.png", colours(8))
    save(root / "masks" / "9.png", 255 * disc(8))
    assert main(["convert", "images-masks", str(root), "-d", "901", "-name", "Mine", "-np", "1"]) == 1
    report = json.loads((raw / "Dataset901_Mine" / "conversion_report.json").read_text())
    assert sorted(report["cases"]) == ["0", "8", "9"]
    assert report["duplicates"] == [["8", "9"]]
    reasons = {Path(problem["name"]).stem: problem["reason"] for problem in report["failed"]}
    for name, message in {
        "1": "12 x 16 pixels, its image 16 x 12",
        "2": "grey image, and colour is expected",
        "4": "mask without image",
        "5": "damaged or was not downloaded completely",
        "6": "no image that can be read",
        "7": "several masks: 7, 7_mask",
    }.items():
        assert message in reasons[name], reasons
    assert [problem["reason"] for problem in report["skipped"]] == ["image without mask"]
    assert "failed: 6" in capsys.readouterr().err


def test_label_maps_and_palettes(tmp_path, raw):
    root = tmp_path / "source"
    for number in range(4):
        save(root / "images" / f"{number}.jpg", colours(number), quality=95)
        label = disc(number) + 2 * disc(number + 2)
        label[label == 3] = 2
        image = Image.fromarray(label)
        image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        (root / "masks").mkdir(exist_ok=True)
        image.save(root / "masks" / f"{number}.png")
        last = label
    options = {"classes": ["polyp", "tool"], "dataset_name": "Mine"}
    outcome = convert_dataset("images-masks", root, 901, **options)
    assert np.array_equal(pixels(outcome.folder / "labelsTr" / "3.png"), last)
    assert json.loads((outcome.folder / "dataset.json").read_text())["labels"] == {
        "background": 0,
        "polyp": 1,
        "tool": 2,
    }
    save(root / "masks" / "0.png", 255 * disc(0))
    failed = convert_dataset("images-masks", root, 902, **options).report["failed"]
    assert "unknown values 255" in failed[0]["reason"]


def test_masks_of_every_kind(tmp_path):
    def mask(array: np.ndarray, name: str = "mask.png", **options) -> list:
        save(tmp_path / name, array, **options)
        return read_mask(Source(tmp_path / name))[0].tolist()

    assert mask(np.array([[0, 1], [1, 0]], np.uint8)) == [[0, 1], [1, 0]]
    assert mask(np.array([[0, 128], [127, 255]], np.uint8)) == [[0, 1], [0, 1]]
    assert mask(np.array([[False, True]])) == [[0, 1]]
    assert mask(np.array([[[0, 0, 0], [0, 255, 0]]], np.uint8)) == [[0, 1]]
    assert mask(np.array([[[0, 0, 0, 0], [255, 255, 255, 255]]], np.uint8)) == [[0, 1]]
    assert mask(np.zeros((2, 2), np.uint8)) == [[0, 0], [0, 0]]
    assert mask(np.array([[0, 200]], np.int32), "mask.tif") == [[0, 1]]
    assert mask(np.array([[0.0, 255.0]], np.float32), "mask.tif") == [[0, 1]]
    with pytest.raises(CaseError, match="0 to 255 are expected"):
        mask(np.array([[0.0, np.nan]], np.float32), "mask.tif")
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([255, 255, 255, 0, 0, 0])  # by index, not by brightness
    palette.save(tmp_path / "palette.png")
    assert read_mask(Source(tmp_path / "palette.png"))[0].tolist() == [[0, 1]]
    save(tmp_path / "colour.png", colours(0))
    with pytest.raises(CaseError, match="grey or palette image of labels"):
        read_label_map(Source(tmp_path / "colour.png"))


def test_pictures_that_claim_too_much_or_hold_more_than_one(tmp_path):
    huge = Image.new("1", (20000, 20000))
    assert huge.width * huge.height > MAX_PIXELS
    huge.save(tmp_path / "huge.png")
    with pytest.raises(CaseError, match=r"the limit is|can be read"):
        read_picture(Source(tmp_path / "huge.png"), 1)
    pages = [Image.fromarray(disc(number)) for number in range(2)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(CaseError, match="holds 2 images"):
        read_picture(Source(tmp_path / "pages.tif"), 1)
    save(tmp_path / "deep.png", np.zeros((4, 4), np.uint16))
    with pytest.raises(CaseError, match="8 bits a channel"):
        read_picture(Source(tmp_path / "deep.png"), 1)
    save(tmp_path / "colour.png", colours(0))
    with pytest.raises(CaseError, match="grey is expected"):
        read_picture(Source(tmp_path / "colour.png"), 1)


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("lungs-ct", "images-masks")])
def test_empty_and_wrong_folders(name, tmp_path, raw, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["convert", name, str(tmp_path / "empty"), "-d", "901"]) == 1
    assert "below" in capsys.readouterr().err
    assert main(["convert", name, str(tmp_path / "absent"), "-d", "901"]) == 2
    assert not list(raw.iterdir())


def test_folder_pairs_need_their_folders(tmp_path, raw):
    make_pairs(tmp_path / "source")
    with pytest.raises(UsageError, match="-images"):
        images_2d.plan_pairs(tmp_path / "source", images="pictures")
    with pytest.raises(UsageError, match="go together"):
        images_2d.plan_pairs(tmp_path / "source", test_images="images")
    with pytest.raises(UsageError, match="threshold"):
        images_2d.plan_pairs(tmp_path / "source", threshold=255)
    with pytest.raises(UsageError, match="background"):
        images_2d.plan_pairs(tmp_path / "source", classes=["background"])
    (tmp_path / "source" / "masks").rename(tmp_path / "source" / "other")
    (tmp_path / "source" / "masks").mkdir()
    with pytest.raises(DatasetError, match="no image with a mask"):
        images_2d.plan_pairs(tmp_path / "source")


def test_masks_beside_their_images_and_test_folders(tmp_path, raw):
    for part in ("train", "test"):
        for number in range(3):
            save(tmp_path / "source" / part / f"{part}{number}.png", colours(number)[..., 0])
            save(tmp_path / "source" / part / f"{part}{number}_mask.png", 255 * disc(number))
    options = {"images": "train", "masks": "train", "test_images": "test", "test_masks": "test"}
    report = convert_dataset("lungs-ct", tmp_path / "source", 901, **options).report
    assert not report["failed"]
    assert sorted(report["cases"]) == [*(f"test{n}" for n in range(3)), *(f"train{n}" for n in range(3))]
    assert report["patients_in_training_and_test"]  # the same images under two names


# --------------------------------------------------------------------------------------------------------- command line


def test_list_names_every_converter(capsys):
    assert main(["convert", "--list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == registry.names()
    assert main(["convert", "--list"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in registry.names())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert"], "name a data set"),
        (["convert", "nothing", "folder", "-d", "901"], "no converter is called 'nothing'"),
        (["convert", "busi", "folder"], "-d is missing"),
        (["convert", "busi", "folder", "-d", "901", "--weak"], "--weak is an option of uls23, not of busi"),
        (["convert", "images-masks", "folder", "-d", "901"], "-name"),
        (["convert", "busi", "folder", "-d", "901", "-name", "../up"], "use letters"),
    ],
)
def test_wrong_calls(arguments, message, raw, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_registry_refers_to_existing_functions_and_options():
    import importlib
    import inspect

    flags = {option.flag: option for option in registry.OPTIONS}
    used = set()
    for entry in registry.CONVERTERS:
        module = importlib.import_module(f"nnunetv2_smallseg.datasets.{entry.module}")
        parameters = inspect.signature(getattr(module, entry.function)).parameters
        assert {flags[flag].name for flag in entry.options} | set(entry.fixed) <= set(parameters)
        used |= set(entry.options)
    assert used == set(flags)
