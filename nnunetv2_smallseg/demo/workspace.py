"""The folder a demo works in: where everything lies, what is finished, and how to remove it again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nnunetv2_smallseg.demo.settings import PLANS_NAME, DemoSettings
from nnunetv2_smallseg.errors import SmallSegError, UsageError
from nnunetv2_smallseg.files import write_json

__all__ = ["State", "Workspace"]

WRITTEN_BY = "smallseg demo"


@dataclass
class State:
    """What a workspace was made from and which steps are done.

    Attributes:
        options: Settings by the option that sets them.
        dataset: ``name``, ``source`` (``phantom`` or a folder) and ``identity`` of the data.
        finished: Seconds each finished step took, in order.
    """

    options: dict[str, str]
    dataset: dict[str, str]
    finished: dict[str, float] = field(default_factory=dict)

    def differences(self, other: State) -> list[str]:
        """What differs in ``other``, one line each; empty if a run of ``other`` may continue this one."""
        lines = [
            f"{option}: {self.options.get(option, 'unset')} before, {other.options.get(option, 'unset')} now"
            for option in {**self.options, **other.options}
            if self.options.get(option) != other.options.get(option)
        ]
        if self.dataset["source"] != other.dataset["source"]:
            lines.append(f"data set: {self.dataset['source']} before, {other.dataset['source']} now")
        elif self.dataset["identity"] != other.dataset["identity"]:
            lines.append(f"the files of {self.dataset['source']} have changed since")
        return lines


class Workspace:
    """Paths inside the folder of a demo, its state file, its lock and its removal."""

    def __init__(self, folder: str | Path) -> None:
        """Names the folder; nothing is written yet."""
        self.folder = Path(os.path.abspath(folder))
        self.raw = self.folder / "nnUNet_raw"
        self.preprocessed = self.folder / "nnUNet_preprocessed"
        self.results = self.folder / "nnUNet_results"
        self.predictions = self.folder / "predictions"
        self.validation_cases = self.folder / "validation_cases"
        self.logs = self.folder / "logs"
        self.state_file = self.folder / "demo_state.json"
        self.lock_file = self.folder / "demo.lock"

    @property
    def summary(self) -> Path:
        """nnU-Net's evaluation of the predictions."""
        return self.predictions / "summary.json"

    def model(self, dataset_name: str, settings: DemoSettings) -> Path:
        """The folder nnU-Net trains into."""
        return self.results / dataset_name / f"{settings.trainer}__{PLANS_NAME}__{settings.configuration}"

    def fold(self, dataset_name: str, settings: DemoSettings) -> Path:
        """The folder of the trained fold, with its checkpoints."""
        return self.model(dataset_name, settings) / f"fold_{settings.fold}"

    def check_usable(self) -> None:
        """Checks that the folder is new, empty, or a demo's.

        Raises:
            UsageError: If it is anything else; nothing of it is touched.
        """
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise UsageError(f"-o {self.folder} is a file: name a folder")
        if not self.folder.is_dir() or self.state_file.is_file():
            return
        if any(path != self.lock_file for path in self.folder.iterdir()):
            raise UsageError(
                f"-o {self.folder} is not empty and was not written by the demo (it has no {self.state_file.name}): "
                "name another folder; this one stays as it is"
            )

    def load_state(self) -> State | None:
        """The state of an earlier run, or None.

        Raises:
            SmallSegError: If the state file is not one of ours or cannot be read.
        """
        if not self.state_file.is_file():
            return None
        try:
            content = json.loads(self.state_file.read_text(encoding="utf-8"))
            if content.pop("written_by") != WRITTEN_BY:
                raise ValueError("another program wrote it")
            state = State(**content)
            # Folders to be removed are made from this name: it must not lead elsewhere.
            if Path(state.dataset["name"]).name != state.dataset["name"]:
                raise ValueError("the name of its data set is a path")
            return state
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SmallSegError(
                f"{self.state_file} is not a state file of the demo ({error}): choose another -o, or remove the "
                "folder by hand if you need nothing in it"
            ) from error

    def save_state(self, state: State) -> None:
        """Writes the state file in one go: it is the old one or the new one, whenever the power fails."""
        write_json({"written_by": WRITTEN_BY, **asdict(state)}, self.state_file)

    def clean(self, state: State) -> None:
        """Removes what the demo with this state wrote, and the folders that are empty then. Other files stay."""
        # Nothing counts as finished from here on, should the removal be interrupted.
        self.save_state(State(state.options, state.dataset))
        name = state.dataset["name"]
        for path in (
            self.preprocessed / name,
            self.results / name,
            self.predictions,
            self.validation_cases,
            self.logs,
            self.raw / name,
            self.raw / f".{name}.partial",
        ):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
        for folder in (self.preprocessed, self.results, self.raw):
            with contextlib.suppress(OSError):
                folder.rmdir()
        self.state_file.unlink()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other demos out of the folder; the operating system lifts the lock however this process ends.

        Raises:
            SmallSegError: If another demo is at work there.
        """
        with self.lock_file.open("a") as stream:
            try:
                _lock(stream.fileno())
            except (BlockingIOError, PermissionError):
                raise SmallSegError(
                    f"another `smallseg demo` is at work in {self.folder}: wait for it, end it, or name another -o"
                ) from None
            except OSError:
                # Some network file systems know no locks; a demo there is on its own.
                pass
            yield


def _lock(descriptor: int) -> None:
    """Locks an open file without waiting."""
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
