"""Report, figures and previews of an evaluation; the page also in a real browser, where one is installed."""

from __future__ import annotations

import html
import io
import json
import math
import os
import re
import shutil
import subprocess
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import SimpleITK as sitk
from made_up_tables import lesion_row, made_up_rows, made_up_volume

from nnunetv2_smallseg.cli.main import main
from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.evaluation.figures import short_name
from nnunetv2_smallseg.evaluation.previews import (
    PREDICTION_COLOUR,
    REFERENCE_COLOUR,
    Preview,
    draw_preview,
    outline,
    worst_cases,
    worst_place,
)
from nnunetv2_smallseg.evaluation.report import write_report
from nnunetv2_smallseg.evaluation.report_tables import metric_of, number_text
from nnunetv2_smallseg.evaluation.resampling import Resampling
from nnunetv2_smallseg.evaluation.result_tables import ResultTables, Units

QUICK = Resampling(num_samples=200)
# Names that would break a page that does not escape them, or matplotlib's formulas.
NASTY = "<script>alert('case')</script> & \"$x_$\""
SETTINGS = {"Reference": f"labels {NASTY}", "Size bins": ["<5", "5-10"], "Probabilities": False, "Rule": {"IoU": 0.1}}


def nasty_tables() -> ResultTables:
    """Two predictions with long names; one case and the region are called badly."""
    cases, lesions = made_up_rows({"nnUNetTrainer": 0.2, "nnUNetTrainerSwinUMamba__Plans__2.5d": 0.9}, num_cases=20)
    for row in (*cases, *lesions):
        row["region"] = f"tumour {NASTY}"
        row["case"] = f"{NASTY} 7" if row["case"] == "case_007" else row["case"]
    return ResultTables(cases, lesions)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A report with two predictions and a picture of every worst case."""
    tables = nasty_tables()
    image, reference, prediction, spacing = made_up_volume(1)
    png = draw_preview(reference, prediction, spacing, image)
    previews = [Preview(case.prediction, case.case, case.region, png) for case in worst_cases(tables)]
    folder = tmp_path_factory.mktemp("report")
    written = datetime(2026, 1, 2, 3, 4, tzinfo=timezone.utc)
    file = write_report(tables, SETTINGS, folder, previews, resampling=QUICK, title="A & B", written=written)
    assert file == folder / "report.html"
    return file


class PageParser(HTMLParser):
    """Collects addresses and text, and checks that elements are closed in order."""

    EMPTY = ("meta", "link", "img", "input", "wbr", "br")

    def __init__(self) -> None:
        super().__init__()
        self.addresses, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def parse(page: str) -> PageParser:
    parser = PageParser()
    parser.feed(page)
    assert parser.open == []
    return parser


class TestPage:
    def test_everything_is_inside(self, report):
        addresses = parse(report.read_text()).addresses
        assert all(address.startswith(("data:", "#")) for address in addresses)
        assert sum(address.startswith("data:image/svg+xml") for address in addresses) == 6
        assert sum(address.startswith("data:image/png") for address in addresses) == 20
        assert not re.search(r"url\(|@import|http-equiv=.refresh", report.read_text())

    def test_names_are_escaped(self, report):
        page = report.read_text()
        assert page.count("<script") == 1
        assert "alert('case')" not in page
        assert NASTY in "".join(parse(page).text)

    def test_head(self, report):
        text = " ".join(" ".join(parse(report.read_text()).text).split())
        for part in (
            "A & B", "20 cases, 2 predictions, 1 region. Written 2026-01-02 03:04 UTC", "Size bins <5, 5-10",
            "Probabilities no", "Rule IoU: 0.1", "95 %, percentile bootstrap with 200 samples of the cases, seed 0",
            "A: nnUNetTrainer", "nnunetv2-smallseg 0.1.0", "docs/evaluation.md",
        ):  # fmt: skip
            assert part in text

    def test_figures_are_files_too(self, report):
        names = {path.stem for path in (report.parent / "figures").iterdir()}
        assert names == {
            "recall_against_diameter", "detection_by_size", "dice_against_volume", "false_positives", "froc",
            "paired_differences_1_2",
        }  # fmt: skip
        for name in names:
            height, width, _ = matplotlib.image.imread(report.parent / "figures" / f"{name}.png").shape
            assert width > height > 500
            assert "<svg" in (report.parent / "figures" / f"{name}.svg").read_text()
        assert not list(report.parent.rglob("*.part"))

    def test_statistics_are_a_file_too(self, report):
        statistics = json.loads((report.parent / "statistics.json").read_text(), parse_constant=pytest.fail)
        dice = statistics["metrics"][0]
        assert (dice["metric"], dice["num_cases"] + dice["num_undefined"]) == ("dice", 20)
        assert f"{dice['mean']['value']:.3f}" in report.read_text()
        assert statistics["froc"][0]["thresholds"][0] is None
        assert statistics["comparisons"][0]["p_value_holm"] <= 1

    def test_same_input_same_page(self, report, tmp_path):
        first, second = (
            write_report(
                nasty_tables(), {}, tmp_path / name, resampling=QUICK, written=datetime(2026, 1, 1, tzinfo=timezone.utc)
            ).read_bytes()
            for name in "ab"
        )
        assert first == second

    def test_a_failure_leaves_the_old_report(self, tmp_path, monkeypatch):
        tables = ResultTables(*made_up_rows({"a": 0.5}, num_cases=3))
        page = write_report(tables, {}, tmp_path, resampling=QUICK)
        before = page.read_bytes()

        def fail(*_, **__):
            raise OSError("disk full")

        monkeypatch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="disk full"):
            write_report(tables, {}, tmp_path, resampling=QUICK)
        assert page.read_bytes() == before
        assert not list(tmp_path.rglob("*.part"))

    def test_case_without_patient(self, tmp_path):
        tables = ResultTables(*made_up_rows({"a": 0.5}, num_cases=3))
        with pytest.raises(SmallSegError, match="have no patient"):
            write_report(tables, {}, tmp_path, resampling=Resampling(10, patients={"case_000": "p"}))

    def test_patients_are_named(self, tmp_path):
        tables = ResultTables(*made_up_rows({"a": 0.5, "b": 1}, num_cases=6))
        patients = {f"case_{number:03d}": str(number // 2) for number in range(6)}
        page = write_report(tables, {}, tmp_path, resampling=Resampling(50, patients=patients)).read_text()
        text = " ".join("".join(parse(page).text).split())
        assert "6 cases, 3 patients, 2 predictions" in text
        assert "samples of the patients, each with all of its cases" in text
        assert "Wilcoxon's signed-rank test on the patients' mean differences" in text


def case_row(case: str, **metrics) -> dict:
    return {"prediction": "a", "case": case, "region": "lesion", **metrics}


@pytest.mark.parametrize(
    ("cases", "lesions"),
    [
        made_up_rows({"only": 0.5}, num_cases=5, scores=False),
        made_up_rows({f"prediction {number}": 0.2 * number for number in range(7)}, num_cases=14),
        made_up_rows({"a": 0.1, "b": 0.5}, num_cases=13, regions=("kidney/tumour", "cyst")),
        ([case_row("1", dice=0.5)], [lesion_row(("a", "1", "lesion"), "reference", 1, 7, detected=1, dice=0.5)]),
        ([case_row("1", dice="")], []),
        ([case_row("1", dice=0.0)], [lesion_row(("a", "1", "lesion"), "false_positive", 1, 7)]),
        ([case_row("1"), case_row("2", unknown_metric=3)], []),
    ],
    ids=["one prediction", "seven predictions", "two regions", "one lesion", "nothing", "false positive", "no Dice"],
)
@pytest.mark.filterwarnings("error")
def test_tables_of_any_kind(cases, lesions, tmp_path):
    """Few or many predictions, regions, lesions and values make a page without a warning."""
    page = write_report(ResultTables(cases, lesions), {}, tmp_path, resampling=Resampling(50), units=Units(2, "px"))
    parser = parse(page.read_text())
    assert "mm²" not in "".join(parser.text)
    images = [address for address in parser.addresses if address.startswith("data:image/svg")]
    assert len(images) == len(list((tmp_path / "figures").glob("*.svg"))) > 0


class TestNumbers:
    @pytest.mark.parametrize(
        ("metric", "value", "signed", "text"),
        [
            ("dice", 0.12345, False, "0.123"),
            ("dice", -0.0001, True, "0.000"),
            ("dice", -0.012, True, "\N{MINUS SIGN}0.012"),
            ("hd95_mm", 3.14159, True, "+3.14"),
            ("num_detected", 2.5, False, "2.50"),
            ("reference_volume_mm3", 12345.6, False, "12,346"),
            ("reference_volume_mm3", 12.3456, False, "12.3"),
            ("reference_volume_mm3", 99.96, False, "100"),
            ("area_ratio_percent", 0.09, False, "0.0900"),
            ("dice", math.nan, False, "\N{EN DASH}"),
        ],
    )
    def test_text(self, metric, value, signed, text):
        assert number_text(value, metric_of(metric), signed) == text

    def test_long_names_are_cut_in_the_middle(self):
        assert short_name("short") == "short"
        assert short_name("a" * 30 + "b" * 30, 11) == "aaaaa…bbbbb"


class TestWorstCases:
    def test_order(self):
        volumes = {"large": 12, "small": 6}
        cases = [case_row(name, dice=0.0) for name in ("small", "large")]
        cases += [case_row("good", dice=0.9), case_row("perfect", dice=1.0), case_row("bad", dice=0.3)]
        cases += [case_row("healthy", dice=""), case_row("false", dice="")]
        lesions = [
            lesion_row(("a", name, "lesion"), "reference", 1, size, detected=0) for name, size in volumes.items()
        ]
        lesions += [lesion_row(("a", "false", "lesion"), "false_positive", 1, 20)]
        found = worst_cases(ResultTables(cases, lesions))
        assert [case.case for case in found] == ["large", "small", "false", "bad", "good"]
        assert [case.rank for case in found] == [1, 2, 3, 4, 5]
        assert (found[0].num_missed, found[2].num_false_positives) == (1, 1)
        assert found[0].missed_volume_mm3 == pytest.approx(math.pi / 6 * 12**3)
        assert [case.case for case in worst_cases(ResultTables(cases, lesions), 2)] == ["large", "small"]


class TestPreviews:
    def test_outline_of_single_pixels(self):
        mask = np.zeros((3, 4), bool)
        mask[1, 2] = True
        edges = {tuple(sorted(map(tuple, edge))) for edge in outline(mask).tolist()}
        corners = [(1.5, 0.5), (2.5, 0.5), (2.5, 1.5), (1.5, 1.5)]
        assert edges == {tuple(sorted((corners[i], corners[(i + 1) % 4]))) for i in range(4)}
        assert len(outline(np.ones((2, 3), bool))) == 10  # the border of the image is an edge
        assert len(outline(np.zeros((2, 3), bool))) == 0

    def test_missed_lesions_come_first(self):
        """A large lesion that was found, a missed one, a smaller false positive."""
        reference, prediction = np.zeros((2, 40, 40), bool)
        reference[2:20, 2:20] = prediction[3:20, 2:20] = True
        reference[30:35, 30:35] = True
        prediction[30:33, 5:8] = True
        place, component = worst_place(reference, prediction, (1, 1))
        assert place == (32, 32)
        assert component.sum() == 25
        place, component = worst_place(prediction, prediction, (1, 1))
        assert component[place]
        assert worst_place(np.zeros((4, 4), bool), np.zeros((4, 4), bool), (1, 1)) is None

    def test_place_is_in_the_error_in_mm(self):
        """The innermost voxel depends on the spacing: along a thick axis one voxel is deep enough."""
        reference, prediction = np.zeros((2, 5, 20, 20), bool)
        reference[2, 4:13, 6:9] = True
        (z, y, x), _ = worst_place(reference, prediction, (5, 1, 1))
        assert (z, y, x) == (2, 8, 7)

    @pytest.mark.parametrize("with_image", [True, False])
    def test_three_planes(self, with_image):
        image, reference, prediction, spacing = made_up_volume(3)
        picture = decode(draw_preview(reference, prediction, spacing, image if with_image else None))
        assert picture.shape[1] > 2.5 * picture.shape[0]
        assert has_colour(picture, REFERENCE_COLOUR)
        assert has_colour(picture, PREDICTION_COLOUR)

    @pytest.mark.parametrize("image", [None, np.random.default_rng(0).random((50, 70, 3)), np.full((50, 70), np.nan)])
    def test_one_plane_in_2d(self, image):
        reference, prediction = np.zeros((2, 50, 70), np.uint8)
        reference[10:20, 0:5], prediction[12:22, 0:6] = 2, 1
        picture = decode(draw_preview(reference, prediction, (1, 1), image, unit="px"))
        assert picture.shape[1] == pytest.approx(picture.shape[0], rel=0.2)
        assert has_colour(picture, REFERENCE_COLOUR)

    def test_empty_case_and_tiny_image(self):
        assert decode(draw_preview(np.zeros((1, 2, 3)), np.zeros((1, 2, 3)), (5, 1, 1))).size
        assert decode(draw_preview(np.ones((1, 1, 1)), np.zeros((1, 1, 1)), (1, 1, 1), np.ones((1, 1, 1)))).size

    @pytest.mark.parametrize(
        ("reference", "prediction", "spacing", "image", "message"),
        [
            (np.zeros((2, 3)), np.zeros((3, 2)), (1, 1), None, "reference has shape"),
            (np.zeros(3), np.zeros(3), (1,), None, "reference has shape"),
            (np.zeros((2, 3)), np.zeros((2, 3)), (1, 1, 1), None, "spacing is"),
            (np.zeros((2, 3)), np.zeros((2, 3)), (1, 0), None, "spacing is"),
            (np.zeros((2, 3)), np.zeros((2, 3)), (1, 1), np.zeros((3, 3)), "image has shape"),
        ],
    )
    def test_arrays_that_do_not_fit(self, reference, prediction, spacing, image, message):
        with pytest.raises(ValueError, match=message):
            draw_preview(reference, prediction, spacing, image)


def decode(png: bytes) -> np.ndarray:
    """(H, W, 3) in [0, 1]."""
    return matplotlib.image.imread(io.BytesIO(png))[..., :3]


def has_colour(picture: np.ndarray, colour: str) -> bool:
    wanted = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    return bool((np.abs(picture - wanted).max(axis=-1) < 0.08).sum() > 20)


# What a test does in the page, and what it writes down. Before the page's own script and images.
WATCH = """<script>
"use strict";
const problems = [];
addEventListener("error", (event) => problems.push(String(event.message || event.target.outerHTML)), true);
addEventListener("securitypolicyviolation", (event) => problems.push(event.violatedDirective));
for (const kind of ["error", "warn"]) console[kind] = (...words) => problems.push(words.join(" "));
</script>"""
USE = """<script>
addEventListener("load", () => {
  const column = (table, index) => [...table.tBodies[0].rows].map((row) => row.cells[index].dataset.sort);
  const cases = document.getElementById("cases");
  const shown = () => [...cases.tBodies[0].rows].filter((row) => row.offsetParent !== null).length;
  const filter = document.getElementById("filter");
  const type = (text) => { filter.value = text; filter.dispatchEvent(new Event("input")); return shown(); };
  const result = {
    problems,
    images: [...document.images].map((image) => image.complete && image.naturalWidth > 0),
    fetched: performance.getEntriesByType("resource").map((entry) => entry.name).filter((name) => !/^data:/.test(name)),
    background: getComputedStyle(document.body).backgroundColor,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    sorted: {},
  };
  const sortBy = (index) => {
    const button = cases.querySelectorAll("tr.columns button")[index];
    button.click();
    const up = [column(cases, index), button.parentElement.getAttribute("aria-sort")];
    button.click();
    return [up, [column(cases, index), button.parentElement.getAttribute("aria-sort")]];
  };
  result.sorted = [...cases.querySelectorAll("tr.columns th")].map((_, index) => sortBy(index));
  result.tables = [...document.querySelectorAll("table.sortable")].map((table) => {
    const before = table.tBodies[0].rows.length;
    for (const button of table.querySelectorAll("tr.columns button")) button.click();
    return [before, table.tBodies[0].rows.length, table.querySelectorAll("th[aria-sort]").length];
  });
  result.shown = ["", "case_003", "CASE_003 swin", "<script>alert", "nothing of it", ""].map(type);
  const place = document.createElement("pre");
  place.id = "result";
  place.textContent = JSON.stringify(result);
  document.body.append(place);
});
</script>"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Opens a page in headless Chromium: returns its DOM and what it wrote to the console."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium: install the package chromium to test the report in a browser")

    def run(file: Path, *flags: str) -> tuple[str, list[str]]:
        profile = tmp_path_factory.mktemp("profile")
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        finished = subprocess.run(
            [
                program, "--headless", *sandbox, "--disable-gpu", "--disable-background-networking", "--no-first-run",
                "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", f"--user-data-dir={profile}",
                "--enable-logging=stderr", "--virtual-time-budget=10000", "--window-size=1280,900", *flags,
                "--dump-dom", file.as_uri(),
            ],
            capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        shutil.rmtree(profile, ignore_errors=True)
        assert finished.returncode == 0, finished.stderr[-4000:]
        return finished.stdout, [line for line in finished.stderr.splitlines() if "CONSOLE" in line]

    return run


def use_page(browse, report: Path, folder: Path, change=lambda page: page, *flags: str) -> dict:
    """Opens a copy of the report that watches itself and is clicked through; returns what it wrote down."""
    page = change(report.read_text())
    page = page.replace("<style>", WATCH + "<style>", 1).replace("</body>", USE + "</body>", 1)
    copy = folder / "used.html"
    copy.write_text(page)
    dom, _ = browse(copy, *flags)
    found = re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found[1]))


def in_order(values: list[str], descending: bool) -> bool:
    """Whether numbers (or texts) are sorted, undefined ones last."""
    known = [value for value in values if value]
    if values != known + [""] * (len(values) - len(known)):
        return False
    try:
        numbers = [float(value) for value in known]
    except ValueError:
        return True  # texts: test_texts_are_sorted_as_people_count
    return numbers == sorted(numbers, reverse=descending)


class TestBrowser:
    def test_console_is_silent(self, browse, report, tmp_path):
        assert browse(report)[1] == []
        noisy = tmp_path / "noisy.html"
        noisy.write_text(report.read_text().replace("</body>", "<script>console.error('heard')</script></body>"))
        assert any("heard" in line for line in browse(noisy)[1])  # the test would notice

    def test_page_works(self, browse, report, tmp_path):
        result = use_page(browse, report, tmp_path)
        assert result["problems"] == []
        assert result["fetched"] == []
        assert result["images"] == [True] * 26
        assert result["overflow"] == 0  # wide tables scroll, the page does not
        for up, down in result["sorted"]:
            assert (up[1], down[1]) == ("ascending", "descending")
            assert sorted(up[0]) == sorted(down[0])
            assert in_order(up[0], descending=False)
            assert in_order(down[0], descending=True)
        undefined = [up[0].count("") for up, _ in result["sorted"]]
        assert max(undefined) > 0
        assert all(before == after > 0 and marked == 1 for before, after, marked in result["tables"])
        assert result["shown"] == [40, 2, 1, 2, 0, 40]

    def test_texts_are_sorted_as_people_count(self, browse, report, tmp_path):
        result = use_page(browse, report, tmp_path)
        names = list(dict.fromkeys(result["sorted"][0][0][0]))
        cases = [name for name in names if name.startswith("case")]
        assert len(names) == len(cases) + 1 == 20
        assert cases == sorted(cases)

    def test_dark_and_light(self, browse, report, tmp_path):
        colours = {
            use_page(browse, report, tmp_path, lambda page: page, f"--blink-settings=preferredColorScheme={scheme}")[
                "background"
            ]
            for scheme in (0, 1)
        }
        assert colours == {"rgb(20, 24, 27)", "rgb(245, 246, 247)"}

    def test_damage_would_be_noticed(self, browse, report, tmp_path):
        broken = use_page(
            browse,
            report,
            tmp_path,
            lambda page: page.replace("data:image/png;base64,", "data:image/png;base64,AAAA", 1),
        )
        assert broken["images"].count(False) == 1
        assert len(broken["problems"]) == 1
        outside = use_page(
            browse, report, tmp_path, lambda page: page.replace("</main>", '<img src="file:///x.png"></main>')
        )
        assert any("img-src" in problem for problem in outside["problems"])


def test_command_line_writes_the_report(tmp_path, capsys):
    """Two predictions of two volumes, with images and patients, through ``smallseg evaluate``."""
    generator = np.random.default_rng(0)
    for case in ("a", "b"):
        labels = np.zeros((6, 24, 24), np.uint8)
        labels[2:4, 4:8, 4:8] = labels[3:5, 14:20, 12:18] = 1
        volumes = {
            "reference": labels,
            "exact": labels,
            "shifted": np.roll(labels, 2, axis=2),
            "images": generator.normal(size=labels.shape).astype(np.float32),
        }
        for folder, array in volumes.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            name = f"{case}_0000.nii.gz" if folder == "images" else f"{case}.nii.gz"
            sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / folder / name))
    (tmp_path / "patients.csv").write_text("case,patient\na,p1\nb,p2\n")
    command = ["evaluate", "-ref", str(tmp_path / "reference"), "-o", str(tmp_path / "out"), "-np", "1"]
    command += ["-pred", f"exact={tmp_path / 'exact'}", f"shifted={tmp_path / 'shifted'}"]
    images = ["-images", str(tmp_path / "images"), "-patients", str(tmp_path / "patients.csv")]
    assert main([*command, *images]) == 0
    assert "shifted" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 patients" in page
    assert page.count("data:image/png;base64,") == 2  # both cases of the prediction that is not exact
    (tmp_path / "images" / "b_0000.nii.gz").unlink()
    assert main([*command, *images]) == 1
    assert "no image of the case b" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    assert main([*command, "--no_report"]) == 0
    assert not (tmp_path / "out" / "report.html").exists()
