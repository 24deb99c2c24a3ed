// CUDA on one thread of a CPU, for ext/cuda/*.cu compiled by a C++ compiler with -DEMULATED: slow, and strict about
// what a kernel may rely on. Blocks run one after another. Threads of a block are fibers: one runs until it waits at a
// barrier or ends. The order of blocks and of threads changes from launch to launch, dynamic shared memory begins as
// garbage, and so does what a shuffle reads from a lane that takes no part, so that a kernel which relies on what a GPU
// does not promise is likely to fail. There is no memory model, though: a missing __syncthreads may go unseen.
//
// With -fsanitize=address --param asan-stack=0 (and libasan in LD_PRELOAD) it finds what a kernel reads out of bounds.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define OPERATORS(m) EMULATED_IMPL(LIBRARY, m)
#define EMULATED_IMPL(library, m) TORCH_LIBRARY_IMPL(library, CPU, m)
#define LAUNCH(kernel, blocks, threads, shared, ...) emulate::launch(blocks, threads, shared, kernel, ##__VA_ARGS__)
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulate::shared.data())

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#define VECTOR(T, name)                                                              \
  struct alignas(2 * sizeof(T)) name##2 {                                            \
    T x, y;                                                                          \
  };                                                                                 \
  struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 {                       \
    T x, y, z, w;                                                                    \
  };                                                                                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTOR(float, float)
VECTOR(double, double)
VECTOR(int, int)
VECTOR(unsigned, uint)
#undef VECTOR

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulate {

constexpr size_t kStack = 256 << 10;
constexpr uint64_t kGarbage = 0xffdeadbeffdeadbe;  // a NaN, a large index

struct Shared {
  std::unique_ptr<char[]> memory;
  size_t room = 0;
  char* data() { return memory.get() + (16 - reinterpret_cast<uintptr_t>(memory.get()) % 16) % 16; }
};
inline Shared shared;

enum State { kNew, kReady, kAtBlock, kAtWarp, kDone };
struct Thread {
  uint3 index;
  State state;
  unsigned mask;    // of the warp's lanes it waits for
  uint64_t value;   // what it brings to a collective, ...
  int source;       // ... the lane whose value it asks for (-1: the ballot of all) ...
  uint64_t result;  // ... and what it gets
  int fiber;
};
struct Fiber {
  jmp_buf jump;
  ucontext_t context;
  bool begun = false;
};

struct Machine {
  std::mutex one;
  std::vector<Thread> threads;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<int> idle;     // fibers without a thread
  std::vector<int> ready;    // threads that may go on
  size_t oldest = 0;         // of `ready`
  jmp_buf home;              // where the launch goes on
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  int self = 0, fiber = 0;   // that run
  int begun = 0, live = 0, waiting = 0;
  bool backwards = false;
  uint64_t total = 0, last_total = 0;  // sum that threads bring to a block's barrier
  uint64_t launches = 0;
  std::exception_ptr error;
};
inline Machine m;

inline void run_threads();

// Another thread runs on: one that may, else one that has not begun; else the launch itself.
[[noreturn]] inline void elsewhere() {
  if (m.oldest < m.ready.size()) {
    int next = m.ready[m.oldest++];
    if (m.oldest == m.ready.size()) {
      m.ready.clear();
      m.oldest = 0;
    }
    m.self = next;
    threadIdx = m.threads[next].index;
    m.fiber = m.threads[next].fiber;
    _longjmp(m.fibers[m.fiber]->jump, 1);
  }
  if (m.begun == int(m.threads.size()) || m.error) _longjmp(m.home, 1);
  if (m.idle.empty()) {
    auto fiber = std::make_unique<Fiber>();
    getcontext(&fiber->context);
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) abort();
    mprotect(stack, 4096, PROT_NONE);
    fiber->context.uc_stack.ss_sp = stack;
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, run_threads, 0);
    m.idle.push_back(int(m.fibers.size()));
    m.fibers.push_back(std::move(fiber));
  }
  m.fiber = m.idle.back();
  m.idle.pop_back();
  Fiber& fiber = *m.fibers[m.fiber];
  if (fiber.begun) _longjmp(fiber.jump, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
  abort();
}

inline void wait() {
  if (!_setjmp(m.fibers[m.fiber]->jump)) elsewhere();
}

// All threads of the block wait at its barrier: they may go on.
inline void block_arrived() {
  if (m.waiting == 0 || m.waiting < m.live) return;
  m.waiting = 0;
  m.last_total = m.total;
  m.total = 0;
  int n = int(m.threads.size());
  for (int k = 0; k < n; k++) {
    int t = m.backwards ? n - 1 - k : k;
    if (m.threads[t].state != kAtBlock) continue;
    m.threads[t].state = kReady;
    m.ready.push_back(t);
  }
}

// All threads named by the mask of thread t, or ended, wait for each other: they get their results and may go on.
inline void warp_arrived(int t) {
  unsigned mask = m.threads[t].mask, together = 0, ballot = 0;
  int first = t / 32 * 32, n = int(m.threads.size());
  for (int lane = 0; lane < 32 && first + lane < n; lane++) {
    Thread& other = m.threads[first + lane];
    if (!(mask >> lane & 1) || other.state == kDone) continue;
    if (other.state != kAtWarp || other.mask != mask) return;
    together |= 1u << lane;
    ballot |= unsigned(other.value != 0) << lane;
  }
  for (int k = 0; k < 32; k++) {
    int lane = m.backwards ? 31 - k : k;
    if (!(together >> lane & 1)) continue;
    Thread& thread = m.threads[first + lane];
    int from = thread.source;
    thread.result = from < 0 ? ballot : together >> from & 1 ? m.threads[first + from].value : kGarbage;
  }
  for (int k = 0; k < 32; k++) {
    int lane = m.backwards ? 31 - k : k;
    if (!(together >> lane & 1)) continue;
    m.threads[first + lane].state = kReady;
    if (first + lane != m.self) m.ready.push_back(first + lane);
  }
}

inline void run_threads() {
  for (;;) {
    while (m.begun < int(m.threads.size()) && !m.error) {
      int number = m.begun++;
      if (m.backwards) number = int(m.threads.size()) - 1 - number;
      Thread& thread = m.threads[number];
      m.self = number;
      threadIdx = thread.index;
      thread.fiber = m.fiber;
      thread.state = kReady;
      try {
        m.body(m.arguments);
      } catch (...) {
        m.error = std::current_exception();
        _longjmp(m.home, 1);
      }
      m.threads[m.self].state = kDone;
      m.live--;
      block_arrived();
      int first = m.self / 32 * 32;
      for (int t = first; t < first + 32 && t < int(m.threads.size()); t++)
        if (m.threads[t].state == kAtWarp) warp_arrived(t);
      if (m.oldest < m.ready.size()) break;
    }
    m.idle.push_back(m.fiber);
    wait();
  }
}

// A kernel that failed leaves fibers in the middle: they are dropped, with their stacks.
inline void forget() {
  for (auto& fiber : m.fibers) munmap(fiber->context.uc_stack.ss_sp, kStack);
  m.fibers.clear();
  m.idle.clear();
}

inline void run_block(size_t bytes) {
  char* memory = shared.data();
  for (size_t i = 0; i + 8 <= bytes + 64; i += 8) memcpy(memory + i, &kGarbage, 8);
  char guard[32], *end = memory + (bytes + 7) / 8 * 8;
  memcpy(guard, end, sizeof(guard));
  for (Thread& thread : m.threads) thread.state = kNew;
  m.ready.clear();
  m.oldest = 0;
  m.begun = m.waiting = 0;
  m.total = m.last_total = 0;
  m.live = int(m.threads.size());
  if (!_setjmp(m.home)) elsewhere();
  if (m.error) {
    forget();
    std::rethrow_exception(std::exchange(m.error, nullptr));
  }
  if (m.live) {
    forget();
    throw std::runtime_error("emulated kernel: " + std::to_string(m.live) + " threads wait for others that never come");
  }
  if (memcmp(guard, end, sizeof(guard))) throw std::runtime_error("emulated kernel: writes past its shared memory");
}

template <class... P, class... A>
void launch(dim3 blocks, dim3 threads, size_t bytes, void (*kernel)(P...), A&&... given) {
  static_assert((sizeof(P) + ... + 0) <= 4000, "arguments of a kernel");
  size_t block = size_t(threads.x) * threads.y * threads.z;
  if (blocks.x * blocks.y * blocks.z == 0) return;
  if (block == 0 || block > 1024 || threads.z > 64) throw std::runtime_error("emulated kernel: bad threads a block");
  if (blocks.x >= 1u << 31 || blocks.y > 65535 || blocks.z > 65535) throw std::runtime_error("emulated kernel: grid");
  if (bytes > 99 << 10) throw std::runtime_error("emulated kernel: more shared memory than a block may have (99 KiB)");
  std::tuple<std::decay_t<P>...> arguments(std::forward<A>(given)...);
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...>* arguments;
  } call{kernel, &arguments};
  std::lock_guard<std::mutex> lock(m.one);
  uint64_t order = (++m.launches * 0x9e3779b97f4a7c15u) >> 60;
  m.body = [](void* p) { std::apply(static_cast<Call*>(p)->kernel, *static_cast<Call*>(p)->arguments); };
  m.arguments = &call;
  m.backwards = order & 1;
  m.threads.assign(block, Thread{});
  m.ready.reserve(4 * block);
  for (size_t t = 0; t < block; t++)
    m.threads[t].index = {unsigned(t % threads.x), unsigned(t / threads.x % threads.y),
                          unsigned(t / threads.x / threads.y)};
  if (shared.room < bytes + 128) {
    shared.room = bytes + 128;
    shared.memory.reset(new char[shared.room]);
  }
  gridDim = blocks;
  blockDim = threads;
  uint64_t count = uint64_t(blocks.x) * blocks.y * blocks.z;
  for (uint64_t k = 0; k < count; k++) {
    uint64_t b = order & 2 ? count - 1 - k : k;
    blockIdx = {unsigned(b % blocks.x), unsigned(b / blocks.x % blocks.y), unsigned(b / blocks.x / blocks.y)};
    run_block(bytes);
  }
}

inline uint64_t block_barrier(uint64_t value) {
  m.threads[m.self].state = kAtBlock;
  m.waiting++;
  m.total += value;
  block_arrived();
  wait();
  return m.last_total;
}

inline uint64_t warp_barrier(unsigned mask, uint64_t value, int source) {
  Thread& thread = m.threads[m.self];
  int lane = m.self % 32;
  if (!(mask >> lane & 1)) throw std::runtime_error("emulated kernel: a lane that its own mask does not name");
  thread.state = kAtWarp;
  thread.mask = mask;
  thread.value = value;
  thread.source = source;
  warp_arrived(m.self);
  if (thread.state == kAtWarp) wait();
  return thread.result;
}

template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = warp_barrier(mask, bits, source);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulate

inline void __syncthreads() { emulate::block_barrier(0); }
inline int __syncthreads_count(int predicate) { return int(emulate::block_barrier(predicate != 0)); }
inline int __syncthreads_or(int predicate) { return emulate::block_barrier(predicate != 0) != 0; }
inline int __syncthreads_and(int predicate) { return emulate::block_barrier(predicate == 0) == 0; }
inline void __syncwarp(unsigned mask = ~0u) { emulate::warp_barrier(mask, 0, -1); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return unsigned(emulate::warp_barrier(mask, predicate != 0, -1));
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// `width` splits the warp in groups; a lane outside the group gives the own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  int lane = emulate::m.self % 32;
  return emulate::shuffle(mask, value, lane / width * width + (source & (width - 1)));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  int lane = emulate::m.self % 32;
  return emulate::shuffle(mask, value, lane % width + int(delta) < width ? lane + int(delta) : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  int lane = emulate::m.self % 32;
  return emulate::shuffle(mask, value, lane % width >= int(delta) ? lane - int(delta) : lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  int lane = emulate::m.self % 32, other = lane ^ bits;
  return emulate::shuffle(mask, value, other / width == lane / width ? other : lane);
}

// One thread runs at a time, so that these are atomic.
#define ATOMIC(name, result)                          \
  template <class T>                                  \
  T name(T* at, std::type_identity_t<T> value) {      \
    T old = *at;                                      \
    *at = result;                                     \
    return old;                                       \
  }
ATOMIC(atomicAdd, old + value)
ATOMIC(atomicSub, old - value)
ATOMIC(atomicMax, value > old ? value : old)
ATOMIC(atomicMin, value < old ? value : old)
ATOMIC(atomicOr, old | value)
ATOMIC(atomicAnd, old & value)
ATOMIC(atomicXor, old ^ value)
ATOMIC(atomicExch, value)
#undef ATOMIC
template <class T>
T atomicCAS(T* at, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  T old = *at;
  if (old == compare) *at = value;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
void __stwb(T* p, T value) {
  *p = value;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
// Rounded one operation at a time, as nvcc would not fuse them (the emulation is compiled with -ffp-contract=off).
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }

// CUDA has these for mixed types too.
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
