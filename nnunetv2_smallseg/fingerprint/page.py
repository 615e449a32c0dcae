"""The page of a fingerprint: one HTML file that opens without a network, in the style of the evaluation report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from nnunetv2_smallseg.evaluation.report import data_address, page_environment, versions
from nnunetv2_smallseg.evaluation.report_tables import UNDEFINED, Cell, Table, count_cell, text_cell
from nnunetv2_smallseg.files import replacing
from nnunetv2_smallseg.fingerprint.recommendations import percent, plan_command
from nnunetv2_smallseg.fingerprint.summary import ALL, PERCENTILES, length_unit

__all__ = ["write_page"]

# More rows than this scroll within their table.
LONG = 25


@dataclass(frozen=True)
class Section:
    """A heading of the page and the tables below it."""

    anchor: str
    title: str
    tables: Sequence[Table]
    long: bool = False


def write_page(content: Mapping, figure_svg: bytes, file: Path, written: datetime | None = None) -> None:
    """Writes the page, whole or not at all.

    Args:
        content: Content of ``lesion_fingerprint.json``.
        figure_svg: The figure.
        file: HTML file.
        written: Time of writing; None for now.
    """
    template = page_environment(Path(__file__).parent / "templates").get_template("fingerprint.html")
    written = written or datetime.now(timezone.utc)
    page = template.render(
        content=content,
        facts=_facts(content),
        command=plan_command(content),
        figure=data_address(figure_svg, "image/svg+xml"),
        sections=_sections(content),
        versions=versions(),
        written=written.strftime("%Y-%m-%d %H:%M %Z").strip(),
    )
    with replacing(file) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _facts(content: Mapping) -> list[tuple[str, str]]:
    sampling = content["sampling"]
    spacing = " x ".join(f"{value:g}" for value in content["target_spacing_mm"])
    return [
        ("Labels", f"{content['labels_read']}, {content['labels_folder']}"),
        ("Cases", f"{content['num_cases']:,}"),
        ("Configuration", f"{content['configuration']} of {content['plans']}"),
        ("Target spacing", f"{spacing} {length_unit(content)}"),
        ("Patch", f"{' x '.join(map(str, content['patch_size']))}, {content['batch_size']} in a batch"),
        (
            "Epoch",
            f"{sampling['iterations_per_epoch']} iterations of {sampling['random_patches_per_batch']} random and "
            f"{sampling['foreground_patches_per_batch']} foreground patches from "
            f"{sampling['num_training_cases']:.3g} training cases",
        ),
    ]


def _sections(content: Mapping) -> list[Section]:
    by_size = [_vanished_table(content), _sampling_table(content)]
    return [
        Section("lesions", "Lesions", [_lesion_table(content), _slice_table(content)]),
        Section("losses", "Losses by size", by_size if content["lesions"][ALL]["count"] else []),
        Section("cases", "Cases", [_case_table(content)], long=len(content["cases"]) > LONG),
    ]


def _number(value: float | None) -> Cell:
    """A cell with three digits."""
    if value is None:
        return Cell(UNDEFINED)
    return Cell(
        f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:#.3g}".rstrip("."), repr(value)
    )


def _share(value: float | None) -> Cell:
    return Cell(UNDEFINED) if value is None else Cell(percent(value), repr(value))


def _volume_unit(content: Mapping) -> str:
    return f"{length_unit(content)}{'²' if content['num_dimensions'] == 2 else '³'}"


def _lesion_table(content: Mapping) -> Table:
    """Percentiles of sizes, a row a class and quantity."""
    planar, length = content["num_dimensions"] == 2, length_unit(content)
    size = "area_mm2" if planar else "volume_mm3"
    quantities = (
        ("equivalent_diameter_mm", f"equivalent diameter ({length})"),
        (size, f"{'area' if planar else 'volume'} ({_volume_unit(content)})"),
        ("per_case", "lesions of a case"),
        (f"{size}_per_case", f"{'area' if planar else 'volume'} of a case ({_volume_unit(content)})"),
    )
    axes = ("rows", "columns") if planar else ("slices", "rows", "columns")
    rows = []
    for name, described in _classes(content["lesions"]):
        for key, title in quantities:
            rows.append([text_cell(name), text_cell(title), count_cell(described["count"]),
                         *(_number(described[key][percentile]) for percentile in PERCENTILES)])  # fmt: skip
        for place, axis in enumerate(axes):
            for key, unit in (("extent_mm", length), ("extent_voxels", "voxels")):
                values = [described[key][percentile] for percentile in PERCENTILES]
                cells = [_number(None if value is None else value[place]) for value in values]
                title = text_cell(f"extent along {axis} ({unit})")
                rows.append([text_cell(name), title, count_cell(described["count"]), *cells])
    return Table(
        ["class", "quantity", "lesions", *PERCENTILES], rows,
        note="A lesion is a connected component, voxels that touch at corners included. Extents are those of its "
        "bounding box; in voxels, after resampling to the target spacing.",
    )  # fmt: skip


def _slice_table(content: Mapping) -> Table:
    rows = [
        [text_cell(name), count_cell(described["num_slices"]), count_cell(described["num_with_lesions"]),
         _share(described["share_with_lesions"]),
         *(_number(described["lesion_area_mm2"][percentile]) for percentile in PERCENTILES)]
        for name, described in _classes(content["slices"])
    ]  # fmt: skip
    note = f"Lesion area of the slices with lesions in {length_unit(content)}²."
    return Table(["class", "slices", "with lesions", "share", *PERCENTILES], rows, note=note)


def _vanished_table(content: Mapping) -> Table:
    """Share of the lesions that vanish, a row a cause, a column a size bin."""
    bins, rows = content["size_bins"]["names"], []
    resampling = content["vanish"]["resampling"]
    if resampling["classes"] is not None:
        found = resampling["classes"][ALL]
        rows.append([text_cell("resampling to the target spacing"), Cell(UNDEFINED), _share(found["share"]),
                     *(_share(found["by_size"][name]) for name in bins)])  # fmt: skip
    slices = len(content["target_spacing_mm"]) == 2 and content["num_dimensions"] == 3
    for level in content["vanish"]["deep_supervision"]:
        if max(level["factor"]) == 1:
            continue
        found, weight = level["nearest"][ALL], _number(level["loss_weight"])
        target = f"target at {_scale(level['factor'])}"
        for key, what in (("lesions", "lesions"), *([("sections", "their parts in a slice")] if slices else [])):
            shares = [found[key], *(found[f"{key}_by_size"][name] for name in bins)]
            rows.append([text_cell(f"{target}: {what}"), weight, *map(_share, shares)])
        shares = [level["lesion_preserving"]] * (1 + len(bins))
        rows.append([text_cell(f"{target}, lesion-preserving"), weight, *map(_share, shares)])
    patch = content["patch"]["classes"][ALL]
    for kind, what in (("random", "that show it"), ("centred", "centred on it")):
        found = patch[f"cut_{kind}"]
        rows.append([text_cell(f"cut: share of the patches {what}"), Cell(UNDEFINED), _share(found["share"]),
                     *(_share(found["by_size"][name]) for name in bins)])  # fmt: skip
    notes = ["Targets: mean over all places of the grid. A lesion vanishes if nothing of it is left."]
    if resampling["note"]:
        notes.append(f"Resampling: {resampling['note']}.")
    return Table(["what", "weight in the loss", "all lesions", *bins], rows, note=" ".join(notes))


def _scale(factor: Sequence[int]) -> str:
    return "1/" + (
        str(max(factor)) if len({value for value in factor if value > 1}) == 1 else "x".join(map(str, factor))
    )


def _sampling_table(content: Mapping) -> Table:
    """How often lesions are seen, a row a quantity, a column a size bin."""
    sampling, bins = content["sampling"]["classes"][ALL], content["size_bins"]["names"]
    rows = [[text_cell("lesions"), count_cell(sampling["count"]),
             *(count_cell(sampling["by_size_count"][name]) for name in bins)]]  # fmt: skip
    for key, title, cell in (
        ("seen_per_epoch", "probability to be seen in an epoch", _number),
        ("views_per_epoch", "patches of an epoch that show it", _number),
        ("centred_per_epoch", "patches of an epoch centred on it", _number),
        ("never_centred", "never the centre of a patch", _share),
    ):
        found = sampling[key]
        rows.append([text_cell(title), cell(found["mean"]), *(cell(found["by_size"][name]) for name in bins)])
    return Table(["quantity", "all lesions", *bins], rows, note="Means over the lesions, of a fold that trains on "
                 "their case; nnU-Net's own sampling, without rotation and scaling.")  # fmt: skip


def _case_table(content: Mapping) -> Table:
    names = list(content["classes"])
    rows = [
        [text_cell(case), *(count_cell(found["num_lesions"][name]) for name in names), _number(found["lesion_size"]),
         count_cell(found["num_slices"]), count_cell(found["num_slices_with_lesions"])]
        for case, found in content["cases"].items()
    ]  # fmt: skip
    sizes = f"lesion {'area' if content['num_dimensions'] == 2 else 'volume'} ({_volume_unit(content)})"
    columns = ["case", *(f"lesions: {name}" for name in names), sizes, "slices", "with lesions"]
    return Table(columns, rows)


def _classes(described: Mapping[str, dict]) -> list[tuple[str, dict]]:
    """All classes together, and each if there are several."""
    return list(described.items()) if len(described) > 2 else [next(iter(described.items()))]
