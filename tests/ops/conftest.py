"""What the tests of the operators share: every test runs over every implementation of `ops` that there is."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock

from ext import build, register
from lcrnet import ops, twins

BACKENDS = ["ext", "twin", pytest.param("emulated", id="emulated"), pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`ops` runs on one implementation: C++, the readable twins, the CUDA kernels compiled for the CPU, or CUDA.

    `.name`; `.device` for the tensors of the test.
    """
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    library: Any = torch.ops.lcrnet
    if name == "twin":
        library = twins
    elif name == "emulated":
        library = request.getfixturevalue("emulated")
    else:
        assert ops.use_ext("cuda" if name == "cuda" else "cpu")
    choose: Callable[..., Any] = lambda op, where: getattr(library, op)  # noqa: E731
    monkeypatch.setattr(ops, "_operator", choose)
    return SimpleNamespace(name=name, device=torch.device("cuda" if name == "cuda" else "cpu"))


class Emulated:
    """torch.ops.lcrnet_emulated; an operator that is not there skips the test, one that did not compile fails it."""

    def __init__(self, broken: dict[str, str]) -> None:
        self.broken = broken

    def __getattr__(self, name: str) -> Any:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"lcrnet_emulated::{name}", "CPU"):
            for stem, fault in self.broken.items():
                if name.startswith(stem):
                    pytest.fail(f"ext/cuda/{stem}.cu: {fault}")
            pytest.skip(f"no CUDA kernel of {name} in ext/cuda")
        return getattr(torch.ops.lcrnet_emulated, name)


@pytest.fixture(scope="session")
def emulated() -> Any:
    """The CUDA kernels, compiled for the CPU (emulate.h): torch.ops.lcrnet_emulated. Objects are kept by their hash."""
    folder = build.folder() / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    torch_home = Path(torch.__file__).parent
    command = [build._compiler(), "-std=c++20", "-O1", "-fPIC", "-fno-gnu-unique", "-fvisibility=hidden",
               "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-w", "-DEMULATED", "-DLIBRARY=lcrnet_emulated",
               f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]  # fmt: skip
    command += [a for p in ("", "torch/csrc/api/include") for a in ("-isystem", str(torch_home / "include" / p))]
    cuda = build.HERE / "cuda"
    headers = [
        *sorted(build.HERE.glob("*.h")),
        *sorted(cuda.glob("*.h")),
        *sorted(cuda.glob("*.cuh")),
        Path(__file__).parent / "emulate.h",
    ]
    common = [
        torch.__version__,
        *command,
        build._version(command[0]),
        *(h.read_text(encoding="utf-8") for h in headers),
    ]

    def compiled(source: Path) -> tuple[Path, str]:
        """The object file and, where it does not compile, why."""
        text = source.read_text(encoding="utf-8")
        to = folder / f"{source.stem}-{build._hash(json.dumps([*common, text]))}.o"
        if to.exists():
            return to, ""
        arguments = [*command, "-x", "c++", "-c", source, "-o", f"{to}.part"]
        said = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if said.returncode == 0:
            Path(f"{to}.part").rename(to)
        return to, said.stderr[:2000] if said.returncode else ""

    with FileLock(folder / "lock", timeout=build.WAIT), ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = [build.HERE / "schema.cpp", *sorted(cuda.glob("*.cu"))]
        results = list(pool.map(compiled, sources))
        objects = [to for to, fault in results if not fault]
        broken = {source.stem: fault for source, (_, fault) in zip(sources, results, strict=True) if fault}
        library = folder / f"emulated-{build._hash(' '.join(o.name for o in objects))}.so"
        if not library.exists():
            link = [command[0], "-shared", *objects, "-o", f"{library}.part", f"-L{torch_home / 'lib'}"]
            subprocess.run([*link, "-lc10", "-ltorch_cpu", "-ltorch"], check=True)
            Path(f"{library}.part").rename(library)
    torch.ops.load_library(library)
    register.describe("lcrnet_emulated")
    return Emulated(broken)
