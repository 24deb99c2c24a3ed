// RoICrop: points between four cells, whose channels are contiguous and go through vector registers. With max_pool the
// four points of an output stay there, and the backward pass computes them again to see which was the greatest.
#include "roi_crop.h"

#include "../roi.h"
#include "block.h"

namespace LEVEL {
namespace {

// A point along one axis: the cells it lies between, fewer at the border, none outside.
template <class S>
struct Point {
  int count, at[2];
  S weight[2];
};

template <class S>
void points_of(const Regions& a, int64_t region, Point<S>* down, Point<S>* across) {
  const S* roi = static_cast<const S*>(a.rois) + 5 * region;
  int height = a.height << a.max_pool, width = a.width << a.max_pool;
  for (int i = 0; i < height; i++)
    down[i].count = roi_point(roi[2], roi[4], S(a.scale), i, height, a.rows, down[i].at, down[i].weight);
  for (int j = 0; j < width; j++)
    across[j].count = roi_point(roi[1], roi[3], S(a.scale), j, width, a.columns, across[j].at, across[j].weight);
}
template <class S>
int64_t bytes(const Regions& a) {
  return (int64_t(a.height) + a.width) * 2 * int64_t(sizeof(Point<S>));
}

// K vectors of channels at a point; with K = 1 `count` channels; `map` (rows, columns, channels) at the first of them.
template <int K, class T, class S, class V>
INLINE void value(V* v, const T* map, int64_t row, int64_t column, const Point<S>& y, const Point<S>& x,
                  int count) {
  for (int k = 0; k < K; k++) v[k] = V{};
  for (int p = 0; p < y.count; p++)
    for (int q = 0; q < x.count; q++) {
      const T* cell = map + y.at[p] * row + x.at[q] * column;
      S w = y.weight[p] * x.weight[q];
      for (int k = 0; k < K; k++) v[k] += load_of<K>(cell, k, count) * w;
    }
}

// Whether `v` takes the place of the maximum `m`: as in max_pool2d a NaN does, and stays.
template <class V>
INLINE auto takes(V v, V m) {
  return (v > m) | (v != v);
}

// Output (i, j), for K vectors of channels.
template <int K, class T, class S, class V>
INLINE void output(V* m, const T* map, int64_t row, int64_t column, const Point<S>* down, const Point<S>* across, int i,
                   int j, bool max_pool, int count = Of<T>::n) {
  if (!max_pool) return value<K>(m, map, row, column, down[i], across[j], count);
  value<K>(m, map, row, column, down[2 * i], across[2 * j], count);
  for (int p = 1; p < 4; p++) {
    V v[K];
    value<K>(v, map, row, column, down[2 * i + p / 2], across[2 * j + p % 2], count);
    for (int k = 0; k < K; k++) m[k] = takes(v[k], m[k]) ? v[k] : m[k];
  }
}

// All outputs of `channels` channels; out (outputs, out_stride).
template <class T, class S>
void region(const Regions& a, T* out, int64_t out_stride, const T* map, int64_t row, int64_t column, int64_t channels,
            const Point<S>* down, const Point<S>* across) {
  typedef typename Of<T>::V V;
  constexpr int n = Of<T>::n, K = 4;
  constexpr int64_t chunk = 2 * K * n;  // channels at a time, so that neighbours find their cells in L1
  for (int64_t c0 = 0; c0 < channels; c0 += chunk) {
    int64_t c1 = c0 + chunk < channels ? c0 + chunk : channels;
    for (int i = 0; i < a.height; i++)
      for (int j = 0; j < a.width; j++) {
        T* to = out + (int64_t(i) * a.width + j) * out_stride;
        int64_t c = c0;
        V v[K];
        for (; c + K * n <= c1; c += K * n) {
          output<K>(v, map + c, row, column, down, across, i, j, a.max_pool);
          for (int k = 0; k < K; k++) store(to + c + n * k, v[k]);
        }
        for (; c + n <= c1; c += n) {
          output<1>(v, map + c, row, column, down, across, i, j, a.max_pool);
          store(to + c, v[0]);
        }
        if (c < c1) {
          output<1>(v, map + c, row, column, down, across, i, j, a.max_pool, int(c1 - c));
          store(to + c, v[0], int(c1 - c));
        }
      }
  }
}

template <class T>
void regions(const Regions& a, void* output, int64_t begin, int64_t end) {
  typedef typename Of<T>::S S;
  Memory memory(bytes<S>(a));
  auto down = memory.take<Point<S>>(2 * a.height), across = memory.take<Point<S>>(2 * a.width);
  int64_t size = a.channels * a.height * a.width, row = a.columns * a.channels, image = 0;
  for (int64_t k = begin; k < end; k++) {
    while (image < a.images && k >= a.start[image + 1]) image++;
    T* out = static_cast<T*>(output) + a.order[k] * size;
    if (image == a.images) {
      memset(out, 0, sizeof(T) * size);
      continue;
    }
    points_of(a, a.order[k], down, across);
    region(a, out, a.channels, static_cast<const T*>(a.map) + image * a.rows * row, row, a.channels, a.channels, down,
           across);
  }
}

// The (B, C, H, W) forward pass: a block of channels of an image is turned to (cells, channels) in the cache, and the
// tile of each region back.
template <class T>
void planes(const Regions& a, void* output, int64_t begin, int64_t end) {
  typedef typename Of<T>::S S;
  int64_t outputs = int64_t(a.height) * a.width, cells = int64_t(a.rows) * a.columns;
  Memory memory(int64_t(sizeof(T)) * (cells + outputs) * a.block + bytes<S>(a));
  auto down = memory.take<Point<S>>(2 * a.height), across = memory.take<Point<S>>(2 * a.width);
  T* block = memory.take<T>(cells * a.block);
  T* tile = memory.take<T>(outputs * a.block);
  for (int64_t t = begin; t < end; t++) {
    Task task = task_of(a, t);
    int64_t first = a.start[task.image], last = a.start[task.image + 1];
    if (first == last) continue;
    gather(a, task, block, a.map, task.image, cells);
    for (int64_t k = first; k < last; k++) {
      points_of(a, a.order[k], down, across);
      region(a, tile, a.block, block, int64_t(a.columns) * a.block, a.block, task.channels, down, across);
      T* out = static_cast<T*>(output) + (a.order[k] * a.channels + task.channel) * outputs;
      transpose<kTo>(out, tile, outputs, task.channels, outputs, a.block);
    }
  }
}

// sum[cells] += grad * weights of a point, for K vectors of channels.
template <int K, class T, class S>
INLINE void give(S* sum, const T* grad, int64_t row, int64_t column, const Point<S>& y, const Point<S>& x) {
  typedef typename Of<T>::V V;
  constexpr int n = Of<T>::n;
  V g[K];
  for (int k = 0; k < K; k++) g[k] = load(grad + n * k);
  for (int p = 0; p < y.count; p++)
    for (int q = 0; q < x.count; q++) {
      S* to = sum + y.at[p] * row + x.at[q] * column;
      S w = y.weight[p] * x.weight[q];
      for (int k = 0; k < K; k++) store(to + n * k, load(to + n * k) + g[k] * w);
    }
}

// The cells of two neighbouring points along an axis, each once, with the weights for either of them.
template <class S>
struct Pair {
  int count = 0, at[4];
  S weight[4][2];
  explicit Pair(const Point<S>* two) {
    for (int p = 0; p < 2; p++)
      for (int k = 0; k < two[p].count; k++) {
        int i = 0;
        while (i < count && at[i] != two[p].at[k]) i++;
        if (i == count) {
          at[count++] = two[p].at[k];
          weight[i][0] = weight[i][1] = S(0);
        }
        weight[i][p] = two[p].weight[k];
      }
  }
};

// The same for the greatest of 2 x 2 points; of equals the first.
template <class T, class S>
INLINE void give_greatest(S* sum, const T* map, const T* grad, int64_t row, int64_t column, const Point<S>* down,
                          const Point<S>* across, const Pair<S>& y, const Pair<S>& x) {
  typedef typename Of<T>::V V;
  V v[4], m, g = load(grad);
  for (int p = 0; p < 4; p++) value<1>(v + p, map, row, column, down[p / 2], across[p % 2], Of<T>::n);
  auto right = takes(v[1], v[0]);
  m = right ? v[1] : v[0];
  auto third = takes(v[2], m);
  m = third ? v[2] : m;
  auto fourth = takes(v[3], m);
  auto below = third | fourth;
  right = (right & ~third) | fourth;
  for (int p = 0; p < y.count; p++) {
    V part = g * (below ? V{} + y.weight[p][1] : V{} + y.weight[p][0]);
    for (int q = 0; q < x.count; q++) {
      S* to = sum + y.at[p] * row + x.at[q] * column;
      store(to, load(to) + part * (right ? V{} + x.weight[q][1] : V{} + x.weight[q][0]));
    }
  }
}

// One task owns a block of channels of an image and takes its regions in their order: no two threads ever add to the
// same number, and the order of the sums does not depend on the number of threads.
template <class T>
void backward(const Regions& a, const void* grad, void* output, int64_t begin, int64_t end) {
  typedef typename Of<T>::S S;
  constexpr int n = Of<T>::n;
  int64_t outputs = int64_t(a.height) * a.width, cells = int64_t(a.rows) * a.columns;
  int64_t row = int64_t(a.columns) * a.block;
  Memory memory((2 * int64_t(sizeof(S)) * cells + int64_t(sizeof(T)) * outputs) * a.block + bytes<S>(a));
  auto down = memory.take<Point<S>>(2 * a.height), across = memory.take<Point<S>>(2 * a.width);
  T* block = memory.take<T>(a.max_pool ? cells * a.block : 0);
  S* sum = memory.take<S>(cells * a.block);
  T* tile = memory.take<T>(outputs * a.block);
  for (int64_t t = begin; t < end; t++) {
    Task task = task_of(a, t);
    memset(sum, 0, sizeof(S) * cells * a.block);
    int64_t first = a.start[task.image], last = a.start[task.image + 1];
    if (a.max_pool && first < last) gather(a, task, block, a.map, task.image, cells);
    for (int64_t k = first; k < last; k++) {
      points_of(a, a.order[k], down, across);
      gather(a, task, tile, grad, a.order[k], outputs);
      for (int i = 0; i < a.height; i++)
        for (int j = 0; j < a.width; j++) {
          const T* from = tile + (int64_t(i) * a.width + j) * a.block;
          int c = 0;
          if (a.max_pool) {
            const Point<S>*two = down + 2 * i, *beside = across + 2 * j;
            Pair<S> y(two), x(beside);
            for (; c < a.block; c += n) give_greatest(sum + c, block + c, from + c, row, a.block, two, beside, y, x);
          }
          for (; c + 2 * n <= a.block; c += 2 * n) give<2>(sum + c, from + c, row, a.block, down[i], across[j]);
          for (; c < a.block; c += n) give<1>(sum + c, from + c, row, a.block, down[i], across[j]);
        }
    }
    scatter<T>(a, task, output, sum, a.block);
  }
}

}  // namespace

void roi_crop_regions(const Regions& a, void* out, int64_t begin, int64_t end) {
#define CALL(T) regions<T>(a, out, begin, end)
  EACH_TYPE(CALL)
#undef CALL
}

void roi_crop_planes(const Regions& a, void* out, int64_t begin, int64_t end) {
#define CALL(T) planes<T>(a, out, begin, end)
  EACH_TYPE(CALL)
#undef CALL
}

void roi_crop_backward(const Regions& a, const void* grad, void* out, int64_t begin, int64_t end) {
#define CALL(T) backward<T>(a, grad, out, begin, end)
  EACH_TYPE(CALL)
#undef CALL
}

}  // namespace LEVEL
