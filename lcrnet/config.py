"""The typed configuration: one YAML file a recipe, dotted overrides, everything else refused in one line.

    config = load("configs/tiny.yaml", {"train.lr": "0.01"})

Every field has a description, which is what `--help` prints. `save` writes the resolved configuration.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError, model_validator
from pydantic.fields import FieldInfo

from lcrnet.sections import (
    PPI_RELEASED as PPI_RELEASED,
)
from lcrnet.sections import (
    Anchors,
    Annotate,
    Coco,
    Data,
    Draw,
    Evaluate,
    Head,
    Image,
    Lift,
    Model,
    Ppi,
    Rpn,
    Section,
    Store,
    Train,
    Tune,
)
from lcrnet.sections import (
    PpiFault as PpiFault,
)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line and names the fix."""


class UserError(Exception):
    """Input that the user can mend. Jobs print the message, without a traceback, and exit with 2."""


class Config(Section):
    """Everything that decides a result."""

    image: Image = Image()
    anchors: Anchors = Anchors()
    model: Model = Model()
    rpn: Rpn = Rpn()
    head: Head = Head()
    ppi: Ppi = Ppi()
    data: Data = Data()
    train: Train = Train()
    store: Store = Store()
    annotate: Annotate = Annotate()
    coco: Coco = Coco()
    evaluate: Evaluate = Evaluate()
    tune: Tune = Tune()
    lift: Lift = Lift()
    draw: Draw = Draw()

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if self.train.batch % self.train.workers:
            raise ValueError(f"train.batch {self.train.batch} is not divisible by train.workers {self.train.workers}")
        parts = self.train.workers * self.train.accumulate
        if self.train.batch % parts:
            raise ValueError(
                f"train.batch {self.train.batch} is not divisible by train.workers {self.train.workers} times "
                f"train.accumulate {self.train.accumulate}"
            )
        if self.model.rpn_levels > 1 and len(self.rpn.sizes) != self.model.rpn_levels:
            raise ValueError(f"rpn.sizes: a pyramid needs {self.model.rpn_levels} sizes, one a level")
        if self.rpn.negative_iou > self.rpn.positive_iou:
            raise ValueError(f"rpn.negative_iou {self.rpn.negative_iou} is above rpn.positive_iou")
        if self.image.max_side < self.image.short_side:
            raise ValueError(f"image.max_side {self.image.max_side} is below image.short_side {self.image.short_side}")
        if self.data.scale[0] > self.data.scale[1]:
            raise ValueError(f"data.scale {list(self.data.scale)} must be [smallest, largest]")
        fields = list(leaves())
        for name in self.tune.space:
            if name not in fields:
                raise ValueError(f"tune.space: {_unknown(name, fields)}")
        return self


def leaves() -> dict[str, FieldInfo]:
    """Every field by its dotted name, in the order they are declared."""
    return {
        f"{section}.{name}": info
        for section, part in Config.model_fields.items()
        for name, info in getattr(part.annotation, "model_fields", {}).items()
    }


def load(file: str | os.PathLike[str] | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """The configuration of a YAML file (or the defaults) with dotted overrides, whose values may be YAML text.

    ConfigError: the file is missing or no YAML, a key is unknown, a value impossible; it names the nearest right one.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror or error}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: expected sections such as `train:`, found {type(values).__name__}")
    for name, value in (overrides or {}).items():
        section, _, field = name.partition(".")
        if name not in leaves():
            raise ConfigError(_unknown(name, list(leaves())))
        if not isinstance(values.setdefault(section, {}), dict):
            raise ConfigError(f"{file}: {section}: expected fields below it")
        try:
            values[section][field] = _number(yaml.safe_load(value)) if isinstance(value, str) else value
        except yaml.YAMLError as error:
            raise ConfigError(f"{name}: {value!r} is not YAML: {' '.join(str(error).split())}") from None
    return from_dict(values, str(file) if file is not None else "configuration")


def from_dict(values: dict[str, Any], origin: str = "configuration") -> Config:
    """The configuration of nested dicts; ConfigError as `load`, naming `origin`."""
    try:
        return Config.model_validate(_numbers(values))
    except ValidationError as error:
        raise ConfigError(f"{origin}: {'; '.join(_explain(dict(e)) for e in error.errors())}") from None


def save(config: Config, file: str | os.PathLike[str]) -> None:
    """Writes the resolved configuration as YAML that `load` reads back to an equal one."""
    Path(file).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def parser(usage: str, config_required: bool = False) -> argparse.ArgumentParser:
    """A command line with `--config FILE` and every field of the configuration as `--section.field VALUE`.

    usage   what the job does (the module's docstring); the job adds its own arguments to the parser.
    """
    out = _Parser(
        description=usage, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )  # fmt: skip
    out.add_argument("--config", metavar="FILE", required=config_required, help="YAML recipe, e.g. configs/tiny.yaml")
    sections = {name: info for name, info in Config.model_fields.items()}
    groups = {
        name: out.add_argument_group(name, (info.annotation.__doc__ or "").strip()) for name, info in sections.items()
    }  # fmt: skip
    for name, info in leaves().items():
        default = info.get_default(call_default_factory=True)
        text = f"{info.description or ''} [{_kind(info.annotation)}; default {_text(default)}]"
        groups[name.split(".")[0]].add_argument(
            f"--{name}", metavar="VALUE", default=argparse.SUPPRESS, help=text.replace("%", "%%")
        )
    return out


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """(the job's own arguments, the resolved configuration); exits with 2 and one line on a mistake."""
    args = parser.parse_args(argv)
    try:
        return args, load(args.config, {k: v for k, v in vars(args).items() if "." in k})
    except ConfigError as error:
        parser.error(str(error))


def run(main: Callable[[], int | None]) -> None:
    """Runs a job and ends the process: 0 done, 2 the user's mistake (one line, no traceback), 130 interrupted."""
    try:
        sys.exit(main() or 0)
    except (UserError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class _Parser(argparse.ArgumentParser):
    """argparse, naming the nearest option when one is unknown."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            options = [o for action in self._actions for o in action.option_strings]
            flag = next((r for r in rest if r.startswith("-")), rest[0])
            self.error(_unknown(flag.split("=")[0], options))
        return found

    def error(self, message: str) -> Any:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _unknown(name: str, known: Sequence[str]) -> str:
    # The same field of another section (or of none) is nearer than any spelling.
    same = [k for k in known if "." in k and k.split(".")[-1] == name.split(".")[-1].lstrip("-")]
    near = same or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; see --help")


def _explain(error: dict[str, Any]) -> str:
    """One pydantic error as `train.lr: ...`."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        sections = list(Config.model_fields)
        return _unknown(where, [*sections, *leaves()] if len(error["loc"]) == 1 else list(leaves()))
    if error["type"] == "literal_error":
        choices = [c.strip(" '") for c in error["ctx"]["expected"].replace(" or ", ",").split(",")]
        near = difflib.get_close_matches(str(error["input"]), choices, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{where}: {error['input']!r} is not one of {', '.join(choices)}{hint}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{where}: {message}, not {error['input']!r}" if where else message


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-4 for text; we take it for a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return [_number(v) for v in value] if isinstance(value, list) else value


def _numbers(values: Any) -> Any:
    return {k: _numbers(v) for k, v in values.items()} if isinstance(values, dict) else _number(values)


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(str(a) for a in get_args(annotation))
    if get_origin(annotation) is Union:
        return " | ".join(_kind(a) for a in get_args(annotation))
    return str(getattr(annotation, "__name__", annotation)).replace("typing.", "")


def _text(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)
