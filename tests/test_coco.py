"""COCO files: round trips, every fault by name, real data, pycocotools."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lcrnet import coco, config, labels
from lcrnet.config import UserError
from lcrnet.pose import People, Person, centre
from lcrnet.skeleton import COCO17, LCR13, LSP14, Skeleton

FILES = {  # file: images, people, of them ignored, with 3D
    "coco-mini/annotations/lcrnet_pose.json": (15, 83, 65, 18),
    "coco-mini/annotations/person_keypoints.json": (51, 172, 86, 0),
    "lspet/annotations/lcrnet_pose.json": (1298, 1298, 0, 1298),
    "lspet/annotations/person_keypoints.json": (1508, 1508, 0, 0),
    "h36m/annotations/lcrnet_pose.json": (2, 2, 0, 2),
    "mpi-inf-3dhp/annotations/lcrnet_pose.json": (2, 2, 0, 2),
}


def people(seed: int, count: int, skeleton: Skeleton = LCR13, size: tuple[int, int] = (640, 480)) -> People:
    """Some people inside an image, rounded as a file rounds."""
    r = np.random.default_rng(seed)
    out = People.empty(count, len(skeleton))
    low = r.uniform(0, 0.5, (count, 2)) * size
    out.box[:] = np.round(np.concatenate([low, low + r.uniform(0.1, 0.4, (count, 2)) * size], 1), 3)
    out.area[:] = np.round(r.uniform(50, 5000, count), 3)
    out.has3d[:] = r.random(count) < 0.5
    out.crowd[:] = r.random(count) < 0.2
    out.trust[:] = np.round(r.uniform(0, 1, count), 6)
    out.seen[:] = np.where(out.has3d[:, None], r.integers(1, 3, out.seen.shape), r.integers(0, 3, out.seen.shape))
    out.seen[:, 0] = np.maximum(out.seen[:, 0], 1)
    out.pose2d[:] = np.where(out.seen[..., None] > 0, np.round(r.uniform(0, 1, out.pose2d.shape) * size, 3), 0)
    pose3d = centre(r.normal(size=out.pose3d.shape), skeleton)
    out.pose3d[:] = np.where(out.has3d[:, None, None], np.round(pose3d, 5), 0)
    return out


def image(number: int = 0, count: int = 2, name: str | None = None, **more: Any) -> coco.CocoImage:
    return coco.CocoImage(number, name or f"{number}.jpg", 640, 480, None, people(number, count), **more)


def same(a: People, b: People) -> None:
    for name in vars(a):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-3, rtol=1e-6, err_msg=name)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 4), joints=st.integers(1, 20))
def test_pose65_both_ways(seed: int, count: int, joints: int) -> None:
    flat = np.random.default_rng(seed).normal(size=(count, 5 * joints))
    pose2d, pose3d = coco.from_pose65(flat)
    assert pose2d.shape == (count, joints, 2) and pose3d.shape == (count, joints, 3)
    np.testing.assert_array_equal(coco.to_pose65(pose2d, pose3d), flat)
    one = coco.from_pose65(np.arange(5 * joints))
    assert one[0][0].tolist() == [0, joints]
    assert one[1][0].tolist() == [-2 * joints, -3 * joints, 4 * joints]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), counts=st.lists(st.integers(0, 3), max_size=4), other=st.booleans())
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, seed: int, counts: list[int], other: bool
) -> None:
    file = tmp_path_factory.mktemp("coco") / "ann.json"
    skeleton = COCO17 if other else LCR13
    before = [
        coco.CocoImage(0, f"a/{n}.jpg", 640, 480, f"clip{n}", people(seed + n, count, skeleton))
        for n, count in enumerate(counts)
    ]
    coco.write(file, before, skeleton)
    assert coco.check(file, skeleton) == []
    after = coco.read(file, skeleton).images
    assert [(i.id, i.file_name, i.group) for i in after] == [
        (n + 1, i.file_name, i.group) for n, i in enumerate(before)
    ]
    assert [i for image in after for i in image.ids] == list(range(1, sum(counts) + 1))
    for a, b in zip(before, after, strict=True):
        same(a.people, b.people)
    coco.write(file.with_name("again.json"), after, skeleton)
    assert file.with_name("again.json").read_text() == file.read_text()


def test_other_fields_and_ids_are_written_through(tmp_path: Path) -> None:
    extras = [{"score": 0.5, "root_camera": [0.1, 0.2, 3]}, {"segmentation": [[1, 2, 3, 4, 5, 6]]}]
    camera = {"f": [1, 2], "c": [3, 4]}
    first = image(7, 2, "x/y.jpg", ids=[5, 0], extra={"camera": camera, "license": 2}, extras=extras)
    empty = image(0, 0, "negative.jpg")
    coco.write(tmp_path / "a.json", [first, empty], info={"description": "d"}, licenses=[{"id": 2}])
    found = coco.read(tmp_path / "a.json")
    assert found.info == {"description": "d"} and found.licenses == [{"id": 2}]
    assert [(i.id, i.ids, len(i.people)) for i in found.images] == [(7, [5, 6], 2), (8, [], 0)]
    assert found.images[0].extra == first.extra
    assert found.images[0].extras[0].items() >= extras[0].items()
    assert found.images[0].extras[1] == extras[1]


def test_trust_is_trust_or_score(tmp_path: Path) -> None:
    def trust(**fields: Any) -> float:
        file = broken(tmp_path, lambda d: d["annotations"][0].update(fields))
        return float(coco.read(file).images[0].people.trust[0])

    assert trust() == 1
    assert trust(score=0.25) == 0.25
    assert trust(score=0.25, trust=0.75) == 0.75
    assert trust(score=1.5) == 1


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "a.json"
    coco.write(file, [image(1)])
    before = file.read_text()
    bad = image(1)
    bad.people.pose3d[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"1\.jpg: a person's pose3d is not finite"):
        coco.write(file, [bad])
    with pytest.raises(ValueError, match="JSON"):
        coco.write(file, [image(1, extra={"camera": float("inf")})])
    assert file.read_text() == before
    assert list(file.parent.iterdir()) == [file]


def test_joints_beyond_the_image_are_no_keypoints_but_stay_in_the_pose() -> None:
    one = image(1, 1)
    one.people.has3d[:], one.people.seen[:] = True, 2
    one.people.pose2d[0, 0] = (-5, 10)
    annotation = coco.dump([one])["annotations"][0]
    assert annotation["keypoints"][:3] == [0, 0, 0]
    assert annotation["num_keypoints"] == 12
    assert (annotation["pose"][0], annotation["pose"][13]) == (-5, 10)
    document = coco.dump([one])
    assert document["categories"][0]["keypoints"][:2] == ["right_ankle", "left_ankle"]
    assert min(min(bone) for bone in document["categories"][0]["skeleton"]) == 1


# Faults


def document() -> dict[str, Any]:
    """Two images, a whole person (1), one with keypoints only (2), a negative image."""
    first, second = image(1, 2, "a/1.jpg"), image(2, 0)
    first.people.crowd[:], first.people.trust[:], first.people.seen[:] = False, 1, 2
    first.people.has3d[:] = (True, False)
    first.people.pose3d[0] = centre(np.random.default_rng(0).normal(size=(13, 3)), LCR13)
    return coco.dump([first, second])


def broken(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    found = copy.deepcopy(document())
    change(found)
    (folder / "ann.json").write_text(json.dumps(found))
    return folder / "ann.json"


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Sets the last but one of the path to the last; `...` deletes it."""

    def change(found: Any) -> None:
        *way, key, value = path
        for step in way:
            found = found[step]
        if value is ...:
            del found[key]
        else:
            found[key] = value

    return change


def person(key: str, value: Any, which: int = 0) -> Callable[[dict[str, Any]], None]:
    return put("annotations", which, key, value)


def entry(key: str, position: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return put("annotations", 0, key, position, value)


NAN, INF = float("nan"), float("inf")
BAD = [
    ("no images", put("images", ...), "images: missing"),
    ("images no list", put("images", {}), "images: must be a list"),
    ("no annotations", put("annotations", ...), "annotations: missing"),
    ("no categories", put("categories", ...), "categories: missing"),
    ("image no object", put("images", 1, 3), "image in row 1: must be an object"),
    ("image without id", put("images", 1, "id", ...), "image in row 1, id: missing"),
    ("image id text", put("images", 1, "id", "2"), "image in row 1, id: '2' is no integer"),
    ("image id true", put("images", 1, "id", True), "image in row 1, id: True is no integer"),
    ("image id twice", put("images", 1, "id", 1), "image 1, id: there are two (row 1)"),
    ("no file_name", put("images", 0, "file_name", ...), "image 1, file_name: missing"),
    ("file_name number", put("images", 0, "file_name", 4), "image 1, file_name: 4 is no file name"),
    ("file_name absolute", put("images", 0, "file_name", "/etc/x.jpg"), "image 1, file_name: '/etc/x.jpg' is absolute"),
    ("file_name windows", put("images", 0, "file_name", "C:\\x.jpg"), "is absolute"),
    ("file_name leaves", put("images", 0, "file_name", "a/../../x.jpg"), "leaves the folder"),
    ("no width", put("images", 0, "width", ...), "image 1, width: missing"),
    ("height 0", put("images", 0, "height", 0), "image 1, height: 0 is no number of pixels"),
    ("height NaN", put("images", 0, "height", NAN), "image 1, height: nan is no number of pixels"),
    ("annotation no object", put("annotations", 1, []), "annotation in row 1: must be an object"),
    ("annotation id real", person("id", 1.5), "annotation in row 0, id: 1.5 is no integer"),
    ("annotation id twice", person("id", 1, 1), "annotation 1, id: there are two (row 1)"),
    ("no image", person("image_id", 77), "annotation 1, image_id: there is no image 77"),
    ("image_id list", person("image_id", [1]), "annotation 1, image_id: there is no image [1]"),
    ("image_id missing", person("image_id", ...), "annotation 1, image_id: missing"),
    ("no category", person("category_id", 9), "annotation 1, category_id: there is no category 9"),
    ("category missing", person("category_id", ...), "annotation 1, category_id: missing"),
    ("bbox missing", person("bbox", ...), "annotation 1, bbox: missing"),
    ("bbox short", person("bbox", [1, 2, 3]), "annotation 1, bbox: has 3 entries, expected 4 numbers"),
    ("bbox empty", person("bbox", []), "annotation 1, bbox: has 0 entries, expected 4 numbers"),
    ("bbox object", person("bbox", {"x": 1}), "annotation 1, bbox: must be 4 numbers"),
    ("bbox text", person("bbox", [1, 2, "3", 4]), "annotation 1, bbox: '3' at position 2 is no number"),
    ("bbox NaN", person("bbox", [1, 2, NAN, 4]), "annotation 1, bbox: nan at position 2 is not finite"),
    ("bbox flat", person("bbox", [10, 10, 0, 5]), "annotation 1, bbox: width 0 and height 5: a box without area"),
    ("bbox negative", person("bbox", [10, 10, 5, -5]), "a box without area"),
    ("bbox elsewhere", person("bbox", [700, 10, 5, 5]), "annotation 1, bbox: lies outside the image"),
    ("pose short", person("pose", [0.0] * 64), "annotation 1, pose: has 64 entries, expected 65 numbers"),
    ("pose NaN", entry("pose", 64, NAN), "annotation 1, pose: nan at position 64 is not finite"),
    ("pose infinite", entry("pose", 3, INF), "annotation 1, pose: inf at position 3 is not finite"),
    ("pose huge", entry("pose", 3, 1e300), "annotation 1, pose: 1e+300 at position 3 is not finite"),
    ("pose null", entry("pose", 3, None), "annotation 1, pose: None at position 3 is no number"),
    ("pose true", person("pose", [True] * 65), "annotation 1, pose: True at position 0 is no number"),
    ("pose text", person("pose", "0.1"), "annotation 1, pose: must be 65 numbers"),
    ("pose millimetres", entry("pose", 30, 900.0), "annotation 1, pose: a joint is more than 10 m from the torso"),
    ("keypoints short", person("keypoints", [0, 0, 0], 1), "annotation 2, keypoints: has 3 entries, expected 39"),
    ("keypoints NaN", entry("keypoints", 0, NAN), "annotation 1, keypoints: nan at position 0 is not finite"),
    ("keypoints v", entry("keypoints", 2, 3), "annotation 1, keypoints: v = 3 of a joint is none of 0, 1, 2"),
    ("keypoints score", entry("keypoints", 5, 0.5), "annotation 1, keypoints: v = 0.5 of a joint"),
    ("pose3d flat", person("pose3d", [0.0] * 39), "annotation 1, pose3d: has 39 entries, expected 13 x 3 numbers"),
    ("pose3d NaN", put("annotations", 0, "pose3d", 1, 2, NAN), "annotation 1, pose3d: nan at position 5 is not finite"),
    ("no joints", put("categories", 0, "keypoints", ...), "category 1, keypoints: missing, though annotations have"),
    ("joints numbers", put("categories", 0, "keypoints", [1, 2]), "category 1, keypoints: must be a list of names"),
    ("joints twice", put("categories", 0, "keypoints", ["nose"] * 13), "category 1, keypoints: names a joint twice"),
    ("joints of a cat", put("categories", 0, "keypoints", list("abcdefghijklm")), "keypoints: no joint of lcr13"),
    ("no person", put("categories", [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]), "none is called 'person'"),
    ("iscrowd", person("iscrowd", "no"), "annotation 1, iscrowd: 'no' is neither 0 nor 1"),
    ("trust", person("trust", 2), "annotation 1, trust: must be within 0 and 1"),
    ("score", person("score", "high"), "annotation 1, score: 'high' is no number"),
    ("others' image", put("persons_without_pose", [{"image_id": 9}]), "in row 0, image_id: there is no"),
    ("others' box", put("persons_without_pose", [{"image_id": 1}]), "persons_without_pose in row 0, bbox: missing"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_faults_are_named_with_their_place_and_refused(tmp_path: Path, change: Any, message: str) -> None:
    file = broken(tmp_path, change)
    named = [str(fault) for fault in coco.check(file) if fault.fatal]
    assert any(message in text for text in named), named
    with pytest.raises(UserError) as refusal:
        coco.read(file)
    assert str(refusal.value).startswith(f"{file}: ") and "\n" not in str(refusal.value)


def farther(pose: list[float]) -> None:
    pose[52:] = [z + 0.5 for z in pose[52:]]


SLIGHT = [
    ("num_keypoints", person("num_keypoints", 4), "annotation 1, num_keypoints: 4, though 13 joints are labelled"),
    ("no num_keypoints", person("num_keypoints", ...), "annotation 1, num_keypoints: missing"),
    ("id 0", person("id", 0), "annotation 0: pycocotools takes id 0"),
    ("no area", person("area", ...), "annotation 1, area: missing"),
    ("area 0", person("area", 0), "annotation 1, area: not above 0"),
    ("bbox over the edge", person("bbox", [600, 400, 60, 60]), "annotation 1, bbox: reaches 20.0 px beyond the image"),
    ("name twice", put("images", 1, "file_name", "a/1.jpg"), "image 2, file_name: 'a/1.jpg' is image 1 too"),
    ("info text", put("info", "spytensor created"), "info: must be an object"),
    ("NaN elsewhere", person("teacher_error", NAN), "file: holds NaN, which is no JSON (1 times)"),
    ("pose off its root", lambda d: farther(d["annotations"][0]["pose"]), "pose: its origin is 0.500 m off"),
    ("half a skeleton", put("categories", 0, "joints", [*LCR13.joints[:12], "tail"]), "without head: 3D poses are not"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in SLIGHT], ids=[row[0] for row in SLIGHT])
def test_slight_faults_are_named_and_read_all_the_same(tmp_path: Path, change: Any, message: str) -> None:
    file = broken(tmp_path, change)
    faults = coco.check(file)
    assert any(message in str(fault) for fault in faults), faults
    assert not any(fault.fatal for fault in faults)
    assert len(coco.read(file).images) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "not JSON"), ("{", "not JSON: Expecting property name"), ("[]", "holds a list"), ("null", "holds a NoneType"),
     ("\xff", "not JSON"), ("[" * 100000, "not JSON"), ("{}", "images: missing")],
    ids=range(7),
)  # fmt: skip
def test_what_is_no_coco_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin1"))
    assert message in str(coco.check(tmp_path / "a.json")[0])
    with pytest.raises(UserError, match="fault"):
        coco.read(tmp_path / "a.json")
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match=str(missing)):
            coco.check(missing)


def test_the_first_faults_and_their_number_are_in_the_message(tmp_path: Path) -> None:
    def change(found: dict[str, Any]) -> None:
        found["annotations"] += [{**found["annotations"][0], "id": n, "image_id": 99} for n in range(10, 20)]

    with pytest.raises(UserError) as refusal:
        coco.read(broken(tmp_path, change))
    message = str(refusal.value)
    assert "10 faults" in message and message.count("no image 99") == 5 and "check" in message


# Meaning


def test_the_untouched_document_is_right(tmp_path: Path) -> None:
    assert coco.check(broken(tmp_path, lambda d: None)) == []


def test_pose_knows_all_joints_and_v_says_which_are_visible(tmp_path: Path) -> None:
    def change(found: dict[str, Any]) -> None:
        first, second = found["annotations"]
        first["keypoints"][0:6] = [0, 0, 0, 5, 5, 1]
        second["keypoints"][0:6] = [0, 0, 0, 5, 5, 1]

    one = coco.read(broken(tmp_path, change)).images[0].people
    assert one.seen[0].tolist() == [1, 1] + [2] * 11
    assert one.seen[1].tolist() == [0, 1] + [2] * 11
    assert one.pose2d[1, 0].tolist() == [0, 0] and one.pose2d[0, 0].any()
    assert one.has3d.tolist() == [True, False]
    assert not one.pose3d[1].any()


def test_pose3d_alone_is_a_3d_pose(tmp_path: Path) -> None:
    whole = coco.read(broken(tmp_path, lambda d: None)).images[0].people
    found = coco.read(broken(tmp_path, person("pose", ...))).images[0].people
    assert found.has3d[0]
    np.testing.assert_allclose(found.pose3d[0], whole.pose3d[0], atol=1e-5)


def test_people_without_enough_joints_are_ignored_regions(tmp_path: Path) -> None:
    def change(found: dict[str, Any]) -> None:
        found["annotations"][1]["keypoints"] = [5, 5, 2] * 3 + [0, 0, 0] * 10
        found["annotations"].append({"id": 3, "image_id": 2, "category_id": 1, "bbox": [1, 1, 5, 5]})
        found["persons_without_pose"] = [{"image_id": 2, "bbox": [2, 2, 5, 5], "iscrowd": 0}]

    file = broken(tmp_path, change)
    assert [i.people.crowd.tolist() for i in coco.read(file).images] == [[False, False], [True, True]]
    assert [i.people.crowd.tolist() for i in coco.read(file, min_joints=4).images] == [[False, True], [True, True]]
    assert coco.read(file).images[1].people.box.tolist() == [[1, 1, 6, 6], [2, 2, 7, 7]]
    assert coco.read(file).images[1].ids == [3, 0]


def test_things_that_are_no_people_are_left_out(tmp_path: Path) -> None:
    def change(found: dict[str, Any]) -> None:
        found["categories"].append({"id": 2, "name": "chair"})
        found["annotations"].append({"id": 3, "image_id": 2, "category_id": 2, "bbox": [1, 1, 0, 0]})

    file = broken(tmp_path, change)
    assert not coco.check(file)
    assert [len(i.people) for i in coco.read(file).images] == [2, 0]


def test_the_predecessors_own_file_is_read(tmp_path: Path) -> None:
    """As its csv2coco writes them: no joints, ids from 0, info a text, the box one pixel too large in `area`."""
    pose = document()["annotations"][0]["pose"]
    found = {
        "info": "spytensor created", "license": ["license"], "categories": [{"id": 1, "name": "person"}],
        "images": [{"height": 480, "width": 640, "id": 0, "file_name": "a.jpg"}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 1, "segmentation": [[1, 2, 1, 5, 1, 9, 4, 9]],
                         "bbox": [1, 2, 10, 20], "pose": pose, "iscrowd": 0, "area": 231}],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(found))
    one = coco.read(tmp_path / "a.json").images[0]
    assert one.people.has3d.all() and (one.people.seen == 2).all() and not one.people.crowd.any()
    np.testing.assert_allclose(coco.to_pose65(one.people.pose2d, one.people.pose3d)[0], pose, atol=1e-3)
    coco.write(tmp_path / "b.json", [one])
    assert coco.check(tmp_path / "b.json") == []
    assert json.loads((tmp_path / "b.json").read_text())["annotations"][0]["id"] == 1


# Real data


@pytest.mark.parametrize("name", FILES)
def test_real_files_are_read_without_a_fault_and_kept(shared: Path, tmp_path: Path, name: str) -> None:
    assert coco.check(shared / name) == []
    found = coco.read(shared / name)
    everybody = People.join(i.people for i in found.images)
    assert (len(found.images), len(everybody), everybody.crowd.sum(), everybody.has3d.sum()) == FILES[name]
    assert (everybody.box[:, 2:] > everybody.box[:, :2]).all()
    coco.write(tmp_path / "a.json", found.images, found.skeleton, found.info, found.licenses)
    assert coco.check(tmp_path / "a.json") == []
    again = coco.read(tmp_path / "a.json")
    same(everybody, People.join(i.people for i in again.images))
    kept = [[(i.id, i.file_name, i.extra, len(i.people)) for i in some.images] for some in (found, again)]
    assert kept[0] == kept[1]


def test_keypoints_of_coco_become_our_joints(shared: Path) -> None:
    found = coco.read(shared / "coco-mini/annotations/person_keypoints.json")
    one = next(i for i in found.images if i.id == 535506)
    who = one.ids.index(441444)
    points = dict(zip(LCR13.joints, one.people.pose2d[who].tolist(), strict=True))
    assert points["l_ankle"] == [178, 616] and points["r_shoulder"] == [195, 286]
    assert dict(zip(LCR13.joints, one.people.seen[who], strict=True))["r_ankle"] == 0
    assert points["head"] == [(298 + 272) / 2, (227 + 222) / 2]  # the eyes, as one ear is unlabelled
    lsp = coco.read(shared / "lspet/annotations/person_keypoints.json", LSP14)
    assert (lsp.images[0].people.seen == 2).all()


def test_seen_follows_what_humans_marked(shared: Path) -> None:
    file = shared / "coco-mini/annotations/lcrnet_pose.json"
    sources = {a["id"]: a["pose_2d_source"] for a in json.loads(file.read_text())["annotations"]}
    for one in coco.read(file).images:
        for row, number in enumerate(one.ids):
            if number:
                hidden = [origin in ("teacher", "human_occluded") for origin in sources[number]]
                assert (one.people.seen[row] == 1).tolist() == hidden


@pytest.mark.parametrize("name", ["h36m", "mpi-inf-3dhp"])
def test_true_3d_projects_onto_its_2d(shared: Path, name: str) -> None:
    """The frame is the camera's: with the true camera 3D lands on 2D, which a wrong sign would not."""
    for one in coco.read(shared / name / "annotations/lcrnet_pose.json").images:
        camera, root = one.extra["camera"], np.array(one.extras[0]["root_camera"])
        scene = one.people.pose3d[0] + root
        pixels = scene[:, :2] / scene[:, 2:] * camera["f"] + camera["c"]
        assert np.linalg.norm(pixels - one.people.pose2d[0], axis=-1).mean() < 4


def test_pycocotools_scores_the_truth_with_1(shared: Path, tmp_path: Path) -> None:
    found = coco.read(shared / "coco-mini/annotations/lcrnet_pose.json")
    coco.write(tmp_path / "a.json", found.images)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "a.json"))
        results = [
            {key: a[key] for key in ("image_id", "category_id", "keypoints")} | {"score": 0.9}
            for a in truth.dataset["annotations"]
            if not a["iscrowd"]
        ]
        judge = COCOeval(truth, truth.loadRes(results), "keypoints")
        judge.params.kpt_oks_sigmas = LCR13.sigma
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert judge.stats[0] == pytest.approx(1)


# Labels


def labelled(score: float, box: list[float], joint_score: float = 0.9, place: Any = None) -> Person:
    pose2d = np.linspace(box[:2], box[2:], 13).astype(np.float32)
    pose3d = centre(np.random.default_rng(0).normal(size=(13, 3)), LCR13).astype(np.float32)
    return Person(np.array(box, np.float32), pose2d, pose3d, score, np.full(13, joint_score, np.float32), 3, 5,
                  np.zeros(13, np.float32), place)  # fmt: skip


def test_labels_become_people_regions_and_nothing(tmp_path: Path) -> None:
    table = labels.table(
        [
            labels.row("/d/a.jpg", sha256="00", width=100, height=100, group="d", people=[
                labelled(0.9, [10, 10, 50, 60], place=np.array([0.1, 0.2, 4])),
                labelled(0.3, [10, 10, 50, 60]),
                labelled(0.8, [50, 50, 150, 150], joint_score=0.1),
                labelled(0.9, [99.5, 10, 150, 60]),
            ]),
            labels.row("/d/b.jpg", error="no picture"),
            labels.row("/d/c.jpg", sha256="02", width=50, height=60),
        ]
    )  # fmt: skip
    names = {"/d/a.jpg": "a.jpg", "/d/c.jpg": "c.jpg"}
    found = coco.from_labels(table.to_pylist(), names, config.Coco(min_score=0.5, min_joint_score=0.2))
    assert [(i.id, i.file_name, i.ids) for i in found] == [(1, "a.jpg", [1, 2, 3]), (2, "c.jpg", [])]
    one = found[0].people
    assert one.crowd.tolist() == [False, True, False]
    assert one.has3d.tolist() == [True, False, True]
    np.testing.assert_allclose(one.trust, [0.9, 0.3, 0.8])
    assert one.seen[0].tolist() == [2] * 13 and not one.seen[1].any() and one.seen[2].tolist() == [1] * 13
    assert one.box[2].tolist() == [50, 50, 100, 100] and one.area[2] == 2500
    assert found[0].extras[0] == {"score": 0.9, "root_camera": [0.1, 0.2, 4.0]}
    assert found[0].extra == {"uri": "/d/a.jpg", "sha256": "00"}

    coco.write(tmp_path / "a.json", found)
    assert coco.check(tmp_path / "a.json") == []
    written = json.loads((tmp_path / "a.json").read_text())["annotations"]
    assert [(a["score"], a["iscrowd"], a["num_keypoints"], "pose" in a) for a in written] == [
        (0.9, 0, 13, True), (0.3, 1, 0, False), (0.8, 0, 7, True)
    ]  # fmt: skip
    again = coco.read(tmp_path / "a.json").images
    same(again[0].people, one)
    assert again[0].extras[1]["score"] == 0.3


def test_file_names_keep_their_folders_and_are_never_one() -> None:
    assert coco.file_names(["/d/a.jpg"]) == {"/d/a.jpg": "a.jpg"}
    assert list(coco.file_names(["/d/x/0001.jpg", "/d/y/0001.jpg"]).values()) == ["x/0001.jpg", "y/0001.jpg"]
    odd = coco.file_names(["/d/é à.JPG", "/d/./é à.JPG", "/d/..\\b.png"])
    assert len(set(odd.values())) == 3 and odd["/d/é à.JPG"] == "é à.JPG"
    assert all(coco.bad_name(name) is None for name in odd.values())
    with pytest.raises(UserError, match="no absolute path"):
        coco.file_names(["s3://bucket/a.jpg"])
