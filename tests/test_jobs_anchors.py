"""jobs/anchors.py: clusters, chooses how many, converts, measures, draws; a mistake is one line and status 2."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import anchors as job
from jobs.train import _anchors
from lcrnet import anchors, coco, config, draw, mocap, pose
from lcrnet.dataset import Source
from lcrnet.pose import People
from lcrnet.skeleton import LCR13

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in an empty folder -> (status, stdout, stderr)."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["anchors.py", *arguments])
        with pytest.raises(SystemExit) as status:
            config.run(job.main)
        return int(str(status.value.code)), *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    return command


def people(count: int, seed: int = 0) -> People:
    """People in three poses."""
    rng = np.random.default_rng(seed)
    base = pose.centre(np.random.default_rng(7).normal(0, 0.4, (3, 13, 3)), LCR13)
    return mocap.seen(pose.centre(base[np.arange(count) % 3] + rng.normal(0, 0.01, (count, 13, 3)), LCR13), LCR13)


def write(file: str, group: People, images: int = 1) -> None:
    each = np.array_split(np.arange(len(group)), images)
    coco.write(file, [
        coco.CocoImage(i, f"{i}.jpg", 1000, 1000, None, group[rows], ids=[int(r) + 1 for r in rows])
        for i, rows in enumerate(each, 1)
    ])  # fmt: skip


def test_cluster_convert_measure(run: Run) -> None:
    flat = np.random.default_rng(0).normal(0, 1, (4, 65)).astype(np.float32)
    Path("model.pkl").write_bytes(pickle.dumps({"anchor_poses": flat}))
    status, out, _ = run("--from", "model.pkl", "--out", "a.json")
    assert status == 0 and "4 anchor poses" in out
    assert len(anchors.load("a.json")) == 4 and Path("a.sheet.png").is_file() and not Path("a.curve.png").exists()

    write("ann.json", people(18))
    status, out, _ = run("--data", "ann.json", "--out", "b.json", "--anchors.k", "5", "--anchors.upper", "false")
    assert status == 0 and "p95" in out and "18 in all" in out
    assert len(anchors.load("b.json")) == 5
    status, out, _ = run("--data", "ann.json", "--from", "b.json")
    assert status == 0 and "18 in all" in out
    assert sorted(f.name for f in Path().iterdir()) == [
        "a.json", "a.sheet.png", "ann.json", "b.json", "b.sheet.png", "model.pkl",
    ]  # fmt: skip

    status, _, error = run("--data", "ann.json")
    assert status == 2 and "--out" in error and error.count("\n") == 1
    status, _, error = run("--data", "ann.json", "--out", "c.json", "--anchors.k", "1000")
    assert status == 2 and "anchors.k" in error and not Path("c.json").exists()
    status, _, error = run("--data", "ann.json", "--out", "c.json", "--anchors.k", "auto")
    assert status == 2 and "set anchors.k to a number" in error and error.count("\n") == 1


def test_motion_capture_and_auto(run: Run) -> None:
    """The same poses under several headings; the curve as a table and a picture; the sheet."""
    up = people(30).pose3d * np.array([-1, -1, 1], np.float32)
    clips = np.array([f"c{i // 6}" for i in range(30)])
    np.savez("poses", poses=up, joints=np.array(LCR13.joints), clip=clips)
    asked = ["--anchors.k", "auto", "--anchors.views", "3", "--anchors.headings", "6", "--anchors.gain", "0.3"]
    status, out, error = run("--data", "poses.npz", "--out", "m.json", *asked)
    assert (status, error) == (0, "") and "p95 at 2 k" in out and "90 in all" in out and "each in 6 headings" in out
    found = anchors.load("m.json")
    assert len(found) % 12 == 0 and f"chosen: k = {len(found) // 12}," in out
    assert Image.open("m.curve.png").size == (720, 480)
    assert Image.open("m.sheet.png").size[0] > 1000
    first = Path("m.json").read_bytes(), Path("m.sheet.png").read_bytes()
    run("--data", "poses.npz", "--out", "n.json", *asked)
    assert first == (Path("n.json").read_bytes(), Path("n.sheet.png").read_bytes())

    np.savez("alone", poses=up, joints=np.array(LCR13.joints))
    status, _, error = run("--data", "alone.npz", "--out", "x.json", "--anchors.k", "auto")
    assert status == 2 and "`clip`" in error
    Path("broken.npz").write_bytes(Path("poses.npz").read_bytes()[:-30])
    status, _, error = run("--data", "broken.npz", "--out", "x.json")
    assert status == 2 and "broken.npz" in error and error.count("\n") == 1


def test_warnings(run: Run) -> None:
    write("ann.json", people(18))
    run("--data", "ann.json", "--out", "all.json", "--anchors.k", "6")
    write("few.json", people(18)[:1])
    status, out, _ = run("--data", "few.json", "--from", "all.json", "--out", "b.json", "--anchors.twin", "0.001")
    assert status == 0 and out.count("is empty: nobody in the data is nearest to it") == 5 and "twins" not in out
    status, out, _ = run("--from", "all.json", "--out", "b.json", "--anchors.twin", "5")
    assert out.count("are near-twins") == 15 and "empty" not in out, "without data only what the anchors tell"


def test_training_clusters_so_too(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config.load(None, {"anchors.k": "auto", "anchors.gain": 0.3})
    found = _anchors(settings, [Source(drawn / "annotations.json", drawn / "images")], tmp_path / "anchors.json")
    assert f"anchors.k auto: {len(found) // 2} 3D poses" in capsys.readouterr().out
    assert len(anchors.load(tmp_path / "anchors.json")) == len(found)


def test_pictures() -> None:
    """The box is where it should be, a person's right is orange, and what is outside the box is drawn."""
    pose3d = np.zeros((13, 3))
    for name, at in {"ankle": (0.1, 0.9), "knee": (0.1, 0.5), "hip": (0.1, 0), "wrist": (0.3, 0), "elbow": (0.3, -0.2),
                     "shoulder": (0.2, -0.5)}.items():  # fmt: skip
        pose3d[LCR13.index(f"r_{name}"), :2] = -at[0], at[1]
        pose3d[LCR13.index(f"l_{name}"), :2] = at
    pose3d[LCR13.index("head"), 1] = -0.7
    flat = pose3d[:, :2] * 100
    whole, half = (pose.into_box(flat, pose.box_of(flat[j])) for j in (np.arange(13), LCR13.upper))
    picture = draw.anchor(np.stack([whole, half]), pose3d, ["#0", "#1"], LCR13, "caption", height=200)
    assert picture.dtype == np.uint8 and picture.shape[1] == 2 * 144 + 2 * 120 and picture.shape[0] > 200
    for panel, outside in ((picture[:200, :144], False), (picture[:200, 144:288], True)):
        box = np.argwhere((panel == draw.GREY).all(-1))
        right, left = (np.argwhere((panel == colour).all(-1)) for colour in (draw.RIGHT, draw.LEFT))
        assert right[:, 1].mean() < left[:, 1].mean()
        high, wide = np.ptp(box, axis=0)
        assert (right[:, 0].max() > box[:, 0].max()) == outside
        # Its sides are those of the body it is round, in metres.
        x1, y1, x2, y2 = pose.box_of(pose3d[LCR13.upper, :2] if outside else pose3d[:, :2])
        assert wide / high == pytest.approx((x2 - x1) / (y2 - y1), rel=0.05)
    np.testing.assert_array_equal(picture, draw.anchor(np.stack([whole, half]), pose3d, ["#0", "#1"], LCR13, "caption"))
    rows = [{"k": k, "mean": 0.2 / k, "p95": 0.3 / k, "worst": 0.4 / k} for k in (1, 2, 4)]
    one, other = draw.coverage(rows, 1), draw.coverage(rows, 4)
    assert one.shape == (480, 720, 3) and (one != other).any()


def test_released_anchors(run: Run, shared: Path) -> None:
    released, athletes = shared / "legacy/DEMO_ECCV18_anchor_cfg.pkl", shared / "lspet/annotations/lcrnet_pose.json"
    status, out, _ = run("--from", str(released), "--data", str(athletes), "--out", "r.json")
    assert status == 0 and "20 anchor poses: 10 3D poses, 10 of the upper body" in out and "warning" not in out
    assert "mean      342" in out, "what was measured when this was written"
    assert Image.open("r.sheet.png").size[0] > 1000
