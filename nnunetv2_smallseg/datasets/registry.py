"""One entry per data set that ``smallseg convert`` knows.

Pure data. It imports neither numpy nor any converter, so that command line, documentation and tests can read it at no
cost. A converter is a function ``plan(source, **options) -> cases.Plan``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nnunetv2_smallseg.errors import UsageError, did_you_mean

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
    Option("-structure", "cell or nucleus (default: cell)", ("NAME",)),
    Option("-images", "folder of the images below SRC (default: images)", ("FOLDER",)),
    Option("-masks", "folder of the masks below SRC (default: masks)", ("FOLDER",)),
    Option("-test_images", "folder of test images below SRC", ("FOLDER",)),
    Option("-test_masks", "folder of their masks below SRC", ("FOLDER",)),
    Option("-threshold", "mask values above it are foreground (default: 127)", ("VALUE",), int),
    Option("-classes", "names of the labels 1, 2, ... if masks hold labels", ("NAME",), several=True),
    Option("--grey", "images are grey, also where stored as colour"),
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
        citation="de Grauw et al., Medical Image Analysis 102 (2025) 103525, arXiv 2406.05231",
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
        citation="Heller et al., The KiTS21 Challenge, arXiv 2307.01984",
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
        citation="Quinton et al., Data 2023, 8(5), 79, doi 10.3390/data8050079",
        options=("--plain_labels",),
    ),
    Converter(
        name="isic2018",
        title="ISIC 2018, task 1",
        dataset_name="ISIC2018",
        module="images_2d",
        contents="2,594 + 100 + 1,000 dermoscopic images with lesions",
        source="https://challenge.isic-archive.com/data/#2018",
        licence="by image; see the source",
        citation="Codella et al., arXiv 1902.03368",
        function="plan_isic",
        fixed={"year": 2018},
    ),
    Converter(
        name="isic2017",
        title="ISIC 2017, part 1",
        dataset_name="ISIC2017",
        module="images_2d",
        contents="2,000 + 150 + 600 dermoscopic images with lesions",
        source="https://challenge.isic-archive.com/data/#2017",
        licence="by image; see the source",
        citation="Codella et al., arXiv 1710.05006",
        function="plan_isic",
        fixed={"year": 2017},
    ),
    Converter(
        name="cvc-clinicdb",
        title="CVC-ClinicDB",
        dataset_name="CVCClinicDB",
        module="images_2d",
        contents="612 colonoscopy frames of 29 videos with polyps",
        source="https://polyp.grand-challenge.org/CVCClinicDB",
        licence="see the source",
        citation="Bernal et al., Computerized Medical Imaging and Graphics 43 (2015) 99-111",
        function="plan_cvc",
    ),
    Converter(
        name="polypgen",
        title="PolypGen",
        dataset_name="PolypGen",
        module="images_2d",
        contents="1,537 colonoscopy frames of six centres with polyps",
        source="https://doi.org/10.7303/syn26376615",
        licence="see the source",
        citation="Ali et al., Scientific Data 10 (2023) 75",
        function="plan_polypgen",
    ),
    Converter(
        name="fives",
        title="FIVES",
        dataset_name="FIVES",
        module="images_2d",
        contents="600 + 200 fundus images with vessels",
        source="https://doi.org/10.6084/m9.figshare.19688169",
        licence="see the source",
        citation="Jin et al., Scientific Data 9 (2022) 475",
        function="plan_fives",
    ),
    Converter(
        name="tissuenet",
        title="TissueNet 1.1",
        dataset_name="TissueNet",
        module="images_2d",
        contents="two-channel microscopy with cells and nuclei; 2,580 training images",
        source="https://datasets.deepcell.org/data",
        licence="academic, non-commercial use",
        citation="Greenwald et al., Nature Biotechnology 40 (2022) 555-565",
        options=("-structure",),
        function="plan_tissuenet",
    ),
    Converter(
        name="busi",
        title="BUSI (BUID)",
        dataset_name="BUSI",
        module="images_2d",
        contents="780 breast ultrasound images with lesions",
        source="https://doi.org/10.1016/j.dib.2019.104863",
        licence="see the source",
        citation="Al-Dhabyani et al., Data in Brief 28 (2020) 104863",
        function="plan_busi",
    ),
    Converter(
        name="lungs-ct",
        title="Lungs CT-Scan",
        dataset_name="LungsCT",
        module="images_2d",
        contents="2,169 slices of LUNA16 with nodules",
        source="https://www.kaggle.com/datasets/hasan1101/luna-classification-0",
        licence="see the source",
        citation="see the source",
        options=("-images", "-masks", "-test_images", "-test_masks", "-threshold"),
        function="plan_pairs",
        fixed={
            "grey": True,
            "notes": (
                "no list of patients is published for these slices: slices of one patient may be on both sides of "
                "every fold, so results are too good by an unknown amount",
            ),
        },
    ),
    Converter(
        name="images-masks",
        title="any images and masks",
        dataset_name=None,
        module="images_2d",
        contents="a folder of 2D images and a folder of masks or label maps",
        source="your own",
        licence="your own",
        citation="",
        options=("-images", "-masks", "-test_images", "-test_masks", "-threshold", "-classes", "--grey"),
        function="plan_pairs",
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
    raise UsageError(
        f"no converter is called {name!r}.{did_you_mean(name, names())} Known: {', '.join(names())}. See `smallseg "
        "convert --list`."
    )
