"""Draws docs/lesion_fingerprint.png: the lesion fingerprint of the demo's phantom, read from the raw labels.

Run: python scripts/fingerprint_picture.py [-o FILE].
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset

from nnunetv2_smallseg.demo.phantom import write_phantom
from nnunetv2_smallseg.demo.settings import PHANTOM_NAME, PHANTOM_SEED
from nnunetv2_smallseg.fingerprint.run import extract_fingerprint
from nnunetv2_smallseg.plans.planner import plan_dataset

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Writes the phantom into a temporary folder, plans it, and keeps the picture of its fingerprint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", type=Path, default=ROOT / "docs" / "lesion_fingerprint.png", metavar="FILE")
    target = parser.parse_args().o
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("raw", "preprocessed", "results"):
            (folder / name).mkdir()
            os.environ[f"nnUNet_{name}"] = str(folder / name)
        os.environ["nnUNet_n_proc_DA"] = "1"
        write_phantom(folder / "raw" / PHANTOM_NAME, seed=PHANTOM_SEED)
        extract_fingerprint_dataset(int(PHANTOM_NAME[7:10]), num_processes=1)
        plan_dataset(PHANTOM_NAME)
        fingerprint = extract_fingerprint(PHANTOM_NAME, num_processes=1)
        shutil.copy(fingerprint.files[2], target)
        for advice in fingerprint.content["recommendations"]:
            print(f"{advice['topic']}: {advice['text']}")


if __name__ == "__main__":
    main()
