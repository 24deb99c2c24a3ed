"""The house rules that a machine can check: who imports whom, and that Ray stays in jobs/."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

# Arrow by arrow: the modules of lcrnet that a module may import. `config` and `skeleton` are everybody's.
# Beyond DESIGN.md's table: `config` outgrew its fields, which are `sections`; `model` has `detect`, so it knows images
# and PPI; `annotations` (a COCO file in memory) outgrew `coco`, `unpickle` outgrew `weights`, and so did `legacy`
# (other people's weights, with its `torchfile`, `fetch`, `names` and `imports`: file formats, URLs, names of tensors,
# conventions), `body` (joint angles and measures) outgrew `synthetic`; `detectron` (its YAML as our configuration) has
# its table of keys beside it.
# `mocap` (3D poses without images) serves `anchors` and `lift` (2D labels get 3D poses). Of `evaluate`, which matches
# people, `metrics` (formulas), `calibration` (scores -> probabilities), `protocols` (other people's data sets and their
# rules, with readers `h36m`, `mupots` and `matfile`) and `report` (a page to look at) are nouns of their own; a model
# carries its calibration. Of `train`, the loop, `board` (TensorBoard), `checkpoint` (what resuming needs) and
# `snapshot` (a step that failed, to be replayed); of `dataset`, `augment`; `sweep` tries settings of PPI without the
# network.
MAY_IMPORT = {
    "skeleton": "",
    "sections": "",
    "config": "sections",
    "unpickle": "",
    "pose": "",
    "image": "",
    "camera": "pose",
    "mocap": "pose camera",
    "anchors": "pose unpickle mocap",
    "lift": "pose camera mocap annotations",
    "calibration": "pose",
    "draw": "pose camera",
    "twins": "",
    "ops": "twins",
    "backbone": "ops",
    "rpn": "ops pose",
    "heads": "ops anchors pose rpn",
    "ppi": "ops pose",
    "model": "backbone rpn heads ops ppi image pose anchors calibration",
    "torchfile": "unpickle",
    "fetch": "",
    "names": "",
    "imports": "model anchors",
    "legacy": "imports names torchfile fetch detectron anchors backbone",
    "weights": "model anchors imports legacy calibration",
    "annotations": "pose",
    "labels": "pose",
    "coco": "annotations labels pose",
    "augment": "image pose",
    "dataset": "coco annotations image pose augment",
    "body": "",
    "synthetic": "body camera coco annotations pose",
    "optim": "",
    "metrics": "pose",
    "matfile": "",
    "h36m": "pose annotations",
    "mupots": "pose annotations matfile",
    "evaluate": "pose image annotations coco ppi calibration metrics",
    "protocols": "pose annotations h36m mupots",
    "report": "pose draw",
    "sweep": "annotate dataset evaluate image ppi weights model pose",
    "board": "draw",
    "checkpoint": "model optim weights",
    "snapshot": "dataset model pose weights",
    "train": "dataset model optim evaluate weights anchors board checkpoint coco draw pose snapshot",
    "annotate": "image labels model ppi weights pose",
    "detectron_keys": "",
    "detectron": "detectron_keys",
    "export": "image weights model pose rpn",
}
ROOT = Path(__file__).resolve().parent.parent


def imports(file: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", sorted((ROOT / "lcrnet").glob("*.py")), ids=lambda f: f.stem)
def test_arrows(file: Path) -> None:
    names = imports(file)
    if file.stem == "__init__":
        assert not names
        return
    assert file.stem in MAY_IMPORT, f"{file.name} has no place in the house: give it one in MAY_IMPORT"
    allowed = {"config", "skeleton", *MAY_IMPORT[file.stem].split()} - {file.stem}
    ours = {n.split(".")[1] for n in names if n.startswith("lcrnet.")} & {f.stem for f in file.parent.glob("*.py")}
    assert ours <= allowed, f"{file.name} must not import {sorted(ours - allowed)}"
    assert not {n for n in names if n.split(".")[0] in ("ray", "jobs")}, f"{file.name}: Ray belongs to jobs/"


def test_ext_imports_nothing_of_ours() -> None:
    for file in (ROOT / "ext").rglob("*.py"):
        assert not {n for n in imports(file) if n.split(".")[0] in ("ray", "jobs", "lcrnet")}, file


def test_modules_of_the_table_exist() -> None:
    assert {f.stem for f in (ROOT / "lcrnet").glob("*.py")} - {"__init__"} == set(MAY_IMPORT)


def test_jobs_do_no_tensor_arithmetic() -> None:
    for file in (ROOT / "jobs").glob("*.py"):
        assert not {n for n in imports(file) if n.split(".")[0] in ("torch", "numpy")}, file
