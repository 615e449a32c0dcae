"""Trainings that are killed, stopped, and run out of disk: nothing is lost, and what goes on goes on exactly."""

from __future__ import annotations

import random
import time

import pytest
from interrupted_training import InterruptedTraining, differences


@pytest.fixture(scope="module")
def uninterrupted(nnunet_workspace, tmp_path_factory) -> dict:
    """The final checkpoint of a training that nobody disturbed."""
    training = InterruptedTraining(nnunet_workspace, tmp_path_factory.mktemp("whole") / "results")
    assert training.finish(training.start(resume=False)) == 0, training.log()
    return training.final()


def kill_and_go_on(training: InterruptedTraining, kills: int, generator: random.Random) -> int:
    """Kills a training up to ``kills`` times and lets it finish; returns how often it was killed.

    The moments are random, some of them before the first checkpoint, and many while one is written.
    """
    for killed in range(kills):
        process = training.start(resume=killed > 0)
        training.wait_for_checkpoints(generator.randint(0, 3), process)
        time.sleep(generator.choice([0, generator.uniform(0, 0.02), generator.uniform(0, 0.5)]))
        if not training.kill(process):
            assert training.finish(process) == 0, training.log()
            return killed
    assert training.finish(training.start()) == 0, training.log()
    return kills


def test_killed_trainings_end_as_if_they_had_not_been(nnunet_workspace, uninterrupted, tmp_path):
    training = InterruptedTraining(nnunet_workspace, tmp_path / "results")
    assert kill_and_go_on(training, 4, random.Random(1)) >= 3
    assert differences(uninterrupted, training.final()) == []
    assert "Going on after iteration" in training.log()
    assert not list(training.output.glob(".*")), "leftovers"
