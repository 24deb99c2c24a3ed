// What roi_pool and roi_crop share on a GPU: a call, and for gradients the regions of each image and those of them that
// touch a tile of its cells.
#pragma once

#include "../roi.h"
#include "device.h"

namespace {

constexpr int kThreads = 256;          // a block has at most
constexpr int kShared = 96 << 10;      // bytes a block may have on every GPU since 8.0

struct Call {
  int images, channels, rows, columns;
  const void* rois;  // (R, 5)
  int regions;
  double scale;
  int height, width;
  int points;  // of roi_crop, along each axis of an output
  int chunks, lanes;  // pieces of the channels; a piece is `lanes` packs, in the backward pass channels
};

template <class S>
__device__ const S* roi_of(const Call& a, int r) {
  return static_cast<const S*>(a.rois) + int64_t(5) * r;
}
// -1: the region lies in no image.
template <class S>
__device__ int image_of(const Call& a, int r) {
  S at = *roi_of<S>(a, r);
  return at > S(-1) && at < S(a.images) ? int(at) : -1;  // false for NaN
}

// N channels of a cell: beside each other, or each in its plane. Where there are only `some`, those only.
template <int N, bool kLast, class T>
__device__ Pack<T, N> read(const T* at, int64_t plane, int some) {
  if constexpr (kLast) {
    return *reinterpret_cast<const Pack<T, N>*>(at);
  } else {
    Pack<T, N> pack;
    for (int k = 0; k < N; k++) pack.v[k] = at[k < some ? k * plane : 0];
    return pack;
  }
}
template <int N, bool kLast, class T>
__device__ void write(T* at, int64_t plane, int some, const Pack<T, N>& pack) {
  if constexpr (kLast) {
    *reinterpret_cast<Pack<T, N>*>(at) = pack;
  } else {
    for (int k = 0; k < N; k++)
      if (k < some) at[k * plane] = pack.v[k];
  }
}

// The forward passes: a block has one region and a piece of the channels; its units are (bin, pack of N channels).
struct Unit {
  int row, column;
  int64_t channel;
  int some;     // channels, none above the last
  int64_t out;  // of the first channel; they are one, or `bins` apart
};
template <int N, bool kLast>
__device__ Unit unit_of(const Call& a, int u) {
  const int bins = a.height * a.width, r = blockIdx.x / a.chunks, chunk = blockIdx.x % a.chunks;
  const int bin = kLast ? u / a.lanes : u % bins, lane = kLast ? u % a.lanes : u / bins;
  Unit unit;
  unit.row = bin / a.width;
  unit.column = bin % a.width;
  unit.channel = (int64_t(chunk) * a.lanes + lane) * N;
  unit.some = int(min(max(int64_t(a.channels) - unit.channel, int64_t(0)), int64_t(N)));
  unit.out = kLast ? (int64_t(r) * bins + bin) * a.channels + unit.channel
                   : (int64_t(r) * a.channels + unit.channel) * bins + bin;
  return unit;
}

// A region and the cells of its map, [top, bottom) x [left, right), that it may have to do with.
struct Reach {
  int region, top, bottom, left, right;
};

// One block an image, `start` has their number + 1: its regions, in their order, and what they reach, as
// Op::reach<S>(call, region, along y or x, low, high) says.
template <class Op, class S>
__global__ void __launch_bounds__(kThreads) list_regions(Call a, int* start, Reach* list) {
  __shared__ int counts[kThreads / 32];
  __shared__ int before;
  const int image = blockIdx.x, t = threadIdx.x;
  auto of = [&](int r) {
    const int i = image_of<S>(a, r);
    return i < 0 ? a.images : i;
  };
  if (t == 0) before = 0;
  __syncthreads();
  for (int r = t; r < a.regions; r += kThreads)
    if (of(r) < image) atomicAdd(&before, 1);
  __syncthreads();
  int at = before;
  if (t == 0) start[image] = at;
  for (int base = 0; base < a.regions; base += kThreads) {
    const int r = base + t;
    const bool mine = r < a.regions && of(r) == image;
    const unsigned ballot = __ballot_sync(~0u, mine);
    if (t % 32 == 0) counts[t / 32] = __popc(ballot);
    __syncthreads();
    int to = at + __popc(ballot & ((1u << t % 32) - 1));
    for (int w = 0; w < kThreads / 32; w++) {
      if (w < t / 32) to += counts[w];
      at += counts[w];
    }
    if (mine) {
      Reach reach;
      reach.region = r;
      Op::template reach<S>(a, r, true, reach.top, reach.bottom);
      Op::template reach<S>(a, r, false, reach.left, reach.right);
      list[to] = reach;
    }
    __syncthreads();
  }
  if (t == 0 && image == a.images - 1) start[image + 1] = at;
}

// The backward passes: a block owns a tile of an image's cells and a piece of the channels; a thread owns one channel,
// of all columns in (B, H, W, C), of one in (B, C, H, W), where neighbours are to read what lies side by side. It adds
// up in shared memory what the regions send there, in their order: no atomics, the same result on every run.
template <bool kLast>
struct Tile {
  static constexpr int kRows = kLast ? 4 : 8, kColumns = kLast ? 8 : 32;
  static constexpr int kOwn = kLast ? kColumns : 1;      // columns a thread owns
  static constexpr int kOwners = kColumns / kOwn;        // threads that share the columns
  static constexpr int kCells = kRows * kOwn;            // a thread owns
  int image, top, left;
  int first;  // column of the tile that this thread owns, the first of kOwn
  int64_t channel;
  bool has;  // such a channel

  __device__ explicit Tile(const Call& a) {
    const int across = (a.columns + kColumns - 1) / kColumns, down = (a.rows + kRows - 1) / kRows;
    int64_t block = blockIdx.x;
    left = int(block % across) * kColumns;
    block /= across;
    top = int(block % down) * kRows;
    block /= down;
    image = int(block / a.chunks);
    const int t = threadIdx.x;
    first = kLast ? 0 : t % kColumns;
    channel = block % a.chunks * a.lanes + (kLast ? t : t / kColumns);
    has = channel < a.channels;
  }
  static int64_t blocks(const Call& a) {
    return int64_t(a.images) * a.chunks * ((a.columns + kColumns - 1) / kColumns) * ((a.rows + kRows - 1) / kRows);
  }

  // Numbers of the regions of list [base, base + threads) that touch the tile -> `touching`, in their order.
  __device__ int touching_of(const Reach* list, int base, int end, int* touching, int* counts) const {
    const int t = threadIdx.x, warps = blockDim.x / 32;
    Reach reach;
    bool touches = base + t < end;
    if (touches) {
      reach = list[base + t];
      touches = reach.top < top + kRows && reach.bottom > top && reach.left < left + kColumns && reach.right > left;
    }
    const unsigned ballot = __ballot_sync(~0u, touches);
    __syncthreads();  // the last ones are done with
    if (t % 32 == 0) counts[t / 32] = __popc(ballot);
    __syncthreads();
    int at = __popc(ballot & ((1u << t % 32) - 1)), all = 0;
    for (int w = 0; w < warps; w++) {
      if (w < t / 32) at += counts[w];
      all += counts[w];
    }
    if (touches) touching[at] = reach.region;
    __syncthreads();
    return all;
  }

  // What this thread has in `sums`, a number of each cell it owns.
  template <class S>
  __device__ static S& sum_of(S* sums, int row, int column) {
    return sums[(row * kOwn + column) * int(blockDim.x) + int(threadIdx.x)];
  }
  template <class S>
  __device__ void clear(S* sums) const {
    for (int i = 0; i < kCells; i++) sums[i * int(blockDim.x) + int(threadIdx.x)] = 0;
  }
  template <class T, class S>
  __device__ void write(const Call& a, S* sums, T* out) const {
    if (!has) return;
    for (int y = 0; y < kRows && top + y < a.rows; y++)
      for (int x = 0; x < kOwn && left + first + x < a.columns; x++) {
        const int64_t plane = int64_t(a.rows) * a.columns, cell = int64_t(top + y) * a.columns + left + first + x;
        out[kLast ? (image * plane + cell) * a.channels + channel
                  : (int64_t(image) * a.channels + channel) * plane + cell] = T(sum_of(sums, y, x));
      }
  }
};

// Indices [from, to) along an axis.
struct Range {
  int from, to;
};

// The outputs of a region in `down` x `across`, some at a time, so that their loads wait together: load(k, offset) for
// each, then use(k, i, j) in order. Offsets of this thread's channel, in a tensor as the output.
template <int kSome, bool kLast, class Load, class Use>
__device__ void each_output(const Call& a, int region, int64_t channel, Range down, Range across, Load load, Use use) {
  const int64_t bins = int64_t(a.height) * a.width, apart = kLast ? a.channels : 1;
  const int64_t base = kLast ? region * bins * a.channels + channel : (int64_t(region) * a.channels + channel) * bins;
  int i = down.from, j = across.from;
  if (j >= across.to) return;
  while (i < down.to) {
    int row[kSome], column[kSome];
#pragma unroll
    for (int k = 0; k < kSome; k++) {
      row[k] = i;
      column[k] = j;
      if (i >= down.to) continue;
      load(k, base + (int64_t(i) * a.width + j) * apart);
      if (++j == across.to) {
        j = across.from;
        i++;
      }
    }
#pragma unroll
    for (int k = 0; k < kSome; k++)
      if (row[k] < down.to) use(k, row[k], column[k]);
  }
}

// Host.

inline int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

struct Host {
  Call a = {};
  at::Tensor map, rois;
  at::MemoryFormat format;
  bool last;
};

inline Host describe(const char* name, const at::Tensor& map, const at::Tensor& rois, double scale, int64_t height,
                     int64_t width) {
  constexpr int64_t many = int64_t(1) << 31;
  Host host;
  TORCH_CHECK(map.dim() == 4, name, ": the map is (B, C, H, W), not ", map.sizes());
  TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5, name, ": boxes are (R, 5), not ", rois.sizes());
  TORCH_CHECK(rois.device() == map.device(), name, ": boxes are on ", rois.device(), ", the map on ", map.device());
  TORCH_CHECK(height > 0 && width > 0 && height + width <= 1 << 11, name,
              ": output_size is from 1 to 1024, not ", height, ", ", width);
  TORCH_CHECK(map.size(0) < many && map.size(1) < many && rois.size(0) < many, name, ": too many images or regions");
  TORCH_CHECK(map.size(2) < 1 << 16 && map.size(3) < 1 << 16 && map.size(2) * map.size(3) < many, name,
              ": a map has less than 2^16 rows and columns, not ", map.sizes());
  host.format = format_of(map);
  host.last = host.format == at::MemoryFormat::ChannelsLast;
  host.map = map.contiguous(host.format);
  host.rois = rois.to(map.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
  Call& a = host.a;
  a.images = int(map.size(0));
  a.channels = int(map.size(1));
  a.rows = int(map.size(2));
  a.columns = int(map.size(3));
  a.rois = host.rois.const_data_ptr();
  a.regions = int(rois.size(0));
  a.scale = scale;
  a.height = int(height);
  a.width = int(width);
  a.points = 1;
  return host;
}

// Cuts a forward pass with packs of n channels into blocks: enough units for all threads, channels-last in whole warps.
inline void cut(Call& a, int n, bool last) {
  const int packs = ceil_div(a.channels, n), bins = a.height * a.width;
  a.lanes = ceil_div(16 * kThreads, bins);
  if (last) a.lanes = ceil_div(a.lanes, 32) * 32;
  a.lanes = std::min(a.lanes, packs);
  a.chunks = ceil_div(packs, a.lanes);
}

// How wide packs may be, of at most `n`: 1 where memory is not aligned.
template <class T>
bool packs(const Call& a, int n, const void* one) {
  return a.channels % n == 0 && reinterpret_cast<uintptr_t>(one) % (n * sizeof(T)) == 0;
}

// Cuts a backward pass: threads a block.
template <bool kLast>
int cut_tiles(Call& a) {
  constexpr int owners = Tile<kLast>::kOwners;
  const int threads = kLast ? std::clamp(ceil_div(a.channels, 32) * 32, 32, 128) : 128;
  a.lanes = threads / owners;
  a.chunks = ceil_div(a.channels, a.lanes);
  return threads;
}

// The regions of each image: `start` (images + 1), `list`.
template <class Op>
void list(const Call& a, bool wide, int* start, Reach* reach) {
  if (wide)
    LAUNCH((list_regions<Op, double>), a.images, kThreads, 0, a, start, reach);
  else
    LAUNCH((list_regions<Op, float>), a.images, kThreads, 0, a, start, reach);
}

}  // namespace
