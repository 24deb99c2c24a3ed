// What all CUDA operators share: launching, shared memory, registration. The tests compile the same files for the CPU,
// with -DEMULATED, where this machine has no GPU: tests/ops/emulate.h then stands for CUDA.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>

#ifdef EMULATED
#include "../../tests/ops/emulate.h"
#else
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

// LAUNCH(kernel, blocks, threads, bytes of dynamic shared memory, arguments...) on the current stream; several template
// arguments of a kernel need brackets: LAUNCH((kernel<T, 4>), ...). No blocks: no launch.
#define LAUNCH(kernel, blocks, threads, shared, ...)                                                             \
  do {                                                                                                           \
    dim3 launch_blocks(blocks);                                                                                  \
    size_t launch_shared = (shared);                                                                             \
    if (launch_blocks.x * launch_blocks.y * launch_blocks.z == 0) break;                                         \
    if (launch_shared > 48 << 10)                                                                                \
      C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch_shared)); \
    kernel<<<launch_blocks, threads, launch_shared, c10::cuda::getCurrentCUDAStream()>>>(__VA_ARGS__);           \
    C10_CUDA_KERNEL_LAUNCH_CHECK();                                                                              \
  } while (0)

// In a kernel: `name`, a pointer to its dynamic shared memory, aligned to 16 bytes.
#define DYNAMIC_SHARED(type, name)                  \
  extern __shared__ __align__(16) char shared_all[]; \
  type* name = reinterpret_cast<type*>(shared_all)

#define OPERATORS(m) TORCH_LIBRARY_IMPL(lcrnet, CUDA, m)
#endif

// In every launcher: kernels go to the tensor's own GPU.
#define GUARD(tensor) c10::DeviceGuard device_guard((tensor).device())

// What numbers of a type are computed in.
template <class T>
struct Wide {
  typedef float type;
};
template <>
struct Wide<double> {
  typedef double type;
};

// N numbers read and written at once; up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// Kernels over `count` things with so many threads a block: the number of blocks.
inline unsigned blocks_of(int64_t count, int64_t threads) {
  int64_t blocks = (count + threads - 1) / threads;
  TORCH_CHECK(blocks < int64_t(1) << 31, "lcrnet: too much for one launch");
  return unsigned(blocks);
}

// How a map lies in memory, and with it the result: as `channels_last` of register.py says it.
inline at::MemoryFormat format_of(const at::Tensor& map) {
  bool last = map.is_contiguous(at::MemoryFormat::ChannelsLast) && !map.is_contiguous();
  return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}
