"""What all tests share: the read-only reference folder and the paths of this checkout."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

from nnunetv2_smallseg import registry

ROOT = Path(__file__).resolve().parent.parent

# Read by OpenMP when torch is imported. Threads that wait actively slow each other down by an order of magnitude as
# soon as another process, such as nnU-Net's data loader, needs one of their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read by nnU-Net when it is imported: how many processes validation starts.
os.environ.setdefault("nnUNet_def_n_proc", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run beside each other: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# Background runs inherit ignored signals, but tests send them and expect what they do by default.
for name, default in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), default)


def shared_folder() -> Path | None:
    """The folder of references and data, beside the project or where SMALLSEG_SHARED points; None when absent."""
    folder = Path(os.environ.get("SMALLSEG_SHARED", ROOT.parent / "shared"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference folder; the test is skipped when it is absent."""
    folder = shared_folder()
    if folder is None:
        pytest.skip("reference folder not found: put it at ../shared or set SMALLSEG_SHARED")
    return folder


@pytest.fixture(scope="session")
def deterministic_weights(shared: Path):
    """The module that fills state dicts for the reference outputs."""
    specification = importlib.util.spec_from_file_location(
        "deterministic_weights", shared / "reference" / "deterministic_weights.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Workspace:
    """nnU-Net's folders with a small phantom data set, planned and preprocessed."""

    folder: Path
    environment: dict[str, str]
    number: int = 991
    dataset: str = "Dataset991_TestPhantom"
    plans_name: str = "nnUNetSmallSegPlans"

    @property
    def preprocessed(self) -> Path:
        return self.folder / "preprocessed" / self.dataset

    @property
    def results(self) -> Path:
        return self.folder / "results" / self.dataset

    def plans(self, name: str | None = None) -> dict:
        return json.loads((self.preprocessed / f"{name or self.plans_name}.json").read_text())

    def dataset_json(self) -> dict:
        return json.loads((self.preprocessed / "dataset.json").read_text())

    def run(self, *command: object, status: int = 0) -> subprocess.CompletedProcess:
        """Runs a command of this Python environment and checks its exit status."""
        return run_command(*command, environment=self.environment, status=status)


def small_networks() -> dict[str, dict]:
    """Constructor options of the small version of every network, as a configuration of the plans holds them."""
    return {name: dict(network.small) for name, network in registry.networks().items() if network.small}


def shrink_networks(plans: dict) -> None:
    """Makes every trainer build a small network from these plans: ours, and nnU-Net's own with eight channels."""
    for configuration in plans["configurations"].values():
        configuration["network_options"] = small_networks()
        if "architecture" in configuration:
            network = configuration["architecture"]["arch_kwargs"]
            network["features_per_stage"] = [8] * network["n_stages"]


def run_command(*command: object, environment: dict[str, str] | None = None, status: int = 0):
    """Runs a command installed beside the Python interpreter; fails with its output unless it exits with ``status``."""
    program, *arguments = [str(part) for part in command]
    finished = subprocess.run(
        [str(Path(sys.executable).with_name(program)), *arguments], env=environment, capture_output=True, text=True
    )
    assert finished.returncode == status, (
        f"{' '.join(map(str, command))}\n{finished.stdout[-4000:]}\n{finished.stderr[-4000:]}"
    )
    return finished


@pytest.fixture(scope="session")
def nnunet_workspace(tmp_path_factory) -> Workspace:
    """Phantom, fingerprint, stock and our plans, 2d data for both and stock 3d data, made once for all tests.

    The commands run in this process: starting them takes a hundred times as long. The tests of the documentation start
    them as a user does.
    """
    import torch
    from feature_datasets import extract_fingerprint
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments, preprocess

    from nnunetv2_smallseg.cli.main import main
    from nnunetv2_smallseg.demo.phantom import write_phantom

    folder = tmp_path_factory.mktemp("nnunet")
    settings = {
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(folder / "preprocessed"),
        "nnUNet_results": str(folder / "results"),
        "nnUNet_extTrainer": str(ROOT / "nnunetv2_smallseg" / "extension"),
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
    }
    workspace = Workspace(folder, {**os.environ, **settings})
    (folder / "raw").mkdir()
    write_phantom(folder / "raw" / workspace.dataset, seed=7, num_training=5, num_held_back=2, shape=(16, 64, 64))
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.setattr(multiprocessing, "get_context", lambda method: Threads)
        extract_fingerprint(workspace.number)
        schedule = ["-num_epochs", "2", "-num_iterations", "2", "-num_val_iterations", "1"]
        assert main(["plan", "-d", str(workspace.number), "-batch_size", "2", *schedule]) == 0
        plan_experiments([workspace.number])
        for plans_name, configurations in ((workspace.plans_name, ["2d"]), ("nnUNetPlans", ["2d", "3d_fullres"])):
            preprocess([workspace.number], plans_name, configurations, num_processes=[1])
    torch.set_num_threads(threads)
    return workspace


@pytest.fixture
def nnunet_folders(nnunet_workspace, tmp_path, monkeypatch) -> Workspace:
    """The workspace in this process's environment, with a results folder of the test's own."""
    for name, value in nnunet_workspace.environment.items():
        if name.startswith("nnUNet_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return nnunet_workspace


class Threads:
    """Stands for a context of ``multiprocessing``: threads, which start at once, instead of processes."""

    Pool = ThreadPool


@pytest.fixture
def quick_nnunet(monkeypatch) -> None:
    """Leaves out what takes nnU-Net longer than training small networks: worker processes and the picture of losses."""
    from nnunetv2.training.logging.nnunet_logger import MetaLogger
    from nnunetv2.utilities import utils

    monkeypatch.setattr(multiprocessing, "get_context", lambda method: Threads)
    monkeypatch.setattr(utils, "Pool", ThreadPool)
    # Models are exported with the picture, so there has to be a file.
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda logger, folder: Path(folder, "progress.png").touch())


@pytest.fixture
def command(quick_nnunet, monkeypatch):
    """Calls the function behind a command of nnU-Net with arguments, in this process; its pools are threads."""
    import torch

    threads = torch.get_num_threads()

    def call(entry_point, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [entry_point.__name__, *map(str, arguments)])
        try:
            entry_point()
        finally:
            torch.set_num_threads(threads)

    return call
