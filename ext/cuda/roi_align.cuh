// RoIAlign on a GPU. Bilinear sampling and the mean over a bin are separable in y and x: every bin has a list of rows
// and a list of columns of the map with weights ("taps"). Geometry is cheap beside the channels: every block works it
// out for itself, into shared memory.
#pragma once

#include "../roi.h"
#include "device.h"

namespace {

constexpr int kLevels = 16;
constexpr int kThreads = 256;          // a block has at most
constexpr int64_t kShared = 96 << 10;  // bytes a block may have on every GPU since 8.0

// Registers are what bounds the blocks of an SM; Blackwell's paired instructions want more of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kFewer = 1;
#else
constexpr int kFewer = 0;
#endif

struct Map {
  void* data;
  int rows, columns;
  double scale;
};

struct Call {
  Map maps[kLevels];
  int levels, images, channels;
  const void* rois;  // (R, 5)
  const int64_t* level;
  int regions;
  int bins_down, bins_across, step, down, across;  // down, across: the bins that are computed, every `step`-th
  int sampling_ratio;
  bool aligned;
};

// One axis of a region.
template <class S>
__device__ Axis<S> axis_of(const Call& a, int r, int level, bool is_row) {
  const S* roi = static_cast<const S*>(a.rois) + int64_t(5) * r + (is_row ? 2 : 1);
  return roi_axis(roi[0], roi[2], S(a.maps[level].scale), a.aligned, is_row ? a.bins_down : a.bins_across,
                  a.sampling_ratio);
}

// Level and image of a region; false: it has none, or is not finite, and gives zeros.
template <class S>
__device__ bool place_of(const Call& a, int r, int& level, int& image) {
  S at = static_cast<const S*>(a.rois)[int64_t(5) * r];
  int64_t l = a.level ? a.level[r] : 0;
  bool inside = at > S(-1) && at < S(a.images) && l >= 0 && l < a.levels;  // false for NaN
  level = inside ? int(l) : 0;
  image = inside ? int(at) : 0;
  return inside && a.maps[level].rows > 0 && a.maps[level].columns > 0 && axis_of<S>(a, r, level, true).valid &&
         axis_of<S>(a, r, level, false).valid;
}

// N numbers as they lie in memory, in words: 16-bit numbers would each take a register.
template <int kBytes>
struct Bits;
template <>
struct Bits<2> {
  typedef unsigned short type;
};
template <>
struct Bits<4> {
  typedef unsigned type;
};
template <>
struct Bits<8> {
  typedef uint2 type;
};
template <>
struct Bits<16> {
  typedef uint4 type;
};
template <class T, int N>
using Word = typename Bits<sizeof(T) * N>::type;

template <class T, int N>
__device__ Word<T, N> load(const T* from) {
  return *reinterpret_cast<const Word<T, N>*>(from);
}

template <class T, int N>
__device__ T part(const Word<T, N>& word, int k) {
  if constexpr (sizeof(T) == 2 && N > 1) {
    unsigned two = __builtin_bit_cast(Pack<unsigned, N / 2>, word).v[k / 2];
    return __builtin_bit_cast(T, static_cast<unsigned short>(two >> k % 2 * 16));
  } else {
    return __builtin_bit_cast(Pack<T, N>, word).v[k];
  }
}

// N channels of a map: beside each other, or each in its plane. Offsets are in bytes: the fewest instructions.
template <class T, int N, bool kLast>
struct Channels {
  static constexpr int kPointers = kLast ? 1 : N;
  const char* from[kPointers];
  // Where there are only `some`, the first is read again in place of the others.
  __device__ Channels(const T* first, int64_t plane, int some) {
    for (int k = 0; k < kPointers; k++) from[k] = reinterpret_cast<const char*>(first + (k < some ? k * plane : 0));
  }
  __device__ void move(int64_t bytes) {
    for (int k = 0; k < kPointers; k++) from[k] += bytes;
  }
  __device__ auto read(unsigned bytes) const {
    if constexpr (kLast) {
      return load<T, N>(reinterpret_cast<const T*>(from[0] + bytes));
    } else {
      Pack<T, N> pack;
      for (int k = 0; k < N; k++) pack.v[k] = *reinterpret_cast<const T*>(from[k] + bytes);
      return pack;
    }
  }
};

template <int N, class S>
__device__ void add(S (&sum)[N], S weight, const S (&values)[N]) {
  for (int k = 0; k < N; k++) sum[k] += weight * values[k];
}
template <class T, int N, class S>
__device__ void add(S (&sum)[N], S weight, const Pack<T, N>& pack) {
  for (int k = 0; k < N; k++) sum[k] += weight * S(pack.v[k]);
}
template <class T, int N, class S>
__device__ void add(S (&sum)[N], S weight, const Word<T, N>& word) {
  for (int k = 0; k < N; k++) sum[k] += weight * S(part<T, N>(word, k));
}
template <class T, int N, class S>
__device__ Word<T, N> rounded(const S (&sum)[N]) {
  Pack<T, N> pack;
  for (int k = 0; k < N; k++) pack.v[k] = T(sum[k]);
  return __builtin_bit_cast(Word<T, N>, pack);
}

// Host.

inline int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

struct Host {
  Call a = {};
  at::Tensor rois, level;
};

// What forward and backward have in common: all but the maps' memory.
inline Host describe(const at::Tensor& like, const at::Tensor& rois, const std::optional<at::Tensor>& level,
              at::ArrayRef<double> scales, int64_t images, int64_t channels, int64_t height, int64_t width,
              int64_t sampling_ratio, bool aligned, int64_t step) {
  Host host;
  Call& a = host.a;
  const auto many = int64_t(1) << 31;
  TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5, "roi_align: boxes are (R, 5), not ", rois.sizes());
  TORCH_CHECK(height > 0 && width > 0 && step > 0, "roi_align: output_size and step are at least 1");
  TORCH_CHECK(height < 1 << 20 && width < 1 << 20 && sampling_ratio < 1 << 20, "roi_align: too many bins or samples");
  TORCH_CHECK(scales.size() <= kLevels, "roi_align: at most ", kLevels, " maps");
  TORCH_CHECK(scales.size() == 1 || level, "roi_align: several maps need the level of each region");
  TORCH_CHECK(rois.device() == like.device(), "roi_align: boxes are on ", rois.device(), ", maps on ", like.device());
  TORCH_CHECK(rois.size(0) < many && channels < many && images < many, "roi_align: too many regions or channels");
  host.rois = rois.to(like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
  if (scales.size() > 1) {
    TORCH_CHECK(level->dim() == 1 && level->size(0) == rois.size(0), "roi_align: level is (R,), not ", level->sizes());
    TORCH_CHECK(level->device() == like.device(), "roi_align: level is on ", level->device(), ", maps on ",
                like.device());
    host.level = level->to(at::kLong).contiguous();
    a.level = host.level.const_data_ptr<int64_t>();
  }
  a.levels = int(scales.size());
  for (int l = 0; l < a.levels; l++) a.maps[l].scale = scales[l];
  a.images = int(images);
  a.channels = int(channels);
  a.rois = host.rois.const_data_ptr();
  a.regions = int(rois.size(0));
  a.bins_down = int(height);
  a.bins_across = int(width);
  a.step = int(std::min(step, int64_t(1) << 20));
  a.down = ceil_div(height, a.step);
  a.across = ceil_div(width, a.step);
  a.sampling_ratio = int(std::max<int64_t>(sampling_ratio, 0));
  a.aligned = aligned;
  return host;
}

inline void set_map(Map& map, const void* data, int64_t channels, int64_t rows, int64_t columns) {
  TORCH_CHECK(rows < 1 << 30 && columns < (int64_t(1) << 29) / std::max<int64_t>(channels, 1),
              "roi_align: too large a map, ", rows, " x ", columns, " cells of ", channels, " channels");
  map.data = const_cast<void*>(data);
  map.rows = int(rows);
  map.columns = int(columns);
}

// Packs of `n` numbers can be read and written.
template <class T>
bool packs(const Call& a, int n, const void* other) {
  bool fits = a.channels % n == 0 && reinterpret_cast<uintptr_t>(other) % (n * sizeof(T)) == 0;
  for (int l = 0; l < a.levels; l++) fits = fits && reinterpret_cast<uintptr_t>(a.maps[l].data) % (n * sizeof(T)) == 0;
  return fits;
}

}  // namespace
