"""How the package hangs together: light imports, one direction of dependencies, one place for every name."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from nnunetv2_smallseg import registry, trainers
from nnunetv2_smallseg.cli.main import main

PACKAGE = ROOT / "nnunetv2_smallseg"


def modules_below(*packages: str) -> list[str]:
    """Dotted names of all modules of the given sub-packages."""
    return [
        module.name
        for package in packages
        for module in pkgutil.walk_packages([str(PACKAGE / package)], f"nnunetv2_smallseg.{package}.")
    ]


# As if the package were not installed. ``sys.modules[name] = None`` would not do: scipy looks there for torch.
WITHOUT = """
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
for module in {modules!r}:
    importlib.import_module(module)
"""


def imports_without(missing: str, modules: list[str]) -> None:
    """Imports modules in a fresh interpreter in which one package cannot be imported."""
    code = WITHOUT.format(missing=missing, modules=modules)
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_networks_operators_and_losses_do_not_need_nnunet():
    modules = [*modules_below("architectures", "losses", "ops"), "nnunetv2_smallseg.data.curriculum"]
    assert "nnunetv2_smallseg.architectures.swin_umamba" in modules
    assert "nnunetv2_smallseg.losses.weighted" in modules
    imports_without("nnunetv2", modules)


def test_evaluation_needs_neither_nnunet_nor_torch():
    modules = modules_below("evaluation")
    assert "nnunetv2_smallseg.evaluation.protocols.uls23" in modules
    imports_without("nnunetv2", modules)
    imports_without("torch", modules)


def test_registry_and_command_line_start_without_torch():
    imports_without("torch", ["nnunetv2_smallseg.registry", "nnunetv2_smallseg.cli.main"])


def test_converters_need_neither_torch_nor_nnunet():
    modules = modules_below("datasets")
    assert "nnunetv2_smallseg.datasets.engine" in modules
    for missing in ("torch", "nnunetv2"):
        imports_without(missing, modules)


def test_scans_do_not_need_numba():
    imports_without("numba", ["nnunetv2_smallseg.architectures.swin_umamba"])


def test_extension_and_package_offer_exactly_the_registered_trainers():
    names = set(registry.trainers())
    assert set(trainers.__all__) == names
    source = (PACKAGE / "extension" / "smallseg_trainers.py").read_text()
    assert set(re.findall(r"nnUNetTrainer\w+", source)) == names
    assert [path.name for path in (PACKAGE / "extension").glob("*.py")] == ["smallseg_trainers.py"]


def test_registry_refers_to_registered_things_only():
    from nnunetv2_smallseg.pretrained.entries import names as weight_names

    for trainer in registry.trainers().values():
        assert trainer.network is None or trainer.network in registry.networks()
        assert trainer.weights is None or trainer.weights in weight_names()


def test_no_pickles_from_outside():
    for path in PACKAGE.rglob("*.py"):
        for call in re.findall(r"torch\.load\([^\n]*", path.read_text()):
            assert "weights_only=True" in call, f"{path}: {call}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        ["trainers", "--nonsense"],
        ["trainers", "--js"],
        ["plan", "-d", "1", "-num_ep", "3"],
        [],
    ],
)
def test_command_line_exit_status(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    expected = 0 if arguments in (["--version"], ["--help"]) else 2
    assert stop.value.code == expected
    assert "Traceback" not in capsys.readouterr().err


def test_trainers_lists_every_trainer(capsys):
    import json

    assert main(["trainers", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == set(registry.trainers())
    assert all(row["paper"] and (row["network"] is None or row["parameters"] > 0) for row in rows)
    assert main(["trainers"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in registry.trainers())
