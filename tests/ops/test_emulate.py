"""The emulation of CUDA that the kernels are tested with on machines without a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ext import build

SOURCE = r"""
#include "emulate.h"

// The sum of each block, by shuffles in a warp and shared memory between warps.
__global__ void sums(const float* from, float* to, int n) {
  __shared__ float partial[32];
  int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  float sum = i < n ? from[i] : 0.f;
  for (int apart = 16; apart; apart /= 2) sum += __shfl_down_sync(~0u, sum, apart);
  if (t % 32 == 0) partial[t / 32] = sum;
  __syncthreads();
  if (t < 32) {
    sum = t < int(blockDim.x) / 32 ? partial[t] : 0.f;
    for (int apart = 16; apart; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
    if (t == 0) to[blockIdx.x] = sum;
  }
}

// Threads end at different times, others go on to meet.
__global__ void rounds(int* met, int* ballots) {
  DYNAMIC_SHARED(int, count);
  int t = threadIdx.x + threadIdx.y * blockDim.x;
  if (t == 0) *count = 0;
  if (t % 32 < 8) ballots[t] = __ballot_sync(0xff, t % 2);
  __syncthreads();
  for (int k = 0; k < t; k++) {
    atomicAdd(count, 1);
    __syncthreads();
    if (t == int(blockDim.x * blockDim.y) - 1) met[k] = *count;
    __syncthreads();
  }
}

__global__ void alone(long long* to) { to[blockIdx.x * blockDim.x + threadIdx.x] = threadIdx.x * 1000 + blockIdx.x; }
__global__ void apart() {
  if (threadIdx.x % 2) __syncthreads();
  else __syncwarp();
}
__global__ void past() {
  DYNAMIC_SHARED(char, memory);
  memory[16] = 1;
}
__global__ void throws() {
  __syncwarp();
  if (threadIdx.x == 3) throw std::runtime_error("no");
  __syncwarp();
}

template <class F>
int caught(F run) {
  try {
    run();
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

extern "C" {
void run_sums(const float* from, float* to, int n, int blocks, int threads) {
  LAUNCH(sums, blocks, threads, 0, from, to, n);
}
void run_rounds(int* met, int* ballots) { LAUNCH(rounds, 1, dim3(8, 5), sizeof(int), met, ballots); }
void run_alone(long long* to, int blocks, int threads) { LAUNCH(alone, blocks, threads, 0, to); }
int run_apart() { return caught([] { LAUNCH(apart, 2, 64, 0); }); }
int run_past() { return caught([] { LAUNCH(past, 2, 64, 16); }); }
int run_throws() { return caught([] { LAUNCH(throws, 2, 64, 0); }); }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulate")
    (folder / "kernels.cpp").write_text(SOURCE, encoding="utf-8")
    command = [build._compiler(), "-std=c++20", "-O1", "-fPIC", "-shared", f"-I{Path(__file__).parent}"]
    subprocess.run([*command, "-o", folder / "kernels.so", folder / "kernels.cpp"], check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


def _at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("threads", [32, 96, 256, 1024])
def test_block_reduction(library: ctypes.CDLL, threads: int) -> None:
    blocks, n = 7, 7 * threads - 5
    values = np.random.default_rng(0).integers(-99, 99, n).astype(np.float32)  # whole numbers: any order of additions
    sums = np.zeros(blocks, np.float32)
    for _ in range(5):  # in several orders
        library.run_sums(_at(values), _at(sums), n, blocks, threads)
        assert np.array_equal(sums, np.append(values, np.zeros(5)).reshape(blocks, threads).sum(1))


def test_threads_that_end_early(library: ctypes.CDLL) -> None:
    met, ballots = np.zeros(39, np.int32), np.zeros(40, np.int32)
    for _ in range(5):
        library.run_rounds(_at(met), _at(ballots))
        assert np.array_equal(met, np.cumsum(np.arange(39, 0, -1)))  # thread 0 takes part in no round, the last in all
        assert [ballots[0], ballots[7], ballots[32], ballots[8]] == [0xAA, 0xAA, 0xAA, 0]


def test_threads_that_never_wait(library: ctypes.CDLL) -> None:
    to = np.zeros((500, 1000), np.int64)
    library.run_alone(_at(to), 500, 1000)
    assert np.array_equal(to, np.arange(1000) * 1000 + np.arange(500)[:, None])


def test_faults_are_found_and_survived(library: ctypes.CDLL) -> None:
    for _ in range(3):
        assert library.run_apart() and library.run_past() and library.run_throws()
        test_block_reduction(library, 64)
