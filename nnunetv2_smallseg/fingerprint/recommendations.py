"""What follows from a fingerprint for planning and training, each sentence with the numbers behind it.

The rules are ours; docs/fingerprint.md lists them. They say where nnU-Net loses small lesions, not that a strategy
improves a network: docs/results.md says what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nnunetv2_smallseg.fingerprint.source import DEFAULT_PLANS_NAME
from nnunetv2_smallseg.fingerprint.summary import ALL, SLAB_SIZES, length_unit
from nnunetv2_smallseg.plans.switches import SWITCHES

__all__ = ["percent", "plan_command", "recommend"]

# A strategy is indicated if it concerns a size bin that holds at least this share of the lesions ...
MIN_BIN_SHARE = 0.05
# ... and, for lesion-preserving targets, this share of the bin vanishes, weighted as the levels are in the loss;
MAX_VANISHED = 0.05
# for lesion sampling, less than this is seen in an epoch, or the bin gets less than this part of its share of patches.
MIN_SEEN, MIN_PATCH_RATIO = 0.9, 0.25
# The share of lesions that are never the centre of a patch is told from here on.
MIN_NEVER_TOLD = 0.005
# A finer spacing is worth considering if more lesions than this vanish by resampling.
MAX_RESAMPLED_AWAY = 0.01
# 2d is enough if at least this share of the lesions lies in one slice; a slab holds at least this share of them whole.
MANY_IN_ONE_SLICE, MIN_WITHIN_SLAB = 0.75, 0.5
# Patches of smallseg plan are multiples of this.
PATCH_MULTIPLE = 32


def recommend(summary: Mapping, median_image_size: Sequence[float]) -> list[dict]:
    """Recommendations, one a topic.

    Args:
        summary: Content of the fingerprint.
        median_image_size: Median voxels of the preprocessed images along the axes of the patch.
    Returns:
        ``topic``, ``indicated`` (whether something should be changed), ``text``, and ``options`` of ``smallseg plan``.
    """
    if not summary["lesions"][ALL]["count"]:
        return [
            {
                "topic": "lesions",
                "indicated": False,
                "text": f"None of the {summary['num_cases']} cases has a lesion: there is nothing to recommend.",
                "options": [],
            }
        ]
    found = [_resampling(summary)]
    if summary["sampling"]["classes"][ALL]["count"]:  # else all have vanished by resampling
        found.insert(0, _patch(summary, median_image_size))
        if summary["num_dimensions"] == 3:
            found.insert(1, _slab(summary))
        found += [_targets(summary), _sampling(summary)]
    return [
        {"topic": topic, "indicated": indicated, "text": " ".join(sentences), "options": options}
        for topic, indicated, sentences, options in found
    ]


def plan_command(content: Mapping) -> str:
    """The call of ``smallseg plan`` that follows from the recommendations; empty if the plans do."""
    options = [option for advice in content["recommendations"] for option in advice["options"]]
    if not options:
        return ""
    name = [] if content["plans"] == DEFAULT_PLANS_NAME else ["-plans_name", content["plans"]]
    return " ".join(["smallseg plan -d", str(int(content["dataset"][7:10])), *name, *options])


def percent(share: float) -> str:
    """A share in per cent, never rounded to 0 or 100 if it is neither."""
    if 0 < share < 0.001:
        return "less than 0.1 %"
    if 0.999 < share < 1:
        return "more than 99.9 %"
    digits = 1 if 0 < share < 0.1 or 0.9 < share < 1 else 0
    return f"{100 * share:.{digits}f} %"


def _size(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.0f}" for value in values)


def _bins(summary: Mapping, counts: Mapping[str, int]) -> list[str]:
    """The size bins that hold enough lesions to matter, smallest first."""
    total = sum(counts.values())
    return [name for name in summary["size_bins"]["names"] if counts[name] >= max(1, MIN_BIN_SHARE * total)]


def _patch(summary: Mapping, median_image_size: Sequence[float]) -> tuple:
    lesions, patch = summary["lesions"][ALL], summary["patch"]["classes"][ALL]
    is_volume = len(summary["target_spacing_mm"]) == 3
    axes = slice(0 if is_volume else -2, None)
    size, most, largest = (list(values)[axes] for values in (
        summary["patch_size"], lesions["extent_voxels"]["p99"], lesions["extent_voxels"]["max"]))  # fmt: skip
    where = "" if is_volume or summary["num_dimensions"] == 2 else " within the slices"
    sentences = [
        f"99 % of the lesions extend over at most {_size(map(math.ceil, most))} voxels{where}, the largest over "
        f"{_size(largest)}; the patch has {_size(size)}."
    ]
    too_small = any(extent > voxels for extent, voxels in zip(most, size, strict=True))
    cut = patch["cut_centred"]["share"]
    options = []
    if not too_small:
        sentences.append("It covers them: keep it.")
    else:
        sentences.append(f"Of the lesions, {percent(patch['larger_than_patch_in_plane'])} are larger than the patch.")
        wanted = [
            min(_round_up(max(extent, voxels)), max(_round_up(image), voxels))
            for extent, voxels, image in zip(most, size, list(median_image_size)[axes], strict=True)
        ]
        if wanted == size:
            too_small = False
            sentences.append("It is as large as the images: keep it.")
        elif is_volume:
            sentences.append(f"Plan a larger one, such as {_size(wanted)}, in the configuration {_name(summary)}.")
        else:
            options = ["-patch_size", *map(str, wanted)]
            sentences.append(f"Plan {_size(wanted)}, with a smaller batch if memory is short.")
    if len(summary["patch_size"]) == len(summary["target_spacing_mm"]):  # slabs: said where slices are counted
        what = "the part in its slice" if where else "the lesion"
        sentences.append(f"Of the patches centred on a lesion, {percent(cut)} do not hold all of {what}.")
    return "patch size", too_small, sentences, options


def _slab(summary: Mapping) -> tuple:
    lesions, name = summary["lesions"][ALL], summary["configuration"]
    within = lesions["share_within_slices"]
    extent = {key: lesions["extent_voxels"][key][0] for key in ("p50", "p95")}
    one = within["1"]
    sentences = [
        f"Half of the lesions extend over at most {extent['p50']:.0f} slices, 95 % over at most {extent['p95']:.0f}; "
        f"{percent(one)} lie in one slice only."
    ]
    if one >= MANY_IN_ONE_SLICE:
        sentences.append("Neighbouring slices seldom show the same lesion: 2d has nearly all there is to see.")
        return "2d or 2.5d", name == "2.5d", sentences, []
    slices = next((size for size in SLAB_SIZES[1:] if within[str(size)] >= MIN_WITHIN_SLAB), SLAB_SIZES[-1])
    planned = summary["patch_size"][0] if len(summary["patch_size"]) > len(summary["target_spacing_mm"]) else None
    sentences.append(f"2.5d with {slices} slices holds {percent(within[str(slices)])} of the lesions whole")
    if planned is None:
        sentences[-1] += f"; this fingerprint is of {name}."
        return "2d or 2.5d", True, sentences, ["-num_slices", str(slices)]
    cut = summary["patch"]["classes"][ALL]["cut_centred"]["share"]
    sentences[-1] += f"; the slabs planned have {planned}."
    sentences.append(f"Of the slabs centred on a lesion, {percent(cut)} do not hold all of it.")
    return "2d or 2.5d", planned < slices, sentences, ["-num_slices", str(slices)] if planned < slices else []


def _resampling(summary: Mapping) -> tuple:
    resampling = summary["vanish"]["resampling"]
    spacing = " x ".join(f"{value:g}" for value in summary["target_spacing_mm"]) + f" {length_unit(summary)}"
    if not resampling["num_cases"]:
        return "resampling", False, [f"What vanishes by resampling to {spacing} is not known: the raw labels are not "
                                     "there."], []  # fmt: skip
    found = resampling["classes"][ALL]
    sentences = [f"{found['num_vanished']:,} of {found['count']:,} lesions vanish by resampling to {spacing}."]
    if (found["share"] or 0) <= MAX_RESAMPLED_AWAY:
        return "resampling", False, sentences, []
    worst = {name: share for name, share in found["by_size"].items() if share}
    sentences.append("Of " + ", ".join(f"{name}: {percent(share)}" for name, share in worst.items()) + ".")
    sentences.append("Consider a finer spacing in the plans; no network can find what is not in its labels.")
    return "resampling", True, sentences, []


def _targets(summary: Mapping) -> tuple:
    levels = summary["vanish"]["deep_supervision"]
    by_slice = len(summary["target_spacing_mm"]) == 2
    key = "sections" if by_slice else "lesions"
    what = "the lesions' parts in a slice" if by_slice and summary["num_dimensions"] == 3 else "the lesions"
    counts = summary["sampling"]["classes"][ALL]["by_size_count"]
    counted = [level for level in levels if max(level["factor"]) > 1 and level["loss_weight"] > 0]
    if not counted:
        return "deep supervision", False, ["No level of lower resolution counts in the loss."], []
    shares = ", ".join(f"{percent(level['nearest'][ALL][key])} at 1/{max(level['factor'])}" for level in counted)
    sentences = [f"Of {what}, nearest-neighbour targets lose {shares} (levels that count in nnU-Net's loss)."]
    weighted = {
        name: sum(level["loss_weight"] * level["nearest"][ALL][f"{key}_by_size"][name] for level in counted)
        for name in _bins(summary, counts)
    }
    name, share = max(weighted.items(), key=lambda item: item[1])
    sentences.append(f"Weighted as in the loss, {percent(share)} of those of {name} are missing.")
    indicated = share >= MAX_VANISHED
    if not indicated:
        return "deep supervision", False, [*sentences, "That is little: nnU-Net's targets do."], []
    sentences.append('Lesion-preserving targets (deep_supervision_targets = "lesion") lose none.')
    return "deep supervision", True, sentences, _switch("deep_supervision_targets", "lesion")


def _sampling(summary: Mapping) -> tuple:
    sampling = summary["sampling"]["classes"][ALL]
    counts, seen = sampling["by_size_count"], sampling["seen_per_epoch"]["by_size"]
    centred = {name: counts[name] * (sampling["centred_per_epoch"]["by_size"][name] or 0.0) for name in counts}
    names = _bins(summary, counts)
    smallest = names[0]
    lesion_share = counts[smallest] / sum(counts.values())
    patch_share = centred[smallest] / (sum(centred.values()) or 1.0)
    least = min(names, key=lambda name: seen[name])
    sentences = [
        f"A lesion of {smallest} is seen at least once in an epoch with probability "
        f"{_probability(seen[smallest])}, and is the centre of "
        f"{sampling['centred_per_epoch']['by_size'][smallest]:.2g} patches of an epoch on average.",
        f"Lesions of {smallest} are {percent(lesion_share)} of all; {percent(patch_share)} of the foreground patches "
        "are centred on one.",
    ]
    never = sampling["never_centred"]["mean"]
    if never >= MIN_NEVER_TOLD:
        sentences.append(
            f"Of the lesions, {percent(never)} are never the centre: none of their voxels is among those that "
            "nnU-Net's preprocessing keeps for it."
        )
    indicated = seen[least] < MIN_SEEN or patch_share < MIN_PATCH_RATIO * lesion_share
    if not indicated:
        return "sampling", False, [*sentences, "nnU-Net's sampling reaches them."], []
    sentences.append('Drawing lesions instead of voxels (lesion_sampling = "lesion") gives them their share.')
    return "sampling", True, sentences, _switch("lesion_sampling", "lesion")


def _switch(name: str, value: str) -> list[str]:
    """The option of ``smallseg plan`` that sets a switch of the trainers."""
    return [SWITCHES[name].option, value] if name in SWITCHES else []


def _probability(value: float) -> str:
    return f"{value:.3f}" if value < 0.9995 else "above 0.999"


def _name(summary: Mapping) -> str:
    return f"{summary['configuration']} of {summary['plans']}"


def _round_up(size: float) -> int:
    return math.ceil(size / PATCH_MULTIPLE) * PATCH_MULTIPLE
