// RoIAlign's forward pass: a block has one region and some channels. A thread owns a column of bins and walks down the
// rows of the map that they read; the weighted sums of a row's cells are kept for the bin below, which reads the last
// two rows again.
#include "roi_align.cuh"

namespace {

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
__global__ void __launch_bounds__(kThreads, (kLast && N <= 4 ? 4 : 3) - kFewer) align(Call a, Plan plan, T* out) {
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

}  // namespace

OPERATORS(m) { m.impl("roi_align", roi_align); }
