"""The weights folder, downloads from a local server, and ``smallseg weights``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import platformdirs
import pytest
import torch

from nnunetv2_smallseg.cli.main import main
from nnunetv2_smallseg.errors import UsageError, WeightsError
from nnunetv2_smallseg.pretrained import entries, store
from nnunetv2_smallseg.pretrained.load import load_pretrained

ROOT = Path(__file__).resolve().parent.parent
NAME = "vmamba_tiny_imagenet"
PUBLISHED = entries.entry(NAME)
CONTENT = bytes(range(256)) * 8192  # 2 MiB
WRONG = b"x" + CONTENT[1:]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty weights folder, and an entry whose file is ``CONTENT``."""
    monkeypatch.setenv("SMALLSEG_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.delenv(PUBLISHED.variable, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    replace_entry(monkeypatch)
    return tmp_path / "weights"


def replace_entry(monkeypatch, content: bytes = CONTENT, urls: tuple[str, ...] = ("http://127.0.0.1:9/no",)) -> None:
    changed = dataclasses.replace(
        PUBLISHED, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), urls=urls
    )
    monkeypatch.setattr(entries, "ENTRIES", (changed,))


def put(folder: Path, content: bytes = CONTENT, file_name: str = PUBLISHED.file_name) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file_name).write_bytes(content)
    return folder / file_name


class Handler(BaseHTTPRequestHandler):
    """Serves the paths of ``test_fetch_*``."""

    stalled = threading.Event()  # half of a body was sent
    release = threading.Event()

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.path == "/absent":
            self.send_error(404)
            return
        body = {"/wrong": WRONG, "/long": CONTENT * 3, "/page": b"<html>log in</html>"}.get(self.path, CONTENT)
        self.send_response(200)
        if self.path != "/unannounced":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path in ("/truncated", "/unannounced", "/stall"):
            body = body[: len(body) // 2]
        self.wfile.write(body)
        if self.path == "/stall":
            self.wfile.flush()
            self.stalled.set()
            self.release.wait(30)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def serve(folder, monkeypatch) -> Iterator[Callable[..., list[str]]]:
    """Function that points the entry's urls to paths of a local server; returns the list of requested paths."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    Handler.stalled.clear()
    Handler.release.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def start(*paths: str) -> list[str]:
        replace_entry(monkeypatch, urls=tuple(f"http://127.0.0.1:{server.server_port}{path}" for path in paths))
        return server.requests

    yield start
    Handler.release.set()
    server.shutdown()
    server.server_close()


# ---------------------------------------------------------------------------------------------------------- folder


def test_folder_is_the_user_cache_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("SMALLSEG_WEIGHTS", raising=False)
    assert store.weights_folder() == Path(platformdirs.user_cache_dir("nnunetv2_smallseg")) / "weights"
    monkeypatch.setenv("SMALLSEG_WEIGHTS", str(tmp_path))
    assert store.path(NAME) == tmp_path / "vssmtiny_dp01_ckpt_epoch_292.pth"


def test_folder_variable_pointing_to_a_file(monkeypatch, tmp_path):
    (tmp_path / "a.pth").touch()
    monkeypatch.setenv("SMALLSEG_WEIGHTS", str(tmp_path / "a.pth"))
    with pytest.raises(WeightsError, match=r"a\.pth is not a folder.*SMALLSEG_WEIGHTS_VMAMBA_TINY_IMAGENET"):
        store.weights_folder()


@pytest.mark.parametrize("file_name", PUBLISHED.file_names)
def test_file_put_by_hand_is_used_under_either_name(folder, file_name):
    file = put(folder, file_name=file_name)
    assert store.verify(NAME) == store.resolve(NAME) == store.path(NAME) == file


def test_missing_file_says_what_to_do(folder):
    with pytest.raises(WeightsError) as error:
        store.resolve(NAME)
    for part in (
        f"{folder / PUBLISHED.file_name} does not exist",
        f"`smallseg weights fetch {NAME}`",
        "127.0.0.1:9/no",
        PUBLISHED.manual_url,
        f"put the file at {folder / PUBLISHED.file_name}",
        PUBLISHED.variable,
        "nnUNetTrainerSwinUMambaScratch",
    ):
        assert part in str(error.value)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[:-1], r"has 2097151 bytes and should have 2097152"),
        (WRONG, r"its sha256 is [0-9a-f]{64} and should be"),
    ],
)
def test_damaged_file_is_never_used(folder, content, message):
    file = put(folder, content)
    with pytest.raises(WeightsError, match=rf"is not the published file of '{NAME}': it.*Delete it and run") as error:
        store.resolve(NAME)
    assert error.match(message)
    assert file.read_bytes() == content


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_unreadable_file(folder):
    put(folder).chmod(0)
    with pytest.raises(WeightsError, match="cannot read"):
        store.verify(NAME)


def test_another_file_by_argument_or_variable(folder, tmp_path, monkeypatch, caplog):
    own, other = tmp_path / "own.pth", tmp_path / "other.pth"
    own.write_bytes(b"1")
    other.write_bytes(b"2")
    with caplog.at_level(logging.WARNING):
        assert store.resolve(NAME, own) == own
    assert "is NOT the published file of" in caplog.text
    monkeypatch.setenv(PUBLISHED.variable, str(other))
    assert store.resolve(NAME) == other
    assert store.resolve(NAME, own) == own
    other.unlink()
    with pytest.raises(WeightsError, match=rf"other\.pth \(given by {PUBLISHED.variable} in place.*does not exist"):
        store.resolve(NAME)


def test_unknown_name(folder):
    for function in (store.path, store.verify, store.resolve, store.fetch):
        with pytest.raises(UsageError, match=f"no weights are called 'resnet'. Known names: {NAME}"):
            function("resnet")


# --------------------------------------------------------------------------------------------------------- download


def test_fetch_and_fetch_again(folder, serve):
    requests = serve("/good")
    assert store.fetch(NAME) == folder / PUBLISHED.file_name
    assert (folder / PUBLISHED.file_name).read_bytes() == CONTENT
    assert os.listdir(folder) == [PUBLISHED.file_name]
    store.fetch(NAME)
    assert requests == ["/good"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_fetched_file_has_ordinary_permissions(folder, serve):
    serve("/good")
    before = os.umask(0o022)
    try:
        assert store.fetch(NAME).stat().st_mode & 0o777 == 0o644  # others can use a shared folder
    finally:
        os.umask(before)


@pytest.mark.parametrize("bad", ["/absent", "/truncated", "/unannounced", "/wrong", "/long", "/page"])
def test_fetch_tries_the_next_address(folder, serve, bad):
    requests = serve(bad, "/good")
    assert store.fetch(NAME).read_bytes() == CONTENT
    assert requests == [bad, "/good"]
    assert os.listdir(folder) == [PUBLISHED.file_name]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("/absent", "request failed: HTTP Error 404"),
        ("/truncated", "not the expected file: it has 1048576 bytes and should have 2097152|connection lost after"),
        ("/unannounced", "not the expected file: it has 1048576 bytes and should have 2097152"),
        ("/wrong", r"not the expected file: its sha256 is [0-9a-f]{64} and should be [0-9a-f]{64} \(stated by third-"),
        ("/long", "not the expected file: it has 3145728 bytes and should have 2097152"),
        ("/page", "not the expected file: it has 19 bytes"),
    ],
)
def test_fetch_fails_leaving_nothing(folder, serve, bad, message):
    serve(bad)
    with pytest.raises(WeightsError, match=message) as error:
        store.fetch(NAME)
    assert error.match(f"'{NAME}' could not be downloaded:\n  http://127.0.0.1:")
    assert f"put the file at {folder / PUBLISHED.file_name}" in str(error.value)
    assert os.listdir(folder) == []


def test_fetch_without_network(folder):
    with pytest.raises(
        WeightsError, match=r"could not be downloaded:\n  http://127.0.0.1:9/no\n    request failed: .*refus"
    ):
        store.fetch(NAME)


@pytest.mark.parametrize("file_name", PUBLISHED.file_names)
def test_fetch_replaces_a_damaged_file(folder, serve, caplog, file_name):
    serve("/good")
    file = put(folder, WRONG, file_name)
    assert store.fetch(NAME) == file
    assert file.read_bytes() == CONTENT
    assert f"{file} is replaced" in caplog.text


def test_failed_fetch_keeps_what_was_there(folder, serve):
    serve("/truncated")
    file = put(folder, WRONG)
    with pytest.raises(WeightsError):
        store.fetch(NAME)
    assert file.read_bytes() == WRONG


def test_fetch_into_a_folder_that_cannot_be_made(folder, serve, tmp_path, monkeypatch):
    serve("/good")
    (tmp_path / "file").touch()
    monkeypatch.setenv("SMALLSEG_WEIGHTS", str(tmp_path / "file" / "weights"))
    with pytest.raises(WeightsError, match=r"cannot write to the weights folder .*SMALLSEG_WEIGHTS"):
        store.fetch(NAME)


def test_full_disk_is_not_blamed_on_the_server(folder, serve, monkeypatch):
    requests = serve("/good", "/good")

    def no_space(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "replace", no_space)
    with pytest.raises(WeightsError, match=r"cannot write to the weights folder .*No space left"):
        store.fetch(NAME)
    assert requests == ["/good"]
    assert os.listdir(folder) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGKILL"])
def test_interrupted_fetch_leaves_nothing_under_the_final_name(folder, serve, signal_name):
    serve("/stall")
    program = (
        "import dataclasses; from nnunetv2_smallseg.pretrained import entries, store; "
        f"entries.ENTRIES = (dataclasses.replace(entries.ENTRIES[0], urls={entries.ENTRIES[0].urls!r}, "
        f"size_bytes={len(CONTENT)}),); store.fetch({NAME!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        assert Handler.stalled.wait(60)
        while not list(folder.glob(".*.part")):
            assert process.poll() is None
        process.send_signal(getattr(signal, signal_name))
        assert process.wait(30) != 0
    finally:
        process.kill()
        process.wait()
    assert not (folder / PUBLISHED.file_name).exists()
    assert len(os.listdir(folder)) == (1 if signal_name == "SIGKILL" else 0)
    serve("/good")
    store.fetch(NAME)
    assert store.verify(NAME)


def test_training_never_downloads(folder, serve):
    requests = serve("/good")
    with pytest.raises(WeightsError, match="are not on this machine"):
        load_pretrained(torch.nn.Linear(1, 1), NAME)
    assert requests == []


@pytest.mark.download
@pytest.mark.skipif("SMALLSEG_TEST_DOWNLOADS" not in os.environ, reason="set SMALLSEG_TEST_DOWNLOADS to download 92 MB")
def test_published_file(tmp_path, monkeypatch):
    from nnunetv2_smallseg.architectures.swin_umamba import SwinUMambaD

    monkeypatch.setenv("SMALLSEG_WEIGHTS", str(tmp_path))
    store.fetch(NAME)
    assert len(load_pretrained(SwinUMambaD(3, 2), NAME).matched) == 208


# ----------------------------------------------------------------------------------------------------- command line


def test_list(folder, capsys):
    assert main(["weights", "list"]) == 0
    output = capsys.readouterr().out
    assert f"{NAME}   " in output
    assert "absent" in output
    put(folder)
    assert main(["weights", "list", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["state"] == "present"
    assert row["path"] == str(folder / PUBLISHED.file_name)
    assert {"sha256", "urls", "licence", "fits", "imagenet_top1", "variable"} <= set(row)
    put(folder, b"short")
    main(["weights", "list", "--json"])
    assert json.loads(capsys.readouterr().out)[0]["state"] == "wrong size"


def test_fetch_path_verify_commands(folder, serve, capsys):
    serve("/good")
    expected = str(folder / PUBLISHED.file_name)
    assert main(["weights", "path", NAME]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert main(["weights", "verify"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{NAME}: the weights '{NAME}' are not on this machine" in captured.err
    assert main(["weights", "fetch", NAME]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    for arguments in (["weights", "verify"], ["weights", "verify", NAME]):
        assert main(arguments) == 0
        assert capsys.readouterr().out == f"{NAME}: ok, {expected}\n"
    put(folder, WRONG)
    assert main(["weights", "verify", NAME]) == 1
    assert "its sha256 is" in capsys.readouterr().err


def test_failing_fetch_command(folder, capsys):
    assert main(["weights", "fetch", NAME]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("Try again later") or "could not be downloaded" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("action", ["fetch", "verify", "path"])
def test_unknown_name_is_a_usage_error(folder, capsys, action):
    assert main(["weights", action, "resnet"]) == 2
    assert f"no weights are called 'resnet'. Known names: {NAME}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["fetch"], ["list", "--js"], ["import-official", "a.pth"], ["download", NAME], ["path", NAME, "x"]],
)
def test_wrong_calls(arguments):
    with pytest.raises(SystemExit) as error:
        main(["weights", *arguments])
    assert error.value.code == 2


# -------------------------------------------------------------------------------------------------- import-official


@pytest.fixture(scope="module")
def official(shared, deterministic_weights) -> Callable[..., dict[str, torch.Tensor]]:
    """Function that makes an official state dict: network name, input channels, classes -> entries."""
    networks = json.loads((shared / "reference" / "swin_umamba" / "manifest.json").read_text())["networks"]

    def make(network: str, channels: int = 1, classes: int = 3) -> dict[str, torch.Tensor]:
        facts = networks[network]
        shapes = {name: list(shape) for name, (shape, _) in facts["entries"].items()}
        for name, (axis,) in facts["axes_that_change_with"]["in_channels"].items():
            shapes[name][axis] = channels
        for name, (axis,) in facts["axes_that_change_with"]["num_classes"].items():
            shapes[name][axis] = classes
        return deterministic_weights.fill_state_dict({name: torch.empty(shape) for name, shape in shapes.items()})

    return make


@pytest.mark.parametrize(
    ("network", "channels", "classes", "container"),
    [
        ("SwinUMamba", 1, 14, True),
        ("SwinUMambaD", 3, 8, False),
    ],
)
def test_import_official_round_trip(tmp_path, capsys, official, network, channels, classes, container):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    from nnunetv2_smallseg.architectures import swin_umamba

    original = official(network, channels, classes)
    content = {"network_weights": original, "init_args": {"fold": "all"}, "current_epoch": 100}
    torch.save(content if container else original, tmp_path / "in.pth")
    assert main(["weights", "import-official", str(tmp_path / "in.pth"), "-o", str(tmp_path / "out.pth")]) == 0
    output = capsys.readouterr().out
    assert f"{network}, {channels} input channels, {classes} classes, {len(original)} tensors" in output
    assert f"-tr nnUNetTrainer{network} -pretrained_weights {tmp_path / 'out.pth'}" in output
    assert sorted(os.listdir(tmp_path)) == ["in.pth", "out.pth"]

    built = getattr(swin_umamba, network)(channels, classes)
    built.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True)["network_weights"])
    restored = swin_umamba.to_official(built.state_dict())
    assert set(restored) == set(original)
    assert all(torch.equal(restored[name], original[name]) for name in original)

    other_classes = getattr(swin_umamba, network)(channels, classes + 1)
    load_pretrained_weights(other_classes, str(tmp_path / "out.pth"))
    loaded = other_classes.state_dict()
    assert all(
        torch.equal(loaded[name], value) for name, value in built.state_dict().items() if "seg_layers" not in name
    )


def test_import_official_does_not_overwrite(tmp_path, capsys, official):
    torch.save(official("SwinUMambaD"), tmp_path / "in.pth")
    (tmp_path / "out.pth").write_text("mine")
    arguments = ["weights", "import-official", str(tmp_path / "in.pth"), "-o", str(tmp_path / "out.pth")]
    assert main(arguments) == 1
    assert "out.pth exists. Choose another name or add --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out.pth").read_text() == "mine"
    assert main([*arguments, "--overwrite"]) == 0
    assert "network_weights" in torch.load(tmp_path / "out.pth", weights_only=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"conv1.weight": torch.ones(1)}, r"neither Swin-UMamba nor SwinUMambaD.*starts with conv1\.weight"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("decoder6")}, r"is missing.*first public version"),
        (lambda s: {**s, "extra.weight": torch.ones(1)}, r"extra\.weight is not part of the network"),
        (lambda s: {**s, "stem.1.bias": torch.ones(2)}, r"stem\.norm\.bias has shape \(2,\), should be \(48,\)"),
        (lambda s: {**s, "stem.0.weight": torch.ones(2)}, r"neither Swin-UMamba"),
        (lambda s: {"epoch": 3}, r"holds no state dict"),
    ],
)
def test_import_official_refuses_other_files(tmp_path, capsys, official, change, message):
    torch.save(change(official("SwinUMamba")), tmp_path / "in.pth")
    assert main(["weights", "import-official", str(tmp_path / "in.pth"), "-o", str(tmp_path / "out.pth")]) == 1
    error = capsys.readouterr().err
    assert f"error: {tmp_path / 'in.pth'}" in error
    assert re.search(message, error, re.DOTALL)
    assert os.listdir(tmp_path) == ["in.pth"]


@pytest.mark.parametrize(("output", "message"), [("absent/out.pth", "cannot write"), (".", "is a folder")])
def test_import_official_to_a_bad_place(tmp_path, capsys, official, output, message):
    torch.save(official("SwinUMambaD"), tmp_path / "in.pth")
    assert main(["weights", "import-official", str(tmp_path / "in.pth"), "-o", str(tmp_path / output)]) == 1
    assert message in capsys.readouterr().err


def test_import_official_of_an_absent_file(tmp_path, capsys):
    assert main(["weights", "import-official", str(tmp_path / "no.pth"), "-o", str(tmp_path / "out.pth")]) == 1
    assert "cannot read checkpoint" in capsys.readouterr().err
