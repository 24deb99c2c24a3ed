"""Anchor poses: clustered, measured, written, read; the released ones."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcrnet import anchors, config, mocap, pose
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


def turned(group: People, count: int) -> People:
    """The same 3D poses, turned evenly round, as a level camera sees them."""
    angle = 2 * np.pi * np.arange(len(group)) / count
    return mocap.seen(mocap.turn(group.pose3d, angle), LCR13)


def test_headings() -> None:
    """One pose seen from everywhere is one centre, put evenly round; its 2D is that of the people in that heading."""
    group, label = people(noise=0)
    one = turned(group[np.repeat(np.flatnonzero(label == 0)[:1], 240)], 240)
    found = anchors.cluster(one, 2, headings=8)
    assert len(found.pose3d_distinct) == 16 and len(found) == 32
    heading = np.degrees(mocap.heading(found.pose3d[:16], LCR13)).reshape(2, 8)
    np.testing.assert_allclose((heading - 45 * np.arange(8) + 180) % 360 - 180, 0, atol=0.01)
    for poses in found.pose3d[:16].reshape(2, 8, 13, 3):  # the same pose but for the heading
        facing = mocap.turn(poses, mocap.heading(poses, LCR13))
        np.testing.assert_allclose(facing, np.repeat(facing[:1], 8, 0), atol=1e-5)
    # 2D: near what a camera sees of the 3D pose, not exactly, as the people of a heading are up to 22.5 degrees off.
    for kind, joints in ((slice(0, 16), np.arange(13)), (slice(16, 32), LCR13.upper)):
        flat = mocap.seen(found.pose3d[kind], LCR13).pose2d
        seen = pose.into_box(flat, pose.box_of(flat[:, joints]))
        assert 0 < np.abs(seen - found.pose2d[kind]).max() < 0.3
        # and much nearer to it than to what it sees of the opposite heading
        away = np.abs(np.roll(seen.reshape(2, 8, 13, 2), 4, 1) - found.pose2d[kind].reshape(2, 8, 13, 2)).mean()
        assert np.abs(seen - found.pose2d[kind]).mean() < away / 3
    # Clustered as they face the camera, so many poses cover them less well than with headings.
    plain = anchors.cluster(one, 16)
    assert anchors.coverage(one.pose3d, found)["mean"] < anchors.coverage(one.pose3d, plain)["mean"] * 1.1
    assert anchors.coverage(one.pose3d, anchors.cluster(one, 2))["mean"] > 0.2


def test_views_of_one_pose_are_one_pose_when_headings_are_removed() -> None:
    """They differ in their last bits, which must neither count as different poses nor give empty clusters."""
    group, label = people(noise=0)
    two = group[np.repeat([np.flatnonzero(label == i)[0] for i in (0, 1)], 8)]
    two.pose3d[:] = mocap.turn(two.pose3d, np.tile(2 * np.pi / 8 * np.arange(8), 2))
    assert np.isfinite(anchors.cluster(two, 4, headings=3).pose3d).all()
    with pytest.raises(UserError, match=r"anchors.k: 8 .* there are 4 "):
        anchors.cluster(two, 8, headings=3)
    rows = anchors.curve(two, list(range(16)), ks=(1, 2, 4, 8, 16), headings=3)
    assert [row["k"] for row in rows] == [1, 2, 4] and np.isfinite([row["worst"] for row in rows]).all()


def test_headings_without_people_are_projected() -> None:
    group, label = people(noise=0)
    one = group[np.flatnonzero(label == 0)[:3]]
    found = anchors.cluster(one, 1, headings=12)
    empty = anchors.coverage(one.pose3d, found)["empty"]
    assert len(empty) >= 10
    facing = np.stack([one.pose3d[0], pose.mirror3d(one.pose3d[0], LCR13)])
    assert np.isfinite(found.pose2d).all()
    flat = mocap.seen(found.pose3d[:12], LCR13).pose2d
    seen = pose.into_box(flat, pose.box_of(flat))
    mine = np.rint(np.degrees(mocap.heading(facing, LCR13)) / 30).astype(int) % 12
    unseen = np.setdiff1d(np.arange(12), mine)
    np.testing.assert_allclose(found.pose2d[unseen], seen[unseen], atol=1e-4)
    assert np.abs(found.pose2d[mine] - seen[mine]).max() > 1e-3


def test_curve_is_measured_on_people_left_out() -> None:
    """Each group of its own pose: clustered from the others, nobody is covered, however large k is."""
    base, _ = people(noise=0)
    rng = np.random.default_rng(1)
    each = pose.centre(rng.normal(0, 0.4, (10, 13, 3)), LCR13)
    group = np.repeat(np.arange(10), 20)
    crowd = mocap.seen(each[group] + rng.normal(0, 0.001, (200, 13, 3)), LCR13)
    alone = anchors.curve(crowd, group.tolist(), ks=(1, 8))
    mixed = anchors.curve(crowd, list(range(200)), ks=(1, 8, 20, 32))
    assert [row["k"] for row in mixed] == [1, 8, 20, 32]
    assert mixed[2]["p95"] < 0.01 < 0.2 < alone[1]["mean"], "people of one's own group give it away"
    assert all(row["mean"] <= row["p95"] <= row["worst"] for row in mixed)
    assert mixed[0]["p95"] > mixed[1]["p95"] > 10 * mixed[2]["p95"]
    assert mixed == anchors.curve(crowd, list(range(200)), ks=(1, 8, 20, 32))
    assert [r["k"] for r in anchors.curve(base[:4], list(range(4)), ks=(1, 64))] == [1], "as many as poses at most"
    with pytest.raises(UserError, match=r"anchors.k: auto .* all people are of one; set anchors.k to a number"):
        anchors.curve(crowd, [""] * 200)


def test_parts_of_the_people() -> None:
    """No group is in two parts, and parts are of one size as far as groups allow."""
    group = np.repeat(np.arange(40), np.random.default_rng(0).integers(1, 30, 40))
    fold = anchors._folds(group.tolist(), 0)
    assert all(len(set(fold[group == g])) == 1 for g in range(40))
    assert np.ptp(np.bincount(fold)) <= 5 and fold.max() == anchors.FOLDS - 1
    assert anchors._folds(["a"] * 9 + ["b"], 0).tolist() == [0] * 9 + [1]


def test_how_k_is_chosen() -> None:
    def rows(**p95: float) -> list[dict[str, float]]:
        return [{"k": int(k[1:]), "mean": 0, "p95": v, "worst": 0} for k, v in p95.items()]

    falls = rows(k1=1.0, k2=0.8, k3=0.75, k4=0.6, k6=0.55, k8=0.57, k12=0.5, k16=0.53)
    # 3 -> 6 lowers it by 27 %, 4 -> 8 by 5 %, 6 -> 12 by 9 %
    assert anchors.choose(falls, 0.1) == 4
    assert anchors.choose(falls, 0.08) == 8
    assert anchors.choose(rows(k1=1.0, k2=0.95, k4=0.5, k8=0.49), 0.1) == 4, "not the first flat step"
    assert anchors.choose(rows(k1=1.0, k2=0.5, k4=0.25), 0.1) == 2, "the curve still falls where it ends"
    assert anchors.choose(rows(k1=1.0, k2=0.99, k4=0.98), 0.1) == 1
    assert anchors.choose(rows(k1=0.5), 0.1) == 1


def test_fit() -> None:
    group, _ = people(noise=0.02, each=60)
    images = list(range(len(group)))
    found, rows, k = anchors.fit(group, images, config.Anchors(k=4))
    assert same(found, anchors.cluster(group, 4)) and rows == [] and k == 4
    found, rows, k = anchors.fit(group, images, config.Anchors(k="auto", upper=False, gain=0.2), seed=1)
    assert k == anchors.choose(rows, 0.2) == 2 * MODES and same(found, anchors.cluster(group, k, upper=False, seed=1))
    asked = config.load(None, {"anchors.k": "auto", "anchors.headings": "4"}).anchors
    assert asked.k == "auto" and len(anchors.fit(group, images, asked)[0]) % 8 == 0
    for wrong in ("0", "many", "true", "2.5"):
        with pytest.raises(config.ConfigError, match=r"anchors.k: [^;]*$"):
            config.load(None, {"anchors.k": wrong})


def test_empty_anchors_and_twins() -> None:
    group, _ = people(noise=0)
    found = anchors.cluster(group, 2 * MODES)
    three = found.pose3d_distinct[:3]
    near = three[0] + np.array([0.03, 0, 0.04], np.float32) * np.where(np.arange(13) % 2, 1, -1)[:, None]
    pose3d = np.stack([*three, near]).astype(np.float32)
    pose2d = np.zeros((4, 13, 2), np.float32)
    poses = AnchorPoses(np.tile(pose2d, (2, 1, 1)), np.tile(pose3d, (2, 1, 1)), np.repeat([False, True], 4))
    report = anchors.coverage(three[:2], poses, twin=0.06)
    assert report["count"] == [1, 1, 0, 0] and report["empty"] == [2, 3]
    assert [(i, j) for i, j, _ in report["twins"]] == [(0, 3)]
    assert report["twins"][0][2] == pytest.approx(0.05, abs=1e-6)
    assert anchors.coverage(three[:2], poses, twin=0.049)["twins"] == []
    assert json.dumps(report)
    # The variants for the whole and the upper body share a 3D pose; two of one kind that do are doubles.
    double = AnchorPoses(pose2d[:3], pose3d[[0, 1, 0]], np.array([False, False, False]))
    assert anchors.twins(double, 0.05) == [(0, 0, 0.0)]


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
