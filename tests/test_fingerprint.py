"""The lesion fingerprint: every number against nnU-Net or by hand, the command, and what it answers to errors."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling import default_resampling
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage.io import imsave
from test_report import PageParser, browse  # noqa: F401 - a fixture

from nnunetv2_smallseg.cli.main import build_parser, main
from nnunetv2_smallseg.data.lesion_table import measure_case
from nnunetv2_smallseg.evaluation.boxes import bounding_box
from nnunetv2_smallseg.evaluation.components import connected_components
from nnunetv2_smallseg.evaluation.regions import Region
from nnunetv2_smallseg.fingerprint import run
from nnunetv2_smallseg.fingerprint.deep_supervision import Residues, downsampling_factors, level_weights
from nnunetv2_smallseg.fingerprint.measure import (
    TrainingSetup,
    draw_locations,
    find_foreground,
    size_table,
    slice_areas,
    training_table,
)
from nnunetv2_smallseg.fingerprint.patches import Locations, Schedule
from nnunetv2_smallseg.fingerprint.recommendations import percent, plan_command, recommend
from nnunetv2_smallseg.fingerprint.resampling import describe_resampled, resample_labels, surviving_components

LESION = Region("lesion", (1,), "1", 1)
NAMES = [f"lesion_fingerprint.{ending}" for ending in ("html", "json", "png")]
CONTRACT = ["p5", "p25", "p50", "p75", "p95", "p99", "max"]


def blobs(shape, seed: int, num_labels: int = 2) -> np.ndarray:
    """A label map with many small lesions of several labels, some of them a single voxel."""
    generator = np.random.default_rng(seed)
    labels = np.zeros(shape, dtype=np.int16)
    for _ in range(14):
        sides = np.minimum(generator.integers(1, 5, 3), shape)
        begin = generator.integers(0, np.array(shape) - sides + 1)
        labels[tuple(slice(*side) for side in zip(begin, begin + sides, strict=True))] = generator.integers(
            1, num_labels + 1
        )
    return labels


# Sizes


def test_sizes_by_hand():
    labels = np.zeros((4, 8, 8), dtype=np.int16)
    labels[0:2, 0:3, 0:3] = 1  # 18 voxels of label 1 ...
    labels[1, 3, 3] = 2  # ... touched at a corner by a voxel of label 2
    labels[3, 7, 7] = 2
    labels[2] = 3  # ignored
    whole, core = Region("whole", (1, 2), "(1, 2)", 0), Region("core", (2,), "2", 1)
    foreground = find_foreground(labels, [whole, core])
    table = size_table(foreground, (2.0, 0.5, 0.5), 3)
    assert table["region"].tolist() == [0, 0, 1, 1]
    assert table["size"].tolist() == [9.5, 0.5, 0.5, 0.5]
    assert table["equivalent_diameter_mm"][0] == pytest.approx((6 * 9.5 / math.pi) ** (1 / 3))
    assert table["extent_mm"][0].tolist() == [4.0, 2.0, 2.0]
    assert table["extent_voxels"].tolist() == [[2, 4, 4], [1, 1, 1], [1, 1, 1], [1, 1, 1]]
    num_slices, areas = slice_areas(foreground, [whole, core], (2.0, 0.5, 0.5), ignore_label=3)
    assert num_slices == 3
    assert [area.tolist() for area in areas] == [[2.25, 2.5, 0.25], [0.25, 0.25], [2.25, 2.5, 0.25]]
    # A picture: areas, whatever the distance of its only slice.
    picture = size_table(find_foreground(labels[:1], [whole]), (999.0, 0.5, 0.5), 2)
    assert picture["size"].tolist() == [2.25]
    assert picture["equivalent_diameter_mm"][0] == pytest.approx(2 * math.sqrt(2.25 / math.pi))


def test_the_lesion_table_of_the_sampling_finds_the_same_lesions():
    labels = blobs((9, 20, 20), 5)
    found = measure_case(labels, [(1, 2), (2,)]).lesions
    regions = [Region("whole", (1, 2), "", 0), Region("core", (2,), "", 1)]
    table = size_table(find_foreground(labels, regions), (1.0, 1.0, 1.0), 3)
    assert table["size"].tolist() == found.voxels.tolist()
    assert table["region"].tolist() == found.classes.tolist()
    assert table["extent_voxels"].tolist() == (found.boxes[:, 1] - found.boxes[:, 0]).tolist()


# Deep supervision


def test_targets_lose_what_nnunet_loses():
    """Over all places of the grid, as often as nnU-Net's own transform."""
    generator = np.random.default_rng(1)
    lesion = generator.random((3, 5, 4)) < 0.2
    for factor in ((1, 2, 2), (2, 4, 4), (1, 8, 4)):
        residues = Residues(factor)
        for z, plane in enumerate(lesion):
            if plane.any():
                residues.add_section(z, *np.nonzero(plane))
        scales = [[1 / value for value in factor]]
        vanished, sections = 0, {z: 0 for z in range(3) if lesion[z].any()}
        for offset in np.ndindex(factor):
            patch = torch.zeros((1, 16, 32, 32), dtype=torch.int16)
            patch[0][tuple(slice(begin, begin + size) for begin, size in zip(offset, lesion.shape, strict=True))] = (
                torch.from_numpy(lesion.astype(np.int16))
            )
            vanished += not DownsampleSegForDSTransform(scales)(segmentation=patch)["segmentation"][0].any()
            for z in sections:  # as a training on slices sees it
                plane = DownsampleSegForDSTransform([scales[0][1:]])(segmentation=patch[:, offset[0] + z])
                sections[z] += not plane["segmentation"][0].any()
        assert residues.lesion_share == pytest.approx(vanished / math.prod(factor))
        assert residues.section_share == pytest.approx(np.mean(list(sections.values())) / math.prod(factor))


def test_levels_of_a_configuration():
    strides = [[1, 1], [2, 2], [2, 2], [2, 1]]
    planar = {"spacing": [1.0, 1.0], "architecture": {"arch_kwargs": {"strides": strides}}}
    assert downsampling_factors(planar) == [(1, 1, 1), (1, 2, 2), (1, 4, 4)]
    volume = {"spacing": [3.0, 1.0, 1.0], "architecture": {"arch_kwargs": {"strides": [1, 2, [1, 2, 2], 2]}}}
    assert downsampling_factors(volume) == [(1, 1, 1), (2, 2, 2), (2, 4, 4)]
    assert level_weights(3) == pytest.approx([2 / 3, 1 / 3, 0])


# Resampling


@pytest.mark.parametrize(
    ("shape", "spacing", "target"),
    [
        ((12, 30, 28), (2, 1, 1), (3, 1.7, 1.3)),
        ((12, 30, 28), (5, 1, 1), (3.3, 1.7, 1.3)),  # the nearest slice
        ((12, 30, 28), (2, 1, 1), (4, 2, 2)),  # ties
        ((12, 30, 28), (2, 1, 1), (1, 0.5, 0.5)),
        ((1, 50, 40), (999, 1, 1), (999, 2.9, 2.9)),
    ],
    ids=["finer", "thick slices", "half", "double", "picture"],
)
def test_resampling_is_that_of_nnunet(shape, spacing, target):
    new_shape = default_resampling.compute_new_shape(shape, spacing, target)
    separately, axis = default_resampling.determine_do_sep_z_and_axis(None, spacing, target)
    options = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}
    for seed in range(3):
        labels = blobs(shape, seed)
        box = bounding_box(labels)
        offset = [side.start for side in box]
        resampled = resample_labels(labels[box], offset, shape, new_shape, axis if separately else None)
        found = np.zeros(resampled.shape, dtype=labels.dtype)
        ends = [begin + size for begin, size in zip(resampled.offset, resampled.labels.shape, strict=True)]
        found[tuple(slice(*side) for side in zip(resampled.offset, ends, strict=True))] = resampled.labels
        expected = default_resampling.resample_data_or_seg_to_shape(
            labels[None], new_shape, spacing, target, **options
        )[0]
        assert np.count_nonzero(found != expected) <= 1  # scores that are equal but for rounding
        # A lesion survives if something of it is left when nnU-Net resamples it alone, without the other label.
        mask = labels > 0
        components = connected_components(mask)
        alone = [
            number
            for number in components.numbers
            if default_resampling.resample_data_or_seg_to_shape(
                (components.labels == number)[None].astype(np.int16), new_shape, spacing, target, **options
            ).any()
        ]
        binary = resample_labels(mask[box].astype(np.int16), offset, shape, new_shape, axis if separately else None)
        kept = surviving_components(binary, binary.labels > 0, components.labels[box], offset)
        assert kept.tolist() == alone
        # The same for a label map that nnU-Net has resampled itself.
        whole = describe_resampled((found > 0).astype(np.int16), shape)
        if not separately:
            direct = surviving_components(whole, whole.labels > 0, components.labels, (0, 0, 0))
            resampled_kept = surviving_components(resampled, resampled.labels > 0, components.labels[box], offset)
            assert direct.tolist() == resampled_kept.tolist()


# Sampling


class Cases:
    """A data set for nnU-Net's loader: label maps in which every lesion has a label of its own."""

    def __init__(self, lesions: dict[str, np.ndarray], locations: dict[str, dict]) -> None:
        self.identifiers, self._lesions, self._locations = sorted(lesions), lesions, locations

    def load_case(self, case):
        lesions = self._lesions[case][None]
        return lesions.astype(np.float32), lesions, None, {"class_locations": self._locations[case]}


@pytest.mark.parametrize(
    ("patch", "drawn", "shape", "ignore"),
    [
        ((12, 12), (17, 17), (6, 30, 26), False),  # 2d
        ((3, 12, 12), (3, 17, 17), (6, 30, 26), False),  # 2.5d
        ((8, 12, 12), (11, 17, 17), (9, 30, 10), False),  # 3D; the patch is wider than the image
        ((12, 12), (17, 17), (6, 30, 26), True),
    ],
    ids=["2d", "2.5d", "3d", "ignore label"],
)
def test_seen_lesions_agree_with_nnunet_s_loader(patch, drawn, shape, ignore):
    generator = np.random.default_rng(3)
    regions = [LESION, Region("cyst", (2,), "2", 2)]
    setup = TrainingSetup((*(1,) * (3 - len(patch)), *patch), (*(1,) * (3 - len(drawn)), *drawn), ((1, 1, 1),),
                          3 if ignore else None)  # fmt: skip
    numbered, stored, tables, whole = {}, {}, [], []
    for case in ("a", "b"):
        labels = np.zeros(shape, dtype=np.int16)
        labels[1, 2:4, 2:4] = 1
        labels[2:5, 20:27, 3:8] = 1
        if case == "a":
            labels[3, 12, 9] = 2
        if ignore:
            labels[:, 15:, 12:] = 3
        foreground = find_foreground(labels, regions)
        places = [draw_locations(foreground, region, generator) for region in regions]
        entry = {number: np.c_[np.zeros(len(place), int), place] for number, place in enumerate(places, start=1)}
        annotated = None
        if ignore:
            everywhere = np.argwhere(labels < 3)
            entry[(-1, 0, 1, 2)] = np.c_[np.zeros(len(everywhere), int), everywhere]
            annotated = Locations(everywhere)
        table = training_table(foreground, setup, [Locations(place) for place in places], annotated)
        tables.append(table)
        components = [connected_components(region.mask(labels)) for region in regions]
        ids = components[0].labels.astype(np.int16)
        ids[components[1].labels > 0] = components[0].count + 1
        numbered[case], stored[case] = ids, entry
        whole += [int((ids == number).sum()) for number in range(1, ids.max() + 1)]

    manager = SimpleNamespace(all_labels=[0, 1, 2], has_ignore_label=ignore)
    loader = nnUNetDataLoader(Cases(numbered, stored), 3, drawn, patch, manager, oversample_foreground_percent=0.33)
    schedule = Schedule(batch_size=3, num_training_cases=2, iterations=12)
    assert (schedule.random_patches, schedule.foreground_patches) == (2, 1)
    np.random.seed(0)  # noqa: NPY002 - nnU-Net draws from it
    num_epochs = 60
    lesions = [(case, number) for case in "ab" for number in range(1, numbered[case].max() + 1)]
    seen, views, cut = np.zeros(len(lesions)), np.zeros((2, len(lesions))), np.zeros(len(lesions))
    middle = tuple(slice((large - small) // 2, (large - small) // 2 + small)
                   for large, small in zip(drawn, patch, strict=True))  # fmt: skip
    for _ in range(num_epochs):
        found = np.zeros(len(lesions), dtype=bool)
        for _ in range(schedule.iterations):
            batch = loader.generate_train_batch()
            for position, (case, target) in enumerate(zip(batch["keys"], batch["target"].numpy(), strict=True)):
                voxels = np.bincount(np.maximum(target[0][middle], 0).ravel(), minlength=9)
                for index, (owner, number) in enumerate(lesions):
                    if owner == case and voxels[number]:
                        views[int(position >= 2), index] += 1
                        cut[index] += position < 2 and voxels[number] < whole[index]
                        found[index] = True
        seen += found
    joined = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    patches = num_epochs * schedule.iterations * np.array([[2], [1]])
    expected = np.array([joined["random"], joined["foreground"]]) / schedule.num_training_cases
    spread = 4 * np.sqrt(expected * (1 - expected) / patches) + 1e-3
    assert np.all(np.abs(views / patches - expected) < spread), (views / patches, expected)
    probability = schedule.seen_per_epoch(joined["random"], joined["foreground"])
    assert np.all(
        np.abs(seen / num_epochs - probability) < 4 * np.sqrt(probability * (1 - probability) / num_epochs) + 1e-9
    )
    assert schedule.views_per_epoch(joined["random"], joined["foreground"]) == pytest.approx(
        views.sum(axis=0) / num_epochs, rel=0.35
    )
    if len(patch) == 3:  # in 2d a patch is compared with the part in its slice, not with all of the lesion
        share = cut / views[0]
        assert np.all(np.abs(share - joined["cut_random"]) < 4 * np.sqrt(0.25 / views[0]))


def test_voxels_that_preprocessing_dropped_are_never_the_centre():
    labels = np.zeros((1, 200, 200), dtype=np.int16)
    labels[0, :150, :150] = 1
    labels[0, 190, 190] = 1
    foreground = find_foreground(labels, [LESION])
    setup = TrainingSetup((1, 32, 32), (1, 32, 32), ((1, 1, 1),))
    locations = Locations(np.argwhere(labels)[:-1])
    table = training_table(foreground, setup, [locations])
    assert table["centred"].tolist() == [1.0, 0.0]
    assert table["foreground"].tolist() == [1.0, 0.0]
    # A patch of 32 pixels in an image of 200 shows a given pixel from 10 of its 169 x 169 places per axis.
    assert table["random"][1] == pytest.approx((10 / 169) ** 2)
    assert table["cut_random"].tolist() == [1.0, 0.0]
    assert len(draw_locations(foreground, LESION, np.random.default_rng(0))) == 10_000


# The command


@pytest.fixture
def phantom(nnunet_folders, tmp_path):
    """Runs ``smallseg fingerprint`` on the phantom; gives its exit status and the content of the JSON file."""

    def call(*arguments: object, folder: str = "out") -> tuple[int, dict | None]:
        output = tmp_path / folder
        status = main(["fingerprint", "-d", "991", "-np", "1", "-o", str(output), *map(str, arguments)])
        file = output / "lesion_fingerprint.json"
        return status, json.loads(file.read_text()) if file.is_file() else None

    call.folder = tmp_path / "out"
    return call


def test_fingerprint_of_the_phantom(phantom, capsys):
    status, content = phantom()
    assert status == 0
    printed = capsys.readouterr().out
    assert all(str(phantom.folder / name) in printed for name in NAMES)
    assert sorted(path.name for path in phantom.folder.iterdir()) == NAMES  # and no progress file
    assert (content["labels_read"], content["configuration"], content["num_cases"]) == ("preprocessed", "2.5d", 5)
    lesions = content["lesions"]["all"]
    assert list(lesions["equivalent_diameter_mm"]) == list(lesions["extent_mm"]) == CONTRACT
    assert all(len(extent) == 3 for extent in lesions["extent_mm"].values())
    assert lesions == content["lesions"]["lesion"]
    # The same lesions are in the raw labels, which the phantom's plans do not resample.
    status, raw = phantom("--raw", folder="raw")
    assert (status, raw["labels_read"]) == (0, "raw")
    assert raw["lesions"]["all"] == lesions
    assert raw["slices"] == content["slices"]
    assert raw["vanish"] == content["vanish"]
    assert content["vanish"]["resampling"]["classes"]["all"]["num_vanished"] == 0
    assert raw["sampling"] == content["sampling"]
    assert {advice["topic"] for advice in content["recommendations"]} == {
        "patch size", "2d or 2.5d", "resampling", "deep supervision", "sampling"
    }  # fmt: skip
    page = (phantom.folder / NAMES[0]).read_text()
    parser = PageParser()
    parser.feed(page)
    assert not parser.open
    assert all(address.startswith(("data:", "#")) for address in parser.addresses)
    assert all(advice["text"].split(":")[0][:40] in " ".join(parser.text) for advice in content["recommendations"])
    assert matplotlib.image.imread(phantom.folder / NAMES[2]).std() > 0.05


def test_the_page_works_in_a_browser(phantom, browse):  # noqa: F811
    phantom()
    file = phantom.folder / NAMES[0]
    sort = "<script>document.querySelector('tr.columns button').click()</script>"
    file.write_text(file.read_text().replace("</body>", f"{sort}</body>"))
    dom, console = browse(file)
    assert console == []
    assert 'aria-sort="ascending"' in dom


def test_3d_configurations(phantom, capsys):
    status, content = phantom("-p", "nnUNetPlans", "--json")
    assert status == 0
    assert json.loads(capsys.readouterr().out) == content
    assert content["configuration"] == "3d_fullres"
    assert len(content["patch"]["patch_size"]) == 3
    levels = content["vanish"]["deep_supervision"]
    assert levels[0]["nearest"]["all"]["lesions"] == 0
    assert levels[-1]["nearest"]["all"]["lesions"] > 0.1
    assert levels[-1]["factor"][1:] == [2 ** (len(levels) - 1)] * 2


def write_dataset(nnunet_folders, tmp_path, monkeypatch, arrays: list[np.ndarray], spacing=None, **changes) -> str:
    """A raw data set of its own, with the phantom's plans changed to fit; gives its name."""
    name = "Dataset993_Tiny"
    raw, preprocessed = tmp_path / "raw" / name, tmp_path / "preprocessed" / name
    (raw / "labelsTr").mkdir(parents=True)
    preprocessed.mkdir(parents=True)
    monkeypatch.setenv("nnUNet_raw", str(raw.parent))
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed.parent))
    for number, array in enumerate(arrays):
        if array.ndim == 2:
            imsave(raw / "labelsTr" / f"case{number}.png", array.astype(np.uint8), check_contrast=False)
        else:
            image = sitk.GetImageFromArray(array.astype(np.uint8))
            image.SetSpacing(spacing[::-1])
            sitk.WriteImage(image, str(raw / "labelsTr" / f"case{number}.nii.gz"))
    description = {"channel_names": {"0": "x"}, "labels": {"background": 0, "lesion": 1}, "numTraining": len(arrays),
                   "file_ending": ".png" if arrays[0].ndim == 2 else ".nii.gz", **changes}  # fmt: skip
    (raw / "dataset.json").write_text(json.dumps(description))
    plans = nnunet_folders.plans()
    plans["dataset_name"] = name
    if arrays[0].ndim == 2:
        plans["image_reader_writer"] = "NaturalImage2DIO"
        plans["original_median_shape_after_transp"] = [1, *arrays[0].shape]
        del plans["configurations"]["2.5d"]
    (preprocessed / "nnUNetSmallSegPlans.json").write_text(json.dumps(plans))
    return name


def results(name: str, tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "preprocessed" / name).glob("*fingerprint*"))


def test_pictures_with_regions(nnunet_folders, tmp_path, monkeypatch, capsys):
    labels = np.zeros((40, 50), dtype=np.uint8)
    labels[3:7, 3:7] = 1
    labels[4, 4] = 2
    labels[20:26, 30:40] = 1
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    name = write_dataset(nnunet_folders, tmp_path, monkeypatch, [labels, np.zeros_like(labels)], **regions)
    assert main(["fingerprint", "-d", "993", "-np", "1", "-size_bins", "3", "6"]) == 0
    assert results(name, tmp_path) == NAMES
    content = json.loads((tmp_path / "preprocessed" / name / NAMES[1]).read_text())
    assert (content["num_dimensions"], content["unit"], content["configuration"]) == (2, "pixel", "2d")
    assert [content["lesions"][key]["count"] for key in ("all", "whole", "core")] == [3, 2, 1]
    assert content["lesions"]["all"]["by_size"] == {"<3 px": 1, "3-6 px": 1, ">=6 px": 1}
    assert content["lesions"]["whole"]["extent_mm"]["max"] == [6.0, 10.0]
    assert content["lesions"]["whole"]["area_mm2"]["max"] == 60.0
    assert content["lesions"]["all"]["num_cases_with_lesions"] == 1
    assert content["slices"]["all"] | {"lesion_area_mm2": None} == {
        "num_slices": 2, "num_with_lesions": 1, "share_with_lesions": 0.5, "lesion_area_mm2": None
    }  # fmt: skip
    # A single pixel is in one of the 16 voxels of a 4 x 4 block.
    levels = {level["factor"][-1]: level["nearest"] for level in content["vanish"]["deep_supervision"]}
    assert levels[4]["core"]["lesions"] == pytest.approx(15 / 16)
    assert levels[4]["whole"]["lesions"] == 0
    assert "2d or 2.5d" not in capsys.readouterr().out


def test_data_set_without_lesions(nnunet_folders, tmp_path, monkeypatch, capsys):
    empty = np.zeros((5, 20, 20), dtype=np.uint8)
    name = write_dataset(nnunet_folders, tmp_path, monkeypatch, [empty, empty], spacing=(3.0, 1.0, 1.0))
    assert main(["fingerprint", "-d", name, "-np", "1"]) == 0
    assert "None of the 2 cases has a lesion" in capsys.readouterr().out
    assert results(name, tmp_path) == NAMES
    content = json.loads((tmp_path / "preprocessed" / name / NAMES[1]).read_text())
    assert content["lesions"]["all"]["count"] == 0
    assert content["lesions"]["all"]["extent_mm"] == dict.fromkeys(CONTRACT)


@pytest.mark.parametrize("order", [1, 0], ids=["nnU-Net's default", "another function"])
def test_raw_labels_are_resampled_as_preprocessing_does(nnunet_folders, tmp_path, monkeypatch, order):
    """Lesions of one voxel vanish at three times the spacing. The images have a border of 0, which nnU-Net cuts off."""
    labels = np.zeros((5, 61, 60), dtype=np.uint8)
    labels[2, 10:16, 10:16] = 1
    labels[2, 30, 30] = labels[2, 40, 41] = labels[3, 50, 52] = labels[1, 44, 12:16] = 1
    name = write_dataset(nnunet_folders, tmp_path, monkeypatch, [labels], spacing=(3.0, 0.33, 0.33))
    output = tmp_path / "preprocessed" / name
    file = output / "nnUNetSmallSegPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["2d"]["resampling_fn_seg_kwargs"]["order"] = order
    file.write_text(json.dumps(plans))
    command = ["fingerprint", "-d", name, "-np", "1", "-size_bins", "1"]
    assert main(command) == 0
    before = json.loads((output / NAMES[1]).read_text())
    assert (before["lesions"]["all"]["count"], before["labels_read"]) == (5, "raw")
    assert before["vanish"]["resampling"]["classes"]["all"]["by_size"][">=1 mm"] == 0

    image = np.zeros(labels.shape, dtype=np.float32)
    image[:, 4:, 2:] = 1 + np.arange(58)
    image = sitk.GetImageFromArray(image)
    image.SetSpacing((0.33, 0.33, 3.0))
    sitk.WriteImage(image, str(tmp_path / "case0_0000.nii.gz"))
    plans = PlansManager(str(file))
    (output / "nnUNetSmallSegPlans_2d").mkdir()
    DefaultPreprocessor(verbose=False).run_case_save(
        str(output / "nnUNetSmallSegPlans_2d" / "case0"), [str(tmp_path / "case0_0000.nii.gz")],
        str(tmp_path / "raw" / name / "labelsTr" / "case0.nii.gz"), plans, plans.get_configuration("2d"),
        str(tmp_path / "raw" / name / "dataset.json"),
    )  # fmt: skip
    contents = []
    for option in ([], ["--raw"]):
        assert main([*command, *option]) == 0
        contents.append(json.loads((output / NAMES[1]).read_text()))
    preprocessed, raw = contents
    assert (preprocessed["labels_read"], raw["labels_read"]) == ("preprocessed", "raw")
    left = preprocessed["lesions"]["all"]["count"]
    assert 1 <= left < 5
    found = raw["vanish"]["resampling"]["classes"]["all"]
    assert (found["count"], found["num_vanished"], found["num_vanished"] > 0) == (5, 5 - left, True)
    for part in ("vanish", "patch", "sampling"):  # of the labels nnU-Net has preprocessed
        assert preprocessed[part] == raw[part]
    assert raw["lesions"]["all"]["count"] == 5
    advice = next(advice for advice in raw["recommendations"] if advice["topic"] == "resampling")
    assert advice["indicated"]


def test_an_interrupted_run_goes_on(nnunet_folders, tmp_path, monkeypatch, capsys):
    labels = np.zeros((5, 20, 20), dtype=np.uint8)
    labels[2, 5:9, 5:9] = 1
    name = write_dataset(nnunet_folders, tmp_path, monkeypatch, [labels, labels, 0 * labels], spacing=(3.0, 1.0, 1.0))
    file = tmp_path / "raw" / name / "labelsTr" / "case2.nii.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert main(["fingerprint", "-d", name, "-np", "1"]) == 1
    error = capsys.readouterr().err
    assert str(file) in error
    assert "Traceback" not in error
    assert results(name, tmp_path) == [".lesion_fingerprint_progress.jsonl"]
    file.write_bytes(whole)
    measured, measure = [], run.measure_case
    monkeypatch.setattr(run, "measure_case", lambda task: measured.append(task.case) or measure(task))
    assert main(["fingerprint", "-d", name, "-np", "1"]) == 0
    assert measured == ["case2"]
    continued = (tmp_path / "preprocessed" / name / NAMES[1]).read_text()
    assert main(["fingerprint", "-d", name, "-np", "1"]) == 0
    assert measured == ["case2", "case0", "case1", "case2"]
    assert (tmp_path / "preprocessed" / name / NAMES[1]).read_text() == continued


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("-d", 345), 2, "there is no data set '345'"),
        (("-d", "Dataset345_No"), 2, "there is no data set 'Dataset345_No'"),
        (("-d", 991, "-p", "NoPlans"), 1, "smallseg plan -d 991"),
        (("-d", 991, "-c", "3d_fullres"), 1, "have no configuration '3d_fullres', only 2d, 2.5d"),
        (("-d", 991, "-size_bins", 5, 3), 2, "have to ascend"),
    ],
)
def test_wrong_calls(nnunet_folders, arguments, status, message, capsys):
    before = sorted(nnunet_folders.preprocessed.iterdir())
    assert main(["fingerprint", *map(str, arguments)]) == status
    assert message in capsys.readouterr().err
    assert sorted(nnunet_folders.preprocessed.iterdir()) == before


def test_damaged_and_missing_labels(nnunet_folders, tmp_path, monkeypatch, capsys):
    source = nnunet_folders.preprocessed
    copied = tmp_path / "preprocessed" / source.name
    copied.mkdir(parents=True)
    for file in (*source.glob("*.json"),):
        shutil.copy(file, copied)
    shutil.copytree(source / "nnUNetSmallSegPlans_2d", copied / "nnUNetSmallSegPlans_2d")
    monkeypatch.setenv("nnUNet_preprocessed", str(copied.parent))
    cases = sorted((copied / "nnUNetSmallSegPlans_2d").glob("*_seg.b2nd"))
    case = cases[1].name.removesuffix("_seg.b2nd")
    cases[1].write_bytes(b"no segmentation")
    assert main(["fingerprint", "-d", "991", "-np", "1"]) == 1
    assert f"the preprocessed case {case}" in capsys.readouterr().err
    assert not any((copied / name).exists() for name in NAMES)
    for file in (copied / "nnUNetSmallSegPlans_2d").glob(f"{case}*"):
        file.unlink()
    assert main(["fingerprint", "-d", "991", "-np", "1"]) == 1
    assert "1 of 5 cases are not in" in capsys.readouterr().err
    shutil.rmtree(copied / "nnUNetSmallSegPlans_2d")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nothing"))
    assert main(["fingerprint", "-d", "991", "-np", "1"]) == 1
    error = capsys.readouterr().err
    assert "there are no labels of" in error
    assert "nnUNetv2_preprocess -d 991" in error


# Recommendations


def test_recommendations_follow_the_numbers(phantom):
    _, content = phantom()
    advice = {entry["topic"]: entry for entry in content["recommendations"]}
    assert not advice["patch size"]["indicated"]
    content["patch_size"][1:] = [8, 8]
    changed = {entry["topic"]: entry for entry in recommend(content, [64, 64])}
    assert changed["patch size"]["options"] == ["-patch_size", "32", "32"]
    content["lesions"]["all"]["share_within_slices"] = {"1": 0.1, "3": 0.4, "5": 0.6, "7": 0.9}
    content["recommendations"] = recommend(content, [64, 64])
    assert plan_command(content).startswith("smallseg plan -d 991 -patch_size 32 32 -num_slices 5")
    build_parser().parse_args(plan_command(content).split()[1:])
    content["lesions"]["all"]["share_within_slices"]["1"] = 0.8
    changed = {entry["topic"]: entry for entry in recommend(content, [64, 64])}
    assert "2d has nearly all" in changed["2d or 2.5d"]["text"]
    for level in content["vanish"]["deep_supervision"]:
        for key in ("sections", "lesions"):
            by_size = level["nearest"]["all"][f"{key}_by_size"]
            by_size.update(dict.fromkeys(by_size, 0.0))
    sampling = content["sampling"]["classes"]["all"]
    sampling["centred_per_epoch"]["by_size"] = dict.fromkeys(sampling["by_size_count"], 2.0)
    sampling["seen_per_epoch"]["by_size"] = dict.fromkeys(sampling["by_size_count"], 0.95)
    changed = {entry["topic"]: entry["indicated"] for entry in recommend(content, [64, 64])}
    assert not changed["deep supervision"]
    assert not changed["sampling"]
    sampling["seen_per_epoch"]["by_size"] = dict.fromkeys(sampling["by_size_count"], 0.85)
    assert {entry["topic"]: entry["indicated"] for entry in recommend(content, [64, 64])}["sampling"]


def test_shares_are_not_rounded_away():
    assert [percent(share) for share in (0, 0.0004, 0.034, 0.5, 0.966, 0.9999, 1)] == [
        "0 %", "less than 0.1 %", "3.4 %", "50 %", "96.6 %", "more than 99.9 %", "100 %"
    ]  # fmt: skip
