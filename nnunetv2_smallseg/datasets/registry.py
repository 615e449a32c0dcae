"""One entry per data set that ``smallseg convert`` knows.

Pure data. It imports neither numpy nor any converter, so that command line, documentation and tests can read it at no
cost. A converter is a function ``plan(source, **options) -> engine.Plan``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nnunetv2_smallseg.errors import UsageError

__all__ = ["CONVERTERS", "OPTIONS", "Converter", "Option", "converter", "names"]


@dataclass(frozen=True)
class Option:
    """An option of ``smallseg convert`` that only some converters take.

    Attributes:
        flag: As typed.
        meaning: One line for ``--help`` and tables.
        metavar: Names of its values; none for a switch.
        type: Type of a value.
        several: The number of values is free.
    """

    flag: str
    meaning: str
    metavar: tuple[str, ...] = ()
    type: type = str
    several: bool = False

    @property
    def name(self) -> str:
        """Argument of the converter's ``plan``."""
        return self.flag.lstrip("-")


@dataclass(frozen=True)
class Converter:
    """A data set and how it is converted.

    Attributes:
        name: As typed.
        title: Name for people.
        dataset_name: The Name of ``DatasetXXX_Name``; None where the user gives it.
        module: Module below ``nnunetv2_smallseg.datasets`` that holds the function.
        contents: What it holds, for tables.
        source: Where to get it.
        licence: Licence of the data.
        citation: What to cite.
        options: Flags of its options.
        function: Name of the function.
        fixed: Arguments of the function that this entry sets.
    """

    name: str
    title: str
    dataset_name: str | None
    module: str
    contents: str
    source: str
    licence: str
    citation: str
    options: tuple[str, ...] = ()
    function: str = "plan"
    fixed: Mapping[str, object] = field(default_factory=dict)


OPTIONS: tuple[Option, ...] = (
    Option("-labels", "folder of the label repository, if it is not below SRC", ("FOLDER",)),
    Option("--subsets", "subsets, or the groups full, novel, weak (default: full novel)", ("NAME",), several=True),
    Option("--weak", "add the weakly labelled sets for training; unmarked slices get the ignore label"),
    Option("--crop", "voxels around the lesion (default: the whole 256 256 128)", ("X", "Y", "Z"), int),
    Option("--plain_labels", "one label a structure instead of the evaluated regions"),
)

CONVERTERS: tuple[Converter, ...] = (
    Converter(
        name="uls23",
        title="ULS23",
        dataset_name="ULS23",
        module="uls23",
        contents="CT crops around one lesion each, 6,376 fully and 33,060 weakly labelled",
        source="https://uls23.grand-challenge.org",
        licence="CC BY-NC-SA 4.0",
        citation="de Grauw et al., Medical Image Analysis 102 (2025) 103525",
        options=("-labels", "--subsets", "--weak", "--crop"),
    ),
    Converter(
        name="kits23",
        title="KiTS23",
        dataset_name="KiTS2023",
        module="kits23",
        contents="489 CT with kidneys, tumours, cysts",
        source="https://github.com/neheller/kits23",
        licence="CC BY-NC-SA 4.0",
        citation="Heller et al., arXiv 2307.01984",
        options=("--plain_labels",),
    ),
    Converter(
        name="atlas",
        title="ATLAS (liver MRI)",
        dataset_name="ATLAS2023",
        module="atlas23",
        contents="60 contrast-enhanced T1 MRI with liver and tumours",
        source="https://atlas-challenge.u-bourgogne.fr",
        licence="CC BY-NC-SA 4.0",
        citation="Quinton et al., Data 2023, 8(5), 79",
        options=("--plain_labels",),
    ),
)


def names() -> list[str]:
    """Names of all converters."""
    return [entry.name for entry in CONVERTERS]


def converter(name: str) -> Converter:
    """The converter called ``name``.

    Raises:
        UsageError: If there is none; the message lists the known names.
    """
    for entry in CONVERTERS:
        if entry.name == name:
            return entry
    raise UsageError(f"no converter is called {name!r}. Known: {', '.join(names())}. See `smallseg convert --list`.")
