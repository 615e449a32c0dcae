"""The study of ``benchmarks/small_lesions``: verdicts, order of runs, statistics, and a tiny study from end to end."""

from __future__ import annotations

import copy
import json
import os
import shlex
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from benchmarks.small_lesions import __main__ as command
from benchmarks.small_lesions import arms, collect, data, report, runs, training
from nnunetv2_smallseg import registry
from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.evaluation.resampling import Resampling
from nnunetv2_smallseg.evaluation.result_tables import ResultTables

TINY = replace(
    data.DATA["phantom"],
    small=data.Scale(num_epochs=2, num_iterations=2, batch_size=2, patch_size=(32, 32), features=(4, 4, 4)),
    phantom=data.Phantom(num_training=4, num_held_back=2, noise_hu=9.0, shape=(16, 64, 64)),
)


@pytest.mark.parametrize(
    ("low", "high", "seeds", "cases", "expected"),
    [
        (0.01, 0.20, (0.1, 0.2, 0.01), 24, report.HELPS),
        (0.01, 0.20, (0.1, 0.2, -0.01), 24, report.UNDECIDED),  # a seed lost
        (-0.01, 0.20, (0.1, 0.2, 0.01), 24, report.UNDECIDED),
        (0.0, 0.20, (0.1, 0.2, 0.01), 24, report.UNDECIDED),  # 0 is in the interval
        (-0.20, -0.01, (-0.1, -0.2, -0.01), 24, report.HARMS),
        (-0.20, -0.01, (-0.1, -0.2, 0.01), 24, report.NO_HELP),
        (-0.05, 0.019, (0.01, -0.02, 0.0), 24, report.NO_HELP),
        (-0.05, 0.02, (0.01, -0.02, 0.0), 24, report.UNDECIDED),  # a gain of 0.02 is possible
        (-0.05, 0.019, (0.02, -0.02, 0.0), 24, report.UNDECIDED),  # a seed gained it
        (0.01, 0.20, (0.1, 0.2), 24, report.UNDECIDED),
        (0.01, 0.20, (0.1, 0.2, 0.1), 4, report.UNDECIDED),
        (None, None, (0.1, 0.2, 0.1), 24, report.UNDECIDED),
    ],
)
def test_rule_of_the_verdict(low, high, seeds, cases, expected):
    per_seed = {str(seed): value for seed, value in enumerate(seeds)}
    assert report.verdict({"low": low, "high": high, "per_seed": per_seed, "num_cases": cases}) == expected


def test_finished_part_is_balanced_and_every_network_has_an_arm():
    assert {arm.network for arm in arms.ARMS.values() if arm.network} == set(registry.networks())
    order = runs.ordered(["phantom", "ms"], ["curriculum", "HUNet"], [1, 2], ["time", "iterations"], network_seeds=1)
    assert [(run.seed, run.data, run.arm, run.budget) for run in order] == [
        *((seed, *rest) for seed in (1,) for rest in (
            ("phantom", "stock", "iterations"), ("phantom", "curriculum", "iterations"),
            ("ms", "stock", "iterations"), ("ms", "curriculum", "iterations"),
            ("phantom", "curriculum", "time"), ("ms", "curriculum", "time"),
            ("phantom", "HUNet", "time"), ("ms", "HUNet", "time"),
        )),
        (2, "phantom", "stock", "iterations"), (2, "phantom", "curriculum", "iterations"),
        (2, "ms", "stock", "iterations"), (2, "ms", "curriculum", "iterations"),
        (2, "phantom", "curriculum", "time"), (2, "ms", "curriculum", "time"),
        (1, "phantom", "HUNet", "iterations"), (1, "ms", "HUNet", "iterations"),
    ]  # fmt: skip
    # Stock's time is the budget of the others.
    assert runs.Run("ms", "stock", "iterations", 1) in runs.ordered(["ms"], ["HUNet"], [1], ["time"], 1)


def test_arms_this_version_cannot_train_are_refused():
    unknown = arms.Arm("unknown", "", attributes={"no_such_switch": True})
    assert "no switch no_such_switch" in arms.missing(unknown)
    with pytest.raises(SmallSegError, match="no_such_switch"):
        training.study_trainer(unknown, 1, max_iterations=2)
    assert "no trainer nnUNetTrainerNone" in arms.missing(arms.Arm("unknown", "", "nnUNetTrainerNone"))


def made_up_tables(detected: dict[str, list[int]]) -> ResultTables:
    """One small lesion of Dice 0.5 a case if found; a large one that all find in the first case."""
    cases, lesions = [], []
    for prediction, found in detected.items():
        for case, hit in enumerate(found):
            key = {"prediction": prediction, "case": f"case_{case}", "region": "lesion"}
            cases.append({**key, "num_predicted_lesions": hit})
            large = [{"size_bin": ">=11 mm", "detected": 1, "dice": 0.9}] if case == 0 else []
            small = {"size_bin": "<5.5 mm", "detected": hit, "dice": 0.5 * hit}
            lesions += [{**key, "kind": "reference", **row} for row in (small, *large)]
    return ResultTables(cases, lesions)


def test_differences_to_stock_by_size():
    tables = made_up_tables({
        "stock-1": [0, 0, 0, 0], "stock-2": [1, 0, 0, 0], "curriculum-1": [1, 1, 1, 1], "curriculum-2": [1, 1, 0, 0],
        "HUNet-3": [1, 1, 1, 1],
    })  # fmt: skip
    seeds = {"stock": [1, 2], "curriculum": [1, 2], "HUNet": [3]}
    rows = collect.summarise(tables, seeds, (5.5, 11.0), Resampling(num_samples=500))
    found = {(row["arm"], row["group"], row["metric"]): row for row in rows}
    row = found["curriculum", "<5.5 mm", "recall"]
    assert row["value"] == 0.75
    assert row["per_seed"] == {"1": 1.0, "2": 0.5}
    difference = row["difference"]
    assert difference["value"] == 0.625  # 6 of 8 minus 1 of 8
    assert difference["per_seed"] == {"1": 1.0, "2": 0.25}
    assert difference["num_cases"] == 4
    # A case contributes 0.5 or 1: (2 - 1) / 2, 2 / 2, 1 / 2, 1 / 2.
    assert 0.5 <= difference["low"] < 0.625 < difference["high"] <= 1.0
    assert found["curriculum", "<5.5 mm", "dice"]["difference"]["value"] == 0.3125
    assert found["curriculum", ">=11 mm", "dice"]["difference"]["value"] == 0.0
    assert found["curriculum", "5.5-11 mm", "dice"]["value"] is None
    assert "difference" not in found["HUNet", "<5.5 mm", "dice"]  # no seed in common with stock
    assert "difference" not in found["stock", "<5.5 mm", "dice"]


def test_training_of_equal_time_is_not_repeated(tmp_path):
    workspace, lines = runs.Workspace(tmp_path), []

    def finish(arm: str, seconds: float) -> None:
        folder = workspace.folder_of(runs.Run("phantom", arm, "iterations", 1))
        folder.mkdir(parents=True)
        (folder / runs.RESULT_FILE).write_text(json.dumps({"training_seconds": seconds}))

    equal, longer, network = (runs.Run("phantom", arm, "time", 1) for arm in ("curriculum", "amplification", "HUNet"))
    stock = runs.Run("phantom", "stock", "iterations", 1)
    waiting = [equal, longer, network]
    assert runs._next(workspace, waiting, [stock], {}, lines.append) is None  # stock still runs
    finish("stock", 100.0)
    finish("curriculum", 104.9)
    finish("amplification", 105.1)
    finish("HUNet", 100.0)
    assert runs._next(workspace, waiting, [], {}, lines.append) == longer
    assert waiting == [longer, network]
    assert "curriculum" in lines[0]
    assert workspace.time_budget("phantom", 1) == 100.0


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of two arms, trained for two iterations, in two goes."""
    environment, folder = dict(os.environ), tmp_path_factory.mktemp("study")
    options = ["-o", str(folder), "-data", "phantom", "-np", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DATA, "phantom", TINY)
        first = command.main(["run", *options, "-arms", "stock", "-seeds", "1", "-budget", "iterations"])
        workspace = runs.Workspace(folder)
        stock = workspace.folder_of(runs.Run("phantom", "stock", "iterations", 1))
        written = (stock / runs.RESULT_FILE).stat().st_mtime_ns
        # What a training leaves that is killed.
        killed = workspace.folder_of(runs.Run("phantom", "curriculum", "iterations", 1))
        (killed / "predictions").mkdir(parents=True)
        (killed / "predictions" / "rubbish.txt").write_text("")
        second = command.main(["run", *options, "-arms", "stock", "curriculum", "-seeds", "1"])
        assert (first, second) == (0, 0)
        assert (stock / runs.RESULT_FILE).stat().st_mtime_ns == written
        assert not (killed / "predictions" / "rubbish.txt").exists()
        failed = workspace.folder_of(runs.Run("phantom", "amplification", "time", 1))
        failed.mkdir(parents=True)
        (failed / runs.ERROR_FILE).write_text("Traceback\n  somewhere\nRuntimeError: too hot\n")
        results = tmp_path_factory.mktemp("results")
        figure = results / "figure.png"
        assert command.main(["collect", *options[:4], "-results", str(results), "-figure", str(figure)]) == 0
        # Other settings need another workspace.
        patch.setitem(data.DATA, "phantom", replace(TINY, limits_mm=(3.0, 6.0)))
        assert command.main(["run", *options, "-arms", "stock", "-seeds", "1"]) == 1
    os.environ.clear()
    os.environ.update(environment)
    return workspace, results, figure


def test_tiny_study_from_end_to_end(study):
    _, folder, figure = study
    results = report.read_results(folder)
    assert list(results) == ["phantom"]
    content = results["phantom"]
    by_run = {(run["counts_for"], run["arm"]): run for run in content["runs"]}
    assert set(by_run) == {(budget, arm) for budget in runs.BUDGETS for arm in ("stock", "curriculum")}
    assert by_run["iterations", "stock"]["iterations"] == by_run["iterations", "curriculum"]["iterations"] == 2
    timed = by_run["time", "curriculum"]
    seconds = by_run["iterations", "stock"]["training_seconds"]
    # The training ends with the first iteration that reaches the budget.
    assert timed["training_seconds"] >= 0.95 * seconds
    assert timed["budget_seconds"] == seconds or timed["budget"] == "iterations"
    assert {row["arm"] for row in content["summaries"]} == {"stock", "curriculum"}
    assert figure.stat().st_size > 10_000
    overview, table = report.overview(results), report.data_tables(results, "phantom")
    assert "| Regularised curriculum (`curriculum`) | undecided |" in overview
    assert "**Not all runs are finished**" in table
    assert table.count("| `curriculum` |") == 2
    assert "- Failed: `amplification`, equal time, seed 1: RuntimeError: too hot" in table
    # An arm whose switch does nothing ends with stock's loss.
    for run in content["runs"]:
        run["last_loss"] = by_run["iterations", "stock"]["last_loss"]
    assert "| Regularised curriculum (`curriculum`) | without effect |" in report.overview(results)


def test_stock_is_nnunets_own_trainer(study, monkeypatch, tmp_path):
    """The same seed gives the same losses, to the last bit, as nnU-Net's class."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    workspace, _, _ = study
    for name, value in workspace.environment().items():
        if name.startswith("nnUNet_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    preprocessed = workspace.folder / "nnUNet_preprocessed" / TINY.dataset
    plans = json.loads((preprocessed / f"{data.PLANS}.json").read_text())
    dataset_json = json.loads((preprocessed / "dataset.json").read_text())
    ours = training.study_trainer(arms.ARMS["stock"], 3, max_iterations=2)
    stock = type("Stock", (training.BudgetedTraining, nnUNetTrainer), {"study_seed": 3, "max_iterations": 2})
    losses = []
    for trainer_class in (ours, stock):
        settings = {**copy.deepcopy(plans), "continue_training": False}
        trainer = trainer_class(settings, "2d", 0, dataset_json, torch.device("cpu"))
        trainer.num_epochs = 1
        trainer.run_training()
        losses.append(trainer.last_losses)
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


def test_documented_commands_are_understood():
    page = (ROOT / "docs" / "results.md").read_text().splitlines()
    lines = [shlex.split(line) for line in page if line.startswith("python -m benchmarks.small_lesions")]
    assert [command.parse(words[3:]).command for words in lines] == ["run", "collect"]
