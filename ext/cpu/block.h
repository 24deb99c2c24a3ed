// What the loops of roi_pool and roi_crop share: plain memory, tasks of (image, block of channels), and turning blocks
// between (channels, cells) and (cells, channels) in a core's own cache. For *.simd.cpp only.
#pragma once

#include <cstdlib>

#include "regions.h"
#define WIDTH NATIVE
#include "vec.h"

namespace LEVEL {
namespace {

// Memory of one task, handed out in pieces aligned to cache lines.
struct Memory {
  char* all;
  char* next;
  explicit Memory(int64_t bytes) {
    all = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 1024));  // room for 16 pieces' ends
    next = all;
  }
  ~Memory() { std::free(all); }
  Memory(const Memory&) = delete;
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next);
    next += (int64_t(sizeof(T)) * count + 63) / 64 * 64;
    return p;
  }
};

// Vector k of K at a cell; the only one (K = 1) may have fewer than all of its `count` channels.
template <int K, class T>
INLINE typename Of<T>::V load_of(const T* cell, int k, int count) {
  if (K == 1 && count < Of<T>::n) return load(cell, count);
  return load(cell + Of<T>::n * k);
}

// Task `t` of (image, block of channels), the last the fastest.
struct Task {
  int64_t image, channel;  // the first channel
  int channels;
  int64_t cells;
};
INLINE Task task_of(const Regions& a, int64_t t) {
  int64_t blocks = (a.channels + a.block - 1) / a.block;
  Task task;
  task.image = t / blocks;
  task.channel = t % blocks * a.block;
  task.channels = int(a.channels - task.channel < a.block ? a.channels - task.channel : a.block);
  task.cells = int64_t(a.rows) * a.columns;
  return task;
}

// Tiles of n x n numbers, n of which make a vector, turned in registers.
template <int bytes>
struct Tile;
template <>
struct Tile<2> {
  typedef uint16_t V __attribute__((vector_size(NATIVE == 64 ? 32 : 16)));
};
template <>
struct Tile<4> {
  typedef uint32_t V __attribute__((vector_size(NATIVE)));
};
template <>
struct Tile<8> {
  typedef uint64_t V __attribute__((vector_size(NATIVE)));
};

// low, high <- a0 b0 a1 b1 ...
template <int n, class V>
INLINE void interleave(V a, V b, V& low, V& high) {
  if constexpr (n == 2) {
    low = __builtin_shufflevector(a, b, 0, 2);
    high = __builtin_shufflevector(a, b, 1, 3);
  } else if constexpr (n == 4) {
    low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  } else if constexpr (n == 8) {
    low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}
template <class T>
INLINE void turn(T* to, const T* from, int64_t to_stride, int64_t from_stride) {
  typedef typename Tile<sizeof(T)>::V V;
  constexpr int n = sizeof(V) / sizeof(T);
  V v[n], w[n];
  for (int i = 0; i < n; i++) memcpy(&v[i], from + i * from_stride, sizeof(V));
  // Every round interleaves the first half of the rows with the second; after log2(n) of them rows are columns.
  for (int round = 1; round < n; round *= 2) {
    for (int i = 0; i < n / 2; i++) interleave<n>(v[i], v[i + n / 2], w[2 * i], w[2 * i + 1]);
    for (int i = 0; i < n; i++) v[i] = w[i];
  }
  for (int i = 0; i < n; i++) memcpy(to + i * to_stride, &v[i], sizeof(V));
}

// to (columns, rows) <- from (rows, columns), along the lines of `to` or of `from`, of what is not in the cache. The
// last tile of a line overlaps the one before.
enum Along { kTo, kFrom };
template <Along along, class T>
void transpose(T* to, const T* from, int64_t rows, int64_t columns, int64_t to_stride, int64_t from_stride) {
  constexpr int n = sizeof(typename Tile<sizeof(T)>::V) / sizeof(T);
  if (rows < n || columns < n) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++) to[c * to_stride + r] = from[r * from_stride + c];
    return;
  }
  auto tile = [&](int64_t r, int64_t c) {
    r = r + n <= rows ? r : rows - n;
    c = c + n <= columns ? c : columns - n;
    turn(to + c * to_stride + r, from + r * from_stride + c, to_stride, from_stride);
  };
  if constexpr (along == kTo) {
    for (int64_t c = 0; c < columns; c += n)
      for (int64_t r = 0; r < rows; r += n) tile(r, c);
  } else {
    for (int64_t r = 0; r < rows; r += n)
      for (int64_t c = 0; c < columns; c += n) tile(r, c);
  }
}

// block (cells, a.block) <- a task's channels of one image, or of one region's gradient: number `at` of those that have
// `cells` each.
template <class T>
void gather(const Regions& a, const Task& task, T* block, const void* all, int64_t at, int64_t cells) {
  const T* from = static_cast<const T*>(all) + at * cells * a.channels;
  if (a.channels_last) {
    for (int64_t cell = 0; cell < cells; cell++)
      memcpy(block + cell * a.block, from + cell * a.channels + task.channel, sizeof(T) * task.channels);
  } else {
    transpose<kFrom>(block, from + task.channel * cells, task.channels, cells, a.block, cells);
  }
}

// The other way, from sums (cells, width), which are in the type that is added in.
template <class T, class S>
void scatter(const Regions& a, const Task& task, void* all, const S* sum, int64_t width) {
  constexpr int n = Of<T>::n;
  T* to = static_cast<T*>(all) + task.image * task.cells * a.channels;
  if (a.channels_last) {
    for (int64_t cell = 0; cell < task.cells; cell++) {
      T* line = to + cell * a.channels + task.channel;
      int c = 0;
      for (; c + n <= task.channels; c += n) store(line + c, load(sum + cell * width + c));
      if (c < task.channels) store(line + c, load(sum + cell * width + c), task.channels - c);
    }
    return;
  }
  to += task.channel * task.cells;
  S values[16 * 16];
  for (int64_t cell = 0; cell < task.cells; cell += 16) {
    int count = int(task.cells - cell < 16 ? task.cells - cell : 16);
    for (int c0 = 0; c0 < task.channels; c0 += 16) {
      int channels = task.channels - c0 < 16 ? task.channels - c0 : 16;
      transpose<kFrom>(values, sum + cell * width + c0, count, channels, 16, width);
      for (int c = 0; c < channels; c++)
        for (int v = 0; v < count; v += n) {
          T* line = to + (c0 + c) * task.cells + cell + v;
          if (v + n <= count) store(line, load(values + 16 * c + v));
          else store(line, load(values + 16 * c + v), count - v);
        }
    }
  }
}

}  // namespace

#define EACH_TYPE(call)                \
  switch (a.type) {                    \
    case kFloat: return call(float);   \
    case kDouble: return call(double); \
    case kBF16: return call(bf16);     \
    case kFP16: return call(fp16);     \
  }

}  // namespace LEVEL
