// Greedy NMS on the device. Boxes are sorted by falling score; a kernel notes in bits which later boxes each box would
// drop, in tiles of 64 x 64; then one block an image walks down the rows, drops what a kept row names, and stops at
// max_keep. Rows are taken in chunks, so that the bits stay small (MASK_BYTES) and in the cache, and the work ends
// early: the kernels of later chunks find their image done. Nothing depends on values on the host, which never waits.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <climits>
#include <tuple>

#include "../nms.h"
#include "device.h"

namespace {

typedef unsigned long long u64;

constexpr int64_t MASK_BYTES = 32 << 20;  // of all images together; more only where 64 rows of each need more
constexpr int64_t CHUNK = 2048;           // rows, at most
constexpr int TILE = 64, SWEEP = 512, GATHER = 256;

// A product as it is rounded, which no FMA takes up.
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double times(double a, double b) { return __dmul_rn(a, b); }

// A key that rises as the score falls: NaN of either sign first, zeros of both signs equal. (A radix sort of floats
// places a NaN by its sign.)
__device__ __forceinline__ int falling(float score) {
  int bits = __float_as_int(score + 0.f);  // -0 becomes 0
  return score != score ? INT_MIN : bits < 0 ? bits & INT_MAX : ~bits;
}
__device__ __forceinline__ int64_t falling(double score) {
  int64_t bits = __double_as_longlong(score + 0.);
  return score != score ? INT64_MIN : bits < 0 ? bits & INT64_MAX : ~bits;
}

template <class S, class K>
__global__ void keys(const S* scores, K* key, int64_t count) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) key[i] = falling(scores[i]);
}

template <class S, class K>
struct Call {
  int count, words;  // N; tiles of N, which are words of bits
  int64_t max_keep;
  S threshold, share;
  const S* boxes;        // (B, N, 4)
  const int64_t* group;  // (B, N), or none
  const K* key;          // (B, N), sorted
  const int64_t* order;  // (B, N)
  Pack<S, 4>* box;       // (B, N), sorted; 0, which nothing overlaps, where it is not finite or has no area
  int64_t* its_group;    // (B, N), sorted
  u64* removed;          // (B, words), a bit a box that is dropped or absent
  u64* mask;             // (B, chunk, words)
  int64_t* keep;
  int64_t* kept;
};

template <class S, class K>
__global__ void gather(Call<S, K> a) {
  int64_t image = blockIdx.y;
  int rank = blockIdx.x * blockDim.x + threadIdx.x;
  bool there = rank < a.count;
  if (there) {
    int64_t at = image * a.count + rank, from = image * a.count + a.order[at];
    const S* p = a.boxes + 4 * from;
    S width = p[2] - p[0], height = p[3] - p[1], area = times(width, height);
    bool solid = width > 0 && height > 0 && area < S(INFINITY);
    a.box[at] = solid ? Pack<S, 4>{p[0], p[1], p[2], p[3]} : Pack<S, 4>{};
    if (a.group) a.its_group[at] = a.group[from];
    there = a.key[at] != falling(-S(INFINITY));
  }
  unsigned absent = __ballot_sync(~0u, !there);
  if (threadIdx.x % 32 == 0 && rank / TILE < a.words)
    reinterpret_cast<unsigned*>(a.removed + image * a.words)[rank / 32] = absent;
}

// Which boxes of a tile of columns those of a tile of rows would drop. Tiles of which nothing is left are not written:
// such rows are never read, and such columns' bits change nothing.
template <class S, class K>
__global__ void mask(Call<S, K> a, int first, int chunk) {
  __shared__ Pack<S, 4> column[TILE];
  __shared__ S areas[TILE];
  int64_t image = blockIdx.z;
  int rows = first / TILE + blockIdx.y, columns = first / TILE + blockIdx.x, t = threadIdx.x;
  if (columns < rows || a.kept[image] >= a.max_keep) return;
  u64 no_row = a.removed[image * a.words + rows];
  if (!~no_row || !~a.removed[image * a.words + columns]) return;
  const Pack<S, 4>* boxes = a.box + image * a.count;
  int of_column = columns * TILE + t, of_row = rows * TILE + t;
  if (of_column < a.count) {
    Pack<S, 4> b = boxes[of_column];
    column[t] = b;
    areas[t] = times(b.v[2] - b.v[0], b.v[3] - b.v[1]);
  }
  __syncthreads();
  if (no_row >> t & 1) return;
  Pack<S, 4> own = boxes[of_row];
  S area = times(own.v[2] - own.v[0], own.v[3] - own.v[1]);
  S share = area > S(1e-24) ? a.share : S(0), least = share * area;
  const int64_t* group = a.group ? a.its_group + image * a.count : nullptr;
  int64_t own_group = group ? group[of_row] : 0;
  int count = min(a.count - columns * TILE, TILE);
  u64 bits = 0;
  for (int k = columns == rows ? t + 1 : 0; k < count; k++) {
    Pack<S, 4> b = column[k];
    S width = min(own.v[2], b.v[2]) - max(own.v[0], b.v[0]), height = min(own.v[3], b.v[3]) - max(own.v[1], b.v[1]);
    S inter = times(max(width, S(0)), height);
    // First without a division, and a little too often.
    if (!(inter > areas[k] * share + least)) continue;
    if (inter / (area + areas[k] - inter) > a.threshold && (!group || group[columns * TILE + k] == own_group))
      bits |= u64(1) << k;
  }
  a.mask[(image * chunk + of_row - first) * a.words + columns] = bits;
}

template <class S, class K>
__global__ void sweep(Call<S, K> a, int first, int chunk) {
  __shared__ int64_t row[TILE];  // kept rows of a tile, as they lie in `mask`
  __shared__ int64_t total;      // kept so far
  __shared__ int fresh;          // of the tile
  int64_t image = blockIdx.x;
  int t = threadIdx.x;
  u64* removed = a.removed + image * a.words;
  if (a.kept[image] >= a.max_keep) return;
  if (t == 0) total = a.kept[image];
  __syncthreads();
  int last = min(a.words, (first + chunk) / TILE);
  for (int tile = first / TILE; tile < last; tile++) {
    if (t < 32) {  // the first warp settles the tile itself; a lane has the rows t and t + 32
      int64_t at = (image * chunk + tile * TILE - first + t) * a.words;
      u64 alive = ~removed[tile], drops[2];
      for (int half = 0; half < 2; half++) {
        bool mine = alive >> (t + 32 * half) & 1;
        drops[half] = mine ? a.mask[at + 32 * half * a.words + tile] & alive : 0;
      }
      u64 left = __ballot_sync(~0u, drops[0] != 0) | u64(__ballot_sync(~0u, drops[1] != 0)) << 32;
      while (left) {  // in their order, rows that drop others of the tile
        int k = __ffsll(left) - 1;
        u64 dropped = __shfl_sync(~0u, k < 32 ? drops[0] : drops[1], k % 32);
        alive &= ~dropped;
        left &= left - 1;
        left &= alive;
      }
      int64_t before = total;
      __syncwarp();
      for (int half = 0; half < 2; half++) {
        int bit = t + 32 * half, place = __popcll(alive & ((u64(1) << bit) - 1));
        if (!(alive >> bit & 1)) continue;
        row[place] = at + 32 * half * a.words;
        if (before + place < a.max_keep)
          a.keep[image * a.max_keep + before + place] = a.order[image * a.count + tile * TILE + bit];
      }
      if (t == 0) {
        fresh = __popcll(alive);
        total = min(before + fresh, a.max_keep);
      }
    }
    __syncthreads();
    bool done = total >= a.max_keep;
    int64_t columns = !done ? a.words - tile - 1 : 0;
    // Several threads a column where there are enough; the order of an OR does not matter.
    int64_t parts = columns ? max(int64_t(1), SWEEP / columns) : 0;
    for (int64_t task = t; task < columns * parts; task += SWEEP) {
      int64_t column = tile + 1 + task % columns;
      u64 drops = 0;
      for (int64_t k = task / columns; k < fresh; k += parts) drops |= a.mask[row[k] + column];
      if (drops) atomicOr(removed + column, drops);
    }
    __syncthreads();
    if (done) break;
  }
  if (t == 0) a.kept[image] = total;
}

template <class S, class K>
void run(Call<S, K>& a, int64_t images, int64_t chunk, double threshold) {
  a.threshold = S(threshold);
  a.share = threshold > 1e-6 ? S(threshold / (1 + threshold) * (1 - 1e-5)) : S(0);
  LAUNCH((gather<S, K>), dim3(blocks_of(int64_t(a.words) * TILE, GATHER), images), GATHER, 0, a);
  for (int64_t first = 0; first < a.count; first += chunk) {
    unsigned columns = a.words - first / TILE, rows = std::min<int64_t>(columns, chunk / TILE);
    LAUNCH((mask<S, K>), dim3(columns, rows, images), TILE, 0, a, int(first), int(chunk));
    LAUNCH((sweep<S, K>), images, SWEEP, 0, a, int(first), int(chunk));
  }
}

std::tuple<at::Tensor, at::Tensor> nms(const at::Tensor& boxes, const at::Tensor& scores,
                                       const std::optional<at::Tensor>& group, double iou_threshold, int64_t max_keep) {
  check_nms(boxes, scores, group, iou_threshold, max_keep);
  GUARD(boxes);
  int64_t images = boxes.size(0), count = boxes.size(1), words = (count + TILE - 1) / TILE;
  TORCH_CHECK(images < 1 << 16, "nms: too many images, ", images);
  auto type = nms_type(boxes, scores);
  auto options = boxes.options().dtype(at::kLong);
  at::Tensor keep = at::full({images, max_keep}, -1, options), kept = at::zeros({images}, options);
  if (images == 0 || count == 0 || max_keep == 0) return {keep, kept};
  at::Tensor box = boxes.to(type).contiguous(), score = scores.to(type).contiguous(), groups, its_group;
  if (group) {
    groups = group->contiguous();
    its_group = at::empty_like(groups);
  }
  int64_t fit = MASK_BYTES / (8 * images * words) / TILE * TILE;
  int64_t chunk = std::clamp(fit, int64_t(TILE), std::min(CHUNK, words * TILE));
  at::Tensor by_score = at::empty_like(box), removed = at::empty({images, words}, options);
  at::Tensor bits = at::empty({images, chunk, words}, options);
  auto start = [&](auto zero, auto zero_key) {
    typedef decltype(zero) S;
    typedef decltype(zero_key) K;
    at::Tensor key = at::empty({images, count}, options.dtype(c10::CppTypeToScalarType<K>::value));
    LAUNCH((keys<S, K>), blocks_of(images * count, GATHER), GATHER, 0, score.const_data_ptr<S>(),
           key.mutable_data_ptr<K>(), images * count);
    at::Tensor sorted, order;
    std::tie(sorted, order) = at::sort(key, /*stable=*/true, /*dim=*/1, /*descending=*/false);
    sorted = sorted.contiguous();
    order = order.contiguous();
    Call<S, K> a;
    a.count = int(count);
    a.words = int(words);
    a.max_keep = max_keep;
    a.boxes = box.const_data_ptr<S>();
    a.group = group ? groups.const_data_ptr<int64_t>() : nullptr;
    a.key = sorted.const_data_ptr<K>();
    a.order = order.const_data_ptr<int64_t>();
    a.box = reinterpret_cast<Pack<S, 4>*>(by_score.mutable_data_ptr<S>());
    a.its_group = group ? its_group.mutable_data_ptr<int64_t>() : nullptr;
    a.removed = reinterpret_cast<u64*>(removed.mutable_data_ptr<int64_t>());
    a.mask = reinterpret_cast<u64*>(bits.mutable_data_ptr<int64_t>());
    a.keep = keep.mutable_data_ptr<int64_t>();
    a.kept = kept.mutable_data_ptr<int64_t>();
    run(a, images, chunk, nms_threshold(iou_threshold, type));
  };
  if (type == at::kDouble)
    start(0., int64_t(0));
  else
    start(0.f, int(0));
  return {keep, kept};
}

}  // namespace

OPERATORS(m) { m.impl("nms", nms); }
