"""jobs/tune.py: short trials and populations on a cluster, the cheap sweep, kills, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs import train, tune
from lcrnet import config, sweep, weights
from lcrnet.config import Config, UserError, from_dict
from lcrnet.dataset import Source

LR = {"train.lr": {"loguniform": [1e-4, 1e-3]}}


def with_space(settings: Config, space: dict[str, Any], tuned: dict[str, Any] | None = None, **fields: Any) -> Config:
    values = settings.model_dump()
    values["tune"] |= {"space": space, "trials": 2, "metric": "step", "mode": "max"} | (tuned or {})
    values["train"] |= {"workers": 1, "threads": 1} | fields
    return from_dict(values)


@pytest.fixture
def source(drawn: Path) -> Source:
    return Source(drawn / "annotations.json", drawn / "images")


@pytest.fixture
def arguments(drawn: Path, model_folder: Path, tmp_path: Path) -> list[str]:
    """Of a cheap sweep of 20 trials."""
    recipe = tmp_path / "ppi.yaml"
    space = {"ppi.th_pose3D": {"loguniform": [0.02, 2]}, "head.score_floor": {"uniform": [0.05, 0.2]}}
    text = json.dumps({"tune": {"space": space, "trials": 20, "metric": "mpjpe_mm", "mode": "min"},
                       "ppi": {"th_persondetect": 0.01}, "evaluate": {"min_score": 0, "oks": 0.001}})  # fmt: skip
    recipe.write_text(text)
    return ["--config", str(recipe), "--ppi", str(model_folder), "--data", str(drawn / "annotations.json"),
            "--images", str(drawn / "images"), "--out", str(tmp_path / "sweep")]  # fmt: skip


@pytest.fixture(scope="module")
def swept(cluster: Any, tiny: Config, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of two trials."""
    out, source = tmp_path_factory.mktemp("swept"), Source(drawn / "annotations.json", drawn / "images")
    rows = tune.run(two_trials(tiny), source, source, out)
    assert len(rows) == 2 and rows[0]["metric"] == 2 and not rows[0]["error"]
    return out


def two_trials(tiny: Config, **fields: Any) -> Config:
    return with_space(tiny, LR | {"anchors.k": {"choice": [3, 4]}}, **{"steps": 2, "save_every": 1} | fields)


def test_a_sweep_ranks_its_trials_and_keeps_the_best_model(swept: Path) -> None:
    rows = json.loads((swept / "report.json").read_text())
    assert {row["anchors.k"] for row in rows} <= {3, 4} and all(1e-4 <= row["train.lr"] <= 1e-3 for row in rows)
    model = weights.load(swept / "best")
    assert model.config.train.lr == rows[0]["train.lr"] and model.config.anchors.k == rows[0]["anchors.k"]
    assert weights.read_about(swept / "best")["step"] == 2
    assert str(rows[0]["trial"]) in tune.table(rows, "step") and (swept / "report.png").is_file()


def test_a_sweep_that_is_done_says_so_and_another_is_refused(
    swept: Path, tiny: Config, source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((swept / "report.json").read_text())
    assert tune.run(two_trials(tiny), source, source, swept) == rows and "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds another sweep \(of other train\)"):
        tune.run(two_trials(tiny, steps=3), source, source, swept)


def test_a_fork_goes_on_from_the_checkpoint_of_another_run(
    swept: Path, tiny: Config, source: Source, tmp_path: Path
) -> None:
    """With a learning rate of its own; from a step that is not the last."""
    row = json.loads((swept / "report.json").read_text())[0]
    tune._fork(Path(row["folder"]), tmp_path / "child", 1)
    values = {name: row[name] for name in ("train.lr", "anchors.k")}
    settings = sweep.with_override(two_trials(tiny), values | {"train.lr": 5e-4})
    assert train.run(settings, source, tmp_path / "child") is not None
    assert "resumed at step 1" in (tmp_path / "child/train.log").read_text()
    child, parent = (load_file(run / "model/model.safetensors") for run in (tmp_path / "child", Path(row["folder"])))
    assert child.keys() == parent.keys() and any(not torch.equal(child[n], parent[n]) for n in child)
    with pytest.raises(UserError, match=r"no checkpoint of step 7"):
        tune._fork(Path(row["folder"]), tmp_path / "other", 7)


def test_rounds_of_a_population(
    cluster: Any, tiny: Config, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    """What a round is made of, with trainings that are none; a kill within the second costs that round alone."""
    settings = with_space(tiny, LR, {"scheduler": "pbt", "metric": "pck2d", "trials": 3}, steps=5, save_every=2)
    ran: list[tuple[int, Any]] = []

    def tuned(job: Any, folder: Path, *args: Any) -> list[Any]:
        stop = args[-1]
        if len(ran) == 1 and stop == {"step": 4}:
            ran.append((0, "killed"))
            raise KeyboardInterrupt
        ran.append((stop["step"] if stop else 5, folder.name))
        for i, home in enumerate(job.homes):
            assert stop == {"step": 2} or (home / "ray/checkpoint_parent").is_dir()
            for step in range(2, 1 + ran[-1][0] + 2 * bool(stop), 2):  # one checkpoint further than asked
                model = home / "ray" / f"checkpoint_{step}" / "model"
                shutil.copytree(model_folder, model, dirs_exist_ok=True)
                about = {"step": step, "metrics": {"pck2d": None if i == 2 else step + i}}
                (model / "model.json").write_text(json.dumps(weights.read_about(model_folder) | about))
        if not stop:
            for i, home in enumerate(job.homes):
                shutil.copytree(model_folder, home / "model")
                about = {"step": 5, "metrics": {"pck2d": i}}
                (home / "model/model.json").write_text(json.dumps(weights.read_about(model_folder) | about))
        return [SimpleNamespace(config={"member": i}, error=None) for i in range(3)]

    def fork(parent: Path, child: Path, step: int) -> None:
        assert step in (2, 4)
        (child / "ray/checkpoint_parent").mkdir(parents=True, exist_ok=True)
        (child / "from").write_text(f"{parent.parent.name}/{parent.name} at {step}")

    monkeypatch.setattr(tune, "_tuned", tuned)
    monkeypatch.setattr(tune, "_fork", fork)
    with pytest.raises(KeyboardInterrupt):
        tune.run(settings, source, source, tmp_path)
    rows = tune.run(settings, source, source, tmp_path)
    assert ran == [(2, "tune_000"), (0, "killed"), (4, "tune_001"), (5, "tune_002")]
    rounds = json.loads((tmp_path / "population.json").read_text())
    assert [[m["metric"] for m in r["members"]] for r in rounds] == [[2, 3, None], [4, 5, None], [0, 1, 2]]
    assert [[m["parent"] for m in r["members"]] for r in rounds] == [[None] * 3, [0, 1, 1], [0, 1, 1]]
    assert (tmp_path / "trials/round_002/2/from").read_text() == "round_001/1 at 4"
    assert rows[0]["trial"] == 2 and rows[0]["metric"] == 2 and weights.read_about(tmp_path / "best")["step"] == 5
    assert rows[0]["train.lr"] == rounds[2]["members"][2]["values"]["train.lr"]


def population(tiny: Config) -> Config:
    return with_space(tiny, LR, {"scheduler": "pbt", "metric": "images", "mode": "max"}, steps=2, save_every=1)


@pytest.mark.slow
def test_a_population_goes_on_from_its_best(cluster: Any, tiny: Config, source: Source, tmp_path: Path) -> None:
    rows = tune.run(population(tiny), source, source, tmp_path)
    rounds = json.loads((tmp_path / "population.json").read_text())
    assert [r["step"] for r in rounds] == [1, 2] and [row["metric"] for row in rows] == [12, 12]
    # both are as good: the first is the parent of the second, whose settings are new
    first, second = (r["members"] for r in rounds)
    assert [m["parent"] for m in first] == [None, None] and [m["parent"] for m in second] == [0, 0]
    assert second[0]["values"] == first[0]["values"] != second[1]["values"]
    child = tmp_path / "trials/round_001/1"
    assert weights.load(child / "model").config.train.lr == pytest.approx(second[1]["values"]["train.lr"])
    assert "resumed at step 1" in (child / "train.log").read_text()
    assert not list(tmp_path.glob("trials/round_000/*/ray")) and weights.read_about(tmp_path / "best")["step"] == 2


@pytest.mark.slow
def test_a_population_is_the_same_again(cluster: Any, tiny: Config, source: Source, tmp_path: Path) -> None:
    """Bit for bit; and its first member, which never went on from another, is a training without rounds."""
    settings = population(tiny)
    for name in ("once", "twice"):
        tune.run(settings, source, source, tmp_path / name)
    values = json.loads((tmp_path / "once/population.json").read_text())[0]["members"][0]["values"]
    assert train.run(sweep.with_override(settings, values), source, tmp_path / "plain", source)
    models = [tmp_path / name / "trials/round_001" / i / "model" for i in "01" for name in ("once", "twice")]
    one, other, *second, plain = (load_file(m / "model.safetensors") for m in [*models, tmp_path / "plain/model"])
    for a, b in ((one, other), (one, plain), second):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(one[name], second[0][name]) for name in one)


def test_concurrency_leaves_each_trial_its_workers(cluster: Any, tiny: Config) -> None:
    """8 CPUs: as many trials as have all their workers, and never none."""
    for workers, threads, asked, fit in ((1, 1, 0, 8), (2, 1, 0, 4), (2, 3, 0, 1), (3, 1, 0, 2), (1, 1, 3, 3)):
        settings = with_space(tiny, LR, {"concurrent": asked}, workers=workers, threads=threads, batch=6)
        assert tune.fit_at_a_time(settings) == fit


def test_the_cheap_sweep_judges_all_trials_and_writes_the_best(
    cluster: Any, arguments: list[str], model_folder: Path, drawn: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from jobs import evaluate

    out = tmp_path / "sweep"
    assert tune.main(arguments) == 0
    said = capsys.readouterr().out
    assert "20 trials in" in said and "the model's own settings: mpjpe_mm" in said
    rows = json.loads((out / "report.json").read_text())
    assert sorted(row["trial"] for row in rows) == list(range(20)) and (out / "report.png").is_file()
    values = [row["metric"] for row in rows if row["metric"] is not None]
    assert values == sorted(values) and len(set(values)) > 3
    # The whole pipeline with SWEEP/best.yaml comes to the same figure.
    best = config.load(out / "best.yaml", {"evaluate.min_score": 0, "evaluate.oks": 0.001})
    metrics = evaluate.run(
        model_folder, Source(drawn / "annotations.json", drawn / "images"), tmp_path / "report", best
    )
    assert metrics["mpjpe_mm"] == pytest.approx(values[0], rel=1e-6)

    # A kill tears a line, takes a chunk's proposals: the rest is not done again, and comes out the same.
    log = out / "trials.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:12]) + lines[12][:9])
    before = log.stat().st_ino
    assert tune.main(arguments) == 0
    assert "8 trials in" in capsys.readouterr().out and log.stat().st_ino == before
    assert json.loads((out / "report.json").read_text()) == rows
    assert tune.main([*arguments, "--tune.trials", "24"]) == 0  # may be prolonged
    assert "4 trials in" in capsys.readouterr().out
    with pytest.raises(UserError, match="of other detection"):
        tune.main([*arguments, "--ppi.iou_func", "torso"])


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({}, "tune.space is empty"),
        ({"train.lr": {"normal": [0, 1]}}, "train.lr: {'normal': [0, 1]} is not one of loguniform"),
        ({"train.lr": {"loguniform": [1]}}, "is not one of"),
        ({"train.lr": {"choice": []}}, "is not one of"),
        ({"train.lr": {"choice": [1, -1]}}, "train.lr: input should be greater than 0, not -1"),
    ],
)
def test_spaces_that_are_refused(tiny: Config, space: dict[str, Any], says: str) -> None:
    with pytest.raises((UserError, config.ConfigError)) as error:
        tune.search_space(with_space(tiny, space))
    assert says in str(error.value)


def test_unknown_fields_are_refused_with_the_nearest(tiny: Config) -> None:
    with pytest.raises(config.ConfigError, match=r"did you mean 'train\.lr'"):
        with_space(tiny, {"train.lrr": {"choice": [1]}})


def test_rounds_end_at_checkpoints(cluster: Any, tiny: Config, source: Source, tmp_path: Path) -> None:
    settings = with_space(tiny, LR, {"scheduler": "pbt", "perturb_every": 3}, steps=4, save_every=2)
    with pytest.raises(UserError, match=r"3 is not a multiple of train\.save_every 2"):
        tune.run(settings, source, source, tmp_path)


@pytest.mark.parametrize("given", [["--data", "a.json"], ["--ppi", "model"]])
def test_missing_arguments_are_named(given: list[str], tmp_path: Path, root: Path) -> None:
    with pytest.raises(UserError, match=r"also needs --(images|data)"):
        tune.main(["--config", str(root / "configs/sweep.yaml"), "--out", str(tmp_path), *given])


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["asha", "pbt"])
def test_a_killed_sweep_goes_on(scheduler: str, tiny: Config, drawn: Path, tmp_path: Path, root: Path) -> None:
    """SIGKILL of the driver; minutes, as each start is a Ray of its own. Run with: pytest -m slow."""
    settings = with_space(tiny, LR, {"scheduler": scheduler, "concurrent": 2}, steps=40, save_every=20)
    config.save(settings, tmp_path / "recipe.yaml")
    data, images = str(drawn / "annotations.json"), str(drawn / "images")
    command = [sys.executable, "jobs/tune.py", "--config", str(tmp_path / "recipe.yaml"), "--data", data, "--images",
               images, "--val", data, "--out", str(tmp_path / "sweep")]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(root)}
    first = subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "sweep").glob("trials/**/ray/checkpoint_*/state.json")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    again = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    logs = [log.read_text() for log in (tmp_path / "sweep").glob("trials/**/train.log")]
    assert any("resumed at step" in log for log in logs)
    rows = json.loads((tmp_path / "sweep/report.json").read_text())
    assert rows[0]["step"] == 40 and weights.read_about(tmp_path / "sweep/best")["step"] == 40
