// The geometry of a region of interest along one axis, the same on CPU and CUDA and, operation by operation, the same
// arithmetic as torchvision's, so that results differ by rounding of sums only.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define ROI_HD __host__ __device__ __forceinline__
#else
#define ROI_HD inline __attribute__((always_inline))
#endif

// One axis of a region in cells of its map. T is float or double.
template <class T>
struct Axis {
  T start, bin;  // where the first bin begins; width of a bin
  T samples;     // a bin; integral, 0 or less when there is none
  bool valid;    // false: not finite, which gives zeros
};

template <class T>
ROI_HD Axis<T> roi_axis(T low, T high, T scale, bool aligned, int bins, int sampling_ratio) {
  Axis<T> a;
  T shift = aligned ? T(0.5) : T(0);
  a.start = low * scale - shift;
  T extent = (high * scale - shift) - a.start;
  a.valid = extent - extent == T(0) && a.start - a.start == T(0);
  if (!aligned && extent < T(1)) extent = T(1);
  a.bin = extent / T(bins);
  a.samples = sampling_ratio > 0 ? T(sampling_ratio) : std::ceil(a.bin);
  return a;
}

// The samples [first, last) of bin `i` that can lie within reach of the map, -1 .. cells; the others add nothing. A
// region may be a million times larger than the map: its samples outside are never visited.
template <class T>
ROI_HD void roi_samples(const Axis<T>& a, int i, int cells, int64_t& first, int64_t& last) {
  first = 0;
  last = 0;
  if (!a.valid || !(a.samples >= T(1))) return;
  if (a.samples <= T(64)) {
    last = int64_t(a.samples);
    return;
  }
  double begin = double(a.start) + double(i) * double(a.bin), step = double(a.bin) / double(a.samples);
  if (!(step > 0)) {  // a fixed number of samples in a region of no size: all at one place, or of negative size
    last = int64_t(a.samples);
    return;
  }
  double lo = std::floor((-1.0 - begin) / step - 0.5) - 1, hi = std::ceil((double(cells) - begin) / step - 0.5) + 2;
  double most = double(a.samples);
  lo = lo < 0 ? 0 : lo > most ? most : lo;
  hi = hi < lo ? lo : hi > most ? most : hi;
  first = int64_t(lo);
  last = int64_t(hi);
}

// Sample `s` of bin `i` -> the two cells it lies between and the weights of both; false: out of reach, it adds nothing.
template <class T>
ROI_HD bool roi_sample(const Axis<T>& a, int i, int64_t s, int cells, int& low, int& high, T& at_low, T& at_high) {
  T x = a.start + T(i) * a.bin + (T(s) + T(0.5)) * a.bin / a.samples;
  if (!(x >= T(-1) && x <= T(cells))) return false;
  if (x <= T(0)) x = T(0);
  low = int(x);
  if (low >= cells - 1) {
    low = high = cells - 1;
    x = T(low);
  } else {
    high = low + 1;
  }
  at_high = x - T(low);
  at_low = T(1) - at_high;
  return true;
}

// RoIPool: a region along one axis, in whole cells. Its corners are rounded as C's round does, the last cell belongs to
// it, and it is at least one cell large. In 64 bits: no box is too large.
template <class T>
struct Span {
  int64_t start;  // first cell
  T bin;          // width of a bin
  bool valid;     // false: not finite, which gives zeros
};

template <class T>
ROI_HD Span<T> roi_span(T low, T high, T scale, int bins) {
  Span<T> s;
  T first = std::round(low * scale), last = std::round(high * scale);
  s.valid = first - first == T(0) && last - last == T(0);
  const T most = T(int64_t(1) << 40);
  first = !(first > -most) ? -most : first > most ? most : first;  // NaN too
  last = !(last > -most) ? -most : last > most ? most : last;
  s.start = int64_t(first);
  int64_t extent = int64_t(last) - s.start + 1;
  s.bin = T(extent < 1 ? 1 : extent) / T(bins);
  return s;
}

// The cells [first, last) of bin `i` that are in the map.
template <class T>
ROI_HD void roi_cells(const Span<T>& s, int i, int cells, int& first, int& last) {
  int64_t low = int64_t(std::floor(T(i) * s.bin)) + s.start, high = int64_t(std::ceil(T(i + 1) * s.bin)) + s.start;
  first = int(low < 0 ? 0 : low > cells ? cells : low);
  last = int(high < 0 ? 0 : high > cells ? cells : high);
}

// RoICrop: point `i` of `points` from `low` to `high`, both included (one point: the middle) -> the cells it lies
// between and their weights. Returns how many of them are in the map; none for a point that is not finite.
template <class T>
ROI_HD int roi_point(T low, T high, T scale, int i, int points, int cells, int* at, T* weight) {
  T share = points > 1 ? T(i) / T(points - 1) : T(0.5);
  T x = low * scale + (high - low) * scale * share;
  if (!(x > T(-1) && x < T(cells))) return 0;
  T floor = std::floor(x);
  int cell = int(floor), n = 0;
  if (cell >= 0) {
    at[n] = cell;
    weight[n++] = T(1) - (x - floor);
  }
  if (cell + 1 < cells && x > floor) {
    at[n] = cell + 1;
    weight[n++] = x - floor;
  }
  return n;
}
