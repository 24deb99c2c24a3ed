"""Builds the operators: `python -m ext.build` ahead of time (for a Docker image or a wheel), else on first use.

A build is a folder named by the hash of sources, torch, compiler, flags and GPU architectures, with the libraries and a
build.json that says what they were built from. It lies in `folder()`: $LCRNET_BUILD, else ~/.cache/lcrnet. A build that
came with the package (`python -m ext.build --package`, before `pip wheel`) is used first. Processes of a node that
come at once build once, under a file lock; what a killed process leaves behind is never taken for a build.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

HERE = Path(__file__).resolve().parent
PACKAGED = HERE / "built"
ARCHITECTURES = ("8.0", "8.6", "9.0", "10.0")
"""GPUs built for where none is visible: A100, A10 / RTX 30, H100 / H200, B200. Newer ones run the last as PTX."""
LEVELS = {"v3": "-march=x86-64-v3", "v4": "-march=x86-64-v4"}
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-Wno-psabi")
WAIT = 900
"""Seconds to wait for another process that is building."""


class BuildError(Exception):
    """Why there is no build, and how to mend it."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: nvcc, its version, where the headers and the runtime library are."""

    nvcc: Path
    version: str
    include: tuple[Path, ...]
    runtime: Path


def folder() -> Path:
    """Where builds are kept: $LCRNET_BUILD, else $XDG_CACHE_HOME/lcrnet, else ~/.cache/lcrnet."""
    if named := os.environ.get("LCRNET_BUILD"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lcrnet"


def library(kind: str) -> Path:
    """The built library of `kind` "cpu" or "cuda", building it first if need be. Raises BuildError."""
    try:
        found = _find(kind)
        if found is None:
            found = build(kind)
    except OSError as error:
        raise BuildError(f"{error}; LCRNET_BUILD=FOLDER names a folder that can be written") from error
    return found


def build(
    kind: str, architectures: tuple[str, ...] | None = None, into: Path | None = None, quiet: bool = False
) -> Path:
    """Compiles the library of `kind` into a folder of `into` (default `folder()`), if it is not there -> its path.

    architectures  for "cuda": compute capabilities, ("8.0", "9.0"); default: of the visible GPUs, else ARCHITECTURES
    """
    compiler = _compiler()
    toolkit = _toolkit() if kind == "cuda" else None
    facts = _facts(kind)
    facts["compiler"] = _version(compiler)
    if toolkit:
        facts["nvcc"] = toolkit.version
        facts["architectures"] = list(_known(toolkit, architectures or _wanted()))
    into = into or folder()
    name = f"{kind}-{_hash(json.dumps(facts, sort_keys=True))}"
    target = into / name / f"lcrnet_{kind}.so"
    into.mkdir(parents=True, exist_ok=True)
    lock = FileLock(into / f"{name}.lock")
    try:
        with lock.acquire(timeout=WAIT):
            if target.exists():
                return target
            if not quiet:
                print(f"building the {kind} operators, once, into {into}", file=sys.stderr, flush=True)
            for left in into.glob(f".{name}-*"):  # by a builder that was killed
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=into, prefix=f".{name}-") as temporary:
                work = Path(temporary)
                _ninja(work, _rules(kind, work, compiler, toolkit, facts))
                done = work / "done"
                done.mkdir()
                (work / target.name).rename(done / target.name)
                (done / "build.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
                shutil.rmtree(target.parent, ignore_errors=True)
                done.rename(target.parent)
    except Timeout as error:
        raise BuildError(
            f"another process has been building in {into} for {WAIT} s; remove it or name another"
        ) from error
    return target


def sources(kind: str) -> list[Path]:
    """The files that are compiled: schema and CPU operators, or CUDA operators."""
    if kind == "cpu":
        return [HERE / "schema.cpp", *sorted((HERE / "cpu").glob("*.cpp"))]
    return sorted((HERE / "cuda").glob("*.cu"))


def _all_sources() -> list[Path]:
    """What a library hangs on: the sources and what they include."""
    suffixes = (".cpp", ".cu", ".cuh", ".h")
    return sorted(f for f in HERE.rglob("*") if f.suffix in suffixes and PACKAGED not in f.parents)


def _find(kind: str) -> Path | None:
    """A build of these sources for this torch: the package's, this compiler's, or, without a compiler, anyone's."""
    wanted = _facts(kind)
    for home in (PACKAGED, folder()):
        for note in sorted(home.glob(f"{kind}-*/build.json")):
            facts = json.loads(note.read_text(encoding="utf-8"))
            fits = all(facts.get(key) == value for key, value in wanted.items())
            if fits and kind == "cuda":
                fits = _serves(facts["architectures"], _wanted())
            if fits and home != PACKAGED:
                try:
                    fits = facts["compiler"] == _version(_compiler())
                except BuildError:
                    pass  # nothing to build with: any that fits will do
            if fits:
                return note.parent / f"lcrnet_{kind}.so"
    return None


def _facts(kind: str) -> dict[str, object]:
    """What a build must have been made from to be used here."""
    text = hashlib.sha256()
    for file in _all_sources():
        if kind == "cuda" or "cuda" not in file.relative_to(HERE).parts:
            text.update(f"{file.relative_to(HERE)}\0".encode() + file.read_bytes())
    text.update(repr((FLAGS, LEVELS)).encode())
    return {
        "sources": text.hexdigest()[:16],
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cuda": torch.version.cuda if kind == "cuda" else None,
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# What there is to build with.


def _compiler() -> str:
    """The C++ compiler: $CXX, else g++, c++ or clang++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler ({', '.join(names)}) is on the PATH: install one (apt install g++) or set CXX")


@functools.cache
def _version(program: str) -> str:
    return _run([program, "--version"]).splitlines()[0]


def _toolkit() -> Toolkit:
    """The CUDA toolkit: $CUDA_HOME, else what pip installed beside torch, the nvcc of the PATH, or /usr/local/cuda.

    An nvcc on the PATH may be a script that calls another: nvcc itself says where it lives.
    """
    if torch.version.cuda is None:
        raise BuildError("this torch was built without CUDA")
    homes: list[Path] = []
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        homes = [Path(named)]
    else:
        site = Path(sysconfig.get_paths()["purelib"])
        homes += [site / "nvidia" / f"cu{torch.version.cuda.split('.')[0]}", site / "nvidia" / "cuda_nvcc"]
        if path := shutil.which("nvcc"):
            with tempfile.TemporaryDirectory() as empty:
                Path(empty, "a.cu").touch()
                said = subprocess.run(
                    [path, "--dryrun", "-c", "a.cu"], cwd=empty, capture_output=True, text=True, check=False
                )
            if top := re.search(r"^#\$ TOP=(.+)$", said.stderr, re.M):
                homes.append(Path(os.path.normpath(Path(path).parent / top[1].strip())))
        homes.append(Path("/usr/local/cuda"))
    for home in homes:
        nvcc = home / "bin" / "nvcc"
        if not nvcc.exists():
            continue
        release = re.search(r"release (\d+\.\d+)", _run([str(nvcc), "--version"]))
        version = release[1] if release else "unknown"
        if version.split(".")[0] != torch.version.cuda.split(".")[0]:
            raise BuildError(
                f"{nvcc} is CUDA {version}, torch is built for {torch.version.cuda}: set CUDA_HOME to a toolkit of that"
            )
        include = tuple(p for p in (home / "include", home / "include" / "cccl") if p.is_dir())
        names = [
            p
            for d in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")
            for p in sorted((home / d).glob("libcudart.so*"))
        ]
        # torch's own runtime, which is loaded already, where the toolkit has none
        names += sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/lib/libcudart.so*"))
        if not names:
            raise BuildError(f"no libcudart.so in {home}: pip install nvidia-cuda-runtime")
        return Toolkit(nvcc, version, include, names[0])
    raise BuildError(
        f"no nvcc of CUDA {torch.version.cuda} ({', '.join(map(str, homes))}): set CUDA_HOME to the toolkit, "
        f"or pip install nvidia-cuda-nvcc nvidia-cuda-cccl nvidia-cuda-crt nvidia-cuda-runtime of that version"
    )


def _wanted() -> tuple[str, ...]:
    """Compute capabilities: of the visible GPUs, else ARCHITECTURES."""
    if torch.cuda.is_available():
        seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return tuple(f"{major}.{minor}" for major, minor in sorted(seen))
    return ARCHITECTURES


def _known(toolkit: Toolkit, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Those that this nvcc knows."""
    codes = set(_run([str(toolkit.nvcc), "--list-gpu-code"]).split())
    known = tuple(a for a in wanted if f"sm_{a.replace('.', '')}" in codes)
    if not known:
        raise BuildError(f"nvcc {toolkit.version} knows none of the architectures {', '.join(wanted)}")
    return known


def _serves(built: list[str], wanted: tuple[str, ...]) -> bool:
    """Whether every GPU can run a build: by the same major architecture, or by the PTX of the last one."""
    numbers = [tuple(map(int, a.split("."))) for a in built]
    return not torch.cuda.is_available() or all(
        any(n[0] == w[0] and n <= w for n in numbers) or numbers[-1] <= w
        for w in (tuple(map(int, a.split("."))) for a in wanted)
    )


# The build itself.


def _rules(kind: str, work: Path, compiler: str, toolkit: Toolkit | None, facts: dict[str, object]) -> str:
    """The text of build.ninja."""
    home = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    include = [f"-isystem {_quoted(home / 'include' / p)}" for p in ("", "torch/csrc/api/include")]
    lines = [f"flags = {' '.join(FLAGS)} {abi} {' '.join(include)}"]
    lines += [f"rule cxx\n command = {_quoted(compiler)} -MD -MF $out.d $flags $more -c $in -o $out\n depfile = $out.d"]
    libraries = ["-lc10", "-ltorch_cpu", "-ltorch"]
    objects = []
    if toolkit:
        codes = [str(a).replace(".", "") for a in facts["architectures"]]  # type: ignore[attr-defined]
        gencode = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in codes]
        gencode.append(f"-gencode=arch=compute_{codes[-1]},code=compute_{codes[-1]}")
        cuda_include = " ".join(f"-isystem {_quoted(p)}" for p in toolkit.include)
        lines.append(
            f"rule nvcc\n command = {_quoted(toolkit.nvcc)} -ccbin {_quoted(compiler)} -std=c++20 -O3 --threads 0 "
            f"--expt-relaxed-constexpr --expt-extended-lambda -diag-suppress 20012,20013,20014,20015 -Xcompiler -fPIC "
            f"{abi} {' '.join(include)} {cuda_include} {' '.join(gencode)} -c $in -o $out"
        )
        libraries += ["-lc10_cuda", "-ltorch_cuda", _quoted(toolkit.runtime)]
    levels = LEVELS if platform.machine() in ("x86_64", "AMD64") else {}
    for source in sources(kind):
        if source.suffix == ".cu":
            objects.append(f"{source.stem}.cu.o")
            lines.append(f"build {objects[-1]}: nvcc {_escaped(source)}")
        elif source.name.endswith(".simd.cpp"):
            for level, march in {"base": "", **levels}.items():
                objects.append(f"{source.stem}.{level}.o")
                lines.append(
                    f"build {objects[-1]}: cxx {_escaped(source)}\n more = -DLEVEL={level} {march} -ffp-contract=fast"
                )
        else:
            objects.append(f"{source.stem}.o")
            lines.append(f"build {objects[-1]}: cxx {_escaped(source)}\n more = {'-DLEVELS' if levels else ''}")
    # `simd` objects declare all levels too
    lines[0] += " -DLEVELS" if levels else ""
    link = f"{_quoted(compiler)} -shared -fopenmp $in -L{_quoted(home / 'lib')} {' '.join(libraries)} -o $out"
    lines += [f"rule link\n command = {link}", f"build lcrnet_{kind}.so: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def _ninja(work: Path, rules: str) -> None:
    (work / "build.ninja").write_text(rules, encoding="utf-8")
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if ninja is None:
        raise BuildError("ninja is not installed: pip install ninja")
    said = subprocess.run([ninja, "-C", str(work)], capture_output=True, text=True, check=False)
    if said.returncode:
        log = folder() / "failed.log"
        log.write_text(said.stdout + said.stderr, encoding="utf-8")
        fault = next((line for line in said.stdout.splitlines() if re.search(r"error|fatal", line)), "ninja failed")
        raise BuildError(f"{fault.strip()} (all of it: {log})")


def _run(command: list[str]) -> str:
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        raise BuildError(f"{' '.join(command)} failed: {said.stderr.strip() or said.stdout.strip()}")
    return said.stdout


def _quoted(path: str | Path) -> str:
    """For a command in build.ninja: `$` doubled, and quoted for the shell that ninja calls."""
    return "'" + str(path).replace("$", "$$").replace("'", "'\\''") + "'"


def _escaped(path: Path) -> str:
    """For a file name in build.ninja."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ext.build", description="Build the C++/CUDA operators ahead of time."
    )
    parser.add_argument(
        "--cuda", action=argparse.BooleanOptionalAction, help="the CUDA operators too; default: if a GPU is visible"
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        metavar="X.Y",
        help=f"compute capabilities; default: the visible GPUs', else {' '.join(ARCHITECTURES)}",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, help="folder of the build; default: $LCRNET_BUILD, else ~/.cache/lcrnet")
    where.add_argument("--package", action="store_true", help=f"into the package itself ({PACKAGED}), for a wheel")
    args = parser.parse_args()
    into = PACKAGED if args.package else args.out
    for a in args.arch or ():
        if not re.fullmatch(r"\d+\.\d", a):
            parser.error(f"--arch takes compute capabilities such as 9.0, not {a!r}")
    cuda = torch.cuda.is_available() if args.cuda is None else args.cuda
    try:
        for kind in ("cpu", "cuda") if cuda else ("cpu",):
            print(build(kind, tuple(args.arch) if args.arch else None, into))
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
