"""Made-up tables of an evaluation, seeded, and the label maps of a made-up case."""

from __future__ import annotations

import math

import numpy as np

SIZE_BINS = ((5, "<5"), (10, "5-10"), (20, "10-20"), (math.inf, ">20"))


def size_bin(diameter: float) -> str:
    return next(name for limit, name in SIZE_BINS if diameter < limit)


def lesion_row(key, kind, number, diameter, **values) -> dict:
    prediction, case, region = key
    return {
        "prediction": prediction, "case": case, "region": region, "kind": kind, "lesion": number,
        "volume_mm3": math.pi / 6 * diameter**3, "equivalent_diameter_mm": diameter, "long_axis_mm": diameter * 1.2,
        "short_axis_mm": diameter * 0.9, "size_bin": size_bin(diameter), "detected": "", "dice": "",
        "predicted_volume_mm3": "", "volume_error_mm3": "", "diameter_error_mm": "", "score": "", "touches_border": 0,
        "centroid": "10 20 30", **values,
    }  # fmt: skip


def made_up_rows(
    predictions: dict[str, float],
    num_cases: int = 40,
    regions: tuple[str, ...] = ("lesion",),
    seed: int = 0,
    scores: bool = True,
) -> tuple[list[dict], list[dict]]:
    """Rows of ``cases.csv`` and ``lesions.csv``; larger numbers in ``predictions`` are better segmentations."""
    cases, lesions = [], []
    for number in range(num_cases):
        for region in regions:
            shared = np.random.default_rng([seed, number, len(region)])
            diameters = np.exp(shared.normal(2.2, 0.55, 0 if number % 13 == 12 else 1 + shared.poisson(2.2)))
            difficulty = shared.normal(0, 0.6)
            for index, (prediction, skill) in enumerate(predictions.items()):
                own = np.random.default_rng([seed, number, len(region), index])
                key = (prediction, f"case_{number:03d}", region)
                overlap = predicted = detected = 0.0
                for place, diameter in enumerate(diameters, start=1):
                    volume = math.pi / 6 * diameter**3
                    strength = 2.2 * math.log(diameter / 6) + skill - difficulty
                    row = lesion_row(key, "reference", place, diameter, detected=0, dice=0.0)
                    if own.random() < 1 / (1 + math.exp(-strength)):
                        quality = own.normal(
                            0.62 + 0.09 * math.log(diameter / 6) + 0.06 * skill - 0.05 * difficulty, 0.09
                        )
                        dice, ratio = float(np.clip(quality, 0.12, 0.97)), math.exp(own.normal(0, 0.25))
                        row |= {
                            "detected": 1, "dice": dice, "predicted_volume_mm3": volume * ratio,
                            "volume_error_mm3": volume * (ratio - 1),
                            "diameter_error_mm": diameter * (ratio ** (1 / 3) - 1),
                            "score": 1 / (1 + math.exp(-(strength + own.normal(1.5, 0.8)))) if scores else "",
                        }  # fmt: skip
                        detected, predicted = detected + 1, predicted + volume * ratio
                        overlap += dice * volume * (1 + ratio) / 2
                    lesions.append(row)
                num_false = int(own.poisson(max(0.2, 1.2 - 0.45 * skill)))
                for place in range(num_false):
                    diameter = float(np.exp(own.normal(1.6, 0.4)))
                    score = 1 / (1 + math.exp(-own.normal(0.3, 1))) if scores else ""
                    lesions.append(lesion_row(key, "false_positive", place + 1, diameter, score=score))
                    predicted += math.pi / 6 * diameter**3
                volume = float((math.pi / 6 * diameters**3).sum())
                both = volume + predicted
                dice = 2 * overlap / both if both else math.nan
                distance = own.gamma(2, 3.2 - skill)
                undefined = not (volume and predicted)
                cases.append(
                    {
                        "prediction": prediction,
                        "case": key[1],
                        "region": region,
                        "dice": dice,
                        "iou": dice / (2 - dice),
                        "sensitivity": overlap / volume if volume else "",
                        "precision": overlap / predicted if predicted else "",
                        "specificity": 1 - predicted / 4e7,
                        "f2": dice * 0.98,
                        "mae": abs(volume - predicted) / 4e6,
                        "ravd": abs(predicted - volume) / volume if volume else "",
                        "assd_mm": "" if undefined else distance / 4,
                        "hd_mm": "" if undefined else distance * 2.1,
                        "hd95_mm": "" if undefined else distance * 1.4,
                        "nsd": "" if undefined else min(dice * 1.12, 1),
                        "auc": min(0.6 + dice * 0.4, 1) if volume else "",
                        "num_reference_lesions": len(diameters),
                        "num_predicted_lesions": int(detected) + num_false,
                        "num_detected": int(detected),
                        "num_false_positives": num_false,
                        "reference_volume_mm3": volume,
                        "predicted_volume_mm3": predicted,
                        "area_ratio_percent": volume / 4e4,
                    }
                )
    return cases, lesions


def made_up_volume(seed: int, shape=(24, 96, 96), spacing=(3.0, 0.8, 0.8)):
    """Image, reference and prediction (Z, Y, X): a found lesion, a missed one and a false positive."""
    generator = np.random.default_rng(seed)
    grid = np.stack(
        np.meshgrid(*(np.arange(size) * step for size, step in zip(shape, spacing, strict=True)), indexing="ij")
    )

    def ball(place, radius):
        centre = np.array([position * size * step for position, size, step in zip(place, shape, spacing, strict=True)])
        return ((grid - centre[:, None, None, None]) ** 2).sum(axis=0) < radius**2

    found, missed, false = (
        ball((0.5, 0.3, 0.35), 9),
        ball((0.55, 0.7, 0.6), 4 + 2 * generator.random()),
        ball((0.3, 0.6, 0.2), 3),
    )
    reference = found | missed
    prediction = np.roll(found, (0, 1, 2), (0, 1, 2)) | false
    image = (
        generator.normal(60, 12, shape) + 45 * reference + 20 * false + 30 * np.sin(grid[2] / 9) * np.cos(grid[1] / 11)
    )
    return image, reference, prediction, spacing
