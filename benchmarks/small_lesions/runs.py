"""The runs of the study: which there are, in which order, what one does, and several at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from benchmarks.small_lesions.arms import ARMS, STOCK
from benchmarks.small_lesions.data import DATA, PLANS, Data, Scale
from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.files import write_json

__all__ = ["BUDGETS", "EQUAL_TIME", "Run", "Workspace", "counts_for_time", "ordered", "run_all"]

BUDGETS = ("iterations", "time")
# A training at equal iterations whose time differs from the budget of time by no more than this share counts for both.
EQUAL_TIME = 0.05
RESULT_FILE = "result.json"
ERROR_FILE = "error.txt"


@dataclass(frozen=True)
class Run:
    """A training with its evaluation: names of data set, arm and budget, and the seed."""

    data: str
    arm: str
    budget: str
    seed: int

    def __str__(self) -> str:
        return f"{self.data}, seed {self.seed}, equal {self.budget}, {self.arm}"


@dataclass(frozen=True)
class Workspace:
    """The folder of a study.

    Attributes:
        folder: Data, plans and results.
        device: "cpu" or "cuda".
        full: Networks at full size.
        num_loaders: Processes that load patches; 0 draws them in the training's own process, where they are seeded.
    """

    folder: Path
    device: str = "cpu"
    full: bool = False
    num_loaders: int = 0

    def scale(self, data: Data) -> Scale:
        """Size of the trainings on a data set."""
        return data.full if self.full else data.small

    def environment(self) -> dict[str, str]:
        """Variables for nnU-Net; one thread a process, so that processor time compares."""
        root = str(Path(__file__).resolve().parents[2])
        return {
            **os.environ,
            "nnUNet_raw": str(self.folder / "nnUNet_raw"),
            "nnUNet_preprocessed": str(self.folder / "nnUNet_preprocessed"),
            "nnUNet_results": str(self.folder),
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "NUMBA_NUM_THREADS": "1",
            "nnUNet_compile": "false",
            "nnUNet_def_n_proc": "1",
            "nnUNet_n_proc_DA": "1",  # planning refuses 0; a run sets its own
        }

    def folder_of(self, run: Run) -> Path:
        """Folder of a run."""
        return self.folder / run.data / run.budget / run.arm / f"seed_{run.seed}"

    def result(self, run: Run) -> dict | None:
        """What a run measured; None if it is not finished."""
        file = self.folder_of(run) / RESULT_FILE
        return json.loads(file.read_text()) if file.is_file() else None

    def time_budget(self, data: str, seed: int) -> float | None:
        """Seconds of a training at equal time: those that stock took for its iterations with this seed."""
        stock = self.result(Run(data, STOCK, "iterations", seed))
        return None if stock is None else stock["training_seconds"]


def counts_for_time(result: dict, budget_seconds: float) -> bool:
    """Whether a training at equal iterations took the time of the budget, so that it need not run again."""
    return abs(result["training_seconds"] / budget_seconds - 1) <= EQUAL_TIME


def ordered(
    data: Iterable[str], arms: Iterable[str], seeds: Sequence[int], budgets: Iterable[str], network_seeds: int
) -> list[Run]:
    """All runs, in an order in which the finished part is balanced whenever the study ends.

    Seed by seed: stock, the strategies at equal iterations, then at equal time, then the networks at equal time. The
    networks at equal iterations come last, because most of them need several times as long.

    Args:
        data: Names of data sets.
        arms: Names of arms. ``stock`` at equal iterations is always among the runs: the others need its time.
        seeds: Seeds.
        budgets: Of ``BUDGETS``.
        network_seeds: How many of the seeds the networks are trained with.
    """
    chosen, budgets = [name for name in ARMS if name in {*arms, STOCK}], set(budgets)
    names = list(data)
    runs = []
    for position, seed in enumerate(seeds):
        for name in names:
            for place, arm in enumerate(chosen):
                is_network = ARMS[arm].network is not None
                if is_network and position >= network_seeds:
                    continue
                # For stock both budgets are the same.
                for budget in ("iterations",) if arm == STOCK else budgets:
                    late = is_network and budget == "iterations"
                    stage = 2 if is_network else BUDGETS.index(budget)
                    key = (late, position, stage, names.index(name), place)
                    runs.append((key, Run(name, arm, budget, seed)))
    return [run for _, run in sorted(runs, key=lambda entry: entry[0])]


def execute(workspace: Workspace, data: Data, run: Run, budget_seconds: float | None) -> dict:
    """Trains, segments the held-out cases, evaluates them by lesion size, and writes the result.

    Args:
        workspace: Folder and device.
        data: The data set of the run.
        run: What to train.
        budget_seconds: Budget at equal time, None at equal iterations.
    """
    import torch

    from benchmarks.small_lesions.training import predict, study_trainer
    from nnunetv2_smallseg.evaluation.case import Settings
    from nnunetv2_smallseg.evaluation.run import evaluate_folders

    torch.set_num_threads(1)
    folder = workspace.folder_of(run)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ["nnUNet_results"] = str(folder / "model")
    os.environ["nnUNet_n_proc_DA"] = str(workspace.num_loaders)
    preprocessed = workspace.folder / "nnUNet_preprocessed" / data.dataset
    plans = json.loads((preprocessed / f"{PLANS}.json").read_text())
    dataset_json = json.loads((preprocessed / "dataset.json").read_text())
    fold = data.fold(run.seed)
    iterations = workspace.scale(data).num_iterations if budget_seconds is None else None
    with (folder / "output.log").open("w", buffering=1) as log, contextlib.redirect_stdout(log):
        trainer_class = study_trainer(ARMS[run.arm], run.seed, max_iterations=iterations, max_seconds=budget_seconds)
        device = torch.device(workspace.device)
        trainer = trainer_class({**plans, "continue_training": False}, "2d", fold, dataset_json, device)
        trainer.run_training()
        references = workspace.folder / run.data / f"references_{fold}"
        ending = dataset_json["file_ending"]
        cases = sorted(file.name.removesuffix(ending) for file in references.iterdir())
        start = trainer.now()
        predict(trainer, cases, folder / "predictions")
        seconds_predicting = trainer.now() - start
        evaluate_folders(
            references,
            {f"{run.arm}-{run.seed}": folder / "predictions"},
            folder / "evaluation",
            dataset_json=preprocessed / "dataset.json",
            settings=Settings(diameter_limits_mm=data.limits_mm),
            num_processes=1,
        )
    result = {
        "data": run.data,
        "arm": run.arm,
        "budget": run.budget,
        "seed": run.seed,
        "fold": fold,
        "iterations": trainer.iterations,
        "training_seconds": round(trainer.seconds, 3),
        "budget_seconds": budget_seconds,
        "last_loss": sum(trainer.last_losses) / len(trainer.last_losses),
        "prediction_seconds": round(seconds_predicting, 1),
        "cases": len(cases),
    }
    write_json(result, folder / RESULT_FILE)
    return result


def _attempt(workspace: Workspace, data: Data, run: Run, budget_seconds: float | None) -> dict | str:
    """``execute``; the message where it failed. A traceback is beside the log of the run."""
    import traceback

    try:
        return execute(workspace, data, run, budget_seconds)
    except (Exception, SystemExit) as error:  # a trainer ends a command by SystemExit
        (workspace.folder_of(run) / ERROR_FILE).write_text(traceback.format_exc())
        return f"{type(error).__name__}: {error}"


def _start_worker(parent: int) -> None:
    """Ends this process when its parent is gone, however that went."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_all(workspace: Workspace, runs: Sequence[Run], num_processes: int, report: Callable[[str], None]) -> list[str]:
    """Does all runs that are not finished, several at a time.

    Args:
        workspace: Folder and device.
        runs: In order.
        num_processes: How many at a time.
        report: Receives a line for each run.
    Returns:
        A message for each run that failed.
    Raises:
        SmallSegError: If a process was ended from outside.
    """
    os.environ.update(workspace.environment())
    waiting = [run for run in runs if workspace.result(run) is None]
    report(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished")
    failures: dict[Run, str] = {}
    pending: dict[Future, Run] = {}
    with ProcessPoolExecutor(
        num_processes, get_context("spawn"), initializer=_start_worker, initargs=(os.getpid(),)
    ) as pool:
        try:
            while waiting or pending:
                while len(pending) < num_processes:
                    run = _next(workspace, waiting, list(pending.values()), failures, report)
                    if run is None:
                        break
                    waiting.remove(run)
                    seconds = workspace.time_budget(run.data, run.seed) if run.budget == "time" else None
                    pending[pool.submit(_attempt, workspace, DATA[run.data], run, seconds)] = run
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    run, outcome = pending.pop(future), future.result()
                    if isinstance(outcome, str):
                        failures[run] = outcome
                        report(f"FAILED {run}: {outcome}")
                    else:
                        report(
                            f"{run}: {outcome['iterations']} iterations in {outcome['training_seconds']:.1f} s, "
                            f"{outcome['prediction_seconds']:.1f} s predicting; {len(waiting) + len(pending)} left"
                        )
        except BrokenProcessPool as error:
            raise SmallSegError(
                "a process was ended from outside, probably for lack of memory: use fewer at a time (-np) and start "
                "the same command again, it goes on from here"
            ) from error
        except BaseException:
            for process in list(pool._processes.values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [f"{run}: {message}" for run, message in failures.items()]


def _next(
    workspace: Workspace, waiting: list[Run], pending: list[Run], failures: dict[Run, str], report: Callable
) -> Run | None:
    """The first run that can start; those that need not run or cannot, are taken out of ``waiting``."""
    for run in list(waiting):
        if run.budget == "iterations":
            return run
        stock, same = (Run(run.data, arm, "iterations", run.seed) for arm in (STOCK, run.arm))
        # A strategy's run at equal iterations may count for this one; networks take too long for that.
        awaited = [stock] if ARMS[run.arm].network is not None else [stock, same]
        if any(other in pending or other in waiting for other in awaited):
            continue
        seconds = workspace.time_budget(run.data, run.seed)
        own = workspace.result(same)
        if seconds is None:
            waiting.remove(run)
            failures[run] = "stock with this seed, whose time is the budget, is not there"
        elif own is not None and counts_for_time(own, seconds):
            waiting.remove(run)
            report(f"{run}: the training at equal iterations took that time, too")
        else:
            return run
    return None
