// The loops of group_poses: overlap with a centre, distances from a centre, weighted sums. Distances are taken in
// float32, sixteen proposals at once; one that is too near its threshold for that to be sure is taken again in float64,
// so that membership is always what float64 says.
#include "group_poses.h"

#include <cmath>

#include "vec.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace LEVEL {
namespace {

// Lane i is below a limit -> bit i. (GCC would compare vectors that are wider than the machine's number by number.)
INLINE uint32_t below(f32 v, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), _mm512_set1_ps(limit), _CMP_LT_OQ);
#elif defined(__AVX__)
  __m256 part[2];
  memcpy(part, &v, 64);
  for (__m256& p : part) p = _mm256_cmp_ps(p, _mm256_set1_ps(limit), _CMP_LT_OQ);
  return uint32_t(_mm256_movemask_ps(part[0]) | _mm256_movemask_ps(part[1]) << 8);
#elif defined(__SSE2__)
  uint32_t all = 0;
  __m128 part[4];
  memcpy(part, &v, 64);
  for (int i = 0; i < 4; i++) all |= uint32_t(_mm_movemask_ps(_mm_cmplt_ps(part[i], _mm_set1_ps(limit)))) << 4 * i;
  return all;
#else
  uint32_t all = 0;
  for (int i = 0; i < 16; i++) all |= uint32_t(v[i] < limit) << i;
  return all;
#endif
}

// The inverse square root, and its relative error.
INLINE f32 inverse_root(f32 v) {
#if defined(__AVX512F__)
  return reinterpret_cast<f32>(_mm512_rsqrt14_ps(reinterpret_cast<__m512>(v)));
#elif defined(__AVX__)
  __m256 part[2];
  memcpy(part, &v, 64);
  for (int i = 0; i < 2; i++) part[i] = _mm256_rsqrt_ps(part[i]);
  memcpy(&v, part, 64);
  return v;
#elif defined(__SSE2__)
  __m128 part[4];
  memcpy(part, &v, 64);
  for (int i = 0; i < 4; i++) part[i] = _mm_rsqrt_ps(part[i]);
  memcpy(&v, part, 64);
  return v;
#else
  for (int i = 0; i < 16; i++) v[i] = 1 / std::sqrt(v[i]);
  return v;
#endif
}
constexpr double kRootError = 1.5 / 4096;

// Sums of `n` distances as `distances` takes them: below `sure` the mean is below the threshold, from `over` on not.
constexpr float kLeast = 1e-30f;
struct Bound {
  float sure, over;
  INLINE Bound(double threshold, int64_t n) {
    double off = kRootError + double(n + 16) * 0x1p-23;
    sure = float(threshold * double(n) * (1 - off));
    over = float(threshold * double(n) * (1 + off) + double(n) * 2e-15);  // sqrt(kLeast)
  }
};

// Whether the mean distance of points p and c (n, D) is below a threshold.
template <int D>
bool near(const float* p, const float* c, int64_t n, double threshold) {
  double sum = 0;
  for (int64_t j = 0; j < n; j++) {
    double square = 0;
    for (int d = 0; d < D; d++) {
      double apart = double(p[D * j + d]) - double(c[D * j + d]);
      square += apart * apart;
    }
    sum += std::sqrt(square);
  }
  return sum / double(n) < threshold;
}

// The sums of distances of sixteen proposals, p (n, D, 16), from c (n, D); less, but above `over`, where all are.
template <int D>
INLINE f32 distances(const float* p, const float* c, int64_t n, float over) {
  f32 sum = {};
  auto add = [&](int64_t j) __attribute__((always_inline)) {
    f32 square = {};
    for (int d = 0; d < D; d++) {
      f32 apart = load(p + 16 * (D * j + d)) - c[D * j + d];
      square += apart * apart;
    }
    sum += square * inverse_root(square + kLeast);
  };
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    add(j);
    add(j + 1);
    add(j + 2);
    add(j + 3);
    if (!below(sum, over)) return sum;
  }
  for (; j < n; j++) add(j);
  return sum;
}

template <class T>
INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
INLINE T larger(T a, T b) {
  return a > b ? a : b;
}

// Which of the sixteen of a block overlap the centre.
INLINE uint32_t boxes_overlap(const double* box, const double* c, double th_iou) {
  float apart[16];
  for (int i = 0; i < 16; i++) {
    double width = smaller(box[32 + i], c[2]) - larger(box[i], c[0]);
    double height = smaller(box[48 + i], c[3]) - larger(box[16 + i], c[1]);
    double both = larger(width, 0.) * larger(height, 0.);
    apart[i] = both / (box[64 + i] + c[4] - both) > th_iou ? 0.f : 1.f;
  }
  return below(load(apart), 1);
}

// Which of sixteen rectangles meet the one that the centre seeks.
INLINE uint32_t meets(const Edges& e, int64_t first, const Centre& c) {
  const float *left = e.left + first, *top = e.top + first, *right = e.right + first, *bottom = e.bottom + first;
  float apart[16];
  for (int i = 0; i < 16; i++) {
    bool meet = (left[i] <= c.right) & (right[i] >= c.left) & (top[i] <= c.bottom) & (bottom[i] >= c.top);
    apart[i] = meet ? 0.f : 1.f;
  }
  return below(load(apart), 1);
}

uint32_t points_near(const Proposals& a, const Field& f, int64_t block, const Centre& c, const Bound& bound) {
  const float* centre = a.at + a.row[c.rank] * 2 * a.points;
  const float* other = a.centres ? a.centres + a.row[c.rank] * 2 * a.points : centre;
  int64_t size = 32 * a.points;
  f32 first = distances<2>(f.at + block * size, centre, a.points, bound.over), second = first;
  if (a.swapped) second = distances<2>(f.swapped + block * size, other, a.points, bound.over);
  uint32_t sure = below(first, bound.sure) | below(second, bound.sure);
  uint32_t unsure = (below(first, bound.over) | below(second, bound.over)) & ~sure & f.alive[block];
  for (; unsure; unsure &= unsure - 1) {
    int lane = __builtin_ctz(unsure);
    int64_t row = a.row[f.rank[16 * block + lane]];
    double limit = a.limit[a.row[c.rank]];
    if (near<2>(a.at + row * 2 * a.points, centre, a.points, limit) ||
        (a.swapped && near<2>(a.swapped + row * 2 * a.points, other, a.points, limit)))
      sure |= 1u << lane;
  }
  return sure;
}

// The scores of sixteen where a bit is set, two by two.
INLINE f64 chosen(const float* score, uint32_t mask) {
  double part[16];
  for (int i = 0; i < 16; i++) part[i] = mask >> i & 1 ? double(score[i]) : 0.;
  return load(part) + load(part + 8);
}

}  // namespace

void group_poses_overlapping(const Proposals& a, const Field& f, const Centre& c, double th_iou, uint64_t* found) {
  Bound bound(a.at ? a.limit[a.row[c.rank]] : 0, a.points);
  for (int64_t d0 = 0; d0 < f.districts; d0 += 16)
    for (uint32_t near = meets(f.district, d0, c); near; near &= near - 1) {
      int64_t district = d0 + __builtin_ctz(near);
      for (uint32_t some = meets(f.block, 16 * district, c); some; some &= some - 1) {
        int64_t block = 16 * district + __builtin_ctz(some);
        uint32_t hit = a.at ? points_near(a, f, block, c, bound) : boxes_overlap(f.box + 80 * block, c.box, th_iou);
        hit &= f.alive[block];
        f.alive[block] &= uint16_t(~hit);
        if (!f.alive[block]) f.block.left[block] = NAN;
        for (; hit; hit &= hit - 1) {
          int rank = f.rank[16 * block + __builtin_ctz(hit)];
          found[rank >> 6] |= uint64_t(1) << (rank & 63);
        }
      }
    }
}

Mode group_poses_best_mode(const Proposals& a, const int* group, int64_t n, double th_pose3d, double min_mode_score,
                           float* poses, uint16_t* memory) {
  int64_t blocks = (n + 15) / 16, size = 3 * a.joints;
  uint16_t *free = memory, *open = memory + blocks, *member = memory + 2 * blocks, *best = memory + 3 * blocks;
  float* score = poses + blocks * 16 * size;
  if (n == 1) {
    *best = 1;
    return {a.score[group[0]], 0, 1, best};
  }
  memset(poses + (blocks - 1) * 16 * size, 0, sizeof(float) * 16 * size);  // the last block may not be full
  memset(score + (blocks - 1) * 16, 0, sizeof(float) * 16);
  for (int64_t k = 0; k < n; k++) {
    const float* from = a.pose3d + a.row[group[k]] * size;
    float* to = poses + k / 16 * 16 * size + k % 16;
    for (int64_t i = 0; i < size; i++) to[16 * i] = from[i];
    score[k] = a.score[group[k]];
  }
  for (int64_t b = 0; b < blocks; b++) free[b] = open[b] = 16 * b + 16 <= n ? 0xffff : uint16_t((1 << n % 16) - 1);

  Bound bound(th_pose3d, a.joints);
  Mode mode = {-1, 0, 0, nullptr};
  for (int64_t centre = 0, b0 = 0;;) {
    const float* c = a.pose3d + a.row[group[centre]] * size;
    f64 sum = {};
    int64_t count = 0;
    for (int64_t b = 0; b < blocks; b++) {
      if (!open[b]) {
        member[b] = 0;
        continue;
      }
      f32 apart = distances<3>(poses + b * 16 * size, c, a.joints, bound.over);
      uint32_t sure = below(apart, bound.sure) & open[b];
      uint32_t unsure = below(apart, bound.over) & open[b] & ~sure;
      for (; unsure; unsure &= unsure - 1) {
        int64_t k = 16 * b + __builtin_ctz(unsure);
        if (near<3>(a.pose3d + a.row[group[k]] * size, c, a.joints, th_pose3d)) sure |= 1u << k % 16;
      }
      if (b == centre / 16) sure |= 1u << centre % 16;  // for a threshold of 0
      member[b] = uint16_t(sure);
      free[b] &= uint16_t(~sure);
      if (!sure) continue;
      sum += chosen(score + 16 * b, sure);
      count += __builtin_popcount(sure);
    }
    double mass = 0;
    for (int i = 0; i < 8; i++) mass += sum[i];
    if (mass > mode.mass) {
      mode = {mass, centre, count, member};
      uint16_t* other = best;
      best = member;
      member = other;
    }
    open[centre / 16] &= uint16_t(~(1 << centre % 16));  // later centres, not being near it, cannot have it
    while (b0 < blocks && !free[b0]) b0++;
    if (b0 == blocks) break;
    centre = 16 * b0 + __builtin_ctz(free[b0]);
    if (!(score[centre] >= min_mode_score)) break;
  }
  return mode;
}

void group_poses_merge(const Proposals& a, const int* member, int64_t n, double* sum, float* pose2d, float* pose3d,
                       float* spread) {
  int64_t J = a.joints;
  double *mean2d = sum, *mean3d = sum + 2 * J, *weights = sum + 5 * J, *apart = sum + 6 * J;
  for (int64_t i = 0; i < 7 * J; i++) sum[i] = 0;
  for (int64_t k = 0; k < n; k++) {
    int64_t row = a.row[member[k]];
    double w = a.score[member[k]], legs = w * a.legs[row];
    const float *p = a.pose2d + 2 * J * row, *q = a.pose3d + 3 * J * row;
    for (int64_t j = 0; j < J; j++) {
      double trust = a.lower[j] ? legs : w;
      weights[j] += trust;
      mean2d[2 * j] += trust * p[2 * j];
      mean2d[2 * j + 1] += trust * p[2 * j + 1];
      for (int d = 0; d < 3; d++) mean3d[3 * j + d] += trust * q[3 * j + d];
    }
  }
  for (int64_t i = 0; i < 2 * J; i++) pose2d[i] = float(mean2d[i] /= weights[i / 2]);
  for (int64_t i = 0; i < 3 * J; i++) pose3d[i] = float(mean3d[i] /= weights[i / 3]);
  for (int64_t k = 0; k < n; k++) {
    int64_t row = a.row[member[k]];
    double w = a.score[member[k]], legs = w * a.legs[row];
    const float* q = a.pose3d + 3 * J * row;
    for (int64_t j = 0; j < J; j++) {
      double square = 0;
      for (int d = 0; d < 3; d++) square += (q[3 * j + d] - mean3d[3 * j + d]) * (q[3 * j + d] - mean3d[3 * j + d]);
      apart[j] += (a.lower[j] ? legs : w) * std::sqrt(square);
    }
  }
  for (int64_t j = 0; j < J; j++) spread[j] = float(apart[j] / weights[j]);
}

}  // namespace LEVEL
