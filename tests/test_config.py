"""The configuration: what is refused and how, overrides, round trip, help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcrnet import config
from lcrnet.config import Config, ConfigError, UserError

REFUSED = [  # (overrides as on a command line, what the line must say)
    ({"train.lrr": "1"}, "unknown 'train.lrr'; did you mean 'train.lr'?"),
    ({"trian.lr": "1"}, "did you mean 'train.lr'?"),
    ({"optim.momentum": "1"}, "did you mean 'train.momentum'?"),
    ({"momentum": "1"}, "did you mean 'train.momentum'?"),
    ({"train": "1"}, "unknown 'train'"),
    ({"qqqqqq": "1"}, "unknown 'qqqqqq'; see --help"),
    ({"train.lr": "0"}, "train.lr: input should be greater than 0, not 0"),
    ({"train.lr": "-1e-4"}, "train.lr: input should be greater than 0, not -0.0001"),
    ({"train.lr": "fast"}, "train.lr: input should be a valid number"),
    ({"train.lr": ".inf"}, "train.lr: input should be a finite number"),
    ({"train.lr": ".nan"}, "train.lr: input should be"),
    ({"image.mean": "[.nan, 0, 0]"}, "image.mean.0: input should be a finite number"),
    ({"train.lr": ""}, "train.lr: input should be a valid number"),
    ({"train.steps": "0"}, "train.steps: input should be greater than or equal to 1, not 0"),
    ({"train.steps": "2.5"}, "train.steps: input should be a valid integer"),
    ({"train.momentum": "1"}, "train.momentum: input should be less than 1, not 1"),
    ({"data.flip": "1.5"}, "data.flip: input should be less than or equal to 1, not 1.5"),
    ({"data.scale": "[1]"}, "data.scale.1: field required"),
    ({"rpn.sizes": "[1, 2"}, "rpn.sizes: '[1, 2' is not YAML"),
    ({"rpn.sizes": "[16, -1]"}, "rpn.sizes.1: input should be greater than 0, not -1"),
    ({"model.backbone": "resnet5"}, "'resnet5' is not one of tiny, resnet18, resnet34, resnet50, resnet101, resnet152,"
                                    " resnext101_32x8d, resnext101_64x4d, resnext152_32x8d, vgg16; did you mean"
                                    " 'resnet50'?"),
    ({"ppi.iou_func": "torsohedLR"}, "did you mean 'torsoheadLR'?"),
    ({"train.lr": "0", "train.batch": "0"}, "train.batch: "),
    # one field against another
    ({"train.batch": "16", "train.workers": "3"}, "train.batch 16 is not divisible by train.workers 3"),
    ({"rpn.negative_iou": "0.8"}, "rpn.negative_iou 0.8 is above rpn.positive_iou"),
    ({"image.max_side": "100"}, "image.max_side 100 is below image.short_side 800"),
    ({"data.scale": "[1.2, 0.8]"}, "data.scale [1.2, 0.8] must be [smallest, largest]"),
    ({"tune.space": "{train.lrr: {choice: [1]}}"}, "tune.space: unknown 'train.lrr'; did you mean 'train.lr'?"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "says"), REFUSED, ids=[str(o) for o, _ in REFUSED])
def test_refused_in_one_line(overrides: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        config.load(None, overrides)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


FILES = [
    (b"trian: {lr: 1}", "unknown 'trian'; did you mean 'train'?"),
    (b"lr: 1", "unknown 'lr'; did you mean 'train.lr'?"),
    (b"train: {lrr: 1}", "unknown 'train.lrr'; did you mean 'train.lr'?"),
    (b"train: 5", "train: input should be a valid dictionary"),
    (b"train:", "train: input should be a valid dictionary"),
    (b"- train", "expected sections such as `train:`, found list"),
    (b"train: {lr: [1", "not YAML"),
    (b"train: {lr: 1}\n\tx: 1", "not YAML"),
    (b"train: {init: \xff}", "not YAML"),
]


@pytest.mark.parametrize(("text", "says"), FILES, ids=[str(t) for t, _ in FILES])
def test_file_refused_in_one_line(text: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text)
    with pytest.raises(ConfigError) as refusal:
        config.load(file)
    assert str(refusal.value).startswith(f"{file}: ") and says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_file_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        config.load(tmp_path)


def test_overrides(tmp_path: Path) -> None:
    """Values are YAML text, 1e-4 is a number although YAML 1.1 says text; what is not overridden stays."""
    file = tmp_path / "recipe.yaml"
    file.write_text("train: {lr: 5e-3, steps: 7}\nrpn: {sizes: [8, 1e1]}\n")
    asked = {
        "train.lr": "1e-4", "data.flip": "0", "rpn.ratios": "[5e-1, 2]", "train.init": "a/b", "train.gpu": "true",
        "tune.space": "{train.lr: {loguniform: [1e-4, 1e-2]}}", "train.batch": 8,
    }  # fmt: skip
    got = config.load(file, asked)
    assert (got.train.lr, got.train.steps, got.train.batch) == (1e-4, 7, 8)
    assert got.rpn.sizes == (8, 10) and got.rpn.ratios == (0.5, 2)
    assert (got.data.flip, got.train.init, got.train.gpu) == (0, "a/b", True)
    assert got.tune.space == {"train.lr": {"loguniform": [1e-4, 1e-2]}}
    assert config.load(file, {"train.init": "null"}).train.init is None
    assert config.load(file).train.lr == 5e-3
    assert got.head == Config().head
    with pytest.raises(ValueError, match="frozen"):
        got.train.lr = 1


def test_saved_and_loaded(tmp_path: Path) -> None:
    for overrides in ({}, {"train.lr": 1e-30, "train.init": "a b", "tune.space": {"train.lr": {"choice": [1e-5]}},
                           "train.decay_at": "[]", "data.scale": "[0.1, 3]", "model.backbone": "tiny"}):  # fmt: skip
        resolved = config.load(None, overrides)
        config.save(resolved, tmp_path / "config.yaml")
        assert config.load(tmp_path / "config.yaml") == resolved


def test_recipes(root: Path) -> None:
    """The files of configs/ are configurations."""
    for file in (root / "configs").glob("*.yaml"):
        assert config.load(file), file


def test_help_documents_every_field() -> None:
    text = "".join(config.parser("What it does, 100 %.").format_help().split())  # lines break at hyphens too
    assert "Whatitdoes,100%." in text
    for name, field in config.leaves().items():
        assert field.description, f"{name} has no description"
        assert f"--{name}VALUE{''.join(field.description.split())}[" in text, name
    assert "default0.02]" in text and "[sgd|adamw;" in text


def arguments(*argv: str) -> Config:
    return config.parse(config.parser("usage"), argv)[1]


def test_command_line() -> None:
    parser = config.parser("usage")
    parser.add_argument("--out")
    parser.add_argument("--steps", dest="train.steps")
    args, got = config.parse(parser, ["--out", "RUN", "--train.lr", "1e-2", "--train.ema=0.9", "--steps", "3"])
    assert (args.out, got.train.lr, got.train.ema, got.train.steps) == ("RUN", 0.01, 0.9, 3)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--train.lrr", "1"], "unknown '--train.lrr'; did you mean '--train.lr'?"),
        (["--train.lrr=1"], "did you mean '--train.lr'?"),
        (["--lr", "1"], "did you mean '--train.lr'?"),
        (["--train.lr"], "--train.lr: expected one argument"),
        (["--train.lr", "0"], "train.lr: input should be greater than 0"),
        (["--rpn.sizes", "[1"], "rpn.sizes: '[1' is not YAML"),
        (["--config", "/none.yaml"], "/none.yaml: No such file or directory"),
        (["surplus"], "unknown 'surplus'"),
    ],
)
def test_command_line_refused(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        arguments(*argv)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err


def fails(error: BaseException) -> Callable[[], int | None]:
    def main() -> int | None:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "says"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (fails(UserError("no such folder")), 2, "error: no such folder\n"),
        (fails(ConfigError("train.lr: ...")), 2, "error: train.lr: ...\n"),
        (fails(KeyboardInterrupt()), 130, ""),
    ],
)
def test_run_ends_the_process(main: Any, code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        config.run(main)
    assert (end.value.code, capsys.readouterr().err) == (code, says)


def test_run_does_not_hide_our_own_mistakes() -> None:
    with pytest.raises(ZeroDivisionError):
        config.run(fails(ZeroDivisionError()))
