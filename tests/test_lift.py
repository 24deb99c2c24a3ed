"""2D labels get 3D poses from motion capture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lcrnet import body, coco, lift, mocap
from lcrnet.annotations import CocoImage
from lcrnet.config import Lift, UserError
from lcrnet.lift import Bank
from lcrnet.mocap import Mocap
from lcrnet.pose import People, box_of, centre, mirror2d, mirror3d
from lcrnet.skeleton import LCR13

SETTINGS = Lift(headings=8, elevations=(0, 20), neighbours=12)
NEAREST = SETTINGS.model_copy(update={"neighbours": 1, "roll": 0.0, "tilt": 0.0})


def poses(count: int, seed: int = 0) -> Mocap:
    """Poses of drawn people."""
    rng = np.random.default_rng(seed)
    pose3d = np.stack([body.sample(rng, 180).joints for _ in range(count)])
    names = np.full(count, "")
    return Mocap(centre(pose3d, LCR13).astype(np.float32), names, names)


@pytest.fixture(scope="module")
def bank() -> Bank:
    return Bank.of(poses(60), SETTINGS)


def labelled(pose2d: np.ndarray, seen: np.ndarray | int = 2) -> People:
    """People with these 2D joints (P, J, 2)."""
    out = People.empty(len(pose2d), len(LCR13))
    out.pose2d, out.box, out.seen[:] = pose2d.astype(np.float32), box_of(pose2d.astype(np.float32)), seen
    return out


def flat(pose3d: np.ndarray, roll: float = 0, scale: float = 80, at: tuple[float, float] = (200, 150)) -> np.ndarray:
    """How a scaled orthographic camera with this roll sees poses (..., J, 3)."""
    turn = np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]])
    return scale * pose3d[..., :2] @ turn + np.array(at)


def strangers(count: int = 12, seed: int = 5) -> tuple[People, np.ndarray]:
    """(people in poses that the bank has not, their 3D poses)."""
    pose3d = poses(count, seed).pose3d
    return labelled(flat(pose3d)), pose3d


def in_bank(bank: Bank, pose: int, view: int) -> np.ndarray:
    """A pose of the bank in one of its views, rotations written out."""
    (heading, elevation), p = bank.view[view], bank.pose3d[pose].astype(np.float64)
    about_y = np.array([[np.cos(heading), 0, np.sin(heading)], [0, 1, 0], [-np.sin(heading), 0, np.cos(heading)]])
    c, s = np.cos(elevation), np.sin(elevation)
    return p @ (np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ about_y).T


@pytest.mark.parametrize("roll", [0, 0.3, np.pi])
def test_a_pose_of_the_bank_comes_back(bank: Bank, roll: float) -> None:
    """Whatever the roll, scale and place of the camera: pose, view and roll are found, metres are the bank's."""
    truth = np.stack([in_bank(bank, pose, view) for pose, view in ((0, 0), (17, 5), (80, 11), (119, 15))])
    pose2d = flat(truth, roll)
    people, error = lift.lift(labelled(pose2d), bank, NEAREST)
    rolled = truth.copy()
    rolled[..., :2] = flat(truth, roll, 1, (0, 0))
    np.testing.assert_allclose(people.pose3d, rolled, atol=2e-3)  # pixels are float32, costs of the search too
    assert people.has3d.all() and error.max() < 1e-3 and people.trust.min() > 0.99


def test_elevation_looks_down(bank: Bank) -> None:
    """From above, what is nearer to the camera lies lower in the image."""
    view = int(np.flatnonzero(bank.view[:, 1] > 0)[0])
    level = int(np.flatnonzero((bank.view[:, 1] == 0) & (bank.view[:, 0] == bank.view[view, 0]))[0])
    lower = bank.flat[:, view].imag - bank.flat[:, level].imag * np.cos(bank.view[view, 1])
    depth = np.stack([in_bank(bank, n, level)[:, 2] for n in range(len(bank.pose3d))])
    np.testing.assert_allclose(lower, -depth * np.sin(bank.view[view, 1]), atol=1e-5)


@pytest.mark.parametrize("missing", [(), (0, 7), (12, 4, 5)])
def test_nearest_is_that_of_a_plain_search(bank: Bank, missing: tuple[int, ...]) -> None:
    """Against least squares of every pose in every view, one by one."""
    people, _ = strangers(4)
    people.seen[:, list(missing)] = 0
    keep = np.setdiff1d(np.arange(13), missing)
    (_, fit), *rest = lift.fits(people, bank, NEAREST)
    assert not rest
    for person in range(len(people)):
        goal = people.pose2d[person, keep].astype(np.float64)
        goal = (goal - goal.mean(0)).reshape(-1)
        best, found = np.inf, None
        for pose in range(len(bank.pose3d)):
            for view in range(len(bank.view)):
                x, y = in_bank(bank, pose, view)[keep, :2].T
                matrix = np.zeros((len(keep), 2, 4))  # pixels = a x - b y + c, b x + a y + d
                matrix[:, 0] = np.stack([x, -y, np.ones_like(x), 0 * x], 1)
                matrix[:, 1] = np.stack([y, x, 0 * x, np.ones_like(x)], 1)
                solution, left, *_ = np.linalg.lstsq(matrix.reshape(-1, 4), goal, rcond=None)
                if left[0] < best:
                    best, found = left[0], (pose, view, np.arctan2(solution[1], solution[0]))
        assert found
        assert fit.error[person] == pytest.approx(np.sqrt(best / (goal**2).sum()), rel=1e-3)
        expected = in_bank(bank, found[0], found[1])
        expected[:, :2] = flat(expected, found[2], 1, (0, 0))
        np.testing.assert_allclose(fit.nearest[person], expected, atol=1e-3)


def test_mirrored_people_get_mirrored_poses(bank: Bank) -> None:
    people, _ = strangers()
    other = replace(people, pose2d=mirror2d(people.pose2d, 400, LCR13))
    one, error = lift.lift(people, bank, SETTINGS)
    two, same = lift.lift(other, bank, SETTINGS)
    np.testing.assert_allclose(same, error, atol=1e-3)
    np.testing.assert_allclose(two.pose3d, mirror3d(one.pose3d, LCR13), atol=5e-3)


def test_result_is_a_body_over_its_labels(bank: Bank) -> None:
    """Origin on the torso, bones about as long as the bank's, and nearer to the labelled joints than the nearest."""
    people, _ = strangers()
    (_, fit), *_ = lift.fits(people, bank, SETTINGS)
    a, b = LCR13.bones.T
    lengths = [np.linalg.norm(p[..., a, :] - p[..., b, :], axis=-1) for p in (fit.pose3d, bank.pose3d)]
    assert np.abs(lengths[0].mean(0) / lengths[1].mean(0) - 1).max() < 0.1
    np.testing.assert_allclose(fit.pose3d, centre(fit.pose3d, LCR13), atol=1e-6)
    assert (residual(fit.pose3d, people) < 0.6 * residual(fit.nearest, people)).all()


def residual(pose3d: np.ndarray, people: People) -> np.ndarray:
    """(P,) what a 2D similarity leaves, in units of the 2D pose."""
    z, q = (v[..., 0] + 1j * v[..., 1] for v in (pose3d.astype(np.float64), people.pose2d.astype(np.float64)))
    z, q = (v - v.mean(1, keepdims=True) for v in (z, q))
    size = (np.abs(z) ** 2).sum(1) * (np.abs(q) ** 2).sum(1)
    return np.sqrt(np.maximum(1 - np.abs((z.conj() * q).sum(1)) ** 2 / size, 0))


def test_unlabelled_joints_come_from_motion_capture(bank: Bank) -> None:
    """Where they are in 2D does not matter, and they stay unlabelled there."""
    people, truth = strangers()
    people.seen[:, LCR13.indices("r_ankle", "l_wrist")] = 0
    one, _ = lift.lift(people, bank, SETTINGS)
    people.pose2d[people.seen == 0] = np.nan
    two, _ = lift.lift(people, bank, SETTINGS)
    np.testing.assert_array_equal(one.pose3d, two.pose3d)
    assert (two.seen == people.seen).all() and np.isfinite(two.pose3d).all()
    off = np.linalg.norm(two.pose3d - truth, axis=-1)[:, LCR13.index("r_ankle")]
    assert np.median(off) < 0.4 < np.linalg.norm(truth[:, LCR13.index("r_ankle")], axis=-1).mean()


def test_who_stays_without(bank: Bank) -> None:
    people, _ = strangers(7)
    people.crowd[0] = True
    people.seen[1, :6] = 0
    people.pose2d[2] = 7
    people.pose2d[3, 4] = np.inf
    people.has3d[4], people.trust[4] = True, 0.7
    people.pose2d[5] = np.random.default_rng(0).uniform(0, 99, (13, 2))  # nobody
    before = people.copy()
    after, error = lift.lift(people, bank, SETTINGS)
    assert after.has3d.tolist() == [False] * 4 + [True, False, True]
    assert np.isnan(error).tolist() == [True] * 5 + [False] * 2
    assert error[5] > SETTINGS.max_error > error[6]
    np.testing.assert_array_equal(after.pose3d[:6], 0)
    assert after.trust[:6].tolist() == before.trust[:6].tolist() and 0 < after.trust[6] < 1
    for name in ("pose2d", "pose3d", "has3d", "trust", "seen"):
        np.testing.assert_array_equal(getattr(people, name), getattr(before, name))  # the argument is left alone

    after, error = lift.lift(people, bank, SETTINGS, replace_3d=True)
    assert after.pose3d[4].any() and 0 < after.trust[4] < 0.7 and error[4] <= SETTINGS.max_error


def test_trust_falls_with_the_fit(bank: Bank) -> None:
    truth = np.stack([in_bank(bank, pose, 3) for pose in range(0, 40, 4)])
    rng, medians, errors = np.random.default_rng(0), [], []
    for noise in (0, 5, 10, 20):
        people = labelled(flat(truth) + rng.normal(0, noise, (len(truth), 13, 2)))
        people, error = lift.lift(people, bank, SETTINGS.model_copy(update={"max_error": 9.0}))
        medians.append(float(np.median(people.trust)))
        errors.append(float(np.median(error)))
    assert medians == sorted(medians, reverse=True) and errors == sorted(errors)
    assert medians[0] - medians[-1] > 0.1


def test_parts_and_repetition_change_nothing(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    people, _ = strangers(10)
    people.seen[::3, 0] = 0
    counts: list[int] = []
    whole, error = lift.lift(people, bank, SETTINGS)
    again, _ = lift.lift(people, bank, SETTINGS)
    monkeypatch.setattr(lift, "ENTRIES", 3 * len(bank.pose3d) * len(bank.view))
    parts, same = lift.lift(people, bank, SETTINGS, advance=counts.append)
    np.testing.assert_array_equal(again.pose3d, whole.pose3d)
    np.testing.assert_allclose(parts.pose3d, whole.pose3d, atol=1e-5)  # BLAS sums in another order
    np.testing.assert_allclose(same, error, atol=1e-5)
    assert sum(counts) == len(people) and max(counts) == 3


def test_roll_costs() -> None:
    """Somebody upside down is a standing pose, rolled, or if roll is dear one that was recorded upside down."""
    some = poses(2)
    some.pose3d[1] *= [-1, -1, 1]
    bank = Bank.of(some, SETTINGS.model_copy(update={"elevations": (0.0,)}))
    people = labelled(flat(in_bank(bank, 0, 0)[None], np.pi))
    errors = []
    for roll in (0.0, 5.0):
        (_, fit), *_ = lift.fits(people, bank, NEAREST.model_copy(update={"roll": roll}))
        errors.append(fit.error[0])
    assert errors[0] < 1e-3 and errors[1] > 0.1


def test_large_files_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lift, "MOST_POSES", 9)
    one, two = (Bank.of(poses(30), SETTINGS, seed=1) for _ in range(2))
    assert one.pose3d.shape == (18, 13, 3) and one.flat.shape == (18, 16, 13)
    np.testing.assert_array_equal(one.flat, two.flat)
    few, _ = lift.lift(strangers(3)[0], one, SETTINGS.model_copy(update={"neighbours": 256}))
    assert few.has3d.all()


def test_images_keep_what_they_carry(bank: Bank) -> None:
    people, _ = strangers(4)
    people.seen[1, :6] = 0
    people.pose2d[3] = np.random.default_rng(0).uniform(0, 99, (13, 2))
    images = [
        CocoImage(5, "a.jpg", 400, 300, "g", people[[0, 1]], [7, 8], {"license": 1}, [{"score": 1, "who": "A"}, {}]),
        CocoImage(6, "b.jpg", 400, 300, None, people[[]]),
        CocoImage(7, "c.jpg", 400, 300, None, people[[2, 3]]),
    ]
    out, done, left = lift.lift_images(images, bank, SETTINGS)
    assert done == 2 and [len(image.people) for image in out] == [2, 0, 2]
    assert [(one.file_name, one.id, one.reason.split()[0]) for one in left] == [
        ("a.jpg", 8, "7"),
        ("c.jpg", 0, "error"),
    ]
    assert (out[0].id, out[0].group, out[0].ids, out[0].extra) == (5, "g", [7, 8], {"license": 1})
    extra = out[0].extras[0]
    assert extra["who"] == "A" and extra["pose_3d_source"] == "lift" and 0 < extra["lift_error"] < 0.5
    assert out[0].extras[1] == {} and images[0].extras[0] == {"score": 1, "who": "A"}
    assert set(out[2].extras[1]) == {"lift_error"}
    assert lift.lift_images([], bank, SETTINGS) == ([], 0, [])


def test_check_wants_somebody_to_compare_with(bank: Bank) -> None:
    with pytest.raises(UserError, match="nobody has a 3D pose"):
        lift.check(strangers()[0], bank, SETTINGS)


def test_the_skeleton_must_be_the_banks(bank: Bank) -> None:
    with pytest.raises(ValueError, match="lcr13"):
        next(lift.fits(People.empty(1, 17), bank, SETTINGS))


def test_lspet(shared: Path) -> None:
    """Every twelfth person of the half that nothing was tuned on: far better than simpler ways, and better
    where trust is higher. The 3D labels are a teacher network's, not measured."""
    data = coco.read(shared / "lspet" / "annotations" / "lcrnet_pose.json")
    people = lift.everybody(data.images, data.skeleton)[1::12]
    bank = Bank.of(mocap.read(shared / "mocap" / "poses.npz"), Lift())
    found = lift.check(people, bank, Lift())
    methods = {name: pa for name, (_, pa) in found["methods"].items()}
    assert found["people"] == len(people) > 100
    assert methods["lifted"] < 108  # 99.5 mm over the whole half; the mean of 108 people is uncertain by 3 mm
    assert methods["lifted"] < 0.8 * methods["nearest, as it is"] < 0.6 * methods["random pose"] + 30
    pa = [row[-1] for row in found["trust"]]
    assert np.mean(pa[:2]) + 15 < np.mean(pa[-2:])
    assert [row[2] for row in found["trust"]] == [len(r) for r in np.array_split(np.arange(len(people)), 5)]
