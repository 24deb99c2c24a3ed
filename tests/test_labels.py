"""The label table: types, round trips, reading, groups and sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcrnet import labels
from lcrnet.config import UserError
from lcrnet.pose import Person


def person(seed: int = 0, joints: int = 13, place: bool = False) -> Person:
    r = np.random.default_rng(seed)
    f4 = lambda *shape: r.normal(size=shape).astype(np.float32)  # noqa: E731
    return Person(f4(4), f4(joints, 2), f4(joints, 3), float(np.float32(r.random())), f4(joints),
                  int(r.integers(20)), int(r.integers(1, 99)), f4(joints), f4(3) if place else None)  # fmt: skip


def some_table() -> pa.Table:
    return labels.table(
        [
            labels.row("/d/a.jpg", sha256="00", width=640, height=480, group="d", model="m", config="c",
                       people=[person(1), person(2, place=True)]),
            labels.row("/d/b.jpg", sha256="01", width=10, height=20),
            labels.row("/d/c.jpg", error="no picture: 0 bytes"),
        ]
    )  # fmt: skip


def save(table: pa.Table, file: Path) -> None:
    pq.write_table(table, file)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), joints=st.integers(1, 20), place=st.booleans())
def test_a_person_survives_the_table(seed: int, joints: int, place: bool) -> None:
    before = person(seed, joints, place)
    stored = labels.table([labels.row("/x", people=[before])]).to_pylist()[0]["people"][0]
    after = labels.person_of(stored)
    for name, value in vars(before).items():
        np.testing.assert_array_equal(getattr(after, name), value, err_msg=name)


def test_rows_say_what_became_of_an_image(tmp_path: Path) -> None:
    save(some_table(), tmp_path / "0.parquet")
    rows = labels.read(tmp_path).to_pylist()
    assert [(r["status"], len(r["people"]), r["error"]) for r in rows] == [
        ("ok", 2, None), ("ok", 0, None), ("unreadable", 0, "no picture: 0 bytes"),
    ]  # fmt: skip


def test_reading_gives_what_was_written_ordered_and_once(tmp_path: Path) -> None:
    table = some_table()
    assert labels.table([]).schema == labels.SCHEMA
    save(table.slice(1), tmp_path / "0.parquet")
    save(table.slice(0, 2), tmp_path / "1.parquet")
    save(labels.table([]), tmp_path / "2.parquet")
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / ".half.parquet").write_text("half")
    assert labels.read(tmp_path).equals(table, check_metadata=True)


def test_of_two_rows_of_one_image_the_first_files_counts(tmp_path: Path) -> None:
    save(labels.table([labels.row("/a", width=1)]), tmp_path / "0.parquet")
    save(labels.table([labels.row("/a", width=2)]), tmp_path / "1.parquet")
    assert labels.read(tmp_path).column("width").to_pylist() == [1]


def test_pandas_reads_it_and_its_wider_types_are_read_back(tmp_path: Path) -> None:
    table = some_table()
    save(table, tmp_path / "0.parquet")
    frame = pd.read_parquet(tmp_path / "0.parquet")
    assert list(frame["uri"]) == ["/d/a.jpg", "/d/b.jpg", "/d/c.jpg"]
    pose3d = np.stack(frame["people"][0][1]["pose3d"])
    np.testing.assert_array_equal(pose3d, person(2, place=True).pose3d)
    frame.to_parquet(tmp_path / "0.parquet")  # int32 with a null becomes double, strings large ones, no metadata
    assert labels.read(tmp_path).equals(table)
    save(pa.Table.from_pylist(table.to_pylist()), tmp_path / "0.parquet")
    assert labels.read(tmp_path).equals(table)


BAD: list[tuple[str, Any, str]] = [
    ("no folder", None, "no such folder of labels"),
    ("empty folder", {}, "no *.parquet in it"),
    ("only other files", {"notes.txt": "hello"}, "no *.parquet in it"),
    ("text", {"0.parquet": "hello"}, "0.parquet: no Parquet file"),
    ("no bytes", {"0.parquet": ""}, "0.parquet: no Parquet file"),
    ("another table", {"0.parquet": pa.table({"a": [1]})}, "column 'uri' is missing"),
    ("without people", {"0.parquet": some_table().drop_columns(["people"])}, "column 'people' is missing"),
    ("text for people", {"0.parquet": some_table().set_column(7, "people", pa.array(["x"] * 3))}, "no label table"),
    ("another version", {"0.parquet": some_table().replace_schema_metadata({"lcrnet.labels": "99"})}, "version 99"),
    ("one bad of two", {"0.parquet": some_table(), "1.parquet": "half"}, "1.parquet: no Parquet file"),
]


@pytest.mark.parametrize(("files", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_folders_are_refused_in_one_line(tmp_path: Path, files: Any, message: str) -> None:
    folder = tmp_path / "labels"
    for name, content in (files or {}).items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(content) if isinstance(content, str) else save(content, folder / name)
    if files is not None:
        folder.mkdir(exist_ok=True)
    with pytest.raises(UserError) as refusal:
        labels.read(folder)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("uri", "root", "group"),
    [
        ("/data/clip1/0.jpg", "/data", "clip1"),
        ("/data/a/b/0.jpg", "/data/", "a/b"),
        ("/data/0.jpg", "/data", ""),
        ("/data/clip1/0.jpg", "", "/data/clip1"),
        ("0.jpg", "", ""),
    ],
)
def test_the_group_is_the_folder(uri: str, root: str, group: str) -> None:
    assert labels.group_of(uri, root) == group


def test_the_split_is_fixed_and_keeps_its_share() -> None:
    # Literals: another value means that everybody's validation set changes.
    assert [labels.split(g, 0.5) for g in ("a", "b", "clip1", "été")] == ["train", "val", "train", "train"]
    share = np.mean([labels.split(str(n), 0.2) == "val" for n in range(5000)])
    assert 0.18 < share < 0.22
    assert {labels.split(str(n), 0) for n in range(99)} == {"train"}
    assert {labels.split(str(n), 1) for n in range(99)} == {"val"}


def rows(*entries: tuple[str, str | None, str | None]) -> list[dict[str, Any]]:
    return [{"uri": uri, "sha256": sha, "group": group} for uri, sha, group in entries]


def test_groups_stay_whole_and_single_images_are_split() -> None:
    clips = rows(*((f"/{g}/{n}", f"{g}{n}", f"clip{g}") for g in range(20) for n in range(5)))
    found = np.array(labels.sides(clips, 0.3)).reshape(20, 5)
    assert (found == found[:, :1]).all()
    assert set(found.ravel()) == {"train", "val"}
    for group in (None, "", "only"):
        plain = labels.sides(rows(*((f"/{n}", f"{n}", group) for n in range(200))), 0.3)
        assert 30 < plain.count("val") < 90


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 30)), min_size=1, max_size=60), st.floats(0.05, 0.95))
def test_the_same_bytes_are_on_one_side(entries: list[tuple[int, int]], share: float) -> None:
    some = rows(*((f"/{n}", str(sha), f"clip{g}" if g else "") for n, (g, sha) in enumerate(entries)))
    found = labels.sides(some, share)
    for sha in {r["sha256"] for r in some}:
        assert len({side for side, r in zip(found, some, strict=True) if r["sha256"] == sha}) == 1


def test_more_images_leave_the_others_where_they_are() -> None:
    some = rows(*((f"/c{n % 30}/{n}", str(n), f"c{n % 30}") for n in range(300)))
    more = rows(*((f"/d{n}", f"d{n}", "") for n in range(50)))
    assert labels.sides(some + more, 0.2)[:300] == labels.sides(some, 0.2)


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_no_side_is_empty_where_there_are_two_groups(share: float) -> None:
    found = labels.sides(rows(("/a/1", "1", "a"), ("/a/2", "2", "a"), ("/b/3", "3", "b")), share)
    assert set(found) == {"train", "val"}
    assert found[0] == found[1]
    assert labels.sides(rows(("/a", "1", None)), 0.2) in (["train"], ["val"])
    assert set(labels.sides(rows(("/a", "1", None), ("/b", "2", None)), 0)) == {"train"}
