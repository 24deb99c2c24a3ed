"""report.py: the page holds what it was given, nothing from outside acts in it, and it needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lcrnet import coco, config, draw, evaluate, image, report
from lcrnet.pose import People, Person, box_of, centre
from lcrnet.skeleton import LCR13

J = len(LCR13)
HOSTILE = "<img src=x onerror=alert(1)>.jpg"
VOID = {"meta", "img", "br", "input", "link", "hr"}


class Page(HTMLParser):
    """A page taken apart: tags with their attributes, texts by the tag they stand in, rows; unbalanced fails."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.stack: list[str] = []
        self.feed(html)
        self.close()
        assert not self.stack, f"left open: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.stack[-1] if self.stack else "", data.strip()))
            if {"td", "th"} & set(self.stack):
                self.rows[-1][-1] += data.strip()

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def text(self, *tags: str) -> str:
        return "\n".join(text for tag, text in self.texts if not tags or tag in tags)

    def row(self, name: str) -> list[str]:
        return next(row[1:] for row in self.rows if row and row[0] == name)

    @property
    def scenes(self) -> dict[str, Any]:
        at = next(i for i, (tag, attrs) in enumerate(self.tags) if attrs.get("id") == "scenes")
        assert self.tags[at] == ("script", {"type": "application/json", "id": "scenes"})
        return json.loads(next(text for tag, text in self.texts if tag == "script" and text.startswith('{"bones"')))

    def pictures(self) -> list[np.ndarray]:
        kept = []
        for attrs in self.all("img"):
            kind, data = attrs["src"].split(",", 1)
            assert kind == "data:image/jpeg;base64"
            kept.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True)))))
        return kept


def standing(x: float = 100, height: float = 120) -> tuple[np.ndarray, np.ndarray]:
    """(J, 2) pixels and (J, 3) metres of somebody who faces the camera, 1.5 m from ankle to head, centred on x."""
    rows = {"ankle": 0.9, "knee": 0.5, "hip": 0.25, "wrist": 0.2, "elbow": -0.05, "shoulder": -0.25, "head": -0.6}
    pose = np.zeros((J, 3), np.float32)
    for j, name in enumerate(LCR13.joints):
        pose[j, 1] = rows[name.split("_")[-1]]
        pose[j, 0] = {"r_": -0.2, "l_": 0.2}.get(name[:2], 0)
    return (pose[:, :2] * height / 1.5 + (x, 90)).astype(np.float32), pose


def person(x: float = 100, off: float = 0.0, **change: Any) -> Person:
    pose2d, pose3d = standing(x)
    pose3d = pose3d.copy()
    pose3d[LCR13.index("head"), 2] += off
    fields = dict(box=box_of(pose2d), pose2d=pose2d, pose3d=pose3d, score=0.9, joint_score=np.ones(J), anchor=0,
                  support=3, spread=np.zeros(J))  # fmt: skip
    return Person(**{**fields, **change})


def people(*places: float) -> People:
    out = People.empty(len(places), J)
    for p, x in enumerate(places):
        out.pose2d[p], out.pose3d[p] = standing(x)
    out.seen[:], out.has3d[:] = 2, True
    out.box[:] = box_of(out.pose2d)
    out.area[:] = 5000
    return out


GREEN = np.full((200, 300, 3), (0, 120, 0), np.uint8)


def example(truth: People | None = None, found: list[Person] | None = None, **change: Any) -> report.Example:
    fields = dict(kind="worst", name="a/b.jpg", caption="quality 0.50", image=GREEN,
                  truth=people(100) if truth is None else truth,
                  found=[person()] if found is None else found)  # fmt: skip
    return report.Example(**{**fields, **change})


def rows(bend: float) -> list[dict[str, float]]:
    return [{"low": i / 10, "high": (i + 1) / 10, "count": 10 * i, "mean": i / 10 + 0.05, "right": (i / 10) ** bend}
            for i in range(10)]  # fmt: skip


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    """Figures of three images, one of them without a detection, and what jobs and other parts add to them."""
    truth = [people(80, 200), people(100), people(150)]
    found = [[person(82), person(203, 0.2)], [person(101, 0.1), person(280)], []]
    tables = {"oks50": rows(1), "mm50": rows(2), "mm100": rows(1.5)}
    curve = [0.0, 0.25, 0.5, 1.0]
    out = {
        **evaluate.evaluate(truth, found, LCR13, config.Evaluate()),
        "curves": {
            "pr": {"recall": [0, 0.5, 1], "precision": {"0.50": [1, 0.8, 0.4], "0.75": [0.9, 0.5, -1]}},
            "pck2d": {"threshold": [0, 0.1, 0.2, 0.5], "matched": curve, "all": [v / 2 for v in curve]},
            "pck3d": {"threshold_mm": [0, 50, 100, 150], "matched": curve, "all": [v / 2 for v in curve]},
        },
        "calibration": {"score": tables, "joint": tables, "event": "mm100", "calibrated": {"score": tables}},
        "per_group": {"clip 1": {"people": 2, "recall": 0.5}, HOSTILE: {"people": 1, "recall": None}},
        "predecessor": {"Err2d": 0.125, "Err3d": 83.25, "PCK2d": 0.75, "PCK3d": None},
        "unreadable": 1,
        "unreadable_files": {HOSTILE: "truncated"},
        "command": f"python jobs/evaluate.py --data '{HOSTILE}'",
        "config": {"evaluate": {"pck2d": 0.2, "pck3d_mm": 150.0}, "train": {"note": HOSTILE}},
    }
    return json.loads(json.dumps(out))


def made(metrics: dict[str, Any], *examples: report.Example, title: str = "A model on data") -> Page:
    return Page(report.page(metrics, examples, LCR13, title))


# The file -------------------------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes(metrics: dict[str, Any], tmp_path: Path) -> None:
    for name in "ab":
        report.write(tmp_path / name, metrics, [example()], LCR13, "title")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    report.write(tmp_path / "a", metrics, [], LCR13, "title")
    assert len((tmp_path / "a").read_bytes()) < len((tmp_path / "b").read_bytes())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_it_needs_nothing_but_itself(metrics: dict[str, Any]) -> None:
    html = report.page(metrics, [example()], LCR13, "title")
    page = Page(html)
    assert not re.search(r"https?:|@import|url\(|//[a-z0-9-]+\.[a-z]", re.sub(r"base64,[^\"]*", "", html), re.I)
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not {k for k in attrs if k.startswith("on")}, (tag, attrs)
        assert attrs.get("src", "data:").startswith("data:") and attrs.get("href", "#").startswith("#")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.all("a")} <= set(ids)


def test_the_browser_may_run_our_script_and_no_other(metrics: dict[str, Any]) -> None:
    html = report.page(metrics, [example()], LCR13, "title")
    policy = next(a["content"] for a in Page(html).all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    script = re.findall(r"<script>(.*?)</script>", html, re.S)
    assert len(script) == 1
    allowed = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"


def test_what_comes_from_outside_is_text(metrics: dict[str, Any]) -> None:
    metrics = {**metrics, HOSTILE: HOSTILE, "per_<b>": {HOSTILE: {HOSTILE: 0.5}}, "nested": {HOSTILE: {"</script>": 1}}}
    metrics["curves"] = {"pr": {"recall": [0, 1], "precision": {HOSTILE: [1, 0]}}}
    metrics["calibration"] = {"score": {HOSTILE: rows(1)}, "event": HOSTILE}
    metrics["predecessor"] = {HOSTILE: HOSTILE}
    hostile = example(kind=HOSTILE, name=HOSTILE, caption='"></script><script>alert(1)</script>')
    page = made(metrics, hostile, title=HOSTILE)
    assert len(page.all("script")) == 2 and len(page.all("img")) == 2 and not page.all("b")
    assert page.text("title").split("\n")[0] == page.text("h1") == HOSTILE
    assert HOSTILE in page.text("h2") and HOSTILE in page.text("bdi") and "</script><script>" in page.text("bdi")
    assert page.text().count("onerror") >= 12


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    report.write(tmp_path / "r.html", {"unreadable_files": {name: "bad"}}, [example(name=name)], LCR13, name)
    assert "caf" in Page((tmp_path / "r.html").read_text(encoding="utf-8")).text("h1")


# Figures --------------------------------------------------------------------------------------------------------------


def test_figures_of_people_found_and_of_all(metrics: dict[str, Any]) -> None:
    page = made({**metrics, "pck2d": 0.91234, "pck2d_all": 0.65432, "mpjpe_mm": 83.26})
    assert page.row("people")[:2] == ["3", "4"]
    assert page.row("recall")[:2] == ["–", "0.750"]
    assert page.row("PCK") == ["0.912", "0.654", "2D joints within 0.2 torso lengths"]
    assert page.row("MPJPE, mm")[:2] == ["83.3", "–"]
    assert "3D joints within 150 mm" in page.row("3DPCK")
    assert "3 of 4 people found in 3 images; 1 false detection." in page.text("p")
    assert page.row("Err3d") == ["83.2"] and page.row("PCK3d") == ["–"]
    assert page.row("unreadable") == ["1"]


def test_a_threshold_that_is_not_known_is_not_named(metrics: dict[str, Any]) -> None:
    assert made({**metrics, "config": None}).row("PCK")[2] == "2D joints within so many torso lengths"


@pytest.mark.parametrize(
    ("key", "told"),
    [("recall", "recall"), ("pa_mpjpe_mm", "PA-MPJPE, mm"), ("calibration", "calibration"),
     ("per_joint", "table per joint"), ("per_size", "table per size"), ("per_group", "table per group"),
     ("curves", "precision-recall curve")],
)  # fmt: skip
def test_what_is_lacking_is_named(metrics: dict[str, Any], key: str, told: str) -> None:
    def lacking(page: Page) -> list[str]:
        line = next((t for t in page.text("p").split("\n") if t.startswith("Not measured")), ": .")
        return line.split(": ")[1].rstrip(".").split("; ")

    assert told not in lacking(made(metrics, example()))
    assert told in lacking(made({**metrics, key: None}, example()))
    assert told in lacking(made({k: v for k, v in metrics.items() if k != key}, example()))


def test_any_key_may_be_missing(metrics: dict[str, Any]) -> None:
    for key in metrics:
        made({k: v for k, v in metrics.items() if k != key})
        made({**metrics, key: None})
    page = made({})
    assert "Neither command nor configuration was given." in page.text() and "images" in page.text("p")
    for empty in ({}, {"pr": {}}, {"pr": {"recall": [], "precision": {"0.50": []}}, "pck2d": None}):
        assert not [c for c in made({"curves": empty}).all("figure") if c.get("class") == "chart"]
    made({"calibration": {"score": {"oks50": []}, "joint": None, "event": None}, "per_joint": {"head": None}})


def test_other_figures_are_kept() -> None:
    page = made({"protocol": {"pa_mpjpe_mm": 41.5}, "note": "by hand", "images_per_second": 12.34})
    assert "pa_mpjpe_mm: 41.5" in page.text("pre") and page.row("note") == ["by hand"]
    assert page.row("images_per_second") == ["12.3"]


def test_bars_of_joints() -> None:
    table = {"r_knee": {"pck2d": 0.5, "mpjpe_mm": 20.0}, "l_knee": {"pck2d": 1.0, "mpjpe_mm": 80.0},
             "head": {"pck2d": None, "mpjpe_mm": float("nan")}}  # fmt: skip
    page = made({"per_joint": table})
    bars = [float(re.findall(r"calc\(([\d.]+)", a["style"])[0]) for a in page.all("span") if a["class"] == "bar"]
    assert bars == [0.5, 0.25, 1, 1]
    assert [a["class"] for a in page.all("tr") if "class" in a] == ["r", "l", "m"]
    assert page.row("r_knee") == ["0.500", "20.0"] and page.row("head") == ["–", "–"]


def test_long_tables_are_folded() -> None:
    groups = {f"clip {i}": {"recall": 0.5} for i in range(report.FOLD + 1)}
    assert f"Per group: {report.FOLD + 1} rows" in made({"per_group": groups}).text("summary")
    del groups["clip 0"]
    assert not made({"per_group": groups}).text("summary")


# Charts ---------------------------------------------------------------------------------------------------------------


def values(points: str) -> np.ndarray:
    """A polyline's points as values 0..1."""
    x, y = np.array([p.split(",") for p in points.split()], float).T
    return np.stack([(x - report.PLOT["left"]) / (report.PLOT["right"] - report.PLOT["left"]),
                     (report.PLOT["bottom"] - y) / (report.PLOT["bottom"] - report.PLOT["top"])], 1)  # fmt: skip


def lines(page: Page) -> list[np.ndarray]:
    return [values(a["points"]) for a in page.all("polyline") if a["points"] != "1,5 33,5"]


def test_curves_go_through_their_values(metrics: dict[str, Any]) -> None:
    drawn = lines(made({"curves": metrics["curves"]}))
    wanted = [[(0, 1), (0.5, 0.8), (1, 0.4)], [(0, 0.9), (0.5, 0.5)]]
    for scale in ([0, 0.2, 0.4, 1], [0, 1 / 3, 2 / 3, 1]):
        wanted += [
            list(zip(scale, [0, 0.25, 0.5, 1], strict=True)),
            list(zip(scale, [0, 0.125, 0.25, 0.5], strict=True)),
        ]
    assert len(drawn) == len(wanted)
    for line, points in zip(drawn, wanted, strict=True):
        np.testing.assert_allclose(line, points, atol=0.0005)  # a tenth of a pixel of 222


def test_a_missing_value_breaks_the_line() -> None:
    curve = {"threshold_mm": [0, 50, 100, 150], "matched": [0, None, 0.5, 1.0], "all": [None] * 4}
    page = made({"curves": {"pck3d": curve}})
    assert [len(line) for line in lines(page)] == [1, 2]
    assert "all people" not in page.text("li") and "150" in page.text("text")


def test_calibration(metrics: dict[str, Any]) -> None:
    table = [{"low": 0.0, "high": 0.5, "count": 30, "mean": 0.25, "right": 0.5},
             {"low": 0.5, "high": 1.0, "count": 10, "mean": 0.75, "right": 0.75},
             {"low": 1.0, "high": 1.0, "count": 0, "mean": None, "right": None}]  # fmt: skip
    page = made({"calibration": {"score": {"mm50": table}, "joint": {"mm50": []}, "event": "mm50",
                                 "error": {"score": {"mm50": 0.1875}}}})  # fmt: skip
    np.testing.assert_allclose(lines(page)[0], [(0.25, 0.5), (0.75, 0.75)], atol=0.0005)
    assert page.text("caption") == "within 50 mm: 40 detections, expected calibration error 0.188"
    assert page.row("0.00 to 0.50") == ["30", "0.250", "0.500"]
    assert "score 0.250: right 0.500 of 30" in page.text("title")
    assert "The calibrated score is the probability of: within 50 mm." in page.text("p")
    titles = made(metrics).text("figcaption")
    assert "Scores of detections, calibrated" in titles and "Scores of joints" in titles
    assert "Scores of joints, calibrated" not in titles


# Images ---------------------------------------------------------------------------------------------------------------


def near(picture: np.ndarray, colour: draw.Colour) -> np.ndarray:
    """x of the pixels near a colour: JPEG keeps colours of thin limbs only roughly."""
    return np.argwhere(np.abs(picture.astype(int) - colour).max(-1) < 60)[:, 1]


def test_overlays_of_truth_and_found() -> None:
    page = made({}, example(people(150), []), example(people(150), [person(150)], kind="best"))
    empty, alone = page.pictures()[1], page.pictures()[3]
    assert page.text("h2").split("\n")[:2] == ["Images: worst", "Images: best"]
    assert alone.shape == (213, 320, 3)  # enlarged
    assert len(near(empty, draw.RIGHT)) == 0
    for picture in (page.pictures()[0], alone):
        assert len(near(picture, draw.RIGHT)) > 50 and len(near(picture, draw.LEFT)) > 50
        assert near(picture, draw.RIGHT).max() < 160 < near(picture, draw.LEFT).min()
    assert [a["alt"] for a in page.all("img")][1:3] == ["found: 0 people over a/b.jpg", "truth: 1 people over a/b.jpg"]


def test_overlays_of_a_large_image() -> None:
    page = made({}, example(people(150), [person(150)], image=np.full((1200, 1600, 3), (0, 120, 0), np.uint8)))
    for picture in page.pictures():
        assert picture.shape == (480, 640, 3)
        assert near(picture, draw.RIGHT).max() < 60 < near(picture, draw.LEFT).min()


def test_pages_stay_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (700, 900, 3), np.uint8)  # nothing compresses worse
    report.write(tmp_path / "r.html", {}, [example(image=noise)] * 18, LCR13, "noise")
    assert (tmp_path / "r.html").stat().st_size < 5e6
    assert all(max(p.shape) == report.LONGEST for p in made({}, example(image=noise)).pictures())


def scene(**change: Any) -> list[dict[str, Any]]:
    page = made({}, example(**change))
    kept = page.scenes["scenes"][0]
    assert len(page.all("canvas")) == bool(kept)
    return kept


def test_truth_and_estimate_stand_in_one_place() -> None:
    elsewhere = person(102, off=0.13)
    elsewhere.pose3d += 2  # nor does a wrong origin count in MPJPE
    (one,) = scene(found=[elsewhere])
    assert one["label"] == "truth + found: 10 mm apart"  # 130 mm of one joint of 13
    truth, found = np.array(one["truth"]), np.array(one["found"])
    np.testing.assert_allclose(centre(truth, LCR13), centre(people(100).pose3d[0], LCR13), atol=0.001)
    np.testing.assert_allclose(truth[LCR13.torso].mean(0), found[LCR13.torso].mean(0), atol=0.001)
    assert max(truth[:, 1].max(), found[:, 1].max()) == pytest.approx(0, abs=0.001)  # on the floor


def test_people_stand_in_the_order_of_the_image() -> None:
    kept = scene(truth=people(250, 50), found=[person(150), person(252), person(48)])
    assert [p["label"].split(":")[0] for p in kept] == ["truth 2 + found 3", "found 1", "truth 1 + found 2"]
    assert [p["truth"] is None for p in kept] == [False, True, False]
    x = [np.array(p["found"])[:, 0] for p in kept]
    assert x[0].max() < x[1].min() and x[1].max() < x[2].min()


def test_numbers_are_those_of_the_overlay() -> None:
    truth = people(60, 150, 240)
    truth.crowd[0] = True  # a grey box, without a number
    assert [p["label"] for p in scene(truth=truth, found=[])] == ["truth 1", "truth 2"]
    assert [p["label"] for p in scene(truth=truth[:2], found=[])] == ["truth"]


def test_pairs_may_be_given() -> None:
    given = {"truth": people(60, 240), "found": [person(240), person(60)]}
    assert [p["label"].split(":")[0] for p in scene(**given)] == ["truth 1 + found 2", "truth 2 + found 1"]
    kept = scene(**given, pairs=np.array([[1, 1]]))
    assert {p["label"].split(":")[0] for p in kept} == {"truth 1", "truth 2 + found 2", "found 1"}
    assert len(scene(**given, pairs=np.zeros((0, 2), np.int64))) == 4
    assert [p["label"] for p in scene(truth=people(60), found=[person(240)])] == ["truth", "found"]  # too far


def test_no_3d_no_view() -> None:
    truth = people(100)
    truth.has3d[:] = False
    assert scene(truth=truth, found=[]) == [] and "Nobody with a 3D pose." in made({}, example(truth, [])).text()
    (one,) = scene(truth=truth, found=[person()])
    assert one["truth"] is None and one["label"] == "truth + found"
    assert scene(truth=truth, found=[person(pose3d=np.full((J, 3), np.nan))]) == []
    assert scene(truth=People.empty(0, J), found=[]) == []


def test_the_script_gets_bones_with_their_sides() -> None:
    scenes = made({}, example()).scenes
    assert len(scenes["bones"]) == len(LCR13.bones) and len(scenes["joints"]) == J
    assert Counter(side for *_, side in scenes["bones"]) == {"r": 5, "l": 5, "m": 4}
    assert scenes["joints"][LCR13.index("l_knee")] == "l" and scenes["joints"][LCR13.index("head")] == "m"


def test_one_may_choose_among_several() -> None:
    page = made({}, example(people(60, 240), [person(61)]))
    assert [a["value"] for a in page.all("option")] == ["-1", "0", "1"]
    assert page.text("option").split("\n") == ["everybody (2)", "truth 1 + found: 0 mm apart", "truth 2"]
    assert not made({}, example()).all("select")


def test_photographs(shared: Path, tmp_path: Path) -> None:
    """A perfect detector on real photographs: whoever has a 3D pose is 0 mm from it."""
    folder = shared / "lspet"
    entries = [e for e in coco.read(folder / "annotations/lcrnet_pose.json").images if e.people.has3d.any()][:6]
    shown = []
    for e in entries:
        found = [person(pose2d=t.pose2d, pose3d=t.pose3d) for t in (e.people[[p]] for p in range(len(e.people)))]
        found = [person(pose2d=p.pose2d[0], pose3d=p.pose3d[0]) for p in found]
        pixels = image.read(folder / "images" / e.file_name)
        shown.append(report.Example("best", e.file_name, "", pixels, e.people, found))
    page = made({}, *shown)
    assert [a["alt"].split("over ")[1] for a in page.all("img")[::2]] == [e.file_name for e in entries]
    for kept in page.scenes["scenes"]:
        assert kept and all(p["label"].endswith("0 mm apart") and p["truth"] == p["found"] for p in kept)
