"""From an entry of the registry to a data set in ``nnUNet_raw``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunetv2_smallseg.datasets.cases import Plan
from nnunetv2_smallseg.datasets.engine import convert
from nnunetv2_smallseg.datasets.registry import Converter, converter
from nnunetv2_smallseg.datasets.summary import Outcome
from nnunetv2_smallseg.datasets.target import dataset_folder

__all__ = ["convert_dataset", "plan_conversion"]


def plan_conversion(entry: Converter, source: str | Path, options: Mapping[str, Any]) -> Plan:
    """Lists what a converter finds in ``source``; its function says what it raises."""
    module = importlib.import_module(f"nnunetv2_smallseg.datasets.{entry.module}")
    plan = getattr(module, entry.function)(source, **entry.fixed, **options)
    if entry.dataset_name is None:  # the user's own data
        return plan
    about = {"licence": entry.licence, "reference": entry.source, "citation": entry.citation}
    return replace(plan, description={**about, **plan.description})


def convert_dataset(
    name: str,
    source: str | Path,
    number: int,
    dataset_name: str | None = None,
    num_processes: int = 1,
    overwrite: bool = False,
    **options: Any,
) -> Outcome:
    """Converts a data set, as ``smallseg convert`` does.

    Args:
        name: Name of the converter.
        source: Folder of the download.
        number: The XXX of ``DatasetXXX_Name``.
        dataset_name: The Name; None for the converter's own.
        num_processes: Cases converted at a time.
        overwrite: Convert again what is there already.
        options: Options of the converter.
    Raises:
        UsageError: If the call makes no sense.
        DatasetError: If nothing can be converted. Single cases that fail are in the outcome's report.
    """
    entry = converter(name)
    folder = dataset_folder(number, dataset_name or entry.dataset_name or "")
    plan = plan_conversion(entry, source, options)
    settings = {"converter": name, "options": options}
    return convert(plan, folder, settings, num_processes, overwrite)
