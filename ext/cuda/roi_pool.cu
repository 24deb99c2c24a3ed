// RoIPool. The backward pass first notes where each maximum is, in two bytes for most maps: a forward pass that did it
// would write those, and inference never reads them. Then tiles of the map collect what is theirs.
#include <cfloat>

#include "regions.cuh"

namespace {

// A cell, in U: row and column side by side; all ones: none.
template <class U>
constexpr int kBits = 4 * sizeof(U);

struct Pool {
  template <class S>
  static __device__ Span<S> span(const Call& a, int r, bool is_row) {
    const S* roi = roi_of<S>(a, r) + (is_row ? 2 : 1);
    return roi_span(roi[0], roi[2], S(a.scale), is_row ? a.height : a.width);
  }
  template <class S>
  static __device__ void reach(const Call& a, int r, bool is_row, int& low, int& high) {
    const Span<S> s = span<S>(a, r, is_row);
    int other;
    roi_cells(s, 0, is_row ? a.rows : a.columns, low, other);
    roi_cells(s, (is_row ? a.height : a.width) - 1, is_row ? a.rows : a.columns, other, high);
    if (!s.valid) high = low = 0;
  }
};

// Maxima, in T, or where they are, in U.
template <class T, class U, int N, bool kLast, bool kWhere>
__global__ void __launch_bounds__(kThreads) pool(Call a, const T* map, T* out, U* where) {
  typedef typename Wide<T>::type S;
  DYNAMIC_SHARED(int, first);  // of rows of bins, then of columns
  const int axes = a.height + a.width, r = blockIdx.x / a.chunks;
  int* last = first + axes;
  const int image = image_of<S>(a, r);
  for (int b = threadIdx.x; b < axes; b += blockDim.x) {
    const bool is_row = b < a.height;
    const Span<S> other = Pool::span<S>(a, r, !is_row), s = Pool::span<S>(a, r, is_row);
    roi_cells(s, is_row ? b : b - a.height, is_row ? a.rows : a.columns, first[b], last[b]);
    if (image < 0 || !s.valid || !other.valid) first[b] = last[b] = 0;
  }
  __syncthreads();
  const int units = a.height * a.width * a.lanes;
  const int64_t plane = int64_t(a.rows) * a.columns, bins = int64_t(a.height) * a.width;
  for (int u = threadIdx.x; u < units; u += blockDim.x) {
    const Unit unit = unit_of<N, kLast>(a, u);
    if (unit.some == 0) continue;
    const int top = first[unit.row], bottom = last[unit.row];
    const int left = first[a.height + unit.column], right = last[a.height + unit.column];
    const bool empty = bottom <= top || right <= left;
    // As in torchvision: what is not above this (NaN, -inf) is no maximum.
    S most[N];
    U at[N];
    for (int k = 0; k < N; k++) {
      most[k] = empty ? S(0) : S(-FLT_MAX);
      at[k] = U(~U(0));
    }
    if (!empty) {
      const T* cells = map + image * a.channels * plane + (kLast ? unit.channel : unit.channel * plane);
      const int64_t apart = kLast ? a.channels : 1;
#pragma unroll 1
      for (int y = top; y < bottom; y++) {
        const T* line = cells + int64_t(y) * a.columns * apart;
#pragma unroll 1
        for (int x = left; x < right; x += 4) {
          Pack<T, N> four[4];  // at the end the last one again, which is not greater than itself
#pragma unroll
          for (int q = 0; q < 4; q++) four[q] = read<N, kLast>(line + min(x + q, right - 1) * apart, plane, unit.some);
#pragma unroll
          for (int q = 0; q < 4; q++)
            for (int k = 0; k < N; k++) {
              const S value = S(four[q].v[k]);
              if (value > most[k]) {
                most[k] = value;
                if (kWhere) at[k] = U(y << kBits<U> | (x + q));
              }
            }
        }
      }
    }
    if constexpr (kWhere) {
      Pack<U, N> pack;
      for (int k = 0; k < N; k++) pack.v[k] = at[k];
      write<N, kLast>(where + unit.out, bins, unit.some, pack);
    } else {
      Pack<T, N> pack;
      for (int k = 0; k < N; k++) pack.v[k] = T(most[k]);
      write<N, kLast>(out + unit.out, bins, unit.some, pack);
    }
  }
}

// The bins that have cells in [low, high). Neither end of a bin ever goes back from one to the next.
template <class S>
__device__ Range bins_in(const Span<S>& s, int bins, int cells, int low, int high) {
  Range range;
  int first, last;
  for (int part = 0; part < 2; part++) {
    int from = part ? range.from : 0, to = bins;
    while (from < to) {
      const int middle = (from + to) / 2;
      roi_cells(s, middle, cells, first, last);
      if (part ? first >= high : last > low)
        to = middle;
      else
        from = middle + 1;
    }
    (part ? range.to : range.from) = from;
  }
  return range;
}

constexpr int kBatch = 8;  // regions at a time

template <class T, class U, bool kLast>
__global__ void __launch_bounds__(128) collect(Call a, const int* start, const Reach* list, const T* grad,
                                               const U* where, T* out) {
  typedef typename Wide<T>::type S;
  typedef Tile<kLast> Mine;
  DYNAMIC_SHARED(S, sums);
  __shared__ int touching[128], counts[4];
  __shared__ Range ranges[kBatch][1 + Mine::kOwners];
  const Mine tile(a);
  tile.clear(sums);
  const int t = threadIdx.x, end = start[tile.image + 1];
  for (int base = start[tile.image]; base < end; base += blockDim.x) {
    const int all = tile.touching_of(list, base, end, touching, counts);
    for (int done = 0; done < all; done += kBatch) {
      const int batch = min(kBatch, all - done);
      for (int u = t; u < batch * (1 + Mine::kOwners); u += blockDim.x) {
        const int k = u / (1 + Mine::kOwners), which = u % (1 + Mine::kOwners);
        const Span<S> s = Pool::span<S>(a, touching[done + k], which == 0);
        const int low = which ? tile.left + (which - 1) * Mine::kOwn : tile.top;
        ranges[k][which] = bins_in(s, which ? a.width : a.height, which ? a.columns : a.rows, low,
                                   low + (which ? Mine::kOwn : Mine::kRows));
      }
      __syncthreads();
      if (tile.has)
        for (int k = 0; k < batch; k++) {
          U at[4];
          T g[4];
          each_output<4, kLast>(
              a, touching[done + k], tile.channel, ranges[k][0], ranges[k][1 + tile.first],
              [&](int n, int64_t offset) {
                at[n] = where[offset];
                g[n] = grad[offset];
              },
              [&](int n, int, int) {
                const int y = int(at[n] >> kBits<U>) - tile.top;
                const int x = int(at[n] & ((1u << kBits<U>) - 1)) - tile.left - tile.first;
                if (unsigned(y) < unsigned(Mine::kRows) && unsigned(x) < unsigned(Mine::kOwn))
                  tile.sum_of(sums, y, x) += S(g[n]);
              });
        }
      __syncthreads();
    }
  }
  tile.write(a, sums, out);
}

template <class T, class U, bool kWhere>
void run_pool(Call a, const T* map, bool last, T* out, U* where) {
  constexpr int n = sizeof(T) == 8 ? 2 : 4;
  const int bytes = 2 * (a.height + a.width) * int(sizeof(int));
  const bool packed = packs<T>(a, n, map) && (kWhere ? packs<U>(a, n, where) : packs<T>(a, n, out));
  cut(a, last && !packed ? 1 : n, last);
  const unsigned blocks = blocks_of(int64_t(a.regions) * a.chunks, 1);
  const int threads = std::min(kThreads, ceil_div(a.height * a.width * a.lanes, 32) * 32);
  if (!last)
    LAUNCH((pool<T, U, n, false, kWhere>), blocks, threads, bytes, a, map, out, where);
  else if (packed)
    LAUNCH((pool<T, U, n, true, kWhere>), blocks, threads, bytes, a, map, out, where);
  else
    LAUNCH((pool<T, U, 1, true, kWhere>), blocks, threads, bytes, a, map, out, where);
}

template <class T, class U, bool kLast>
void run_collect(Call a, const int* start, const Reach* list, const T* grad, const U* where, T* out) {
  typedef typename Wide<T>::type S;
  const int threads = cut_tiles<kLast>(a);
  LAUNCH((collect<T, U, kLast>), blocks_of(Tile<kLast>::blocks(a), 1), threads,
         Tile<kLast>::kCells * threads * sizeof(S), a, start, list, grad, where, out);
}

template <class T, class U>
void run_backward(const Host& host, at::ScalarType places, const at::Tensor& grad, const at::Tensor& out) {
  const Call& a = host.a;
  const auto ints = grad.options().dtype(at::kInt);
  const at::Tensor where = at::empty({grad.numel()}, grad.options().dtype(places));
  const at::Tensor start = at::empty({a.images + 1}, ints), reaches = at::empty({a.regions, 5}, ints);
  U* at = static_cast<U*>(where.mutable_data_ptr());
  Reach* reach = reinterpret_cast<Reach*>(reaches.mutable_data_ptr<int>());
  int* starts = start.mutable_data_ptr<int>();
  list<Pool>(a, sizeof(T) == 8, starts, reach);
  if (grad.numel()) run_pool<T, U, true>(a, host.map.const_data_ptr<T>(), host.last, nullptr, at);
  const T* from = grad.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  if (host.last)
    run_collect<T, U, true>(a, starts, reach, from, at, to);
  else
    run_collect<T, U, false>(a, starts, reach, from, at, to);
}

at::Tensor roi_pool(const at::Tensor& map, const at::Tensor& rois, double scale, int64_t height, int64_t width) {
  GUARD(map);
  const Host host = describe("roi_pool", map, rois, scale, height, width);
  at::Tensor out = at::empty({rois.size(0), map.size(1), height, width}, map.options(), host.format);
  if (out.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, map.scalar_type(), "roi_pool", [&] {
    run_pool<scalar_t, uint16_t, false>(host.a, host.map.const_data_ptr<scalar_t>(), host.last,
                                        out.mutable_data_ptr<scalar_t>(), nullptr);
  });
  return out;
}

at::Tensor roi_pool_backward(const at::Tensor& grad, const at::Tensor& map, const at::Tensor& rois, double scale) {
  GUARD(map);
  TORCH_CHECK(grad.dim() == 4, "roi_pool_backward: grad is (R, C, h, w), not ", grad.sizes());
  const Host host = describe("roi_pool_backward", map, rois, scale, grad.size(2), grad.size(3));
  TORCH_CHECK(grad.size(0) == rois.size(0) && grad.size(1) == map.size(1) && grad.scalar_type() == map.scalar_type(),
              "roi_pool_backward: grad is (R, C, h, w) and of the map's type, not ", grad.sizes(), ", ",
              grad.scalar_type());
  const at::Tensor from = grad.contiguous(host.format);
  const at::Tensor out = at::empty(map.sizes(), map.options(), host.format);
  if (out.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, map.scalar_type(), "roi_pool_backward", [&] {
    if (host.a.rows < 256 && host.a.columns < 256)
      run_backward<scalar_t, uint16_t>(host, at::kShort, from, out);
    else
      run_backward<scalar_t, uint32_t>(host, at::kInt, from, out);
  });
  return out;
}

}  // namespace

OPERATORS(m) {
  m.impl("roi_pool", roi_pool);
  m.impl("roi_pool_backward", roi_pool_backward);
}
