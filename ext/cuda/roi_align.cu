// RoIAlign on a GPU. Bilinear sampling and the mean over a bin are separable in y and x: every bin has a list of rows
// and a list of columns of the map with weights ("taps"). Geometry is cheap beside the channels: every block works it
// out for itself, into shared memory.
//
// Forward: a block has one region and some channels. A thread owns a column of bins and walks down the rows of the map
// that they read; the weighted sums of a row's cells are kept for the bin below, which reads the last two rows again.
//
// Backward: a block owns a tile of a map's cells and some channels, adds up what each region of the image sends there,
// in the regions' order, in registers, and writes each cell once: no atomics, the same result on every run.
#include "../roi.h"
#include "device.h"

namespace {

constexpr int kLevels = 16;
constexpr int kThreads = 256;          // a block has at most
constexpr int64_t kShared = 96 << 10;  // bytes a block may have on every GPU since 8.0

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

// Forward.

template <class S>
struct Tap {
  S weight;
  unsigned at;  // row; of a column, how many bytes it is from the first
};

// The taps of a bin, in the order of its samples: into `to`, at most `room`; their number. Cells are `apart`.
template <class S>
__device__ int taps_of(const Axis<S>& axis, int bin, int cells, unsigned apart, Tap<S>* to, int room) {
  int n = 0, cell = -2;        // two neighbours, `cell` and `cell` + 1, have had ...
  S at_cell = 0, at_next = 0;  // ... these weights so far
  S share = axis.samples >= S(1) ? S(1) / axis.samples : S(0);
  auto put = [&](int at, S weight) {
    if (weight == S(0)) return;
    if (n < room) to[n] = {weight, unsigned(at) * apart};
    n++;
  };
  int64_t first, last;
  roi_samples(axis, bin, cells, first, last);
  for (int64_t s = first; s < last; s++) {
    int low, high;
    S at_low, at_high;
    if (!roi_sample(axis, bin, s, cells, low, high, at_low, at_high)) continue;
    if (low == cell + 1) {
      put(cell, at_cell);
      at_cell = at_next;
      at_next = 0;
    } else if (low == cell - 1) {
      put(cell + 1, at_next);
      at_next = at_cell;
      at_cell = 0;
    } else if (low != cell) {
      put(cell, at_cell);
      put(cell + 1, at_next);
      at_cell = at_next = 0;
    }
    cell = low;
    at_cell += at_low * share;
    at_next += at_high * share;
  }
  put(cell, at_cell);
  put(cell + 1, at_next);
  return n;
}

// Taps of a bin: how many there are, and where they lie.
struct Span {
  int count, begin, end;
};

// What a thread does for a row of bins: the last row of cells it has summed and the one before, with these weights,
// then new rows, the taps [begin, end).
template <class S>
struct Step {
  S line, before;
  int begin, end;
};

// How the work of the forward pass is cut.
struct Plan {
  int chunks, parts;  // of the channels: `chunks` pieces, over `parts` blocks
  int lanes;          // a piece is `lanes` packs
  int bands, rows;    // the rows of bins are cut in `bands` of `rows`, which run beside each other
  int stride;         // taps of a bin have so much room each, or (0) as much as they need, of `room` in all
  int room_down, room_across;
  int geometry;  // bytes of shared memory for all that, ...
  bool tile;     // ... and (R, C, h, w) has a tile of bins behind it, to be written in one piece
};

template <class T, int N, bool kLast>
__global__ void __launch_bounds__(kThreads, kLast && N <= 4 ? 4 : 3) align(Call a, Plan plan, T* out) {
  typedef typename Wide<T>::type S;
  DYNAMIC_SHARED(Step<S>, steps);
  Tap<S>* down = reinterpret_cast<Tap<S>*>(steps + a.down);
  Tap<S>* across = down + plan.room_down;
  Span* spans = reinterpret_cast<Span*>(across + plan.room_across);
  const int axes = a.down + a.across, t = threadIdx.x;
  const int r = blockIdx.x / plan.parts, part = blockIdx.x % plan.parts;
  int level, image;
  const bool inside = place_of<S>(a, r, level, image);
  const Map& map = a.maps[level];
  const unsigned apart = (kLast ? a.channels : 1) * sizeof(T);  // bytes between cells

  for (int pass = plan.stride ? 1 : 0; pass < 2; pass++) {  // count, then write
    for (int b = t; b < axes; b += blockDim.x) {
      const bool is_row = b < a.down;
      const int first = is_row ? 0 : a.down;
      int begin = plan.stride * (b - first), room = plan.stride, n = 0;
      if (!plan.stride && pass == 1) {
        for (int k = first; k < b; k++) begin += spans[k].count;
        room = max((is_row ? plan.room_down : plan.room_across) - begin, 0);
      }
      if (inside)
        n = taps_of(axis_of<S>(a, r, level, is_row), (b - first) * a.step, is_row ? map.rows : map.columns,
                    is_row ? 1 : apart, (is_row ? down : across) + begin, pass == 0 ? 0 : room);
      if (pass == 0) spans[b].count = n;
      spans[b].begin = begin;
      spans[b].end = begin + min(n, room);  // never cut, but where samples are so far out that all are rounded
    }
    __syncthreads();
  }
  for (int i = t; i < a.down; i += blockDim.x) {
    const Span span = spans[i];
    Step<S> step = {0, 0, span.begin, span.end};
    if (i % plan.rows && span.begin < span.end && spans[i - 1].begin < spans[i - 1].end) {
      const Tap<S>* tap = down + span.begin;
      const Tap<S>* line = down + spans[i - 1].end - 1;
      if (tap->at == line->at) {
        step.line = tap->weight;
        step.begin += 1;
      } else if (span.end - span.begin >= 2 && spans[i - 1].end - spans[i - 1].begin >= 2 && tap[1].at == line->at &&
                 tap->at == line[-1].at) {
        step.before = tap->weight;
        step.line = tap[1].weight;
        step.begin += 2;
      }
    }
    steps[i] = step;
  }
  __syncthreads();

  const int bins = a.down * a.across, units = plan.lanes * plan.bands * a.across;
  const int64_t plane = int64_t(map.rows) * map.columns;
  const unsigned row = map.columns * apart;
  T* tile = reinterpret_cast<T*>(reinterpret_cast<char*>(steps) + plan.geometry);
  for (int chunk = part; chunk < plan.chunks; chunk += plan.parts) {
    const int64_t c0 = int64_t(chunk) * plan.lanes * N;
    T* to = out + (r * int64_t(a.channels) + (kLast ? 0 : c0)) * bins;
    for (int u = t; u < units; u += blockDim.x) {
      const int lane = kLast ? u % plan.lanes : u / a.across % plan.lanes;
      const int j = kLast ? u / plan.lanes % a.across : u % a.across, band = u / (plan.lanes * a.across);
      const int64_t c = c0 + lane * N;
      const int some = int(min(int64_t(a.channels) - c, int64_t(N)));
      if (some <= 0) continue;
      const T* corner = static_cast<const T*>(map.data) + image * (a.channels * plane) + (kLast ? c : c * plane);
      const Channels<T, N, kLast> cells(corner, plane, some);

      // Taps of this column; most have no more than four.
      const int first = spans[a.down + j].begin, count = spans[a.down + j].end - first;
      Tap<S> x[4];
#pragma unroll
      for (int q = 0; q < 4; q++) x[q] = q < count ? across[first + q] : Tap<S>{0, 0};
      auto sum_row = [&](S(&line)[N], unsigned at) {
        Channels<T, N, kLast> here = cells;
        here.move(int64_t(uint64_t(at) * row));
        decltype(here.read(0)) values[4];
#pragma unroll
        for (int q = 0; q < 4; q++)
          if (q < count) values[q] = here.read(x[q].at);
        for (int k = 0; k < N; k++) line[k] = 0;
#pragma unroll
        for (int q = 0; q < 4; q++)
          if (q < count) add<T, N>(line, x[q].weight, values[q]);
#pragma unroll 1
        for (int q = 4; q < count; q++) add<T, N>(line, across[first + q].weight, here.read(across[first + q].at));
      };

      S even[N] = {}, odd[N] = {};  // sums of the last row of cells and of the one before, by turns
      bool is_odd = false;          // the last is `odd`
      const int end = min((band + 1) * plan.rows, a.down);
      T* put = kLast ? to + c : (plan.tile ? tile : to) + int64_t(lane) * N * bins;
      put += (int64_t(band) * plan.rows * a.across + j) * (kLast ? a.channels : 1);
      const int64_t below = int64_t(a.across) * (kLast ? a.channels : 1);
      for (int i = band * plan.rows; i < end; i++, put += below) {
        const Step<S> step = steps[i];
        const S of_even = is_odd ? step.before : step.line, of_odd = is_odd ? step.line : step.before;
        S sum[N] = {};
        if (of_even != S(0)) add(sum, of_even, even);
        if (of_odd != S(0)) add(sum, of_odd, odd);
#pragma unroll 1
        for (int p = step.begin; p < step.end; p++) {
          const Tap<S> tap = down[p];
          is_odd = !is_odd;
          if (is_odd) {
            sum_row(odd, tap.at);
            add(sum, tap.weight, odd);
          } else {
            sum_row(even, tap.at);
            add(sum, tap.weight, even);
          }
        }
        if constexpr (kLast) {
          // Written once, not read again soon: it should not push the maps out of the cache.
          __stcs(reinterpret_cast<Word<T, N>*>(put), rounded<T, N>(sum));
        } else {
          for (int k = 0; k < N; k++)
            if (k < some) put[k * bins] = T(sum[k]);
        }
      }
    }
    if (kLast || !plan.tile) continue;
    __syncthreads();
    constexpr int n = 16 / sizeof(T);
    const int size = int(min(int64_t(a.channels) - c0, int64_t(plan.lanes) * N)) * bins;
    const int whole = reinterpret_cast<uintptr_t>(to) % 16 ? 0 : size / n * n;
    for (int k = t * n; k < whole; k += blockDim.x * n)
      __stcs(reinterpret_cast<Word<T, n>*>(to + k), load<T, n>(tile + k));
    for (int k = whole + t; k < size; k += blockDim.x) to[k] = tile[k];
    __syncthreads();
  }
}

// Backward.

// A region and the cells of its map that it may send something to.
struct Reach {
  int region, top, bottom, left, right;
};

template <class S>
__device__ void reach_of(const Axis<S>& axis, int bins, int cells, int& low, int& high) {
  S from = axis.start, to = axis.start + axis.bin * S(bins);
  if (to < from) {
    S other = from;
    from = to;
    to = other;
  }
  // A cell is reached from less than one away; more than enough is added for rounding.
  from -= S(1.5) + S(1e-5) * std::abs(from);
  to += S(1.5) + S(1e-5) * std::abs(to);
  low = int(min(max(from, S(0)), S(cells)));
  high = int(max(min(to, S(cells - 1)), S(-1)));
}

// One block an (image, level) pair, `start` has their number + 1: its regions, in their order, and where they lie.
template <class S>
__global__ void __launch_bounds__(kThreads) list_regions(Call a, int* start, Reach* list) {
  __shared__ int counts[kThreads / 32 + 1];
  const int pair = blockIdx.x, t = threadIdx.x, warp = t / 32;
  auto pair_of = [&](int r) {
    int level, image;
    return place_of<S>(a, r, level, image) ? level * a.images + image : int(gridDim.x);
  };
  if (t == 0) counts[0] = 0;
  __syncthreads();
  for (int r = t; r < a.regions; r += kThreads)
    if (pair_of(r) < pair) atomicAdd(&counts[0], 1);
  __syncthreads();
  int at = counts[0];
  __syncthreads();
  if (t == 0) start[pair] = at;
  for (int base = 0; base < a.regions; base += kThreads) {
    int r = base + t;
    bool mine = r < a.regions && pair_of(r) == pair;
    unsigned ballot = __ballot_sync(~0u, mine);
    if (t % 32 == 0) counts[warp] = __popc(ballot);
    __syncthreads();
    int to = at + __popc(ballot & ((1u << t % 32) - 1));
    for (int w = 0; w < kThreads / 32; w++) {
      if (w < warp) to += counts[w];
      at += counts[w];
    }
    if (mine) {
      const int level = pair / a.images;
      Reach reach;
      reach.region = r;
      reach_of(axis_of<S>(a, r, level, true), a.bins_down, a.maps[level].rows, reach.top, reach.bottom);
      reach_of(axis_of<S>(a, r, level, false), a.bins_across, a.maps[level].columns, reach.left, reach.right);
      list[to] = reach;
    }
    __syncthreads();
  }
  if (t == 0 && pair == int(gridDim.x) - 1) start[pair + 1] = at;
}

constexpr int kTileRows = 8;

struct Tiles {
  int start[kLevels + 1];  // the first tile of each level; a tile is kTileRows x `columns` cells
  int across[kLevels];
  int chunks, lanes;  // pieces of the channels, `lanes` packs each
  int batch;          // regions at a time
};

// Columns of a tile. (B, H, W, C): a warp has one column; (B, C, H, W): enough of them to be read in one piece.
template <bool kLast>
constexpr int kTileColumns = kLast ? 8 : 16;

template <class T, int N, bool kLast>
__global__ void __launch_bounds__(kThreads, 3) gather(Call a, Tiles tiles, const int* start, const Reach* list,
                                                     const T* grad) {
  typedef typename Wide<T>::type S;
  constexpr int R = kTileRows, C = kTileColumns<kLast>;
  // Of each region of a batch: weights of rows (bins, R) and columns (C, bins), the bins of each column, whether a row
  // of bins sends anything here; then the regions that touch the tile, of as many as there are threads.
  DYNAMIC_SHARED(S, weights);
  const int size = R * a.down + C * a.across;
  int* first = reinterpret_cast<int*>(weights + tiles.batch * size);
  int* last = first + tiles.batch * C;
  int* used = last + tiles.batch * C;
  int* touching = used + tiles.batch * a.down;
  __shared__ int counts[kThreads / 32];
  const int t = threadIdx.x, threads = blockDim.x;

  int tile = blockIdx.x, level = 0;  // of all images and chunks, tiles the fastest
  const int tiles_of_all = tiles.start[a.levels];
  const int chunk = tile / tiles_of_all % tiles.chunks, image = tile / tiles_of_all / tiles.chunks;
  tile %= tiles_of_all;
  while (tile >= tiles.start[level + 1]) level++;
  tile -= tiles.start[level];
  const Map& map = a.maps[level];
  const int top = tile / tiles.across[level] * R, left = tile % tiles.across[level] * C;

  const int column = kLast ? t / tiles.lanes : t % C, lane = kLast ? t % tiles.lanes : t / C;
  const int64_t c = (int64_t(chunk) * tiles.lanes + lane) * N;
  const int some = int(max(min(int64_t(a.channels) - c, int64_t(N)), int64_t(0)));
  const int64_t bins = int64_t(a.down) * a.across;
  const unsigned apart = (kLast ? a.channels : 1) * sizeof(T);  // bytes between bins
  S sum[R][N] = {};

  const int pair = level * a.images + image, end = start[pair + 1];
  for (int base = start[pair]; base < end; base += threads) {
    // The regions that touch this tile, in their order.
    Reach reach;
    bool touches = base + t < end;
    if (touches) {
      reach = list[base + t];
      touches = reach.top < top + R && reach.bottom >= top && reach.left < left + C && reach.right >= left;
    }
    unsigned ballot = __ballot_sync(~0u, touches);
    if (t % 32 == 0) counts[t / 32] = __popc(ballot);
    __syncthreads();
    int at = __popc(ballot & ((1u << t % 32) - 1)), all = 0;
    for (int w = 0; w < threads / 32; w++) {
      if (w < t / 32) at += counts[w];
      all += counts[w];
    }
    if (touches) touching[at] = reach.region;
    __syncthreads();

    for (int done = 0; done < all; done += tiles.batch) {
      const int batch = min(tiles.batch, all - done), axes = a.down + a.across;
      for (int u = t; u < batch * axes; u += threads) {
        const int b = u % axes, k = u / axes;
        const bool is_row = b < a.down;
        const int bin = is_row ? b : b - a.down, from = is_row ? top : left, cells = is_row ? R : C;
        S* weight = weights + k * size + (is_row ? bin * R : R * a.down + bin);
        const int stride = is_row ? 1 : a.across;
        const Axis<S> axis = axis_of<S>(a, touching[done + k], level, is_row);
        const S share = axis.samples >= S(1) ? S(1) / axis.samples : S(0);
        for (int x = 0; x < cells; x++) weight[x * stride] = 0;
        bool any = false;
        int64_t s, stop;
        roi_samples(axis, bin * a.step, is_row ? map.rows : map.columns, s, stop);
        for (; s < stop; s++) {
          int low, high;
          S at_low, at_high;
          if (!roi_sample(axis, bin * a.step, s, is_row ? map.rows : map.columns, low, high, at_low, at_high)) continue;
          low -= from;
          high -= from;
          if (low >= 0 && low < cells) weight[low * stride] += at_low * share;
          if (high >= 0 && high < cells) weight[high * stride] += at_high * share;
          any = any || (low < cells && high >= 0);
        }
        if (is_row) used[k * a.down + bin] = any;
      }
      __syncthreads();
      for (int u = t; u < batch * C; u += threads) {
        const S* weight = weights + u / C * size + R * a.down + u % C * a.across;
        int from = 0, to = a.across;
        while (from < to && weight[from] == S(0)) from++;
        while (to > from && weight[to - 1] == S(0)) to--;
        first[u] = from;
        last[u] = to;
      }
      __syncthreads();
      if (some > 0)
#pragma unroll 1
        for (int k = 0; k < batch; k++) {
          const int from = first[k * C + column], to = last[k * C + column];
          if (from == to) continue;
          const S* down = weights + k * size;
          const S* across = down + R * a.down + column * a.across;
          const T* corner = grad + int64_t(touching[done + k]) * a.channels * bins + (kLast ? c : c * bins);
          Channels<T, N, kLast> row(corner, bins, some);
          row.move(int64_t(from) * apart);
#pragma unroll 1
          for (int i = 0; i < a.down; i++, row.move(int64_t(a.across) * apart)) {
            if (!used[k * a.down + i]) continue;
            S g[N] = {};
            Channels<T, N, kLast> here = row;
#pragma unroll 1
            for (int j = from; j < to; j += 2, here.move(2 * int64_t(apart))) {
              const bool two = j + 1 < to;
              const auto values = here.read(0), next = here.read(two ? apart : 0);
              add<T, N>(g, across[j], values);
              if (two) add<T, N>(g, across[j + 1], next);
            }
#pragma unroll
            for (int h = 0; h < R; h += 16 / sizeof(S)) {
              const auto some_weights = load<S, 16 / sizeof(S)>(down + i * R + h);
#pragma unroll
              for (int y = 0; y < int(16 / sizeof(S)); y++) {
                const S w = part<S, 16 / sizeof(S)>(some_weights, y);
                if (w != S(0)) add(sum[h + y], w, g);  // zero times an infinite gradient would be NaN
              }
            }
          }
        }
      __syncthreads();
    }
  }

  if (left + column >= map.columns || some <= 0) return;
  const int64_t plane = int64_t(map.rows) * map.columns;
  T* to = static_cast<T*>(map.data) + int64_t(image) * a.channels * plane + (kLast ? c : c * plane);
#pragma unroll
  for (int y = 0; y < R; y++) {
    if (top + y >= map.rows) break;
    const int64_t cell = int64_t(top + y) * map.columns + left + column;
    if constexpr (kLast) {
      __stwb(reinterpret_cast<Word<T, N>*>(to + cell * a.channels), rounded<T, N>(sum[y]));
    } else {
      for (int n = 0; n < N; n++)
        if (n < some) to[n * plane + cell] = T(sum[y][n]);
    }
  }
}

// Host.

int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

struct Host {
  Call a = {};
  at::Tensor rois, level;
};

// What forward and backward have in common: all but the maps' memory.
Host describe(const at::Tensor& like, const at::Tensor& rois, const std::optional<at::Tensor>& level,
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

void set_map(Map& map, const void* data, int64_t channels, int64_t rows, int64_t columns) {
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

template <class T, int N, bool kLast>
void run_forward(const Call& a, T* out) {
  typedef typename Wide<T>::type S;
  Plan plan = {};
  int64_t rows = 0, columns = 0, bins = int64_t(a.down) * a.across;
  for (int l = 0; l < a.levels; l++) {
    rows = std::max<int64_t>(rows, a.maps[l].rows);
    columns = std::max<int64_t>(columns, a.maps[l].columns);
  }
  // Taps of an axis: at most two a sample, and bins follow each other, so that two share no more than two cells.
  plan.stride = 2 * a.sampling_ratio;
  int64_t most_down = rows + 3 * a.down + 64, most_across = columns + 3 * a.across + 64;
  if (int64_t(plan.stride) * (a.down + a.across) >= most_down + most_across) plan.stride = 0;
  int64_t room_down = plan.stride ? int64_t(plan.stride) * a.down : most_down;
  int64_t room_across = plan.stride ? int64_t(plan.stride) * a.across : most_across;
  int64_t bytes = (room_down + room_across) * sizeof(Tap<S>) + int64_t(sizeof(Span)) * (a.down + a.across) +
                  int64_t(sizeof(Step<S>)) * a.down;
  bytes = (bytes + 15) / 16 * 16;
  TORCH_CHECK(bytes <= kShared, "roi_align: too many bins, or too large a map for adaptive sampling: ", bytes,
              " bytes of shared memory, of ", kShared);
  plan.geometry = int(bytes);
  plan.room_down = int(room_down);
  plan.room_across = int(room_across);

  const int packs = ceil_div(a.channels, N);
  int most = 32;
  if (!kLast) {  // a tile of 26 KiB leaves much of an SM's memory to be its cache
    const int64_t a_pack = bins * N * int64_t(sizeof(T)), room = std::min<int64_t>(26 << 10, kShared - bytes);
    plan.tile = a_pack <= room;
    if (plan.tile) most = int(std::min<int64_t>(most, room / a_pack));
  }
  plan.chunks = ceil_div(packs, most);
  plan.lanes = ceil_div(packs, plan.chunks);
  plan.chunks = ceil_div(packs, plan.lanes);
  if (plan.tile) bytes += plan.lanes * N * bins * int64_t(sizeof(T));
  plan.bands = int(std::clamp<int64_t>(kThreads / (int64_t(plan.lanes) * a.across), 1, a.down));
  plan.rows = ceil_div(a.down, plan.bands);
  plan.bands = ceil_div(a.down, plan.rows);
  plan.parts = plan.chunks;
  while (plan.parts % 2 == 0 && int64_t(a.regions) * plan.parts >= 4096) plan.parts /= 2;
  const int64_t units = int64_t(plan.lanes) * plan.bands * a.across;
  TORCH_CHECK(units < int64_t(1) << 31, "roi_align: too many bins");
  const int threads = ceil_div(ceil_div(units, ceil_div(units, kThreads)), 32) * 32;
  LAUNCH((align<T, N, kLast>), blocks_of(int64_t(a.regions) * plan.parts, 1), threads, bytes, a, plan, out);
}

at::Tensor roi_align(at::TensorList maps, const at::Tensor& rois, const std::optional<at::Tensor>& level,
                     at::ArrayRef<double> scales, int64_t height, int64_t width, int64_t sampling_ratio, bool aligned,
                     int64_t step) {
  TORCH_CHECK(maps.size() > 0 && maps.size() == scales.size(), "roi_align: one scale for each map");
  for (const auto& map : maps)
    TORCH_CHECK(map.dim() == 4 && map.size(0) == maps[0].size(0) && map.size(1) == maps[0].size(1) &&
                    map.scalar_type() == maps[0].scalar_type() && map.device() == maps[0].device(),
                "roi_align: maps are (B, C, H, W), of one type, device, B and C");
  GUARD(maps[0]);
  Host host = describe(maps[0], rois, level, scales, maps[0].size(0), maps[0].size(1), height, width, sampling_ratio,
                       aligned, step);
  Call& a = host.a;
  const auto format = format_of(maps[0]);
  const bool last = format == at::MemoryFormat::ChannelsLast;
  std::vector<at::Tensor> keep;
  for (int l = 0; l < a.levels; l++) {
    keep.push_back(maps[l].contiguous(format));
    set_map(a.maps[l], keep[l].const_data_ptr(), a.channels, maps[l].size(2), maps[l].size(3));
  }
  at::Tensor out = at::empty({a.regions, a.channels, a.down, a.across}, maps[0].options(), format);
  if (out.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "roi_align", [&] {
    constexpr int n = 16 / sizeof(scalar_t);
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    if (!last)
      run_forward<scalar_t, sizeof(scalar_t) == 8 ? 2 : 4, false>(a, to);
    else if (packs<scalar_t>(a, n, to))
      run_forward<scalar_t, n, true>(a, to);
    else
      run_forward<scalar_t, 1, true>(a, to);
  });
  return out;
}

template <class T, int N, bool kLast>
void run_backward(const Call& a, const T* grad, const int* start, const Reach* list) {
  typedef typename Wide<T>::type S;
  constexpr int R = kTileRows, C = kTileColumns<kLast>;
  Tiles tiles = {};
  int64_t count = 0;
  for (int l = 0; l < a.levels; l++) {
    tiles.across[l] = ceil_div(a.maps[l].columns, C);
    tiles.start[l] = int(count);
    count += int64_t(ceil_div(a.maps[l].rows, R)) * tiles.across[l];
    TORCH_CHECK(count < int64_t(1) << 31, "roi_align: maps too large");
  }
  tiles.start[a.levels] = int(count);
  const int packs = ceil_div(a.channels, N);
  tiles.lanes = kThreads / C;
  while (tiles.lanes * C > 32 && tiles.lanes >= 2 * packs) tiles.lanes /= 2;
  // No more channels a block than leave every SM of a large GPU some blocks.
  while (tiles.lanes * C > 64 && count * a.images * ceil_div(packs, tiles.lanes) < 512) tiles.lanes /= 2;
  tiles.chunks = ceil_div(packs, tiles.lanes);
  const int threads = tiles.lanes * C;
  const int64_t a_region = (int64_t(R) * a.down + int64_t(C) * a.across) * int64_t(sizeof(S)) + 8 * C + 4 * a.down;
  const int64_t room = kShared - 4 * threads;
  TORCH_CHECK(a_region <= room, "roi_align: too many bins for the gradient: ", a.down, " x ", a.across);
  tiles.batch = int(std::clamp<int64_t>((16 << 10) / a_region, 1, 8));
  LAUNCH((gather<T, N, kLast>), blocks_of(count * a.images * tiles.chunks, 1), threads,
         tiles.batch * a_region + 4 * threads, a, tiles, start, list, grad);
}

std::vector<at::Tensor> roi_align_backward(const at::Tensor& grad, const at::Tensor& rois,
                                           const std::optional<at::Tensor>& level, at::ArrayRef<double> scales,
                                           at::IntArrayRef shape, int64_t height, int64_t width, int64_t sampling_ratio,
                                           bool aligned, int64_t step, bool channels_last) {
  TORCH_CHECK(shape.size() == 2 + 2 * scales.size(), "roi_align_backward: shape is B, C, then H, W of each map");
  GUARD(grad);
  Host host = describe(grad, rois, level, scales, shape[0], shape[1], height, width, sampling_ratio, aligned, step);
  Call& a = host.a;
  TORCH_CHECK(grad.dim() == 4 && grad.size(0) == a.regions && grad.size(1) == a.channels && grad.size(2) == a.down &&
                  grad.size(3) == a.across,
              "roi_align_backward: grad is (R, C, h, w), not ", grad.sizes());
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const at::Tensor from = grad.contiguous(format);
  std::vector<at::Tensor> out;
  int64_t cells = 0;
  for (int l = 0; l < a.levels; l++) {
    out.push_back(at::empty({shape[0], shape[1], shape[2 + 2 * l], shape[3 + 2 * l]}, grad.options(), format));
    set_map(a.maps[l], out[l].mutable_data_ptr(), a.channels, shape[2 + 2 * l], shape[3 + 2 * l]);
    cells += out[l].numel();
  }
  if (cells == 0) return out;
  const auto ints = grad.options().dtype(at::kInt);
  const int pairs = a.levels * a.images;
  const at::Tensor start = at::empty({pairs + 1}, ints), list = at::empty({a.regions, 5}, ints);
  Reach* reach = reinterpret_cast<Reach*>(list.mutable_data_ptr<int>());
  int* starts = start.mutable_data_ptr<int>();
  if (grad.scalar_type() == at::kDouble)
    LAUNCH(list_regions<double>, pairs, kThreads, 0, a, starts, reach);
  else
    LAUNCH(list_regions<float>, pairs, kThreads, 0, a, starts, reach);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "roi_align_backward", [&] {
    constexpr int n = sizeof(scalar_t) == 8 ? 2 : 4;
    const scalar_t* data = from.const_data_ptr<scalar_t>();
    if (!channels_last)
      run_backward<scalar_t, n, false>(a, data, starts, reach);
    else if (packs<scalar_t>(a, n, data))
      run_backward<scalar_t, n, true>(a, data, starts, reach);
    else
      run_backward<scalar_t, 1, true>(a, data, starts, reach);
  });
  return out;
}

}  // namespace

OPERATORS(m) {
  m.impl("roi_align", roi_align);
  m.impl("roi_align_backward", roi_align_backward);
}
