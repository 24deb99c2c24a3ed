// RoIAlign's gradient: a block owns a tile of a map's cells and some channels, adds up what each region of the image
// sends there, in the regions' order, in registers, and writes each cell once: no atomics, the same result on every run.
#include "roi_align.cuh"

namespace {

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

OPERATORS(m) { m.impl("roi_align_backward", roi_align_backward); }
