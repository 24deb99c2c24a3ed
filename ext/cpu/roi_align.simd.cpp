// RoIAlign as weighted sums of cells. Bilinear sampling and the mean over a bin are separable, so that each bin has a
// list of rows and a list of columns with weights ("taps"), merged where samples share a cell; the channels of a cell are
// contiguous and go through vector registers.
#include "roi_align.h"

#include <cstdlib>

#include "../roi.h"
#define WIDTH NATIVE
#include "vec.h"

namespace LEVEL {
namespace {

template <class S>
struct Taps {
  int* at;    // cells, ...
  S* weight;  // ... and weights: those of bin i are [end[i], end[i + 1])
  int* end;
};

// Plain memory of one task: taps of both axes, a block of a map, a tile of output.
struct Memory {
  char* all;
  char* next;
  explicit Memory(int64_t bytes) {
    all = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64));
    next = all;
  }
  ~Memory() { std::free(all); }
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next);
    next += (int64_t(sizeof(T)) * count + 63) / 64 * 64;
    return p;
  }
};

INLINE int64_t most_taps(int bins, int cells, int ratio) {
  int64_t a_bin = ratio > 0 && 2 * int64_t(ratio) < cells ? 2 * int64_t(ratio) : cells;
  return int64_t(bins) * (a_bin + 2);
}
template <class S>
INLINE int64_t bytes(int bins, int cells, int ratio) {
  return most_taps(bins, cells, ratio) * int64_t(sizeof(int) + sizeof(S)) + 4 * int64_t(bins) + 256;
}
template <class S>
INLINE Taps<S> take(Memory& m, int bins, int cells, int ratio) {
  int64_t n = most_taps(bins, cells, ratio);
  return {m.take<int>(n), m.take<S>(n), m.take<int>(bins + 1)};
}

template <class S>
void fill(Taps<S>& taps, const Axis<S>& axis, int bins, int step, int cells) {
  int n = 0;
  taps.end[0] = 0;
  S share = axis.samples >= S(1) ? S(1) / axis.samples : S(0);
  for (int b = 0; b < bins; b++) {
    int from = n;
    int64_t first, last;
    roi_samples(axis, b * step, cells, first, last);
    auto add = [&](int cell, S weight) {
      // Samples advance one way, so that a cell which has a tap is among the bin's last; a bin never has two of a cell.
      for (int k = n - 1; k >= from && k >= n - 3; k--)
        if (taps.at[k] == cell) {
          taps.weight[k] += weight;
          return;
        }
      taps.at[n] = cell;
      taps.weight[n++] = weight;
    };
    for (int64_t s = first; s < last; s++) {
      int low, high;
      S at_low, at_high;
      if (!roi_sample(axis, b * step, s, cells, low, high, at_low, at_high)) continue;
      add(low, at_low * share);
      if (at_high != S(0)) add(high, at_high * share);
    }
    taps.end[b + 1] = n;
  }
}

template <class S>
bool taps_of(const RoiAlign& a, int64_t region, int level, Taps<S>& down, Taps<S>& across) {
  const S* roi = static_cast<const S*>(a.rois) + 5 * region;
  S scale = S(a.scale[level]);
  Axis<S> y = roi_axis(roi[2], roi[4], scale, a.aligned, a.bins_down, a.sampling_ratio);
  Axis<S> x = roi_axis(roi[1], roi[3], scale, a.aligned, a.bins_across, a.sampling_ratio);
  if (!x.valid || !y.valid) x.valid = y.valid = false;
  fill(down, y, a.out_down, a.step, a.rows[level]);
  fill(across, x, a.out_across, a.step, a.columns[level]);
  return x.valid;
}

// out[0 .. 16 K) = weighted sum of cells, for one bin; `map` (rows, columns, stride) at the first of the channels.
template <int K, class T, class S>
INLINE void bin(T* out, const T* map, int64_t row, int64_t column, const Taps<S>& down, const Taps<S>& across, int i,
                int j) {
  typedef typename Of<T>::V V;
  constexpr int n = Of<T>::n;
  V sum[K] = {};
  for (int p = down.end[i]; p < down.end[i + 1]; p++) {
    const T* line = map + down.at[p] * row;
    S down_weight = down.weight[p];
    for (int q = across.end[j]; q < across.end[j + 1]; q++) {
      const T* cell = line + across.at[q] * column;
      S w = down_weight * across.weight[q];
      for (int k = 0; k < K; k++) sum[k] += load(cell + n * k) * w;
    }
  }
  for (int k = 0; k < K; k++) store(out + n * k, sum[k]);
}
template <class T, class S>
INLINE void last_bin(T* out, const T* map, int64_t row, int64_t column, const Taps<S>& down, const Taps<S>& across,
                     int i, int j, int count) {
  typename Of<T>::V sum = {};
  for (int p = down.end[i]; p < down.end[i + 1]; p++)
    for (int q = across.end[j]; q < across.end[j + 1]; q++)
      sum += load(map + down.at[p] * row + across.at[q] * column, count) * (down.weight[p] * across.weight[q]);
  store(out, sum, count);
}

// All bins of `channels` channels; out (bins, out_stride).
template <class T, class S>
void region(T* out, int64_t out_stride, const T* map, int64_t row, int64_t column, int64_t channels,
            const Taps<S>& down, const Taps<S>& across, int rows, int columns) {
  constexpr int n = Of<T>::n, K = 4;
  constexpr int64_t chunk = 2 * K * n;  // channels at a time, so that neighbouring bins find their cells in L1
  for (int64_t c0 = 0; c0 < channels; c0 += chunk) {
    int64_t c1 = c0 + chunk < channels ? c0 + chunk : channels;
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < columns; j++) {
        T* to = out + (int64_t(i) * columns + j) * out_stride;
        int64_t c = c0;
        for (; c + K * n <= c1; c += K * n) bin<K>(to + c, map + c, row, column, down, across, i, j);
        for (; c + n <= c1; c += n) bin<1>(to + c, map + c, row, column, down, across, i, j);
        if (c < c1) last_bin(to + c, map + c, row, column, down, across, i, j, int(c1 - c));
      }
  }
}

template <class T>
void regions(const RoiAlign& a, void* output, int64_t begin, int64_t end) {
  typedef typename Of<T>::S S;
  int rows = 0, columns = 0;
  for (int l = 0; l < a.levels; l++) {
    rows = a.rows[l] > rows ? a.rows[l] : rows;
    columns = a.columns[l] > columns ? a.columns[l] : columns;
  }
  Memory memory(bytes<S>(a.out_down, rows, a.sampling_ratio) + bytes<S>(a.out_across, columns, a.sampling_ratio));
  Taps<S> down = take<S>(memory, a.out_down, rows, a.sampling_ratio);
  Taps<S> across = take<S>(memory, a.out_across, columns, a.sampling_ratio);
  int64_t size = a.channels * a.out_down * a.out_across;
  int64_t pair = 0, pairs = a.levels * a.images;
  for (int64_t k = begin; k < end; k++) {
    while (pair < pairs && k >= a.start[pair + 1]) pair++;
    T* out = static_cast<T*>(output) + a.order[k] * size;
    if (pair == pairs) {
      memset(out, 0, sizeof(T) * size);
      continue;
    }
    int level = int(pair / a.images);
    int64_t row = a.columns[level] * a.channels;
    const T* map = static_cast<const T*>(a.maps[level]) + pair % a.images * a.rows[level] * row;
    taps_of(a, a.order[k], level, down, across);
    region(out, a.channels, map, row, a.channels, a.channels, down, across, a.out_down, a.out_across);
  }
}

// to[c][r] = from[r][c]. Four by four floats are turned in registers; what else there is, number by number.
typedef float f32x4 __attribute__((vector_size(16)));
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t i32x4 __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i32x4){__VA_ARGS__})
#endif
INLINE void turn(float* to, const float* from, int64_t to_stride, int64_t from_stride) {
  f32x4 a, b, c, d;
  memcpy(&a, from, 16);
  memcpy(&b, from + from_stride, 16);
  memcpy(&c, from + 2 * from_stride, 16);
  memcpy(&d, from + 3 * from_stride, 16);
  f32x4 ab = SHUFFLE(a, b, 0, 4, 1, 5), cd = SHUFFLE(c, d, 0, 4, 1, 5);
  f32x4 ab2 = SHUFFLE(a, b, 2, 6, 3, 7), cd2 = SHUFFLE(c, d, 2, 6, 3, 7);
  a = SHUFFLE(ab, cd, 0, 1, 4, 5);
  b = SHUFFLE(ab, cd, 2, 3, 6, 7);
  c = SHUFFLE(ab2, cd2, 0, 1, 4, 5);
  d = SHUFFLE(ab2, cd2, 2, 3, 6, 7);
  memcpy(to, &a, 16);
  memcpy(to + to_stride, &b, 16);
  memcpy(to + 2 * to_stride, &c, 16);
  memcpy(to + 3 * to_stride, &d, 16);
}
template <class T>
INLINE void turn(T* to, const T* from, int64_t to_stride, int64_t from_stride) {
  for (int c = 0; c < 4; c++)
    for (int r = 0; r < 4; r++) to[c * to_stride + r] = from[r * from_stride + c];
}
template <class T>
void transpose(T* to, const T* from, int64_t rows, int64_t columns, int64_t to_stride, int64_t from_stride) {
  constexpr int64_t side = 16;  // whole lines of the cache on both sides
  for (int64_t r0 = 0; r0 < rows; r0 += side)
    for (int64_t c0 = 0; c0 < columns; c0 += side) {
      int64_t r1 = r0 + side < rows ? r0 + side : rows, c1 = c0 + side < columns ? c0 + side : columns;
      int64_t r4 = r0 + (r1 - r0) / 4 * 4, c4 = c0 + (c1 - c0) / 4 * 4;
      for (int64_t c = c0; c < c4; c += 4)
        for (int64_t r = r0; r < r4; r += 4)
          turn(to + c * to_stride + r, from + r * from_stride + c, to_stride, from_stride);
      for (int64_t c = c0; c < c1; c++)
        for (int64_t r = c < c4 ? r4 : r0; r < r1; r++) to[c * to_stride + r] = from[r * from_stride + c];
    }
}

// Tasks are (level, image, block of channels), the last the fastest.
struct Task {
  int level;
  int64_t image, pair, channel, channels, cells;
};
INLINE Task task_of(const RoiAlign& a, int64_t t) {
  Task task;
  int64_t blocks = (a.channels + a.block - 1) / a.block;
  task.pair = t / blocks;
  task.level = int(task.pair / a.images);
  task.image = task.pair % a.images;
  task.channel = t % blocks * a.block;
  task.channels = a.channels - task.channel < a.block ? a.channels - task.channel : a.block;
  task.cells = int64_t(a.rows[task.level]) * a.columns[task.level];
  return task;
}

// The (B, C, H, W) forward pass: a block of channels of a map is turned to (cells, channels) in the cache, and the tile
// of each region back.
template <class T>
void planes(const RoiAlign& a, void* output, int64_t begin, int64_t end) {
  typedef typename Of<T>::S S;
  int64_t bins = int64_t(a.out_down) * a.out_across;
  for (int64_t t = begin; t < end; t++) {
    Task task = task_of(a, t);
    int64_t first = a.start[task.pair], last = a.start[task.pair + 1];
    if (first == last) continue;
    int rows = a.rows[task.level], columns = a.columns[task.level];
    Memory memory(int64_t(sizeof(T)) * (task.cells + bins) * a.block + 256 + bytes<S>(a.out_down, rows, a.sampling_ratio) +
                  bytes<S>(a.out_across, columns, a.sampling_ratio));
    Taps<S> down = take<S>(memory, a.out_down, rows, a.sampling_ratio);
    Taps<S> across = take<S>(memory, a.out_across, columns, a.sampling_ratio);
    T* block = memory.take<T>(task.cells * a.block);
    T* tile = memory.take<T>(bins * a.block);
    const T* map =
        static_cast<const T*>(a.maps[task.level]) + (task.image * a.channels + task.channel) * task.cells;
    transpose(block, map, task.channels, task.cells, a.block, task.cells);
    for (int64_t k = first; k < last; k++) {
      taps_of(a, a.order[k], task.level, down, across);
      region(tile, a.block, block, int64_t(columns) * a.block, a.block, task.channels, down, across, a.out_down,
             a.out_across);
      T* out = static_cast<T*>(output) + (a.order[k] * a.channels + task.channel) * bins;
      transpose(out, tile, bins, task.channels, bins, a.block);
    }
  }
}


// sum[at] += weight * grad for all taps of a region; `sum` (rows, columns, at least `channels`), in the type added in.
template <int K, class T, class S>
INLINE void scatter_bin(S* sum, int64_t row, int64_t column, const T* grad, const Taps<S>& down, const Taps<S>& across,
                        int i, int j) {
  constexpr int n = Of<T>::n;
  typename Of<T>::V g[K];
  for (int k = 0; k < K; k++) g[k] = load(grad + n * k);
  for (int p = down.end[i]; p < down.end[i + 1]; p++)
    for (int q = across.end[j]; q < across.end[j + 1]; q++) {
      S* to = sum + down.at[p] * row + across.at[q] * column;
      S w = down.weight[p] * across.weight[q];
      for (int k = 0; k < K; k++) store(to + n * k, load(to + n * k) + g[k] * w);
    }
}
template <class T, class S>
INLINE void scatter_last(S* sum, int64_t row, int64_t column, const T* grad, const Taps<S>& down,
                         const Taps<S>& across, int i, int j, int count) {
  typename Of<T>::V g = load(grad, count);
  for (int p = down.end[i]; p < down.end[i + 1]; p++)
    for (int q = across.end[j]; q < across.end[j + 1]; q++) {
      S* to = sum + down.at[p] * row + across.at[q] * column;
      store(to, load(to, count) + g * (down.weight[p] * across.weight[q]), count);
    }
}
template <class T, class S>
void scatter(S* sum, int64_t row, int64_t column, const T* grad, int64_t grad_stride, int64_t channels,
             const Taps<S>& down, const Taps<S>& across, int rows, int columns) {
  constexpr int n = Of<T>::n, K = 4;
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < columns; j++, grad += grad_stride) {
      int64_t c = 0;
      for (; c + K * n <= channels; c += K * n) scatter_bin<K>(sum + c, row, column, grad + c, down, across, i, j);
      for (; c + n <= channels; c += n) scatter_bin<1>(sum + c, row, column, grad + c, down, across, i, j);
      if (c < channels) scatter_last(sum + c, row, column, grad + c, down, across, i, j, int(channels - c));
    }
}

template <class T>
struct Is {
  static constexpr bool summed = false;  // whether sums are kept in this type
};
template <>
struct Is<float> {
  static constexpr bool summed = true;
};
template <>
struct Is<double> {
  static constexpr bool summed = true;
};

// One task owns a block of channels of a map and takes its regions in their order: no two threads ever add to the same
// number, and the order of the sums does not depend on the number of threads.
template <class T>
void backward(const RoiAlign& a, const void* grad, int64_t begin, int64_t end) {
  typedef typename Of<T>::S S;
  constexpr int n = Of<T>::n;
  int64_t bins = int64_t(a.out_down) * a.out_across;
  bool direct = a.channels_last && Is<T>::summed;  // sums are made where the result goes
  for (int64_t t = begin; t < end; t++) {
    Task task = task_of(a, t);
    int rows = a.rows[task.level], columns = a.columns[task.level];
    // One vector more than is needed, lest the sums of neighbouring cells compete for the same lines of the cache.
    int64_t width = direct ? a.channels : (task.channels + n - 1) / n * n + n;
    Memory memory((direct ? 0 : int64_t(sizeof(S)) * task.cells * width) +
                  (a.channels_last ? 0 : int64_t(sizeof(T)) * bins * a.block) + 512 +
                  bytes<S>(a.out_down, rows, a.sampling_ratio) + bytes<S>(a.out_across, columns, a.sampling_ratio));
    Taps<S> down = take<S>(memory, a.out_down, rows, a.sampling_ratio);
    Taps<S> across = take<S>(memory, a.out_across, columns, a.sampling_ratio);
    T* map = static_cast<T*>(const_cast<void*>(a.maps[task.level]));
    map += task.image * task.cells * a.channels + task.channel * (a.channels_last ? 1 : task.cells);
    S* sum = direct ? reinterpret_cast<S*>(map) : memory.take<S>(task.cells * width);
    T* tile = a.channels_last ? nullptr : memory.take<T>(bins * a.block);
    for (int64_t cell = 0; cell < task.cells; cell++) memset(sum + cell * width, 0, sizeof(S) * task.channels);
    for (int64_t k = a.start[task.pair]; k < a.start[task.pair + 1]; k++) {
      int64_t r = a.order[k];
      if (!taps_of(a, r, task.level, down, across)) continue;
      const T* from = static_cast<const T*>(grad) + r * bins * a.channels;
      if (a.channels_last) {
        from += task.channel;
      } else {
        transpose(tile, from + task.channel * bins, task.channels, bins, a.block, bins);
        from = tile;
      }
      scatter(sum, columns * width, width, from, a.channels_last ? a.channels : a.block, task.channels, down, across,
              a.out_down, a.out_across);
    }
    if (direct) continue;
    if (a.channels_last) {
      for (int64_t cell = 0; cell < task.cells; cell++) {
        int64_t c = 0;
        for (; c + n <= task.channels; c += n) store(map + cell * a.channels + c, load(sum + cell * width + c));
        if (c < task.channels) store(map + cell * a.channels + c, load(sum + cell * width + c), int(task.channels - c));
      }
    } else {
      S values[64];
      T line[64];
      for (int64_t c = 0; c < task.channels; c++)
        for (int64_t cell = 0; cell < task.cells; cell += 64) {
          int64_t count = task.cells - cell < 64 ? task.cells - cell : 64;
          memset(values, 0, sizeof values);
          for (int64_t i = 0; i < count; i++) values[i] = sum[(cell + i) * width + c];
          for (int v = 0; v < 64; v += n) store(line + v, load(values + v));
          memcpy(map + c * task.cells + cell, line, sizeof(T) * count);
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

void roi_align_regions(const RoiAlign& a, void* out, int64_t begin, int64_t end) {
#define CALL(T) regions<T>(a, out, begin, end)
  EACH_TYPE(CALL)
#undef CALL
}

void roi_align_planes(const RoiAlign& a, void* out, int64_t begin, int64_t end) {
#define CALL(T) planes<T>(a, out, begin, end)
  EACH_TYPE(CALL)
#undef CALL
}

void roi_align_backward(const RoiAlign& a, const void* grad, int64_t begin, int64_t end) {
#define CALL(T) backward<T>(a, grad, begin, end)
  EACH_TYPE(CALL)
#undef CALL
}

}  // namespace LEVEL
