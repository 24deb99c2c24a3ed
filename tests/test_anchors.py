"""Anchor poses: clustered, measured, written, read; the released ones."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcrnet import anchors, pose
from lcrnet.anchors import AnchorPoses
from lcrnet.config import UserError
from lcrnet.pose import People
from lcrnet.skeleton import LCR13

MODES = 3


def people(seed: int = 0, each: int = 40, noise: float = 0.01) -> tuple[People, np.ndarray]:
    """(people in `MODES` clearly different poses seen by one camera, the pose of each (P,))."""
    rng = np.random.default_rng(seed)
    base = pose.centre(np.random.default_rng(7).normal(0, 0.4, (MODES, 13, 3)), LCR13)
    label = np.repeat(np.arange(MODES), np.arange(MODES, 0, -1) * each // MODES)
    pose3d = pose.centre(base[label] + rng.normal(0, noise, (len(label), 13, 3)), LCR13)
    pose2d = pose3d[..., :2] * rng.uniform(50, 200, (len(label), 1, 1)) + rng.uniform(0, 500, (len(label), 1, 2))
    out = People.empty(len(label), 13)
    out.pose2d, out.pose3d = pose2d.astype(np.float32), pose3d.astype(np.float32)
    out.box, out.seen[:], out.has3d[:] = pose.box_of(out.pose2d), 2, True
    return out, label


def same(a: AnchorPoses, b: AnchorPoses) -> bool:
    return a.skeleton == b.skeleton and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("pose2d", "pose3d", "upper_only")
    )


def test_cluster_finds_the_poses() -> None:
    """k-means on people in three poses gives these and their mirror images."""
    group, label = people()
    found = anchors.cluster(group, 2 * MODES)
    truth = np.stack([group.pose3d[label == i].mean(0) for i in range(MODES)])
    truth = np.concatenate([truth, pose.mirror3d(truth, LCR13)])
    distance = np.linalg.norm(truth[:, None] - found.pose3d_distinct[None], axis=-1).mean(-1)
    np.testing.assert_allclose(distance.min(1), 0, atol=1e-5)
    assert sorted(distance.argmin(1)) == list(range(2 * MODES))
    assert (distance.argmin(1)[[0, MODES]] < 2).all(), "the most frequent pose and its mirror image come first"
    origin = found.pose3d[:, LCR13.torso].mean(1)
    np.testing.assert_allclose(origin, 0, atol=1e-6)


def test_variants() -> None:
    """The same 3D twice; 2D in units of the box of all joints, then of the box of the upper ones."""
    group, _ = people(noise=0)
    found = anchors.cluster(group, 2 * MODES)
    half = len(found) // 2
    assert len(found) == 4 * MODES and found.upper_only.tolist() == [False] * half + [True] * half
    np.testing.assert_array_equal(found.pose3d[:half], found.pose3d[half:])
    assert found.group.tolist() == list(range(half)) * 2
    np.testing.assert_array_equal(found.pose3d_distinct[found.group], found.pose3d)
    # Without noise a cluster's mean is each member's own pose in its box.
    margin = pose.BOX_MARGIN
    for kind, joints in ((slice(0, half), np.arange(13)), (slice(half, None), LCR13.upper)):
        inside = found.pose2d[kind][:, joints]
        low, high = inside.min(1), inside.max(1)
        np.testing.assert_allclose(low, 1 - high, atol=1e-5)  # the margin is the same on both sides
        np.testing.assert_allclose(low.min(1), margin / (1 + 2 * margin), atol=1e-5)
    assert found.pose2d.dtype == found.pose3d.dtype == np.float32
    np.testing.assert_array_equal(anchors.cluster(group, 2 * MODES, upper=False).pose2d, found.pose2d[:half])


def test_cluster_is_deterministic_and_takes_only_full_labels() -> None:
    group, _ = people(noise=0.2)
    first = anchors.cluster(group, 5, seed=3)
    assert same(first, anchors.cluster(group, 5, seed=3))
    bad = People.join([group] * 5)
    n = len(group)
    bad.has3d[n : 2 * n] = False
    bad.crowd[2 * n : 3 * n] = True
    bad.seen[3 * n : 4 * n, 4] = 0
    bad.pose2d[4 * n :] = 0  # no box
    bad.pose3d[n:] += np.random.default_rng(0).normal(0, 1, bad.pose3d[n:].shape).astype(np.float32)
    assert same(first, anchors.cluster(bad, 5, seed=3))


def test_many_people_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchors, "MOST_POSES", 60)
    group, _ = people(each=90, noise=0.1)
    assert same(anchors.cluster(group, 4), anchors.cluster(group, 4))


def test_too_few_poses() -> None:
    group, _ = people()
    few = group[[0, 0, 0]]
    with pytest.raises(UserError, match=r"anchors.k: 3 .* there are 2 .* set anchors.k to 2 or less"):
        anchors.cluster(few, 3)
    assert len(anchors.cluster(few, 2)) == 4
    few.has3d[:] = False
    with pytest.raises(UserError, match="none of 3 people has a 3D pose"):
        anchors.cluster(few, 1)
    with pytest.raises(UserError, match="none of 0"):
        anchors.cluster(People.empty(0, 13), 1)


def test_nearest_and_coverage() -> None:
    group, _ = people(noise=0.1)
    found = anchors.cluster(group, 4)
    nearest, distance = anchors.nearest3d(group.pose3d, found)
    for p, n, d in zip(group.pose3d, nearest, distance, strict=True):
        each = [np.mean([np.linalg.norm(a - b) for a, b in zip(p, q, strict=True)]) for q in found.pose3d_distinct]
        assert n == np.argmin(each) and d == pytest.approx(min(each), abs=1e-6)
    report = anchors.coverage(group.pose3d, found)
    assert report["people"] == len(group) == sum(report["count"])
    assert report["count"] == np.bincount(nearest, minlength=4).tolist()
    assert report["mean"] == pytest.approx(distance.mean())
    assert report["worst"] == distance.max() == distance[report["worst_person"]]
    assert report["mean"] < report["p95"] < report["worst"]
    assert anchors.coverage(found.pose3d[:1], found)["worst"] == 0
    with pytest.raises(UserError, match="no person"):
        anchors.coverage(group.pose3d[:0], found)


def test_round_trip(tmp_path: Path) -> None:
    found = anchors.cluster(people(noise=0.1)[0], 4)
    file = tmp_path / "new" / "anchors.json"
    anchors.save(found, file)
    assert same(anchors.load(file), found)
    assert [f.name for f in file.parent.iterdir()] == ["anchors.json"]
    values = json.loads(file.read_text())
    assert (
        values["joints"] == list(LCR13.joints) and "metres" in values["units"]["pose3d"] and "y down" in values["frame"]
    )


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        anchors.save(anchors.cluster(people()[0], 2), tmp_path / "file" / "anchors.json")


def broken(change: Any) -> Any:
    def make(values: dict[str, Any]) -> str:
        change(values)
        return json.dumps(values)

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: "", "neither"),
        (lambda v: "PK\3\4", "neither"),
        (lambda v: "{", "not JSON"),
        (lambda v: '{"a":' * 100000, "not JSON"),
        (broken(lambda v: v.update(format="x")), "format"),
        (broken(lambda v: v.update(joints=7)), "joints: expected a list"),
        (broken(lambda v: v["joints"].reverse()), "joints: they are not those of lcr13"),
        (broken(lambda v: v.update(anchors=[])), "anchors: expected a list"),
        (broken(lambda v: v["anchors"][1].update(upper_only=1)), r"anchors\[1\].upper_only"),
        (broken(lambda v: v["anchors"][1].pop("pose2d")), r"anchors\[1\].pose2d: expected 13 x 2"),
        (broken(lambda v: v["anchors"][0]["pose3d"].pop()), r"anchors\[0\].pose3d: expected 13 x 3"),
        (broken(lambda v: v["anchors"][0]["pose3d"][3].append(1)), r"anchors\[0\].pose3d"),
        (broken(lambda v: v["anchors"][0]["pose3d"][3].__setitem__(0, float("nan"))), r"anchors\[0\].pose3d"),
        (broken(lambda v: v["anchors"][0]["pose3d"][3].__setitem__(0, "x")), r"anchors\[0\].pose3d"),
    ],
)  # fmt: skip
def test_faults_are_named(tmp_path: Path, make: Any, message: str) -> None:
    file = tmp_path / "anchors.json"
    anchors.save(anchors.cluster(people()[0], 2), file)
    file.write_text(make(json.loads(file.read_text())))
    with pytest.raises(UserError, match=message) as error:
        anchors.load(file)
    assert str(error.value).startswith(str(file))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.json: No such file"):
        anchors.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "bundle",
    [{}, [1], {"anchor_poses": 3}, {"anchor_poses": np.zeros((20, 64), np.float32)},
     {"anchor_poses": np.zeros((0, 65), np.float32)}, {"anchor_poses": np.full((2, 65), np.nan)},
     {"anchor_poses": np.zeros((2, 65), np.int64)}],
)  # fmt: skip
def test_bundles_without_anchor_poses(tmp_path: Path, bundle: Any) -> None:
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps(bundle))
    with pytest.raises(UserError, match=r"model.pkl: anchor_poses: expected"):
        anchors.load(file)


def test_released_anchor_poses(shared: Path) -> None:
    """In our frame they stand upright and face as the file says; which are of the upper body comes from the data."""
    found = anchors.load(shared / "legacy" / "InTheWild-ResNet50_anchor_cfg.pkl")
    assert same(found, anchors.load(shared / "legacy" / "DEMO_ECCV18_anchor_cfg.pkl"))
    assert len(found) == 20 and found.upper_only.tolist() == [False] * 10 + [True] * 10
    assert found.group.tolist() == [*range(10), *range(10)]
    np.testing.assert_allclose(found.pose3d[:, LCR13.torso].mean(1), 0, atol=1e-8)
    for pose2d, pose3d in zip(found.pose2d, found.pose3d, strict=True):
        # A camera sees x and y as they are: 2D grows with 3D, in both.
        for axis in range(2):
            assert np.corrcoef(pose2d[:, axis], pose3d[:, axis])[0, 1] > 0.9
    head, ankles = LCR13.index("head"), LCR13.indices("r_ankle", "l_ankle")
    assert (found.pose3d[:, head, 1] < found.pose3d[:, ankles, 1].min(1)).all()


def test_real_people_cluster_better_than_the_released_poses_cover_them(shared: Path) -> None:
    from lcrnet import coco

    data = coco.read(shared / "lspet" / "annotations" / "lcrnet_pose.json")
    athletes = People.join(image.people for image in data.images)
    athletes = athletes[athletes.has3d]
    own = anchors.coverage(athletes.pose3d, anchors.cluster(athletes, 10))
    other = anchors.coverage(athletes.pose3d, anchors.load(shared / "legacy" / "DEMO_ECCV18_anchor_cfg.pkl"))
    assert own["people"] == 1298
    assert own["mean"] < 0.27 < other["mean"]


def test_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One command clusters, another converts; a mistake is one line and status 2."""
    from jobs import anchors as job
    from lcrnet import coco, config

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["anchors.py", *arguments])
        with pytest.raises(SystemExit) as status:
            config.run(job.main)
        return int(str(status.value.code)), *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    flat = np.random.default_rng(0).normal(0, 1, (4, 65)).astype(np.float32)
    Path("model.pkl").write_bytes(pickle.dumps({"anchor_poses": flat}))
    status, out, _ = run("--from", "model.pkl", "--out", "a.json")
    assert status == 0 and "4 anchor poses" in out
    assert len(anchors.load("a.json")) == 4

    group, _ = people(each=9)
    coco.write("ann.json", [coco.CocoImage(1, "a.jpg", 1000, 1000, None, group, ids=[*range(1, len(group) + 1)])])
    status, out, _ = run("--data", "ann.json", "--out", "b.json", "--anchors.k", "5", "--anchors.upper", "false")
    assert status == 0 and "p95" in out
    assert len(anchors.load("b.json")) == 5
    status, out, _ = run("--data", "ann.json", "--from", "b.json")
    assert status == 0 and f"({len(group)} in all)" in out

    status, _, error = run("--data", "ann.json")
    assert status == 2 and "--out" in error and error.count("\n") == 1
    status, _, error = run("--data", "ann.json", "--out", "c.json", "--anchors.k", "1000")
    assert status == 2 and "anchors.k" in error and not Path("c.json").exists()
