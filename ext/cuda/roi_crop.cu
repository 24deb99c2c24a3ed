// RoICrop. With max_pool the four points of an output stay in registers; the backward pass first notes in a byte which
// of them was the greatest. Then tiles of the map collect what is theirs.
#include "regions.cuh"

namespace {

// A point along one axis: the first cell that it lies between and that is in the map, weights of it and of the next.
template <class S>
struct Point {
  int cell;
  S weight[2];  // 0: outside the map
};

struct Crop {
  static __device__ int count(const Call& a, bool is_row) { return (is_row ? a.height : a.width) * a.points; }
  template <class S>
  static __device__ Point<S> point(const Call& a, int r, bool is_row, int i) {
    const S* roi = roi_of<S>(a, r) + (is_row ? 2 : 1);
    int at[2] = {0, 0};
    S weight[2] = {0, 0};
    roi_point(roi[0], roi[2], S(a.scale), i, count(a, is_row), is_row ? a.rows : a.columns, at, weight);
    return {at[0], {weight[0], weight[1]}};
  }
  template <class S>
  static __device__ void reach(const Call& a, int r, bool is_row, int& low, int& high) {
    const S* roi = roi_of<S>(a, r) + (is_row ? 2 : 1);
    const S cells = S(is_row ? a.rows : a.columns), from = roi[0] * S(a.scale), extent = (roi[2] - roi[0]) * S(a.scale);
    S first = from + (extent < S(0) ? extent : S(0)), last = from + (extent < S(0) ? S(0) : extent);
    if (!(first - first == S(0) && last - last == S(0))) first = last = S(-9);  // not finite
    // A little more, for points are rounded in another way.
    first -= S(0.01) + S(1e-5) * std::abs(first);
    last += S(0.01) + S(1e-5) * std::abs(last);
    low = int(std::floor(min(max(first, S(-9)), cells)));
    high = int(std::floor(min(max(last, S(-9)), cells))) + 2;
  }
};

// Whether `v` takes the place of the maximum `m`: as in max_pool2d a NaN does, and stays.
template <class S>
__device__ bool takes(S v, S m) {
  return v > m || v != v;
}

// Values, in T, or which point is the greatest, in a byte.
template <class T, int N, bool kLast, int kPoints, bool kWhich>
__global__ void __launch_bounds__(kThreads) crop(Call a, const T* map, T* out, uint8_t* which) {
  typedef typename Wide<T>::type S;
  DYNAMIC_SHARED(Point<S>, down);
  const int rows = a.height * kPoints, axes = rows + a.width * kPoints, r = blockIdx.x / a.chunks;
  const Point<S>* across = down + rows;
  const int image = image_of<S>(a, r);
  for (int b = threadIdx.x; b < axes; b += blockDim.x) {
    Point<S> point = {0, {0, 0}};
    if (image >= 0) point = Crop::point<S>(a, r, b < rows, b < rows ? b : b - rows);
    down[b] = point;
  }
  __syncthreads();
  const int units = a.height * a.width * a.lanes;
  const int64_t plane = int64_t(a.rows) * a.columns, bins = int64_t(a.height) * a.width;
  const int64_t apart = kLast ? a.channels : 1;
  for (int u = threadIdx.x; u < units; u += blockDim.x) {
    const Unit unit = unit_of<N, kLast>(a, u);
    if (unit.some == 0) continue;
    const T* cells = map + (image < 0 ? 0 : image) * a.channels * plane + (kLast ? unit.channel : unit.channel * plane);
    S most[N] = {};
    Pack<uint8_t, N> best = {};
#pragma unroll
    for (int p = 0; p < kPoints * kPoints; p++) {
      const Point<S> y = down[unit.row * kPoints + p / kPoints], x = across[unit.column * kPoints + p % kPoints];
      Pack<T, N> four[4];
#pragma unroll
      for (int q = 0; q < 4; q++) {  // a cell without weight is not read: the first one is, again
        const int64_t row = y.cell + (q / 2 && y.weight[1] != S(0)), column = x.cell + (q % 2 && x.weight[1] != S(0));
        four[q] = read<N, kLast>(cells + (row * a.columns + column) * apart, plane, unit.some);
      }
      S sum[N] = {};
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const S weight = y.weight[q / 2] * x.weight[q % 2];
        if (weight == S(0)) continue;  // zero times an infinite cell would be NaN
        for (int k = 0; k < N; k++) sum[k] += weight * S(four[q].v[k]);
      }
      for (int k = 0; k < N; k++)
        if (p == 0 || takes(sum[k], most[k])) {
          most[k] = sum[k];
          best.v[k] = uint8_t(p);
        }
    }
    if constexpr (kWhich) {
      write<N, kLast>(which + unit.out, bins, unit.some, best);
    } else {
      Pack<T, N> pack;
      for (int k = 0; k < N; k++) pack.v[k] = T(most[k]);
      write<N, kLast>(out + unit.out, bins, unit.some, pack);
    }
  }
}

template <class T, bool kLast, int kPoints>
__global__ void __launch_bounds__(128) collect(Call a, int batch_size, const int* start, const Reach* list,
                                               const T* grad, const uint8_t* which, T* out) {
  typedef typename Wide<T>::type S;
  typedef Tile<kLast> Mine;
  constexpr int kSets = 1 + Mine::kOwners, kMost = 16;
  DYNAMIC_SHARED(S, sums);
  Point<S>* points = reinterpret_cast<Point<S>*>(sums + Mine::kCells * blockDim.x);  // (batch, down and across)
  __shared__ int touching[128], counts[4];
  __shared__ Range ranges[kMost][kSets];
  const Mine tile(a);
  tile.clear(sums);
  const int rows = a.height * kPoints, axes = rows + a.width * kPoints;
  const int t = threadIdx.x, end = start[tile.image + 1];
  for (int base = start[tile.image]; base < end; base += blockDim.x) {
    const int all = tile.touching_of(list, base, end, touching, counts);
    for (int done = 0; done < all; done += batch_size) {
      const int batch = min(batch_size, all - done);
      for (int u = t; u < batch * axes; u += blockDim.x) {
        const bool is_row = u % axes < rows;
        Point<S> p = Crop::point<S>(a, touching[done + u / axes], is_row, is_row ? u % axes : u % axes - rows);
        p.cell -= is_row ? tile.top : tile.left;
        points[u] = p;
      }
      __syncthreads();
      // The outputs of which a point has a cell here; points go one way, so that all between two such have.
      for (int u = t; u < batch * kSets; u += blockDim.x) {
        const int set = u % kSets, low = set ? (set - 1) * Mine::kOwn : 0;
        const int high = low + (set ? Mine::kOwn : Mine::kRows);
        const Point<S>* p = points + u / kSets * axes + (set ? rows : 0);
        Range range = {0, 0};
        for (int i = 0; i < (set ? a.width : a.height) * kPoints; i++) {
          const bool first = p[i].weight[0] != S(0) && p[i].cell >= low && p[i].cell < high;
          const bool second = p[i].weight[1] != S(0) && p[i].cell + 1 >= low && p[i].cell + 1 < high;
          if (!first && !second) continue;
          if (range.to == 0) range.from = i / kPoints;
          range.to = i / kPoints + 1;
        }
        ranges[u / kSets][set] = range;
      }
      __syncthreads();
      if (tile.has)
        for (int k = 0; k < batch; k++) {
          const Point<S>* down = points + k * axes;
          const Point<S>* across = down + rows;
          uint8_t best[4] = {};
          T g[4];
          each_output<4, kLast>(
              a, touching[done + k], tile.channel, ranges[k][0], ranges[k][1 + tile.first],
              [&](int n, int64_t offset) {
                if (kPoints > 1) best[n] = which[offset];
                g[n] = grad[offset];
              },
              [&](int n, int i, int j) {
                const Point<S> y = down[i * kPoints + best[n] / kPoints], x = across[j * kPoints + best[n] % kPoints];
#pragma unroll
                for (int q = 0; q < 4; q++) {
                  const S weight = y.weight[q / 2] * x.weight[q % 2];
                  const unsigned row = y.cell + q / 2, column = x.cell + q % 2 - tile.first;
                  if (weight != S(0) && row < unsigned(Mine::kRows) && column < unsigned(Mine::kOwn))
                    tile.sum_of(sums, row, column) += S(g[n]) * weight;
                }
              });
        }
      __syncthreads();
    }
  }
  tile.write(a, sums, out);
}

template <class T, int kPoints, bool kWhich>
void run_crop(Call a, const T* map, bool last, T* out, uint8_t* which) {
  typedef typename Wide<T>::type S;
  constexpr int n = sizeof(T) == 8 ? 2 : 4;
  const int bytes = (a.height + a.width) * kPoints * int(sizeof(Point<S>));
  const bool packed = packs<T>(a, n, map) && (kWhich ? packs<uint8_t>(a, n, which) : packs<T>(a, n, out));
  cut(a, last && !packed ? 1 : n, last);
  const unsigned blocks = blocks_of(int64_t(a.regions) * a.chunks, 1);
  const int threads = std::min(kThreads, ceil_div(a.height * a.width * a.lanes, 32) * 32);
  if (!last)
    LAUNCH((crop<T, n, false, kPoints, kWhich>), blocks, threads, bytes, a, map, out, which);
  else if (packed)
    LAUNCH((crop<T, n, true, kPoints, kWhich>), blocks, threads, bytes, a, map, out, which);
  else
    LAUNCH((crop<T, 1, true, kPoints, kWhich>), blocks, threads, bytes, a, map, out, which);
}

template <class T, int kPoints, bool kLast>
void run_collect(Call a, const int* start, const Reach* list, const T* grad, const uint8_t* which, T* out) {
  typedef typename Wide<T>::type S;
  const int threads = cut_tiles<kLast>(a);
  const int sums = Tile<kLast>::kCells * threads * int(sizeof(S));
  const int a_region = (a.height + a.width) * kPoints * int(sizeof(Point<S>));
  TORCH_CHECK(sums + a_region <= kShared - 8192, "roi_crop: too many points for the gradient: ", a.height, " x ",
              a.width);
  const int batch = std::clamp((12 << 10) / a_region, 1, 16);
  LAUNCH((collect<T, kLast, kPoints>), blocks_of(Tile<kLast>::blocks(a), 1), threads, sums + batch * a_region, a, batch,
         start, list, grad, which, out);
}

template <class T, int kPoints>
void run_backward(const Host& host, const at::Tensor& grad, const at::Tensor& out) {
  const Call& a = host.a;
  const auto ints = grad.options().dtype(at::kInt);
  const at::Tensor which = at::empty({kPoints > 1 ? grad.numel() : 0}, grad.options().dtype(at::kByte));
  const at::Tensor start = at::empty({a.images + 1}, ints), reaches = at::empty({a.regions, 5}, ints);
  uint8_t* at = which.mutable_data_ptr<uint8_t>();
  Reach* reach = reinterpret_cast<Reach*>(reaches.mutable_data_ptr<int>());
  int* starts = start.mutable_data_ptr<int>();
  list<Crop>(a, sizeof(T) == 8, starts, reach);
  if constexpr (kPoints > 1) {
    if (grad.numel()) run_crop<T, kPoints, true>(a, host.map.const_data_ptr<T>(), host.last, nullptr, at);
  }
  const T* from = grad.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  if (host.last)
    run_collect<T, kPoints, true>(a, starts, reach, from, at, to);
  else
    run_collect<T, kPoints, false>(a, starts, reach, from, at, to);
}

at::Tensor roi_crop(const at::Tensor& map, const at::Tensor& rois, double scale, int64_t height, int64_t width,
                    bool max_pool) {
  GUARD(map);
  Host host = describe("roi_crop", map, rois, scale, height, width);
  host.a.points = max_pool ? 2 : 1;
  at::Tensor out = at::empty({rois.size(0), map.size(1), height, width}, map.options(), host.format);
  if (map.numel() == 0) out.zero_();
  if (out.numel() == 0 || map.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, map.scalar_type(), "roi_crop", [&] {
    const scalar_t* from = host.map.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    if (max_pool)
      run_crop<scalar_t, 2, false>(host.a, from, host.last, to, nullptr);
    else
      run_crop<scalar_t, 1, false>(host.a, from, host.last, to, nullptr);
  });
  return out;
}

at::Tensor roi_crop_backward(const at::Tensor& grad, const at::Tensor& map, const at::Tensor& rois, double scale,
                             bool max_pool) {
  GUARD(map);
  TORCH_CHECK(grad.dim() == 4, "roi_crop_backward: grad is (R, C, h, w), not ", grad.sizes());
  Host host = describe("roi_crop_backward", map, rois, scale, grad.size(2), grad.size(3));
  host.a.points = max_pool ? 2 : 1;
  TORCH_CHECK(grad.size(0) == rois.size(0) && grad.size(1) == map.size(1) && grad.scalar_type() == map.scalar_type(),
              "roi_crop_backward: grad is (R, C, h, w) and of the map's type, not ", grad.sizes(), ", ",
              grad.scalar_type());
  const at::Tensor from = grad.contiguous(host.format);
  const at::Tensor out = at::empty(map.sizes(), map.options(), host.format);
  if (out.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, map.scalar_type(), "roi_crop_backward", [&] {
    if (max_pool)
      run_backward<scalar_t, 2>(host, from, out);
    else
      run_backward<scalar_t, 1>(host, from, out);
  });
  return out;
}

}  // namespace

OPERATORS(m) {
  m.impl("roi_crop", roi_crop);
  m.impl("roi_crop_backward", roi_crop_backward);
}
