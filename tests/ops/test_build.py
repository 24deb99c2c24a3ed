"""Building the operators: once, whatever happens, and what a user hears where it cannot be done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from ext import build

USE = "import torch; from lcrnet import ops; print(ops.nms(torch.tensor([[0., 0, 1, 1]]), torch.ones(1), 0.5).tolist())"


def python(code: str, root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code from a checkout's folder; an empty value takes a variable away."""
    env = {k: v for k, v in (os.environ | environment).items() if v}
    return subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_killed_and_raced_it_is_built_once(root: Path, tmp_path: Path) -> None:
    """A builder dies in the middle; two more come at once: one builds, the other waits, both get the same library."""
    code = "from ext import build; print(build.library('cpu'))"
    environment = {k: v for k, v in os.environ.items() if k != "LCRNET_OPS"} | {"LCRNET_BUILD": str(tmp_path / "b")}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code], cwd=root, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    first = start()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "b").glob(".cpu-*/build.ninja")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert list((tmp_path / "b").glob(".cpu-*")) and not list((tmp_path / "b").glob("cpu-*/build.json"))

    said = [p.communicate() for p in [start(), start()]]
    assert said[0][0] == said[1][0] and Path(said[0][0].strip()).is_file()
    assert sum("building the cpu operators" in err for _, err in said) == 1
    facts = json.loads((Path(said[0][0].strip()).parent / "build.json").read_text())
    assert facts["torch"] == torch.__version__ and facts["compiler"] and facts["sources"]


def test_another_source_is_another_build(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build._facts("cpu")
    shutil.copytree(root / "ext", tmp_path / "ext", ignore=shutil.ignore_patterns("__pycache__", "built"))
    monkeypatch.setattr(build, "HERE", tmp_path / "ext")
    monkeypatch.setattr(build, "PACKAGED", tmp_path / "ext" / "built")
    assert build._facts("cpu") == before, "the folder does not matter"
    (tmp_path / "ext" / "cuda" / "new.cuh").write_text("//")
    assert build._facts("cpu") == before, "the CPU library does not hang on CUDA sources"
    (tmp_path / "ext" / "roi.h").write_text("//")
    assert build._facts("cpu") != before


def test_no_compiler(root: Path, tmp_path: Path) -> None:
    """The twins run, with one warning that says why and how to mend it; LCRNET_OPS forces either."""
    nothing = {"CXX": "no-such-compiler", "LCRNET_BUILD": str(tmp_path / "none"), "LCRNET_OPS": ""}
    said = python(USE + ";" + USE, root, **nothing)
    assert said.stdout == "[0]\n[0]\n" and said.returncode == 0
    assert said.stderr.count("RuntimeWarning") == 1 and "no C++ compiler (no-such-compiler)" in said.stderr
    assert "set CXX" in said.stderr
    said = python(USE, root, **nothing | {"LCRNET_OPS": "torch"})
    assert said.stdout == "[0]\n" and not said.stderr
    said = python(USE, root, **nothing | {"LCRNET_OPS": "ext"})
    assert said.returncode and "no C++ compiler" in said.stderr
    said = python(USE, root, LCRNET_OPS="both")
    assert said.returncode and "LCRNET_OPS is ext or torch, not 'both'" in said.stderr


def test_failing_compiler(root: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\ntest "$1" = --version && echo strange 1.0 && exit\necho "x.cpp:1: error: no"; exit 1\n'
    )
    compiler.chmod(0o755)
    said = python(USE, root, CXX=str(compiler), LCRNET_BUILD=str(tmp_path / "b"), LCRNET_OPS="")
    assert said.stdout == "[0]\n" and "error: no" in said.stderr and "failed.log" in said.stderr
    assert "error: no" in (tmp_path / "b" / "failed.log").read_text()
    assert not list((tmp_path / "b").glob("cpu-*/build.json"))


def test_folder_that_cannot_be_written(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = python(USE, root, LCRNET_BUILD=str(tmp_path / "file"), LCRNET_OPS="")
    assert said.stdout == "[0]\n" and "LCRNET_BUILD=FOLDER" in said.stderr


def test_command(root: Path, tmp_path: Path) -> None:
    """`python -m ext.build`: prints the library, finds it the second time, refuses nonsense."""

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ext.build", *arguments]
        return subprocess.run(command, cwd=root, env=os.environ | more, capture_output=True, text=True, check=False)

    build.library("cpu")
    said = run("--no-cuda")
    assert said.returncode == 0 and Path(said.stdout.strip()) == build.library("cpu") and not said.stderr
    said = run("--arch", "hopper")
    assert said.returncode == 2 and "such as 9.0" in said.stderr
    said = run("--no-cuda", "--out", str(tmp_path), CXX="no-such-compiler")
    assert said.returncode == 1 and said.stderr.startswith("error: no C++ compiler") and "Traceback" not in said.stderr


def test_ray_working_dir(cluster: Any, root: Path, tmp_path: Path) -> None:
    """A worker that got the code as a job's working_dir finds the node's build: same sources, same hash."""
    build.library("cpu")
    job = f"""
import ray
ray.init({cluster.get_runtime_context().gcs_address!r}, log_to_driver=False,
         runtime_env={{"working_dir": {str(root)!r}, "excludes": ["/.git", "/demo", "/.venv"]}})
@ray.remote
def where():
    from ext import build
    return build.__file__, str(build._find("cpu"))
print(*ray.get(where.remote()))
"""
    said = python(job, tmp_path)
    file, found = said.stdout.split()
    assert "working_dir_files" in file and Path(found).is_file(), said.stderr


def test_wheel_has_every_source(root: Path) -> None:
    """What pyproject.toml puts into a wheel is all that the hash is made of: it builds what a checkout builds."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packed = {f for pattern in settings["package-data"]["ext"] for f in (root / "ext").glob(pattern)}
    assert {*build.sources("cpu"), *build.sources("cuda"), *build._all_sources()} <= packed


def test_cuda_compiles_and_links(tmp_path: Path) -> None:
    """Without a GPU too; its numbers are checked by the emulation, and by the `cuda` tests where there is one."""
    try:
        build._toolkit()
    except build.BuildError as error:
        pytest.skip(f"no CUDA toolkit: {error}")
    library = build.build("cuda", ("9.0",))
    torch.ops.load_library(build.library("cpu"))
    torch.ops.load_library(library)
    for name in {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("lcrnet::")}:
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lcrnet::{name}", key), f"{name} has no {key} kernel"


def test_nvcc_behind_a_script_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        home = build._toolkit().nvcc.parent
    except build.BuildError as error:
        pytest.skip(f"no CUDA toolkit: {error}")
    script = tmp_path / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {home}/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert build._toolkit().nvcc.resolve() == (home / "nvcc").resolve()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match="no nvcc"):
        build._toolkit()
