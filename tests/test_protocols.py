"""Human3.6M and MuPoTS-3D: readers on files in the exact formats, and their figures against plain loops."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat
from scipy.spatial.transform import Rotation

from lcrnet import coco, protocols
from lcrnet.camera import Camera
from lcrnet.config import UserError
from lcrnet.pose import Person, centre
from lcrnet.skeleton import H36M17, LCR13, MPI_INF_3DHP17, Skeleton, convert

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import protocols_reference as golden

# A standing body facing the camera, metres, x right, y down, z away: right is the person's, on the image's left.
BODY = {
    "pelvis": (0, 0, 0), "spine": (0, -0.24, 0.02), "neck": (0, -0.5, 0.03), "head": (0, -0.61, -0.02),
    "head_top": (0, -0.73, 0), "r_hip": (-0.13, 0.01, 0), "r_knee": (-0.13, 0.44, -0.02),
    "r_ankle": (-0.13, 0.88, 0.05),
    "r_shoulder": (-0.17, -0.47, 0.03), "r_elbow": (-0.24, -0.2, 0.05), "r_wrist": (-0.27, 0.04, -0.03),
}  # fmt: skip
BODY |= {f"l{name[1:]}": (-x, y, z) for name, (x, y, z) in list(BODY.items()) if name.startswith("r_")}


def bodies(count: int, skeleton: Skeleton, seed: int, noise: float = 0.08) -> np.ndarray:
    """(count, J, 3) metres: turned and bent bodies, pelvis (which is the middle of the hips) at the origin."""
    rng = np.random.default_rng(seed)
    points = np.array([BODY[name] for name in skeleton.joints]) + rng.normal(0, noise, (count, len(skeleton), 3))
    points = np.array(
        [Rotation.from_euler("y", a).apply(p) for a, p in zip(rng.uniform(0, 6, count), points, strict=True)]
    )
    points[:, skeleton.index("pelvis")] = points[:, skeleton.indices("r_hip", "l_hip")].mean(1)
    return points - points[:, [skeleton.index("pelvis")]]


def person(pose2d: np.ndarray, pose3d: np.ndarray, score: float = 1.0) -> Person:
    joints = len(pose2d)
    return Person(np.zeros(4), pose2d, pose3d, score, np.ones(joints), 0, 1, np.zeros(joints))


def as_model(pose: np.ndarray, source: Skeleton, target: Skeleton, origin: bool = True) -> np.ndarray:
    """A pose in a model's joints, its 3D about the torso as a model gives it."""
    out, seen = convert(pose, np.ones(len(source)), source, target)
    assert seen.all()
    return centre(out, target) if origin else out


def by_name(pose: np.ndarray, skeleton: Skeleton) -> dict[str, np.ndarray]:
    return dict(zip(skeleton.joints, pose, strict=True))


# --- Human3.6M


def h36m_json(folder: Path, subjects: tuple[int, ...] = (9, 11), frames: int = 130, ours: bool = False) -> np.ndarray:
    """Writes the JSON files as 3DMPPE's h36m2coco.py does, two actions and two cameras; (M, 17, 3) metres, in the
    cameras' frames, of each 64th frame. ours: t is the camera's place, as in the tool; else x = R X + t."""
    folder.mkdir(exist_ok=True)
    expected = []
    for subject in subjects:
        cameras, camera_of = {}, {}
        for key, angle in (("1", 0.3), ("2", 2.0)):
            rotation = Rotation.from_euler("xy", [0.1, angle]).as_matrix() @ np.array(
                [[1, 0, 0], [0, 0, -1], [0, 1, 0]]
            )
            shift = np.array([30.0, -80.0, 5200.0])  # millimetres, camera's frame; the scene's z is up
            camera_of[key] = (rotation, shift)
            t = -rotation.T @ shift if ours else shift
            cameras[key] = {"R": rotation.tolist(), "t": t.tolist(), "f": [1145.0, 1143.8], "c": [512.5, 515.5]}
        images: list[dict[str, Any]] = []
        boxes: list[dict[str, Any]] = []
        joints: dict[str, Any] = {}
        for action, label in ((2, "Directions"), (14, "Walking")):
            body = bodies(frames, H36M17, 100 * subject + action)
            world = 1000 * body @ np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]]) + [200, 100, 900]
            joints[str(action)] = {"1": {str(n): pose.tolist() for n, pose in enumerate(world)}}
            for key, (rotation, shift) in camera_of.items():
                name = f"s_{subject:02d}_act_{action:02d}_subact_01_ca_{int(key):02d}"
                seen = world @ rotation.T + shift
                pixels = seen[..., :2] / seen[..., 2:] * [1145.0, 1143.8] + [512.5, 515.5]
                low, size = pixels.min(1), np.ptp(pixels, 1) - 1
                low, size = low + size / 2 - 0.6 * size, 1.2 * size  # get_bbox
                for n in range(frames):
                    boxes.append({"id": len(boxes), "image_id": len(images), "bbox": [*low[n], *size[n]]})
                    images.append({"id": len(images), "file_name": f"{name}/{name}_{n + 1:06d}.jpg", "width": 1000,
                                   "height": 1002, "subject": subject, "action_name": label, "action_idx": action,
                                   "subaction_idx": 1, "cam_idx": int(key), "frame_idx": n})  # fmt: skip
                    if n % 64 == 0:
                        expected.append(seen[n] / 1000)
        data = {"images": images, "annotations": boxes}
        for kind, value in (("data", data), ("camera", cameras), ("joint_3d", joints)):
            (folder / f"Human36M_subject{subject}_{kind}.json").write_text(json.dumps(value))
    return np.array(expected)


def h36m_npz(file: Path, points: np.ndarray, pixels: np.ndarray, names: list[str]) -> None:
    """Writes an .npz as mmpose's preprocess_h36m.py does."""
    ones = np.ones((*points.shape[:2], 1))
    np.savez(file, imgname=np.array(names), center=np.zeros((len(names), 2)), scale=np.ones(len(names)),
             part=np.concatenate([pixels, ones], 2), S=np.concatenate([points, ones], 2))  # fmt: skip


@pytest.mark.parametrize("ours", [False, True], ids=["published", "tool"])
def test_h36m_json(tmp_path: Path, ours: bool) -> None:
    expected = h36m_json(tmp_path, ours=ours)
    benchmark = protocols.read("h36m", tmp_path, skeleton=H36M17)
    assert len(benchmark.images) == len(expected) == 2 * 2 * 2 * 3
    assert benchmark.groups == (["Directions"] * 6 + ["Walking"] * 6) * 2
    for image, points in zip(benchmark.images, expected, strict=True):
        people = image.people
        assert people.pose3d[0] == pytest.approx(centre(points, H36M17), abs=1e-5)
        camera = Camera(tuple(image.extra["camera"]["f"]), tuple(image.extra["camera"]["c"]))
        again = camera.project(people.pose3d[0] + np.array(image.extras[0]["root_camera"]))
        assert people.pose2d[0] == pytest.approx(again, abs=0.05)
        assert people.has3d.all() and (people.seen == 2).all() and not people.crowd.any()
        x1, y1, x2, y2 = people.box[0]
        assert 0 <= x1 < people.pose2d[0, :, 0].min() and people.pose2d[0, :, 1].max() < y2 <= image.height
        assert y1 < y2 and people.area[0] == pytest.approx((x2 - x1) * (y2 - y1))
    assert {image.extra["subject"] for image in benchmark.images} == {9, 11}
    assert len(protocols.read("h36m", tmp_path, every=10).images) == 2 * 2 * 2 * 13


def test_h36m_npz_is_the_same_as_json(tmp_path: Path) -> None:
    expected = h36m_json(tmp_path / "json", subjects=(9,))
    read = protocols.read("h36m", tmp_path / "json")
    names = [
        f"S9/S9_TakingPhoto_1.54138969/S9_TakingPhoto_1.54138969_{64 * n + 1:06d}.jpg" for n in range(len(expected))
    ]
    pixels = np.array(
        [image.people.pose2d[0] for image in protocols.read("h36m", tmp_path / "json", None, H36M17).images]
    )
    h36m_npz(tmp_path / "h36m_test.npz", expected, pixels, names)
    again = protocols.read("h36m", tmp_path / "h36m_test.npz")
    assert [image.file_name for image in again.images] == names and set(again.groups) == {"Photo"}
    for a, b in zip(read.images, again.images, strict=True):
        assert a.people.pose3d == pytest.approx(b.people.pose3d, abs=1e-6)
        assert a.people.pose2d == pytest.approx(b.people.pose2d, abs=1e-3)
        assert (b.width, b.height) == (1000, 1002)
    assert len(protocols.read("h36m", tmp_path / "h36m_test.npz", every=128).images) == (len(names) + 1) // 2


@pytest.mark.parametrize("skeleton", [LCR13, H36M17], ids=lambda s: s.name)
def test_h36m_figures(tmp_path: Path, skeleton: Skeleton) -> None:
    """MPJPE, PA-MPJPE and the rigid one of each action equal the loops'; the highest score is taken."""
    expected = h36m_json(tmp_path)
    benchmark = protocols.read("h36m", tmp_path, skeleton=skeleton)
    rng = np.random.default_rng(3)
    found, pairs = [], []
    for n, points in enumerate(expected):
        true = as_model(points, H36M17, skeleton)
        guess = (0.9 * true + rng.normal(0, 0.05, true.shape)) @ Rotation.from_euler("y", 0.2).as_matrix().T
        others = [
            person(true[:, :2], true + 9, 0.3),
            person(true[:, :2], guess, 0.8),
            person(true[:, :2], guess + 9, 0.4),
        ]
        found.append([] if n == 4 else others[: n % 3 + 2])  # image 4, S9's Directions, has nobody
        if n != 4:
            pairs.append((benchmark.groups[n], by_name(1000 * guess, skeleton), by_name(1000 * true, skeleton)))
    got = protocols.figures(benchmark, found)
    loops = golden.h36m(pairs)
    assert got["joints"] == list(skeleton.joints)
    assert (got["images"], got["found"], got["missed"]) == (24, 23, 1)
    for action, row in got["per_action"].items():
        assert row["mpjpe_mm"] == pytest.approx(loops[action]["mpjpe"], rel=1e-5)
        assert row["pa_mpjpe_mm"] == pytest.approx(loops[action]["pa"], rel=1e-5)
    assert got["per_action"]["Directions"]["images"] == 12 and got["per_action"]["Directions"]["found"] == 11
    # the mean of the actions is not that of the images: Directions has one less
    assert got["protocol1"]["mean_mm"] == pytest.approx(np.mean([v["mpjpe"] for v in loops.values()]), rel=1e-5)
    pooled = (11 * loops["Directions"]["pa"] + 12 * loops["Walking"]["pa"]) / 23
    assert got["protocol2"]["pooled_mm"] == pytest.approx(pooled, rel=1e-5)
    eleven = golden.h36m([("all", found, true) for _, found, true in pairs[11:]])["all"]
    assert got["s11"]["rigid_mpjpe_mm"] == pytest.approx(eleven["rigid"], rel=1e-5)
    assert got["s11"]["pa_mpjpe_mm"] == pytest.approx(eleven["pa"], rel=1e-5) and got["s11"]["found"] == 12
    assert "1 of 24 images" in got["note"] and "no image of Discussion" in got["note"]
    assert ("middle of the hips" in got["note"]) == (skeleton is LCR13)
    json.dumps(got, allow_nan=False)


def test_h36m_nobody_found(tmp_path: Path) -> None:
    h36m_json(tmp_path, subjects=(9,))
    benchmark = protocols.read("h36m", tmp_path)
    lost = person(np.zeros((13, 2)), np.full((13, 3), np.nan))
    got = protocols.figures(benchmark, [[lost] for _ in benchmark.images])
    assert got["missed"] == 12 and got["protocol1"]["mean_mm"] is None and got["s11"]["images"] == 0
    assert "S11 is not in the annotations" in got["note"]
    json.dumps(got, allow_nan=False)


# --- MuPoTS-3D


def mupots_files(folder: Path, seed: int = 0, sequences: tuple[str, ...] = ("TS1", "TS7")) -> list[dict[str, Any]]:
    """Writes annot.mat and occlusion.mat, 6 frames of 3 people, the third annotated in few; what is valid, by frame."""
    rng = np.random.default_rng(seed)
    frames = []
    for sequence in sequences:
        cells, hidden = np.empty((6, 3), object), np.empty((6, 3), object)
        for i in range(6):
            frame: dict[str, Any] = {"sequence": sequence, "file": f"{sequence}/img_{i:06d}.jpg", "true2d": [],
                                     "true3d": [], "metric": [], "hidden": []}  # fmt: skip
            for k, pose in enumerate(bodies(3, MPI_INF_3DHP17, int(rng.integers(1e6)))):
                points = 1000 * (pose + [k - 1, 0.1, 4 + 0.5 * k])
                pixels = 1100 * points[:, :2] / points[:, 2:] + [960, 540]
                valid, out_of_sight = int(i > 0 and (k < 2 or i == 3)), rng.random(17) < 0.3
                cells[i, k] = {"annot2": pixels.T, "annot3": points.T, "univ_annot3": 1.1 * points.T,
                               "isValidFrame": valid}  # fmt: skip
                hidden[i, k] = out_of_sight.astype(np.uint8)[None]
                if valid:
                    frame["true2d"].append(pixels)
                    frame["true3d"].append(1.1 * points)
                    frame["metric"].append(points / 1000)
                    frame["hidden"].append(out_of_sight)
            if frame["true2d"]:
                frames.append(frame)
        (folder / sequence).mkdir(parents=True, exist_ok=True)
        savemat(folder / sequence / "annot.mat", {"annotations": cells}, do_compression=True)
        savemat(folder / sequence / "occlusion.mat", {"occlusion_labels": hidden})
    return frames


def test_mupots_files(tmp_path: Path) -> None:
    frames = mupots_files(tmp_path)
    benchmark = protocols.read("mupots", tmp_path)
    assert [image.file_name for image in benchmark.images] == [frame["file"] for frame in frames]
    assert benchmark.groups == [frame["sequence"] for frame in frames] and len(frames) == 10  # frame 0 has nobody valid
    assert {(i.width, i.height) for i in benchmark.images} == {(2048, 2048), (1920, 1080)}
    for image, native, universal, frame in zip(
        benchmark.images, benchmark.native, benchmark.universal, frames, strict=True
    ):
        count = len(frame["true2d"])
        people = image.people
        assert len(people) == 3 and people.crowd.tolist() == [False] * count + [True] * (3 - count)
        assert len(image.extras) == len(image.ids) == 3
        for p in range(count):
            assert native.pose2d[p] == pytest.approx(frame["true2d"][p], abs=1e-3)
            assert (native.seen[p] == np.where(frame["hidden"][p], 1, 2)).all()
            root = frame["true3d"][p][MPI_INF_3DHP17.index("pelvis")]
            assert universal[p] == pytest.approx((frame["true3d"][p] - root) / 1000, abs=1e-9)
            assert people.pose3d[p] == pytest.approx(as_model(frame["metric"][p], MPI_INF_3DHP17, LCR13), abs=1e-5)
            assert people.has3d[p] and (people.seen[p] > 0).all()
            x1, y1, x2, y2 = people.box[p]
            assert 0 <= x1 < x2 <= image.width and 0 <= y1 < y2 <= image.height


def detections(frames: list[dict[str, Any]], skeleton: Skeleton, seed: int = 1) -> list[list[Person]]:
    """Of each frame: some people missed, some far off, some beside, two too many; in any order."""
    rng = np.random.default_rng(seed)
    out = []
    for n, frame in enumerate(frames):
        found = []
        for k, (pixels, points) in enumerate(zip(frame["true2d"], frame["true3d"], strict=True)):
            if (n + k) % 5 == 0:
                continue
            flat = as_model(pixels, MPI_INF_3DHP17, skeleton, origin=False)
            guess = as_model(points / 1000, MPI_INF_3DHP17, skeleton) + rng.normal(0, 0.09, (len(skeleton), 3))
            for _ in range(1 + n % 2):
                found.append(person(flat + rng.normal(0, 25, flat.shape), 0.8 * guess, float(rng.random())))
        found.append(person(rng.uniform(0, 1000, (len(skeleton), 2)), rng.normal(0, 0.3, (len(skeleton), 3))))
        out.append([found[i] for i in rng.permutation(len(found))])
    return out


@pytest.mark.parametrize("skeleton", [LCR13, MPI_INF_3DHP17], ids=lambda s: s.name)
def test_mupots_figures(tmp_path: Path, skeleton: Skeleton) -> None:
    """Matching, rescaling, 3DPCK and AUC equal the loops', for a model with all joints and for LCR13."""
    frames = mupots_files(tmp_path)
    benchmark = protocols.read("mupots", tmp_path, skeleton=skeleton)
    found = detections(frames, skeleton)
    got = protocols.figures(benchmark, found)
    names = MPI_INF_3DHP17.joints
    loops = [
        {
            "sequence": frame["sequence"],
            "true2d": [by_name(p, MPI_INF_3DHP17) for p in frame["true2d"]],
            "true3d": [by_name(p, MPI_INF_3DHP17) for p in frame["true3d"]],
            "hidden": [{name for name, h in zip(names, hidden, strict=True) if h} for hidden in frame["hidden"]],
            "found2d": [by_name(p.pose2d, skeleton) for p in persons],
            "found3d": [by_name(1000 * p.pose3d, skeleton) for p in persons],
        }
        for frame, persons in zip(frames, found, strict=True)
    ]
    counted = [*golden.LIMBS] if skeleton is LCR13 else ["head_top", *golden.LIMBS]
    assert sorted(got["joints"]) == sorted(counted)
    assert 0 < got["matched"] < got["people"] == 22
    for name in ("rescaled", "as_is"):
        want = golden.mupots(loops, counted, scale=name == "rescaled")
        for which, row in want.items():
            for figure, value in row.items():
                assert got[name][which][figure] == pytest.approx(value, abs=1e-6), (name, which, figure)
    assert 0.2 < got["rescaled"]["all"]["pck3d"] < got["rescaled"]["matched"]["pck3d"] < 1
    rows = got["per_sequence"]
    assert list(rows) == ["TS1", "TS7"] and sum(row["people"] for row in rows.values()) == 22
    mean = np.mean([row["pck3d_all"] for row in rows.values()])
    assert got["rescaled"]["all"]["pck3d"] == pytest.approx(mean)
    assert ("head" in got["per_joint_group"]) == (skeleton is MPI_INF_3DHP17)
    assert "2 of 20 sequences" in got["note"] and ("neck: the middle" in got["note"]) == (skeleton is LCR13)
    json.dumps(got, allow_nan=False)


def test_mupots_truth_is_perfect(tmp_path: Path) -> None:
    """The truth itself has 3DPCK 1 as it is and rescaled; half its size only when rescaled; nobody found has 0."""
    frames = mupots_files(tmp_path)
    benchmark = protocols.read("mupots", tmp_path, skeleton=MPI_INF_3DHP17)
    for factor in (1.0, 0.5):
        found = [
            [person(flat, factor * points / 1000) for flat, points in zip(f["true2d"], f["true3d"], strict=True)]
            for f in frames
        ]
        got = protocols.figures(benchmark, found)
        assert got["rescaled"]["all"]["pck3d"] == 1 and got["matched"] == got["people"]
        assert got["rescaled"]["all"]["auc3d"] == pytest.approx(30 / 31)  # nothing is below 0 mm
        assert (got["as_is"]["all"]["pck3d"] == 1) == (factor == 1)
    got = protocols.figures(benchmark, [[] for _ in frames])
    assert got["rescaled"]["all"]["pck3d"] == 0 and got["rescaled"]["matched"]["pck3d"] is None
    assert "nobody matched in TS1, TS7" in got["note"]


def test_mupots_matching_is_in_order_and_by_count() -> None:
    """The first true person takes the found one with most joints near, even if the second would fit it better."""
    true = np.zeros((2, 3, 2))
    true[1] += 30
    found = np.array([np.full((3, 2), 30.0), np.full((3, 2), 500.0)])
    assert protocols._match(true, found).tolist() == [0, -1]
    found[1, 0] = 1  # one joint near is enough
    assert protocols._match(true, found).tolist() == [0, 1]
    assert protocols._match(true[:1], np.full((1, 3, 2), 40.0)).tolist() == [-1]  # nearer than 40, not at 40
    assert protocols._match(true, np.zeros((0, 3, 2))).tolist() == [-1, -1]


# --- real frames


def test_real_h36m_frames(shared: Path, tmp_path: Path) -> None:
    """Real frames written as mmpose writes them come back as they are; their 3D, projected, is their 2D."""
    data = coco.read(shared / "h36m" / "annotations" / "lcrnet_pose.json")
    points, pixels, names = [], [], []
    for n, image in enumerate(data.images):
        people, camera = image.people, image.extra["camera"]
        place = people.pose3d[0] + np.array(image.extras[0]["root_camera"])
        off = np.linalg.norm(Camera(tuple(camera["f"]), tuple(camera["c"])).project(place) - people.pose2d[0], axis=-1)
        assert off.max() < 3 and off.mean() < 2  # lens distortion is left out
        whole, seen = convert(place, np.ones(13), LCR13, H36M17)
        flat, _ = convert(people.pose2d[0], np.ones(13), LCR13, H36M17)
        for pose in (whole, flat):  # spine, neck and top of the head are not in LCR13: any point will do
            pose[seen == 0] = pose[0]
        points.append(whole)
        pixels.append(flat)
        camera_id = "54138969" if image.height == 1002 else "55011271"
        names.append(f"S11/S11_Greeting.{camera_id}/S11_Greeting.{camera_id}_{n + 1:06d}.jpg")
    h36m_npz(tmp_path / "h36m_test.npz", np.array(points), np.array(pixels), names)
    for name, image in zip(names, data.images, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shared / "h36m" / "images" / image.file_name, tmp_path / name)
    benchmark = protocols.read("h36m", tmp_path / "h36m_test.npz", tmp_path)
    for real, read in zip(data.images, benchmark.images, strict=True):
        assert (real.width, real.height) == (read.width, read.height)
        assert read.people.pose3d == pytest.approx(real.people.pose3d, abs=1e-4)
        assert read.people.pose2d == pytest.approx(real.people.pose2d, abs=1e-2)
        assert read.extras[0]["root_camera"] == pytest.approx(real.extras[0]["root_camera"], abs=1e-4)
    found = [[person(i.people.pose2d[0], i.people.pose3d[0])] for i in data.images]
    assert protocols.figures(benchmark, found)["protocol1"]["mean_mm"] < 0.2


def test_real_3dhp_frames(shared: Path, tmp_path: Path) -> None:
    """The same of MPI-INF-3DHP's frames, whose camera, units and joints are MuPoTS-3D's."""
    data = coco.read(shared / "mpi-inf-3dhp" / "annotations" / "lcrnet_pose.json")
    cells, hidden = np.empty((len(data.images), 1), object), np.empty((len(data.images), 1), object)
    for n, image in enumerate(data.images):
        people, camera = image.people, image.extra["camera"]
        place = people.pose3d[0] + np.array(image.extras[0]["root_camera"])
        off = np.linalg.norm(Camera(tuple(camera["f"]), tuple(camera["c"])).project(place) - people.pose2d[0], axis=-1)
        assert off.max() < 3 and off.mean() < 2
        whole, seen = convert(1000 * place, np.ones(13), LCR13, MPI_INF_3DHP17)
        flat, _ = convert(people.pose2d[0], np.ones(13), LCR13, MPI_INF_3DHP17)
        middle = MPI_INF_3DHP17.index("pelvis")
        for pose in (whole, flat):
            pose[seen == 0] = pose[middle]
        cells[n, 0] = {"annot2": flat.T, "annot3": whole.T, "univ_annot3": whole.T, "isValidFrame": True}
        hidden[n, 0] = np.zeros((1, 17))
    (tmp_path / "TS1").mkdir()
    savemat(tmp_path / "TS1" / "annot.mat", {"annotations": cells})
    savemat(tmp_path / "TS1" / "occlusion.mat", {"occlusion_labels": hidden})
    benchmark = protocols.read("mupots", tmp_path)
    for real, read in zip(data.images, benchmark.images, strict=True):
        assert read.people.pose3d == pytest.approx(real.people.pose3d, abs=1e-4)
        assert read.people.pose2d == pytest.approx(real.people.pose2d, abs=1e-2)
        assert read.extras[0]["root_camera"] == pytest.approx(real.extras[0]["root_camera"], abs=1e-4)


# --- files that are not as they should be


def _edit(folder: Path, kind: str, change: Callable[[Any], Any]) -> None:
    file = folder / f"Human36M_subject9_{kind}.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


H36M_FAULTS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "no images": ("data", lambda d: d.pop("images"), "images: expected a list of objects"),
    "an image that is a number": ("data", lambda d: d["images"].append(5), "images: expected a list of objects"),
    "no annotations": ("data", lambda d: d.update(annotations=None), "annotations: expected a list of objects"),
    "an image without a person": ("data", lambda d: d["annotations"].pop(0), "none has the image_id 0 of"),
    "no box": ("data", lambda d: d["annotations"][0].update(bbox=[1]), r"annotations\[0\].bbox: expected 4 numbers"),
    "no frame": ("data", lambda d: d["images"][1].pop("frame_idx"), r"images\[1\].frame_idx"),
    "a true frame": ("data", lambda d: d["images"][0].update(frame_idx=True), r"images\[0\].frame_idx"),
    "a way out": ("data", lambda d: d["images"][0].update(file_name="../../x.jpg"), "leaves the folder"),
    "no action": ("data", lambda d: d["images"][0].update(action_name=3), r"images\[0\].action_name"),
    "no pose": ("joint_3d", lambda d: d["2"]["1"].pop("0"), r"\[2\]\[1\]\[0\]: missing"),
    "16 joints": ("joint_3d", lambda d: d["2"]["1"]["0"].pop(), r"\[2\]\[1\]\[0\]: expected 17 x 3 numbers"),
    "NaN": ("joint_3d", lambda d: d["2"]["1"]["0"].__setitem__(0, [float("nan")] * 3), "expected 17 x 3 numbers"),
    "metres": ("joint_3d", lambda d: d.update(json.loads(json.dumps(d), parse_float=lambda x: float(x) / 1000)),
               "boxes are"),
    "no camera": ("camera", lambda d: d.pop("2"), r"\[2\]: expected an object with R, t, f, c"),
    "no rotation": ("camera", lambda d: d["1"].update(R=[[2, 0, 0], [0, 1, 0], [0, 0, 1]]), r"\[1\].R: no rotation"),
    "words": ("camera", lambda d: d["1"].update(f=["a", "b"]), r"\[1\].f: expected 2 numbers"),
    "another camera": ("camera", lambda d: d["1"].update(R=[[1, 0, 0], [0, 1, 0], [0, 0, 1]]), "boxes are"),
}  # fmt: skip


@pytest.mark.parametrize("fault", H36M_FAULTS)
def test_h36m_json_faults(tmp_path: Path, fault: str) -> None:
    kind, change, message = H36M_FAULTS[fault]
    h36m_json(tmp_path, subjects=(9,), frames=2)
    _edit(tmp_path, kind, change)
    with pytest.raises(UserError, match=message) as error:
        protocols.read("h36m", tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_h36m_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no Human36M_subject9_data"):
        protocols.read("h36m", tmp_path)
    with pytest.raises(UserError, match=r"none\.npz: No such file"):
        protocols.read("h36m", tmp_path / "none.npz")
    for name, content in (("a", b"hello"), ("b", b"PK\x03\x04 cut"), ("c", b"")):
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"no \.npz file of Human3\.6M"):
            protocols.read("h36m", tmp_path / f"{name}.npz")
    (tmp_path / "Human36M_subject9_data.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not JSON"):
        protocols.read("h36m", tmp_path)
    with pytest.raises(UserError, match="'coco' is no benchmark"):
        protocols.read("coco", tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imgname": np.array([b"a"], object)}, "no .npz file of Human3.6M: Object arrays"),
        ({"imgname": np.array(["S9_Directions.jpg"])}, "is not like"),
        ({"imgname": np.array(["../S9_Directions_1.54138969_000001.jpg"])}, "is not like"),
        ({"imgname": np.array(["S9_Directions_1.11111111_000001.jpg"])}, "is of none of the cameras"),
        ({"imgname": np.array(["S1_Directions_1.54138969_000001.jpg"])}, "no image of subjects S9 and S11"),
        ({"S": np.zeros((1, 17, 3))}, "S: expected 1 x 17 x 4 numbers, found float64"),
        ({"S": np.full((1, 17, 4), np.nan)}, "S: row 0 has a number that is not finite"),
        ({"S": np.ones((1, 17, 4))}, "from the torso: other units"),
        ({"part": np.zeros((1, 17, 3), "U1")}, "part: expected"),
    ],
)
def test_h36m_npz_faults(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    body = np.concatenate([bodies(1, H36M17, 0) + [0, 0, 5], np.ones((1, 17, 1))], 2)
    fields = {"imgname": np.array(["S9_Directions_1.54138969_000001.jpg"]), "S": body, "part": np.ones((1, 17, 3))}
    np.savez(tmp_path / "a.npz", **fields)
    protocols.read("h36m", tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", **(fields | change))
    with pytest.raises(UserError, match=message):
        protocols.read("h36m", tmp_path / "a.npz")


def test_missing_images_are_told(tmp_path: Path) -> None:
    frames = mupots_files(tmp_path)
    with pytest.raises(UserError, match=r"10 of 10 images are missing, the first is TS1/img_000001\.jpg"):
        protocols.read("mupots", tmp_path, tmp_path)
    for frame in frames:
        (tmp_path / frame["file"]).touch()
    assert len(protocols.read("mupots", tmp_path, tmp_path).images) == 10


def _cell(**change: Any) -> np.ndarray:
    points = 1000 * (bodies(1, MPI_INF_3DHP17, 0)[0] + [0, 0, 4])
    cell = {"annot2": np.ones((2, 17)), "annot3": points.T, "univ_annot3": points.T, "isValidFrame": 1} | change
    cells = np.empty((1, 1), object)
    cells[0, 0] = {name: value for name, value in cell.items() if value is not None}
    return cells


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        (
            _cell(annot3=np.ones((17, 3))),
            r"annotations\{1,1\}\.annot3: expected 3 x 17 numbers, found float64 \(17, 3\)",
        ),
        (_cell(annot2=np.full((2, 17), np.nan)), r"annotations\{1,1\}\.annot2: numbers that are not finite"),
        (_cell(annot3=np.random.default_rng(0).normal(0, 1e6, (3, 17))), r"annot3: .* other units"),
        (_cell(univ_annot3=None), r"annotations\{1,1\}\.univ_annot3: missing"),
        (_cell(isValidFrame="yes"), r"isValidFrame: expected 1 x 1 numbers"),
        (_cell(isValidFrame=0), "no person of TS1 has isValidFrame 1"),
        (np.ones((2, 2)), "annotations: expected cells"),
        (np.array([["a", "b"]], object), r"annotations\{1,1\}\.isValidFrame: missing"),
    ],
)
def test_mupots_faults(tmp_path: Path, annotations: np.ndarray, message: str) -> None:
    mupots_files(tmp_path, sequences=("TS1",))
    labels = np.empty(annotations.shape, object)
    labels.fill(np.zeros((1, 17)))
    savemat(tmp_path / "TS1" / "occlusion.mat", {"occlusion_labels": labels})
    savemat(tmp_path / "TS1" / "annot.mat", {"annotations": annotations})
    with pytest.raises(UserError, match=message) as error:
        protocols.read("mupots", tmp_path)
    assert str(tmp_path) in str(error.value)


def test_mupots_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no TS1/annot"):
        protocols.read("mupots", tmp_path)
    mupots_files(tmp_path, sequences=("TS1",))
    good = (tmp_path / "TS1" / "annot.mat").read_bytes()
    rng = np.random.default_rng(0)
    for n in range(150):  # cut, and with wrong bytes: told, or read if nothing that matters was hit
        data = bytearray(good[: int(rng.integers(len(good)))] if n % 3 == 0 else good)
        for at in rng.integers(0, max(len(data), 1), n % 5):
            if data:
                data[at] = int(rng.integers(256))
        (tmp_path / "TS1" / "annot.mat").write_bytes(data)
        try:
            protocols.read("mupots", tmp_path)
        except UserError as error:
            assert "TS1" in str(error)
    (tmp_path / "TS1" / "annot.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x00" * 400)
    with pytest.raises(UserError, match="a MATLAB 7"):
        protocols.read("mupots", tmp_path)
    (tmp_path / "TS1" / "annot.mat").write_bytes(good)
    (tmp_path / "TS1" / "occlusion.mat").unlink()
    with pytest.raises(UserError, match=r"occlusion\.mat: No such file"):
        protocols.read("mupots", tmp_path)


def test_figures_need_all_images(tmp_path: Path) -> None:
    mupots_files(tmp_path)
    with pytest.raises(ValueError, match="10 images of truth, but detections of 1"):
        protocols.figures(protocols.read("mupots", tmp_path), [[]])
