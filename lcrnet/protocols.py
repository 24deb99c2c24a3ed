"""Other people's benchmarks: Human3.6M's protocols and MuPoTS-3D's, on their own annotation files.

    benchmark = read("mupots", "MultiPersonTestSet", "MultiPersonTestSet", skeleton)
    found = [...]                          # of each of benchmark.images, in order
    print(figures(benchmark, found))       # a dict for JSON

These figures follow the data sets' rules, so that they can stand beside published ones; `evaluate.evaluate` on
`benchmark.images` follows ours. Poses are compared with their roots at one place: the pelvis, or the middle of the hips
where a skeleton (LCR13) has no pelvis. In both data sets the pelvis IS the middle of the hips (to 0.1 mm in the eight
sample frames of mmpose's tests), so that changes nothing.

Human3.6M (`h36m`), subjects S9 and S11, one person an image, the found person with the highest score:
    protocol 1  MPJPE with the roots aligned (Ionescu et al., PAMI 2014; the numbering is that of Martinez et al., "A
                simple yet effective baseline", ICCV 2017), mean over the 15 actions, and over all images
    protocol 2  the same after Procrustes with rotation, translation and scale (PA-MPJPE)
    s11         the older protocol (1 in 3DMPPE's Human36M.py): S11 only, each 64th frame (`every`), for models trained
                on the other six subjects; after a rigid alignment, and after one with scale
    An image where nobody is found has no error; it is counted (`missed`), and the note says so. Published methods get
    the person's box, so that they miss nobody.

MuPoTS-3D (`mupots`), twenty sequences (mpii_mupots_multiperson_eval.m of Mehta et al., 3DV 2018):
    matching    for each annotated person in the file's order, the found person not yet taken with the most joints (neck
                to ankles) within 40 pixels in x and in y; none without a single such joint
    pose        univ_annot3, root at the pelvis; found poses likewise, each bone then scaled to the length that it has
                in the truth, from the pelvis outwards (`rescaled`), or left as they are (`as_is`)
    3DPCK       share of joints within 150 mm; AUC its mean over 0, 5 .. 150 mm; `all` annotated people (missed ones are
                wrong in every joint), or the `matched` only; a mean over sequences of each sequence's share
    joints      head top, neck, shoulders, elbows, wrists, hips, knees, ankles. A missing neck is the middle of the
                shoulders and a missing pelvis that of the hips, as the official code suggests; joints that the model
                has not (LCR13: the head's top) take no part, and bones hang from the nearest joint that is there.
                The stand-in for the neck is not harmless: of a perfect LCR13 pose it moves arms and shoulders by 39 mm
                when bones are scaled (a mean of 20 mm over all joints; 3 mm as they are; four MPI-INF-3DHP frames)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lcrnet import h36m, mupots
from lcrnet.annotations import CocoImage
from lcrnet.config import UserError
from lcrnet.pose import People, Person, centre, procrustes
from lcrnet.skeleton import H36M17, LCR13, MPI_INF_3DHP17, Skeleton, convert

Kind = Literal["h36m", "mupots"]
KINDS: tuple[Kind, ...] = ("h36m", "mupots")

MATCH_PIXELS = 40.0
"""mpii_multiperson_get_identity_matching's threshold, in x and in y."""

PCK_MM = 150.0
AUC_MM = np.arange(0, 151, 5)
"""mpii_compute_3d_pck's thresholds, "below" them being right."""

GROUPS = {
    "head": ("head_top",), "neck": ("neck",), "shoulders": ("r_shoulder", "l_shoulder"),
    "elbows": ("r_elbow", "l_elbow"), "wrists": ("r_wrist", "l_wrist"), "hips": ("r_hip", "l_hip"),
    "knees": ("r_knee", "l_knee"), "ankles": ("r_ankle", "l_ankle"),
}  # fmt: skip
"""mpii_get_pck_auc_joint_groups: the 14 joints of MuPoTS-3D that count."""

PARENT = {
    "spine": "pelvis", "neck": "spine", "head_top": "neck", "head": "neck",
    "r_shoulder": "neck", "r_elbow": "r_shoulder", "r_wrist": "r_elbow",
    "l_shoulder": "neck", "l_elbow": "l_shoulder", "l_wrist": "l_elbow",
    "r_hip": "pelvis", "r_knee": "r_hip", "r_ankle": "r_knee",
    "l_hip": "pelvis", "l_knee": "l_hip", "l_ankle": "l_knee",
}  # fmt: skip
"""Where each bone begins (`o1` of mpii_get_joints), in the order in which they are scaled (`safe_traversal_order`)."""


@dataclass
class Benchmark:
    """A data set to be evaluated on by its own rules. N images, all with somebody annotated.

    images    N, their people in the joints of `skeleton`, as `coco.read` gives them (3D where all joints are known)
    groups    N names: the action (Human3.6M) or the sequence (MuPoTS-3D)
    native    N: the same people in the data set's own joints
    universal N arrays (P, 17, 3) metres, root at the pelvis: univ_annot3 of the people that are no `crowd` (MuPoTS-3D)
    """

    kind: Kind
    images: list[CocoImage]
    skeleton: Skeleton
    groups: list[str]
    native: list[People]
    universal: list[np.ndarray]


def read(
    kind: Kind,
    path: str | Path,
    images: str | Path | None = None,
    skeleton: Skeleton = LCR13,
    every: int | None = None,
) -> Benchmark:
    """The benchmark in the joints of `skeleton`.

    path     h36m: the folder of its JSON files or mmpose's h36m_test.npz (h36m.py); mupots: its MultiPersonTestSet
    images   folder that the files' names are below; all of them must be there. None: not looked for
    every    h36m: each so many frames of the videos; None: 64 of JSON files, all of an .npz

    UserError: a file is missing or not as it should be; it names the file, the field and the fault.
    """
    if kind not in KINDS:
        raise UserError(f"{kind!r} is no benchmark; there are {', '.join(KINDS)}")
    if every is not None and every < 1:
        raise UserError(f"every: {every} is no number of frames")
    universal: list[np.ndarray] = []
    if kind == "h36m":
        entries, source = h36m.read(path, every), H36M17
    else:
        (entries, universal), source = mupots.read(path), MPI_INF_3DHP17
    if images is not None:
        lost = [entry.file_name for entry in entries if not (Path(images) / entry.file_name).is_file()]
        if lost:
            raise UserError(f"{images}: {len(lost)} of {len(entries)} images are missing, the first is {lost[0]}")
    native = [entry.people for entry in entries]
    everybody = _converted(People.join(native), source, skeleton)
    stops = np.cumsum([len(people) for people in native])
    parts = [everybody[stop - len(people) : stop] for people, stop in zip(native, stops, strict=True)]
    entries = [replace(entry, people=part) for entry, part in zip(entries, parts, strict=True)]
    return Benchmark(kind, entries, skeleton, [str(entry.group) for entry in entries], native, universal)


def figures(benchmark: Benchmark, found: Sequence[Sequence[Person]]) -> dict[str, Any]:
    """The benchmark's own figures of the people found in each of its images, a dict for JSON. All detections take part.

    h36m     images, found, missed, joints; `protocol1`, `protocol2`: `mean_mm` over actions, `pooled_mm` over images;
             `s11`: images, found, rigid_mpjpe_mm, pa_mpjpe_mm; `per_action`: images, found, mpjpe_mm, pa_mpjpe_mm
    mupots   images, people, matched, detections, joints; `rescaled`, `as_is`: of `all` and of `matched` people pck3d,
             auc3d, pck3d_visible, pck3d_occluded, and mpjpe_mm of the matched; `per_sequence`, `per_joint_group`: of
             the rescaled poses people, matched, pck3d_all, auc3d_all, pck3d_matched, auc3d_matched
    note     what differs from the published protocol

    Shares are 0..1; a figure of nobody is None. ValueError: the number of images differs.
    """
    if len(found) != len(benchmark.images):
        raise ValueError(f"{len(benchmark.images)} images of truth, but detections of {len(found)}")
    return _h36m(benchmark, found) if benchmark.kind == "h36m" else _mupots(benchmark, found)


def _converted(people: People, source: Skeleton, target: Skeleton) -> People:
    """People in other joints; the 3D of those whose joints are all known."""
    pose2d, seen = convert(people.pose2d, people.seen, source, target)
    pose3d, known = convert(people.pose3d, np.ones(people.seen.shape, np.int64), source, target)
    whole = people.has3d.astype(bool) & (known > 0).all(-1)
    pose3d = np.where(whole[:, None, None], centre(pose3d, target), 0).astype(np.float32)
    return replace(people, pose2d=pose2d, pose3d=pose3d, seen=seen, has3d=whole)


def _h36m(benchmark: Benchmark, found: Sequence[Sequence[Person]]) -> dict[str, Any]:
    skeleton = benchmark.skeleton
    best = [max(persons, key=lambda person: person.score, default=None) for persons in found]
    rows = np.array(
        [i for i, person in enumerate(best) if person is not None and np.isfinite(person.pose3d).all()], np.int64
    )
    pose = np.array([best[i].pose3d for i in rows], np.float64).reshape(-1, len(skeleton), 3)
    people = People.join([People.empty(0, len(H36M17)), *(benchmark.native[i] for i in rows)])
    goal, _ = convert(people.pose3d.astype(np.float64), np.ones(people.seen.shape, np.int64), H36M17, skeleton)
    joints = _common(H36M17, skeleton)
    pose, goal = _rooted(pose, skeleton)[:, joints], _rooted(goal, skeleton)[:, joints]
    plain = _millimetres(pose - goal)  # (n,) mean over joints
    aligned = _millimetres(procrustes(pose, goal) - goal)
    rigid = _millimetres(procrustes(pose, goal, scale=False) - goal)

    action = np.array(benchmark.groups)
    subject = np.array([image.extra.get("subject") for image in benchmark.images])
    per_action = {
        name: {
            "images": int((action == name).sum()),
            "found": int((action[rows] == name).sum()),
            "mpjpe_mm": _mean(plain[action[rows] == name]),
            "pa_mpjpe_mm": _mean(aligned[action[rows] == name]),
        }
        for name in sorted(set(benchmark.groups))
    }
    notes = [f"means over the {len(joints)} joints of {skeleton.name} that Human3.6M has, of its 17"]
    if "pelvis" not in skeleton.joints:
        notes.append("root at the middle of the hips, which is Human3.6M's pelvis")
    if len(rows) < len(action):
        notes.append(
            f"nobody found in {len(action) - len(rows)} of {len(action)} images, which have no part in the means"
        )
    for s in h36m.SUBJECTS:
        if s not in subject:
            notes.append(f"S{s} is not in the annotations; the protocol wants S9 and S11")
    absent = [name for name in h36m.ACTIONS if name not in per_action]
    if absent:
        notes.append(f"no image of {', '.join(absent)}")
    old = subject[rows] == 11
    return {
        "kind": "h36m",
        "images": len(action),
        "found": len(rows),
        "missed": len(action) - len(rows),
        "joints": [skeleton.joints[j] for j in joints],
        "protocol1": {"mean_mm": _mean([row["mpjpe_mm"] for row in per_action.values()]), "pooled_mm": _mean(plain)},
        "protocol2": {
            "mean_mm": _mean([row["pa_mpjpe_mm"] for row in per_action.values()]), "pooled_mm": _mean(aligned),
        },
        "s11": {
            "images": int((subject == 11).sum()), "found": int(old.sum()),
            "rigid_mpjpe_mm": _mean(rigid[old]), "pa_mpjpe_mm": _mean(aligned[old]),
        },
        "per_action": per_action,
        "note": "; ".join(notes),
    }  # fmt: skip


def _mupots(benchmark: Benchmark, found: Sequence[Sequence[Person]]) -> dict[str, Any]:
    skeleton = benchmark.skeleton
    persons = [person for each in found for person in each]
    start = np.cumsum([0, *(len(each) for each in found)])
    pose2d = np.array([person.pose2d for person in persons], np.float64).reshape(-1, len(skeleton), 2)
    pose3d = np.array([person.pose3d for person in persons], np.float64).reshape(-1, len(skeleton), 3)
    pose2d, _ = _completed(pose2d, skeleton)
    pose3d, known = _completed(pose3d, skeleton)
    matching = np.array([j for j in MPI_INF_3DHP17.indices(*_limbs()) if known[j]], np.int64)

    taken: list[np.ndarray] = []  # of each true person: the row of its match, -1 = none
    truth: list[People] = [People.empty(0, len(MPI_INF_3DHP17))]
    for i, people in enumerate(benchmark.native):
        true = people[~people.crowd.astype(bool)]
        rows = _match(true.pose2d[:, matching], pose2d[start[i] : start[i + 1], matching])
        taken.append(np.where(rows >= 0, rows + start[i], -1))
        truth.append(true)
    match = np.concatenate([np.zeros(0, np.int64), *taken])
    hit = match >= 0
    hidden = People.join(truth).seen == 1
    sequence = np.repeat(np.array(benchmark.groups), [len(rows) for rows in taken])
    goal = np.concatenate([np.zeros((0, len(MPI_INF_3DHP17), 3)), *benchmark.universal])
    pose = _rooted(pose3d, MPI_INF_3DHP17)[match[hit]]

    error = {}  # (people, 17) millimetres; infinite for missed people, NaN (never right) where a bone has no length
    for name, poses in (("rescaled", _rescaled(pose, goal[hit], known)), ("as_is", pose)):
        error[name] = np.full((len(match), len(MPI_INF_3DHP17)), np.inf)
        error[name][hit] = 1000 * np.linalg.norm(poses - goal[hit], axis=-1)
    counted = [name for names in GROUPS.values() for name in names if known[MPI_INF_3DHP17.index(name)]]
    columns = MPI_INF_3DHP17.indices(*counted)
    present = [name for name in mupots.SEQUENCES if name in benchmark.groups]

    def mean(name: str, joints: np.ndarray, rows: np.ndarray, part: np.ndarray, curve: bool = False) -> float | None:
        """Mean over sequences of the share of joints in `rows` and `part` that are right."""
        return _mean([_share(error[name][:, joints], rows & (sequence == s), part[:, joints], curve) for s in present])

    everything = np.ones_like(hidden)
    summary = {
        name: {
            which: {
                "pck3d": mean(name, columns, rows, everything),
                "auc3d": mean(name, columns, rows, everything, curve=True),
                "pck3d_visible": mean(name, columns, rows, ~hidden),
                "pck3d_occluded": mean(name, columns, rows, hidden),
                **({"mpjpe_mm": _mean(values[hit][:, columns])} if which == "matched" else {}),
            }
            for which, rows in (("all", np.ones_like(hit)), ("matched", hit))
        }
        for name, values in error.items()
    }

    def line(joints: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
        values, whole = error["rescaled"][:, joints], everything[:, joints]
        return {
            "people": int(rows.sum()),
            "matched": int((rows & hit).sum()),
            "pck3d_all": _share(values, rows, whole),
            "auc3d_all": _share(values, rows, whole, curve=True),
            "pck3d_matched": _share(values, rows & hit, whole),
            "auc3d_matched": _share(values, rows & hit, whole, curve=True),
        }

    notes = [
        f"{len(counted)} of the 14 joints that count; {skeleton.name} lacks {', '.join(_lacking(known)) or 'none'}"
    ]
    for name, stand in (("neck", "shoulders"), ("pelvis", "hips")):
        if name not in skeleton.joints:
            notes.append(f"{name}: the middle of the {stand}")
            if name == "neck":
                notes[-1] += " (a perfect pose is then about 20 mm off once its bones are scaled)"
    if len(present) < len(mupots.SEQUENCES):
        notes.append(f"{len(present)} of {len(mupots.SEQUENCES)} sequences")
    empty = [name for name in present if not (hit & (sequence == name)).any()]
    if empty:
        notes.append(f"nobody matched in {', '.join(empty)}, which have no part in the means of matched people")
    return {
        "kind": "mupots",
        "images": len(benchmark.images),
        "people": len(match),
        "matched": int(hit.sum()),
        "detections": len(persons),
        "joints": counted,
        **summary,
        "per_sequence": {name: line(columns, sequence == name) for name in present},
        "per_joint_group": {
            name: line(MPI_INF_3DHP17.indices(*(n for n in names if n in counted)), np.ones_like(hit))
            for name, names in GROUPS.items()
            if any(n in counted for n in names)
        },
        "note": "; ".join(notes),
    }


def _limbs() -> list[str]:
    """The joints that people are matched by: all that count but the head's top."""
    return [name for names in GROUPS.values() for name in names if name != "head_top"]


def _lacking(known: np.ndarray) -> list[str]:
    return [name for names in GROUPS.values() for name in names if not known[MPI_INF_3DHP17.index(name)]]


def _completed(pose: np.ndarray, skeleton: Skeleton) -> tuple[np.ndarray, np.ndarray]:
    """Poses (N, J, D) in MuPoTS-3D's joints, and which of them are known (17,); a missing neck as its code suggests."""
    out, _ = convert(pose, np.ones(pose.shape[:2], np.int64), skeleton, MPI_INF_3DHP17)
    known = np.isin(np.arange(len(MPI_INF_3DHP17)), _common(skeleton, MPI_INF_3DHP17))
    neck, shoulders = MPI_INF_3DHP17.index("neck"), MPI_INF_3DHP17.indices("r_shoulder", "l_shoulder")
    if not known[neck] and known[shoulders].all():
        out[:, neck] = out[:, shoulders].mean(1)
        known[neck] = True
    return out, known


def _match(true: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(P,) index of the found pose (N, J, 2) that each true pose (P, J, 2) gets, in turn; -1 = none."""
    near = (np.abs(true[:, None] - found[None]) < MATCH_PIXELS).all(-1).sum(-1)  # (P, N) joints
    out = np.full(len(true), -1, np.int64)
    for row in range(len(true) if len(found) else 0):
        column = int(near[row].argmax())
        if near[row, column] > 0:
            out[row] = column
            near[:, column] = 0
    return out


def _rescaled(pose: np.ndarray, goal: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Poses (N, 17, 3) with the bones of their own direction and the length that they have in the truth.

    mpii_map_to_gt_bone_lengths. A bone without length has no direction: NaN, which is never right, as there.
    """
    out = pose.copy()
    for name, above in PARENT.items():
        j = MPI_INF_3DHP17.index(name)
        while not known[MPI_INF_3DHP17.index(above)] and above in PARENT:
            above = PARENT[above]
        i = MPI_INF_3DHP17.index(above)
        if known[j] and known[i]:
            bone = pose[:, j] - pose[:, i]
            length = np.linalg.norm(bone, axis=-1, keepdims=True)
            wanted = np.linalg.norm(goal[:, j] - goal[:, i], axis=-1, keepdims=True)
            out[:, j] = out[:, i] + bone * wanted / np.where(length > 0, length, np.nan)
    return out


def _rooted(pose: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    """Poses (N, J, 3) with their origin at the pelvis, or the middle of the hips where there is none."""
    root = ("pelvis",) if "pelvis" in skeleton.joints else ("r_hip", "l_hip")
    return pose - pose[:, skeleton.indices(*root)].mean(1, keepdims=True)


def _common(source: Skeleton, target: Skeleton) -> np.ndarray:
    """Joints of `target` that `source` gives."""
    return np.flatnonzero(convert(np.ones((len(source), 1)), np.ones(len(source)), source, target)[1] > 0)


def _share(error: np.ndarray, rows: np.ndarray, part: np.ndarray, curve: bool = False) -> float | None:
    """Share of the errors (N, J) mm in `rows` (N,) and `part` (N, J) below PCK_MM, or its mean over AUC_MM."""
    values = error[rows][part[rows]]
    if not len(values):
        return None
    return float(np.mean([np.mean(values < limit) for limit in (AUC_MM if curve else (PCK_MM,))]))


def _millimetres(difference: np.ndarray) -> np.ndarray:
    """(N,) mean length over the joints of (N, J, 3) metres."""
    return 1000 * np.linalg.norm(difference, axis=-1).mean(-1)


def _mean(values: Any) -> float | None:
    known = np.array([value for value in np.ravel(values) if value is not None], np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else None
