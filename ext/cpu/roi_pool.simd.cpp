// RoIPool: the channels of a cell are contiguous and go through vector registers. The backward pass looks for the
// maxima again rather than being told where they were: reading the cells of a bin from cache costs less than writing
// and reading an index for every output.
#include "roi_pool.h"

#include <cfloat>

#include "../roi.h"
#include "block.h"

namespace LEVEL {
namespace {

// Cells [first, last) of each bin along an axis.
struct Bins {
  int* first;
  int* last;
};
INLINE Bins take(Memory& m, int bins) { return {m.take<int>(bins), m.take<int>(bins)}; }

template <class S>
bool bins_of(const Regions& a, int64_t region, Bins& down, Bins& across) {
  const S* roi = static_cast<const S*>(a.rois) + 5 * region;
  Span<S> y = roi_span(roi[2], roi[4], S(a.scale), a.height), x = roi_span(roi[1], roi[3], S(a.scale), a.width);
  bool valid = y.valid && x.valid;
  for (int i = 0; i < a.height; i++) roi_cells(y, i, valid ? a.rows : 0, down.first[i], down.last[i]);
  for (int j = 0; j < a.width; j++) roi_cells(x, j, valid ? a.columns : 0, across.first[j], across.last[j]);
  return valid;
}

// Where a bin's maximum begins, as in torchvision, for all types: what is not above it (NaN, -inf) is no maximum.
constexpr float kLeast = -FLT_MAX;

// The maxima of the bin of `rows` x `columns` cells at `cell`, for K vectors of channels, or (K = 1) `count` channels.
template <int K, class T, class V>
INLINE void most(V* m, const T* cell, int64_t row, int64_t column, int rows, int columns,
                 int count = Of<T>::n) {
  for (int k = 0; k < K; k++) m[k] = V{} + kLeast;
  for (int p = 0; p < rows; p++, cell += row) {
    const T* at = cell;
    for (int q = 0; q < columns; q++, at += column)
      for (int k = 0; k < K; k++) {
        V v = load_of<K>(at, k, count);
        m[k] = v > m[k] ? v : m[k];
      }
  }
}

// All bins of `channels` channels; out (bins, out_stride), map (rows, columns, channels) with these strides.
template <class T>
void region(T* out, int64_t out_stride, const T* map, int64_t row, int64_t column, int64_t channels, const Bins& down,
            const Bins& across, int height, int width) {
  typedef typename Of<T>::V V;
  constexpr int n = Of<T>::n, K = 4;
  constexpr int64_t chunk = 2 * K * n;  // channels at a time, so that neighbouring bins find their cells in L1
  for (int64_t c0 = 0; c0 < channels; c0 += chunk) {
    int64_t c1 = c0 + chunk < channels ? c0 + chunk : channels;
    for (int i = 0; i < height; i++)
      for (int j = 0; j < width; j++) {
        T* to = out + (int64_t(i) * width + j) * out_stride;
        int rows = down.last[i] - down.first[i], columns = across.last[j] - across.first[j];
        if (rows <= 0 || columns <= 0) {
          memset(to + c0, 0, sizeof(T) * (c1 - c0));
          continue;
        }
        const T* cell = map + down.first[i] * row + across.first[j] * column;
        int64_t c = c0;
        V m[K];
        for (; c + K * n <= c1; c += K * n) {
          most<K>(m, cell + c, row, column, rows, columns);
          for (int k = 0; k < K; k++) store(to + c + n * k, m[k]);
        }
        for (; c + n <= c1; c += n) {
          most<1>(m, cell + c, row, column, rows, columns);
          store(to + c, m[0]);
        }
        if (c < c1) {
          most<1>(m, cell + c, row, column, rows, columns, int(c1 - c));
          store(to + c, m[0], int(c1 - c));
        }
      }
  }
}

template <class T>
void regions(const Regions& a, void* output, int64_t begin, int64_t end) {
  typedef typename Of<T>::S S;
  Memory memory(8 * (int64_t(a.height) + a.width));
  Bins down = take(memory, a.height), across = take(memory, a.width);
  int64_t size = a.channels * a.height * a.width, row = a.columns * a.channels, image = 0;
  for (int64_t k = begin; k < end; k++) {
    while (image < a.images && k >= a.start[image + 1]) image++;
    T* out = static_cast<T*>(output) + a.order[k] * size;
    if (image == a.images) {
      memset(out, 0, sizeof(T) * size);
      continue;
    }
    bins_of<S>(a, a.order[k], down, across);
    region(out, a.channels, static_cast<const T*>(a.map) + image * a.rows * row, row, a.channels, a.channels, down,
           across, a.height, a.width);
  }
}

// The (B, C, H, W) forward pass: a block of channels of an image is turned to (cells, channels) in the cache, and the
// tile of each region back.
template <class T>
void planes(const Regions& a, void* output, int64_t begin, int64_t end) {
  typedef typename Of<T>::S S;
  int64_t bins = int64_t(a.height) * a.width, cells = int64_t(a.rows) * a.columns;
  Memory memory(int64_t(sizeof(T)) * (cells + bins) * a.block + 8 * (int64_t(a.height) + a.width));
  Bins down = take(memory, a.height), across = take(memory, a.width);
  T* block = memory.take<T>(cells * a.block);
  T* tile = memory.take<T>(bins * a.block);
  for (int64_t t = begin; t < end; t++) {
    Task task = task_of(a, t);
    int64_t first = a.start[task.image], last = a.start[task.image + 1];
    if (first == last) continue;
    gather(a, task, block, a.map, task.image, cells);
    for (int64_t k = first; k < last; k++) {
      bins_of<S>(a, a.order[k], down, across);
      region(tile, a.block, block, int64_t(a.columns) * a.block, a.block, task.channels, down, across, a.height,
             a.width);
      T* out = static_cast<T*>(output) + (a.order[k] * a.channels + task.channel) * bins;
      transpose<kTo>(out, tile, bins, task.channels, bins, a.block);
    }
  }
}

// sum[cell] += grad at the bin's maximum, for K vectors of channels; of equal cells the first.
template <int K, class T, class S>
INLINE void give(S* sum, const T* cell, const T* grad, int64_t row, int64_t column, int rows, int columns) {
  typedef typename Of<T>::V V;
  constexpr int n = Of<T>::n;
  V m[K], g[K];  // g: what is still to be given
  most<K>(m, cell, row, column, rows, columns);
  for (int k = 0; k < K; k++) g[k] = m[k] > kLeast ? load(grad + n * k) : V{};
  for (int p = 0; p < rows; p++)
    for (int q = 0; q < columns; q++)
      for (int k = 0; k < K; k++) {
        int64_t at = p * row + q * column + n * k;
        auto here = load(cell + at) == m[k];
        store(sum + at, load(sum + at) + (here ? g[k] : V{}));
        g[k] = here ? V{} : g[k];
      }
}

// One task owns a block of channels of an image and takes its regions in their order: no two threads ever add to the
// same number, and the order of the sums does not depend on the number of threads.
template <class T>
void backward(const Regions& a, const void* grad, void* output, int64_t begin, int64_t end) {
  typedef typename Of<T>::S S;
  typedef typename Of<T>::V V;
  constexpr int n = Of<T>::n;
  int64_t bins = int64_t(a.height) * a.width, cells = int64_t(a.rows) * a.columns, row = int64_t(a.columns) * a.block;
  Memory memory((2 * int64_t(sizeof(S)) * cells + int64_t(sizeof(T)) * bins) * a.block +
                8 * (int64_t(a.height) + a.width));
  Bins down = take(memory, a.height), across = take(memory, a.width);
  T* block = memory.take<T>(cells * a.block);  // a.block: a multiple of n
  S* sum = memory.take<S>(cells * a.block);
  T* tile = memory.take<T>(bins * a.block);
  for (int64_t t = begin; t < end; t++) {
    Task task = task_of(a, t);
    memset(sum, 0, sizeof(S) * cells * a.block);
    int64_t first = a.start[task.image], last = a.start[task.image + 1];
    if (first < last) gather(a, task, block, a.map, task.image, cells);
    for (int64_t k = first; k < last; k++) {
      int64_t r = a.order[k];
      if (!bins_of<S>(a, r, down, across)) continue;
      gather(a, task, tile, grad, r, bins);
      for (int i = 0; i < a.height; i++)
        for (int j = 0; j < a.width; j++) {
          int rows = down.last[i] - down.first[i], columns = across.last[j] - across.first[j];
          if (rows <= 0 || columns <= 0) continue;
          int64_t cell = (int64_t(down.first[i]) * a.columns + across.first[j]) * a.block;
          const T* from = tile + (int64_t(i) * a.width + j) * a.block;
          int c = 0;
          for (; c + 4 * n <= a.block; c += 4 * n)
            give<4>(sum + cell + c, block + cell + c, from + c, row, a.block, rows, columns);
          for (; c < a.block; c += n)
            give<1>(sum + cell + c, block + cell + c, from + c, row, a.block, rows, columns);
        }
    }
    scatter<T>(a, task, output, sum, a.block);
  }
}

}  // namespace

void roi_pool_regions(const Regions& a, void* out, int64_t begin, int64_t end) {
#define CALL(T) regions<T>(a, out, begin, end)
  EACH_TYPE(CALL)
#undef CALL
}

void roi_pool_planes(const Regions& a, void* out, int64_t begin, int64_t end) {
#define CALL(T) planes<T>(a, out, begin, end)
  EACH_TYPE(CALL)
#undef CALL
}

void roi_pool_backward(const Regions& a, const void* grad, void* out, int64_t begin, int64_t end) {
#define CALL(T) backward<T>(a, grad, out, begin, end)
  EACH_TYPE(CALL)
#undef CALL
}

}  // namespace LEVEL
