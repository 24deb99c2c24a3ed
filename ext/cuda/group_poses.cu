// PPI on a batch of images, in five launches that wait for nothing: which proposals count (a warp each); their order
// and groups (a block an image); the heaviest mode of each group (a block a group); the people by mass (a thread a
// group); what each of them is (a block a person). Every sum has a fixed order.
#include "../group_poses.h"
#include "device.h"

#include <algorithm>
#include <utility>

namespace {

typedef unsigned long long Key;
constexpr Key kAbsent = ~Key(0) << 32;
constexpr int kSorted = 4096;  // keys that are sorted in shared memory
constexpr int kWords = 8192;   // words of 32 proposals that are kept there

struct Inputs {
  int64_t images;
  int proposals, joints, points, people;
  const float *score, *pose2d, *pose3d, *legs;
  const bool* lower;
  const double* boxes;
  const bool* boxed;    // (J,): the joints that boxes are round, which `present` then makes
  const int64_t* size;  // (B, 2): height, width
  const float *at, *swapped, *centres;
  const double* limit;
  double th_iou, th_pose3d, min_mode_score, th_persondetect;
};

struct Outputs {
  float *mass, *pose2d, *pose3d, *spread;
  int64_t *support, *best, *person, *count;
  unsigned long long* dropped;
};

// Memory on the way, N or more of each for an image. A proposal's rank is its place by falling score; groups are
// numbered by the rank of their centre.
struct Work {
  int room;         // N as a power of two
  Key* key;         // (B, room)
  float* score;     // of each proposal: 0 where it does not count
  unsigned* alive;  // (B, N / 32 + 1): a bit for each rank that is in no group yet
  int* group;       // of each rank
  int* row;         // of each rank
  int* list;        // the ranks of each group, in order: those of group g are list[start[g]] .. list[start[g + 1] - 1]
  int* start;       // (B, N + 1)
  int* groups;      // (B,)
  int* free;        // by place in the list: in no mode yet; then: in the heaviest mode
  double* mass;     // of each group's heaviest mode; -1 where it is no person
  int* support;
  int* best;        // the first of the mode, its place in the list
  int* person;      // (B, N): the group of each person, by falling mass
  double* box;      // (B, N, 4), where they are made here
};

template <class T>
__device__ __forceinline__ bool finite(T x) {
  return x - x == T(0);
}

// Whether the mean distance of points p and c (n, D) is below a threshold: what float64 says, by float32 where that is
// sure.
template <int D>
__device__ bool near(const float* p, const float* c, int n, double threshold) {
  float sum = 0;
  for (int j = 0; j < n; j++) {
    float square = 0;
    for (int d = 0; d < D; d++) {
      float apart = p[D * j + d] - c[D * j + d];
      square += apart * apart;
    }
    sum += sqrtf(square);
  }
  double off = double(n + 16) * 0x1p-23, all = threshold * double(n);
  if (double(sum) < all * (1 - off)) return true;
  if (!(double(sum) < all * (1 + off) + double(n) * 1e-18)) return false;
  double exact = 0;
  for (int j = 0; j < n; j++) {
    double square = 0;
    for (int d = 0; d < D; d++) {
      double apart = double(p[D * j + d]) - double(c[D * j + d]);
      square += apart * apart;
    }
    exact += sqrt(square);
  }
  return exact / double(n) < threshold;
}

// Rows of proposals, all images' in one.
__device__ bool overlap(const Inputs& in, int64_t p, int64_t c) {
  if (in.boxes) {
    const double *a = in.boxes + 4 * p, *b = in.boxes + 4 * c;
    double width = fmin(a[2], b[2]) - fmax(a[0], b[0]), height = fmin(a[3], b[3]) - fmax(a[1], b[1]);
    double both = fmax(width, 0.) * fmax(height, 0.);
    double area = fmax(a[2] - a[0], 0.) * fmax(a[3] - a[1], 0.), own = fmax(b[2] - b[0], 0.) * fmax(b[3] - b[1], 0.);
    return both / (area + own - both) > in.th_iou;
  }
  int64_t size = 2 * in.points;
  const float* other = in.centres ? in.centres : in.at;
  return near<2>(in.at + p * size, in.at + c * size, in.points, in.limit[c]) ||
         (in.swapped && near<2>(in.swapped + p * size, other + c * size, in.points, in.limit[c]));
}

// A warp a proposal: does it count?
__global__ void present(Inputs in, Work work, Outputs out) {
  int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  int lane = threadIdx.x % 32;
  if (i >= in.images * in.proposals) return;
  bool none = finite(in.score[i]) && in.score[i] <= 0;
  bool fine = !none && finite(in.score[i]) && finite(in.legs[i]);
  for (int k = lane; k < 2 * in.joints; k += 32) fine = fine && finite(in.pose2d[i * 2 * in.joints + k]);
  for (int k = lane; k < 3 * in.joints; k += 32) fine = fine && finite(in.pose3d[i * 3 * in.joints + k]);
  for (int k = lane; k < 2 * in.points; k += 32) {
    fine = fine && finite(in.at[i * 2 * in.points + k]);
    if (in.swapped) fine = fine && finite(in.swapped[i * 2 * in.points + k]);
    if (in.centres) fine = fine && finite(in.centres[i * 2 * in.points + k]);
  }
  if (in.boxes && !in.boxed && lane < 4) fine = fine && finite(in.boxes[4 * i + lane]);
  if (in.limit) fine = fine && finite(in.limit[i]);
  fine = __all_sync(~0u, fine);
  for (int d = 0; in.boxed && d < 2; d++) {
    float low = INFINITY, high = -INFINITY;
    for (int j = lane; j < in.joints; j += 32) {
      if (!in.boxed[j]) continue;
      float x = in.pose2d[(i * in.joints + j) * 2 + d];
      low = fminf(low, x);
      high = fmaxf(high, x);
    }
    for (int apart = 16; apart; apart /= 2) {
      low = fminf(low, __shfl_xor_sync(~0u, low, apart));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, apart));
    }
    float most = float(in.size[i / in.proposals * 2 + 1 - d] - 1);
    if (lane == 0) {
      work.box[4 * i + d] = fminf(fmaxf(low, 0.f), most);
      work.box[4 * i + 2 + d] = double(fminf(fmaxf(high, 0.f), most)) + 1;
    }
  }
  if (lane == 0) {
    work.score[i] = fine ? in.score[i] : 0.f;
    out.person[i] = -1;
    if (!fine && !none) atomicAdd(out.dropped + i / in.proposals, 1ull);
  }
}

// Bitonic, by all threads of a block; `room` is a power of two.
__device__ void sort(Key* key, int room) {
  for (int size = 2; size <= room; size *= 2)
    for (int apart = size / 2; apart > 0; apart /= 2) {
      __syncthreads();
      for (int t = threadIdx.x; t < room / 2; t += blockDim.x) {
        int i = 2 * t - (t & (apart - 1)), j = i + apart;
        Key x = key[i], y = key[j];
        if ((x > y) == !(i & size)) {
          key[i] = y;
          key[j] = x;
        }
      }
    }
  __syncthreads();
}

// A block an image: the order of its proposals, and their groups.
__global__ void __launch_bounds__(1024) group(Inputs in, Work work) {
  DYNAMIC_SHARED(Key, shared);
  __shared__ int centre, found, last;
  int N = in.proposals, tid = threadIdx.x, lane = tid % 32;
  int64_t b = blockIdx.x, first = b * N;
  Key* key = work.room <= kSorted ? shared : work.key + b * work.room;
  int words = N / 32 + 1;
  int *row = work.row + first, *member = work.group + first, *start = work.start + b * (N + 1);

  if (tid == 0) last = 0;
  for (int i = tid; i < work.room; i += blockDim.x) {
    float score = i < N ? work.score[first + i] : 0.f;
    // Positive floats are ordered as their bits are.
    key[i] = (score > 0 ? Key(~__float_as_uint(score)) << 32 : kAbsent) | Key(i);
  }
  sort(key, work.room);
  for (int r = tid; r < N; r += blockDim.x) {
    bool there = key[r] < kAbsent;
    row[r] = int(key[r] & 0xffffffff);
    if (there && (r + 1 == work.room || key[r + 1] >= kAbsent)) last = r + 1;
  }
  __syncthreads();
  int n = last;
  // The keys are read: their memory may hold the bits of who is left.
  unsigned* alive = words <= kWords ? reinterpret_cast<unsigned*>(shared) : work.alive + b * words;
  for (int w = tid; w < words; w += blockDim.x)
    alive[w] = n >= 32 * w + 32 ? ~0u : n > 32 * w ? (1u << (n - 32 * w)) - 1 : 0u;

  int groups = 0, from = 0, members = 0;  // `from` and `members` are the first thread's
  for (;; groups++) {
    __syncthreads();
    if (tid == 0) {
      if (groups) members += found;
      start[groups] = members;
      while (from < words && !alive[from]) from++;
      centre = from < words ? 32 * from + __ffs(int(alive[from])) - 1 : -1;
      found = 0;
    }
    __syncthreads();
    int c = centre;
    if (c < 0) break;
    int64_t centre_row = first + row[c];
    for (int i = c / 32 * 32 + tid; i < 32 * words; i += blockDim.x) {  // a warp has the 32 of a word
      unsigned word = alive[i / 32];
      if (!word) continue;
      bool in_it = (word >> lane & 1) && (i == c || overlap(in, first + row[i], centre_row));
      unsigned hit = __ballot_sync(~0u, in_it);
      if (in_it) member[i] = groups;
      if (lane == 0 && hit) {
        alive[i / 32] = word & ~hit;
        atomicAdd(&found, __popc(hit));
      }
    }
  }
  if (tid == 0) work.groups[b] = groups;

  for (int i = tid; i < work.room; i += blockDim.x) key[i] = i < n ? Key(member[i]) << 32 | Key(i) : kAbsent;
  sort(key, work.room);
  for (int i = tid; i < n; i += blockDim.x) work.list[first + i] = int(key[i] & 0xffffffff);
}

// What all threads of a block agree on: a sum, in a fixed order, and a minimum.
struct Both {
  double sum;
  int least;
};
__device__ Both all(Both mine) {
  __shared__ double sums[32];
  __shared__ int leasts[32];
  for (int apart = 16; apart; apart /= 2) {
    mine.sum += __shfl_xor_sync(~0u, mine.sum, apart);
    mine.least = min(mine.least, __shfl_xor_sync(~0u, mine.least, apart));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    sums[threadIdx.x / 32] = mine.sum;
    leasts[threadIdx.x / 32] = mine.least;
  }
  __syncthreads();
  mine.sum = sums[0];
  mine.least = leasts[0];
  for (int w = 1; w < int(blockDim.x) / 32; w++) {
    mine.sum += sums[w];
    mine.least = min(mine.least, leasts[w]);
  }
  return mine;
}

// A block a group: its heaviest mode.
__global__ void modes(Inputs in, Work work, int share) {
  int N = in.proposals, tid = threadIdx.x;
  int64_t b = blockIdx.x / share, first = b * N;
  const int *row = work.row + first, *start = work.start + b * (N + 1);
  for (int g = blockIdx.x % share; g < work.groups[b]; g += share) {
    const int* list = work.list + first + start[g];
    int* free = work.free + first + start[g];
    int m = start[g + 1] - start[g];
    auto pose = [&](int k) { return in.pose3d + (first + row[list[k]]) * 3 * in.joints; };
    auto score = [&](int k) { return work.score[first + row[list[k]]]; };

    Both total = {0, m};
    for (int k = tid; k < m; k += blockDim.x) {
      free[k] = 1;
      total.sum += score(k);
    }
    total = all(total);
    double most = -1;
    int best = 0;
    if (total.sum * (1 + 1e-9) >= in.th_persondetect)  // else no mode of it can be a person
      for (int c = 0; c < m && (c == 0 || score(c) >= in.min_mode_score);) {
        const float* centre = pose(c);
        Both mode = {0, m};
        for (int k = tid; k < m; k += blockDim.x) {
          if (k == c || near<3>(pose(k), centre, in.joints, in.th_pose3d)) {
            mode.sum += score(k);
            free[k] = 0;
          } else if (free[k] && k < mode.least) {
            mode.least = k;
          }
        }
        mode = all(mode);
        if (mode.sum > most) {
          most = mode.sum;
          best = c;
        }
        c = mode.least;
      }
    if (!(most > in.th_persondetect)) most = -1;
    Both members = {0, m};
    if (most >= 0)
      for (int k = tid; k < m; k += blockDim.x) {
        free[k] = k == best || near<3>(pose(k), pose(best), in.joints, in.th_pose3d);
        if (!free[k]) continue;
        members.sum += 1;
        members.least = min(members.least, k);
      }
    members = all(members);
    if (tid == 0) {
      work.mass[first + g] = most;
      work.support[first + g] = int(members.sum);
      work.best[first + g] = members.least;
    }
  }
}

// A thread a group: the place of its person by falling mass, of equals the first.
__global__ void places(Inputs in, Work work, int64_t* count, int share) {
  int N = in.proposals;
  int64_t b = blockIdx.x / share;
  int g = int(blockIdx.x % share * blockDim.x + threadIdx.x), groups = work.groups[b];
  const double* mass = work.mass + b * N;
  if (g > 0 && g >= groups) return;
  double mine = groups ? mass[g] : -1;
  int people = 0, before = 0;
  for (int h = 0; h < groups; h++) {
    people += mass[h] >= 0;
    before += mass[h] > mine || (mass[h] == mine && h < g);
  }
  if (g == 0) count[b] = people;
  if (mine >= 0) work.person[b * N + before] = g;
}

// A block a person. Shared: for each warp sums of 2 J and 3 J coordinates, J weights, J distances.
__global__ void merge(Inputs in, Work work, Outputs out) {
  DYNAMIC_SHARED(double, sums);
  int N = in.proposals, J = in.joints, tid = threadIdx.x, lane = tid % 32, warp = tid / 32, warps = blockDim.x / 32;
  int64_t b = blockIdx.x / in.people, first = b * N, person = blockIdx.x;
  int p = int(blockIdx.x % in.people);
  float *pose2d = out.pose2d + person * 2 * J, *pose3d = out.pose3d + person * 3 * J, *spread = out.spread + person * J;
  if (p >= out.count[b]) {
    for (int i = tid; i < 3 * J; i += blockDim.x) {
      if (i < J) spread[i] = 0;
      if (i < 2 * J) pose2d[i] = 0;
      pose3d[i] = 0;
    }
    if (tid == 0) {
      out.mass[person] = 0;
      out.support[person] = 0;
      out.best[person] = -1;
    }
    return;
  }
  int g = work.person[first + p], begin = work.start[b * (N + 1) + g], m = work.start[b * (N + 1) + g + 1] - begin;
  const int *list = work.list + first + begin, *in_it = work.free + first + begin, *row = work.row + first;

  double* mine = sums + warp * 7 * J;
  for (int i = lane; i < 7 * J; i += 32) mine[i] = 0;
  for (int k = warp; k < m; k += warps) {
    if (!in_it[k]) continue;
    int64_t r = first + row[list[k]];
    double weight = work.score[r], legs = weight * in.legs[r];
    for (int i = lane; i < 6 * J; i += 32) {
      int j = i < 2 * J ? i / 2 : i < 5 * J ? (i - 2 * J) / 3 : i - 5 * J;
      double value = i < 2 * J ? in.pose2d[r * 2 * J + i] : i < 5 * J ? in.pose3d[r * 3 * J + i - 2 * J] : 1.f;
      mine[i] += (in.lower[j] ? legs : weight) * value;
    }
    if (lane == 0) out.person[r] = p;
  }
  auto add_up = [&](int from, int to) {  // into the first warp's
    __syncthreads();
    for (int i = from + tid; i < to; i += blockDim.x)
      for (int w = 1; w < warps; w++) sums[i] += sums[w * 7 * J + i];
    __syncthreads();
  };
  add_up(0, 6 * J);
  const double* weights = sums + 5 * J;
  for (int i = tid; i < 5 * J; i += blockDim.x) {
    sums[i] /= weights[i < 2 * J ? i / 2 : (i - 2 * J) / 3];
    if (i < 2 * J) pose2d[i] = float(sums[i]);
    else pose3d[i - 2 * J] = float(sums[i]);
  }
  __syncthreads();
  for (int k = warp; k < m; k += warps) {
    if (!in_it[k]) continue;
    int64_t r = first + row[list[k]];
    double weight = work.score[r], legs = weight * in.legs[r];
    for (int j = lane; j < J; j += 32) {
      double square = 0;
      for (int d = 0; d < 3; d++) {
        double apart = double(in.pose3d[(r * J + j) * 3 + d]) - sums[2 * J + 3 * j + d];
        square += apart * apart;
      }
      mine[6 * J + j] += (in.lower[j] ? legs : weight) * sqrt(square);
    }
  }
  add_up(6 * J, 7 * J);
  for (int j = tid; j < J; j += blockDim.x) spread[j] = float(sums[6 * J + j] / weights[j]);
  if (tid == 0) {
    out.mass[person] = float(work.mass[first + g]);
    out.support[person] = work.support[first + g];
    out.best[person] = row[list[work.best[first + g]]];
  }
}

typedef std::optional<at::Tensor> Maybe;

typedef at::Tensor T;

std::tuple<T, T, T, T, T, T, T, T, T> group_poses(
    const at::Tensor& score, const at::Tensor& pose2d, const at::Tensor& pose3d, const at::Tensor& legs,
    const at::Tensor& lower, const Maybe& boxes, const Maybe& joints,
    const Maybe& size, const Maybe& points, const Maybe& swapped, const Maybe& centres,
    const Maybe& limit, double th_iou, double th_pose3d, double min_mode_score, double th_persondetect,
    int64_t max_people) {
  check_group_poses(score, pose2d, pose3d, legs, lower, boxes, joints, size, points, swapped, centres, limit, th_iou,
                    max_people);
  GUARD(score);
  int64_t B = score.size(0), N = score.size(1), J = lower.size(0), P = max_people;
  auto empty = [&](at::IntArrayRef shape, at::ScalarType type) {
    return at::empty(shape, score.options().dtype(type));
  };
  at::Tensor mass = empty({B, P}, at::kFloat), mean2d = empty({B, P, J, 2}, at::kFloat);
  at::Tensor mean3d = empty({B, P, J, 3}, at::kFloat), spread = empty({B, P, J}, at::kFloat);
  at::Tensor support = empty({B, P}, at::kLong), best = empty({B, P}, at::kLong);
  at::Tensor person = empty({B, N}, at::kLong), count = empty({B}, at::kLong);
  at::Tensor dropped = empty({B}, at::kLong);
  dropped.zero_();
  if (B == 0) return {mass, mean2d, mean3d, spread, support, best, person, count, dropped};

  auto ready = [](const Maybe& t) { return t ? t->contiguous() : at::Tensor(); };
  auto data = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; };
  auto wide = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<double>() : nullptr; };
  at::Tensor s = score.contiguous(), p2 = pose2d.contiguous(), p3 = pose3d.contiguous(), l = legs.contiguous();
  at::Tensor low = lower.contiguous(), bx = ready(boxes), q = ready(points), x = ready(swapped), r = ready(limit);
  at::Tensor z = ready(centres), boxed = ready(joints), sides = ready(size);
  Inputs in = {B, int(N), int(J), q.defined() ? int(q.size(2)) : 0, int(P), data(s), data(p2), data(p3), data(l),
               low.const_data_ptr<bool>(), wide(bx), boxed.defined() ? boxed.const_data_ptr<bool>() : nullptr,
               sides.defined() ? sides.const_data_ptr<int64_t>() : nullptr, data(q), data(x), data(z), wide(r),
               th_iou, th_pose3d, min_mode_score, th_persondetect};
  Outputs out = {mass.mutable_data_ptr<float>(), mean2d.mutable_data_ptr<float>(), mean3d.mutable_data_ptr<float>(),
                 spread.mutable_data_ptr<float>(), support.mutable_data_ptr<int64_t>(),
                 best.mutable_data_ptr<int64_t>(), person.mutable_data_ptr<int64_t>(),
                 count.mutable_data_ptr<int64_t>(),
                 reinterpret_cast<unsigned long long*>(dropped.mutable_data_ptr<int64_t>())};

  Work work;
  work.room = 2;
  while (work.room < N) work.room *= 2;
  int64_t keys = work.room <= kSorted ? 0 : work.room, words = N / 32 + 1;
  at::Tensor large = empty({B * (keys + N + (joints ? 4 * N : 0))}, at::kLong);  // keys, masses, boxes
  at::Tensor small = empty({B * (9 * N + words + 2)}, at::kInt);
  work.key = reinterpret_cast<Key*>(large.mutable_data_ptr<int64_t>());
  work.mass = reinterpret_cast<double*>(work.key + B * keys);
  work.box = work.mass + B * N;
  if (joints) in.boxes = work.box;
  int* next = small.mutable_data_ptr<int>();
  auto take = [&](int64_t each) { return std::exchange(next, next + B * each); };
  work.score = reinterpret_cast<float*>(take(N));
  work.alive = reinterpret_cast<unsigned*>(take(words));
  work.group = take(N);
  work.row = take(N);
  work.list = take(N);
  work.start = take(N + 1);
  work.groups = take(1);
  work.free = take(N);
  work.support = take(N);
  work.best = take(N);
  work.person = take(N);

  LAUNCH(present, blocks_of(B * N * 32, 256), 256, 0, in, work, out);
  int threads = int(std::min<int64_t>(1024, (N + 31) / 32 * 32 + 32));
  int64_t bytes = std::max(work.room <= kSorted ? 8 * int64_t(work.room) : 0, words <= kWords ? 4 * words : 0);
  LAUNCH(group, blocks_of(B, 1), threads, bytes, in, work);
  int share = int(std::min<int64_t>(256, N));
  LAUNCH(modes, blocks_of(B * share, 1), std::min(threads, 128), 0, in, work, share);
  share = int(blocks_of(std::max<int64_t>(N, 1), 128));
  LAUNCH(places, blocks_of(B * share, 1), 128, 0, in, work, out.count, share);
  int64_t warps = std::min<int64_t>(8, (96 << 10) / (56 * J));
  TORCH_CHECK(warps > 0, "group_poses: too many joints for a GPU: ", J);
  LAUNCH(merge, blocks_of(B * P, 1), 32 * warps, 56 * J * warps, in, work, out);
  return {mass, mean2d, mean3d, spread, support, best, person, count, dropped};
}

}  // namespace

OPERATORS(m) { m.impl("group_poses", group_poses); }
