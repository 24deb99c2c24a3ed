"""Files that are no weights, or damaged, or of another address: a UserError of one line, and exit code 2."""

from __future__ import annotations

import hashlib
import http.server
import pickle
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import legacy_files as files
import numpy as np
import pytest
import torch
from legacy_files import DETECTRON

from lcrnet import fetch, legacy, unpickle, weights
from lcrnet.config import UserError


@pytest.fixture(scope="module")
def flat(shared: Path) -> np.ndarray:
    """INRIA's own anchor poses (20, 65)."""
    file = shared / "legacy/DEMO_ECCV18_anchor_cfg.pkl"
    return unpickle.load(file.read_bytes())["anchor_poses"]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(data: bytes, name: str = "file.bin") -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "picture": (b"\xff\xd8\xff\xe0" + b"\0" * 100, "a JPEG image"),
    "web page": (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "text": (b"hello world", "text, not weights"),
    "noise": (bytes(range(200, 256)), "no known format"),
    "list": (pickle.dumps([1]), "a pickle of a list"),
    "dict": (pickle.dumps({"weights": 1}), "no weights known here: it holds weights"),
    "ours": (files.torch_file({"body.conv1.weight": torch.zeros(1)}), "name the model folder"),
    "detectron2": (files.torch_file({"model": {"backbone.bottom_up.x": torch.zeros(1)}}), "detectron2"),
    "zip": (b"PK\x03\x04" + b"\0" * 30, "zip"),
    "ResNet of another width": (
        files.torch_file(OrderedDict((n, torch.zeros(4, 4, 3, 3)) for n in
                                     ("conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight"))),
        r"a ResNet of \[1, 0, 0, 0\] blocks"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused(name: str, write: Any) -> None:
    data, message = WRONG[name]
    file = write(data)
    with pytest.raises(UserError, match=message) as error:
        legacy.load(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_damage_is_named(flat: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of another shape, one that is not finite, one that is missing."""
    good = files.seed(files.Draw())

    def load(**changed: Any) -> legacy.Imported:
        state = {k: v for k, v in (good | changed).items() if v is not None}
        monkeypatch.setattr(legacy, "_read", lambda path: {"model": state, "anchor_poses": flat})
        return legacy.load("x")

    name = "Conv_Body.res2.0.conv1.weight"
    with pytest.raises(UserError, match=rf"x: {name}: shape \(64, 3, 1, 1\), but body.layer1.0.conv1.weight of such"):
        load(**{name: np.zeros((64, 3, 1, 1), np.float32)})
    with pytest.raises(UserError, match=rf"x: {name}: not all its numbers are finite"):
        load(**{name: np.full_like(good[name], np.nan)})
    found = load(**{name: None, "RPN.RPN_conv.bias": None, "Other.weight": np.zeros(3, np.float32)})
    assert found.model is None and found.report.left_over == ["Other.weight"]
    assert found.report.missing == ["body.layer1.0.conv1.weight", "rpn.conv.bias"]
    with pytest.raises(UserError, match="52 channels for 5 sizes"):
        load(**{"RPN.RPN_bbox_pred.bias": np.zeros(52, np.float32)})
    with pytest.raises(UserError, match="rows for 20 anchor poses"):
        load(**{"Pose_Outs.pose_pred.bias": np.zeros(7, np.float32)})


ODD: list[Any] = [None, 3, -1.5, "text", b"bytes", [], {}, np.zeros(()), np.zeros((0,), np.float32), np.zeros((2, 2)),
                  np.zeros(3, np.complex64), (1, "a"), True, float("nan"), 10**30]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("family", ["resnet", "blobs", "seed", "inria", "dope", "detector"])
def test_odd_values_anywhere(family: str, flat: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands where a tensor or a setting should: a UserError of one line, or an import without it."""
    tiny = files.Draw(tiny=True)
    given: dict[str, Any] = {
        "resnet": lambda: files.resnet("50", tiny),
        "blobs": lambda: {"blobs": files.blobs("50", tiny)},
        "detector": lambda: {"blobs": files.detector(tiny, True), "cfg": DETECTRON},
        "seed": lambda: {"model": files.seed(tiny), "step": 1},
        "inria": lambda: {"model": files.seed(tiny), "anchor_poses": flat, "cfg": files.inria_cfg(),
                          "ppi_params": dict(files.PPI)},
        "dope": lambda: dope_of(tiny),
    }[family]()  # fmt: skip
    random = np.random.default_rng(0)
    places = list(leaves(given))
    few = {"conv1.weight", "layer1.0.conv2.weight", "bn1.running_var", "conv1_w", "Pose_Outs.cls_score.bias"}
    first = [p for p in places if p[-1] in few or (len(p) < 3 and p[0] not in ("model", "blobs")) or p[0] == "cfg"]
    chosen = first[:6] + [places[i] for i in random.choice(len(places), 3, replace=False)]
    refused = 0
    for place in chosen:
        *way, last = place
        target = given
        for key in way:
            target = target[key]
        before = target[last]
        for odd in random.choice(len(ODD), 2, replace=False):
            target[last] = ODD[odd]
            monkeypatch.setattr(legacy, "_read", lambda path: given)
            try:
                legacy.load("x")
            except UserError as error:
                refused += 1
                assert str(error).startswith("x: ") and "\n" not in str(error)
        target[last] = before
    assert refused


def dope_of(draw: files.Draw) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "from_numpy", lambda value: value)
        return files.dope(draw, half=False)


def leaves(value: dict[str, Any], way: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, item in value.items():
        yield (*way, key)
        if isinstance(item, dict):
            yield from leaves(item, (*way, key))


def test_command_line(write: Any) -> None:
    command = [sys.executable, "-m", "lcrnet.weights", str(write(b"<html>"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "a web page" in done.stderr and "Traceback" not in done.stderr


def test_command_line_in_process(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], model_folder: Path
) -> None:
    assert weights.main([str(model_folder)]) == 0 and '"format": 1' in capsys.readouterr().out
    body = str(write(files.torch_file(files.tensors(files.resnet("50", files.Draw())))))
    with pytest.raises(UserError, match="no whole detector"):
        weights.main([body, "--out", str(tmp_path / "m")])
    said = capsys.readouterr().out
    assert "resnet_torchvision" in said and "image.mean: '[0.485, 0.456, 0.406]'" in said and "  'fc.weight'" in said


# Files by URL


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("LCRNET_BUILD", str(tmp_path / "cache/build"))
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None})
    (tmp_path / "www").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=tmp_path / "www")) as http_:
        thread = threading.Thread(target=http_.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http_.server_port}"
        http_.shutdown()
        thread.join()


def test_urls(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = files.torch_file(files.tensors(files.resnet("50", files.Draw())))
    (tmp_path / "www/a.pth").write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    with pytest.raises(UserError, match="a URL needs the sha256"):
        legacy.load(f"{server}/a.pth")
    with pytest.raises(UserError, match="expected 64 hexadecimal digits"):
        legacy.load(f"{server}/a.pth#sha256=12")
    monkeypatch.setattr(legacy, "_read", lambda path: pytest.fail("read before it was checked"))
    with pytest.raises(UserError, match=f"its sha256 is {sha256}, not 0000"):
        legacy.load(f"{server}/a.pth#sha256={'0' * 64}")
    monkeypatch.setattr(fetch, "MOST_BYTES", len(data) - 1)
    with pytest.raises(UserError, match="more than the"):
        legacy.load(f"{server}/a.pth", sha256=sha256)
    assert list((tmp_path / "cache/weights").iterdir()) == []  # nothing half done stays
    monkeypatch.undo()
    monkeypatch.setenv("LCRNET_BUILD", str(tmp_path / "cache/build"))
    assert legacy.recognise(f"{server}/a.pth#sha256={sha256}") == "resnet_torchvision"
    assert [f.name for f in (tmp_path / "cache/weights").iterdir()] == [sha256]
    (tmp_path / "www/a.pth").unlink()
    assert legacy.load(f"{server}/a.pth", sha256=sha256).report.kind == "resnet_torchvision"  # kept
    (tmp_path / "cache/weights" / sha256).write_bytes(b"changed")
    with pytest.raises(UserError, match=r"cannot be fetched: .*(404|Not Found|not found)"):
        legacy.load(f"{server}/a.pth", sha256=sha256)
    with pytest.raises(UserError, match="cannot be fetched"):
        legacy.load("http://127.0.0.1:9/x", sha256=sha256)
    with pytest.raises(UserError, match="only http and https"):
        legacy.load("ftp://x/y")


def test_sha256_of_a_path(write: Any) -> None:
    file = write(b"abc")
    with pytest.raises(UserError, match="another or a damaged file"):
        fetch.local(f"{file}#sha256={'a' * 64}")
    assert fetch.local(f"{file}#sha256={hashlib.sha256(b'abc').hexdigest()}&kind=x") == (file, {"kind": "x"})
