// PPI on a batch of images, an image at a time: order by score, groups, their modes, people. The loops over proposals
// are in group_poses.simd.cpp.
#include "group_poses.h"

#include <cmath>
#include <cstdlib>
#include <memory>

#include "../group_poses.h"
#include "tensors.h"

namespace {

struct Call {
  Proposals all;  // of the first image
  const float* score;
  const double* boxes;   // (B, N, 4) or null
  const bool* boxed;     // (J,): the joints that boxes are round, or null
  const int64_t* size;   // (B, 2): height, width
  int64_t proposals, most;
  double th_iou, th_pose3d, min_mode_score, th_persondetect;
  float *mass, *pose2d, *pose3d, *spread;
  int64_t *support, *best, *person, *count, *dropped;
};

// Memory as it comes, aligned for vectors.
template <class T>
struct Array {
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T[], Free> all;
  explicit Array(int64_t count)
      : all(static_cast<T*>(std::aligned_alloc(64, (int64_t(sizeof(T)) * count + 63) / 64 * 64))) {}
  operator T*() { return all.get(); }
};

// Sorts by `width` bits of a key above 32 bits of payload; equal keys stay as they were.
void sort(std::vector<uint64_t>& items, int width) {
  if (items.size() < 256) {
    uint64_t keys = (uint64_t(1) << width) - 1;
    std::stable_sort(items.begin(), items.end(),
                     [&](uint64_t x, uint64_t y) { return (x >> 32 & keys) < (y >> 32 & keys); });
    return;
  }
  std::vector<uint64_t> other(items.size());
  for (int shift = 32; shift < 32 + width; shift += 11) {
    uint32_t start[2049] = {};
    for (uint64_t x : items) start[(x >> shift & 2047) + 1]++;
    for (int d = 0; d < 2047; d++) start[d + 1] += start[d];
    for (uint64_t x : items) other[start[x >> shift & 2047]++] = x;
    items.swap(other);
  }
}

bool finite(const float* v, int64_t count) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, v + i, 4);
    bad |= uint32_t((bits & 0x7f800000) == 0x7f800000);
  }
  return !bad;
}

// An image's proposals: usable ones, by falling score.
struct Ranks {
  Proposals a;
  const double* boxes;
  std::vector<int64_t> row;
  std::vector<float> score;
  std::vector<double> box;
  int64_t dropped = 0;  // proposals with a number that is not finite

  Ranks(const Call& call, int64_t image) : a(call.all) {
    int64_t n = call.proposals, first = image * n;
    const float* scores = call.score + first;
    a.pose2d += first * 2 * a.joints;
    a.pose3d += first * 3 * a.joints;
    a.legs += first;
    if (a.at) a.at += first * 2 * a.points;
    if (a.swapped) a.swapped += first * 2 * a.points;
    if (a.centres) a.centres += first * 2 * a.points;
    if (a.limit) a.limit += first;
    boxes = call.boxes ? call.boxes + 4 * first : nullptr;

    std::vector<uint64_t> items;
    items.reserve(n);
    for (int64_t i = 0; i < n; i++) {
      if (scores[i] <= 0 && std::isfinite(scores[i])) continue;
      if (!usable(scores[i], i)) {
        dropped++;
        continue;
      }
      uint32_t bits;
      memcpy(&bits, scores + i, 4);
      items.push_back(uint64_t(~bits) << 32 | uint64_t(i));  // positive floats are ordered as their bits are
    }
    sort(items, 32);
    row.resize(items.size());
    score.resize(items.size());
    for (size_t r = 0; r < items.size(); r++) {
      row[r] = int64_t(items[r] & 0xffffffff);
      score[r] = scores[row[r]];
    }
    a.count = int64_t(items.size());
    a.row = row.data();
    a.score = score.data();
    if (call.boxed) surround(call, image);
  }

  // Boxes round joints of the poses, cut to the image, and a pixel more to the right and bottom.
  void surround(const Call& call, int64_t image) {
    box.resize(4 * call.proposals);
    boxes = box.data();
    float most[2] = {float(call.size[2 * image + 1] - 1), float(call.size[2 * image] - 1)};
    std::vector<int64_t> joints;
    for (int64_t j = 0; j < a.joints; j++)
      if (call.boxed[j]) joints.push_back(2 * j);
    for (int64_t i : row) {
      const float* pose = a.pose2d + i * 2 * a.joints;
      for (int d = 0; d < 2; d++) {
        float low = INFINITY, high = -INFINITY;
        for (int64_t j : joints) {
          low = std::min(low, pose[j + d]);
          high = std::max(high, pose[j + d]);
        }
        box[4 * i + d] = std::min(std::max(low, 0.f), most[d]);
        box[4 * i + 2 + d] = double(std::min(std::max(high, 0.f), most[d])) + 1;
      }
    }
  }

  bool usable(float score, int64_t i) const {
    bool fine = finite(&score, 1) && finite(a.legs + i, 1) && finite(a.pose2d + i * 2 * a.joints, 2 * a.joints) &&
                finite(a.pose3d + i * 3 * a.joints, 3 * a.joints);
    if (a.at) fine = fine && finite(a.at + i * 2 * a.points, 2 * a.points) && std::isfinite(a.limit[i]);
    if (a.swapped) fine = fine && finite(a.swapped + i * 2 * a.points, 2 * a.points);
    if (a.centres) fine = fine && finite(a.centres + i * 2 * a.points, 2 * a.points);
    for (int d = 0; boxes && d < 4; d++) fine = fine && std::isfinite(boxes[4 * i + d]);
    return fine;
  }
};

struct Rectangle {
  double left, top, right, bottom;
};
constexpr Rectangle kNowhere = {INFINITY, INFINITY, -INFINITY, -INFINITY};

// Where the proposals of an image lie.
struct Places {
  const Proposals& a;
  const double* boxes;
  Field f;
  std::vector<int> slot;  // of each rank
  std::vector<float> far, close;  // edges of districts and blocks
  std::vector<uint16_t> alive;
  std::vector<int> rank;
  Array<double> box;
  Array<float> at, swapped;

  explicit Places(const Ranks& ranks)
      : a(ranks.a), boxes(ranks.boxes), box(0), at(0), swapped(0) {
    int64_t n = a.count, blocks = (n + 15) / 16, districts = (blocks + 15) / 16;
    std::vector<Rectangle> place(n);
    Rectangle round = kNowhere;
    for (int64_t r = 0; r < n; r++) {
      place[r] = rectangle(a.row[r]);
      round = join(round, place[r]);
    }
    std::vector<uint64_t> items(n);
    for (int64_t r = 0; r < n; r++) {
      uint64_t x = cell(place[r].left / 2 + place[r].right / 2, round.left, round.right);
      uint64_t y = cell(place[r].top / 2 + place[r].bottom / 2, round.top, round.bottom);
      items[r] = (spread(x) | spread(y) << 1) << 32 | uint64_t(r);
    }
    sort(items, 20);  // along a curve that fills the plane (Morton's): neighbours come together

    slot.resize(n);
    rank.assign(16 * blocks, 0);
    alive.assign(blocks, 0);
    auto rectangles = [](std::vector<float>& all, int64_t count) -> Edges {
      count = (count + 15) / 16 * 16;
      all.assign(4 * count, NAN);
      return {all.data(), all.data() + count, all.data() + 2 * count, all.data() + 3 * count};
    };
    if (boxes) box = Array<double>(80 * blocks);
    if (a.at) at = Array<float>(32 * blocks * a.points);
    if (a.swapped) swapped = Array<float>(32 * blocks * a.points);
    f = {districts, rectangles(far, districts), rectangles(close, blocks), alive.data(), rank.data(), box, at, swapped};
    Rectangle district = kNowhere;
    for (int64_t b = 0; b < blocks; b++) {
      Rectangle all = kNowhere;
      for (int64_t s = 16 * b; s < 16 * b + 16; s++) {
        int64_t r = int64_t(items[std::min(s, n - 1)] & 0xffffffff), row = a.row[r], lane = s % 16;
        if (s < n) {
          slot[r] = int(s);
          rank[s] = int(r);
          alive[b] |= uint16_t(1 << lane);
          all = join(all, place[r]);
        }
        if (boxes) corners(row, f.box + 80 * b + lane, 16);
        for (int64_t i = 0; i < 2 * a.points; i++) {
          if (a.at) f.at[32 * b * a.points + 16 * i + lane] = a.at[row * 2 * a.points + i];
          if (a.swapped) f.swapped[32 * b * a.points + 16 * i + lane] = a.swapped[row * 2 * a.points + i];
        }
      }
      put(f.block, b, all);
      district = b % 16 ? join(district, all) : all;
      put(f.district, b / 16, district);
    }
  }

  static void put(const Edges& e, int64_t i, const Rectangle& r) {
    e.left[i] = float(r.left);  // rounding keeps order, so that what met still meets
    e.top[i] = float(r.top);
    e.right[i] = float(r.right);
    e.bottom[i] = float(r.bottom);
  }

  // x1, y1, x2, y2, area
  void corners(int64_t row, double* out, int64_t stride) const {
    const double* b = boxes + 4 * row;
    for (int d = 0; d < 4; d++) out[d * stride] = b[d];
    out[4 * stride] = std::max(b[2] - b[0], 0.0) * std::max(b[3] - b[1], 0.0);
  }

  // A box itself; of points their mean, which is no further from another's mean than the points are on average.
  Rectangle rectangle(int64_t row) const {
    if (boxes) {
      const double* b = boxes + 4 * row;
      return {b[0], b[1], std::max(b[0], b[2]), std::max(b[1], b[3])};
    }
    Rectangle r = mean(a.at, row);
    return a.swapped ? join(r, mean(a.swapped, row)) : r;
  }

  Centre centre(int64_t r) const {
    Centre c;
    c.rank = int(r);
    Rectangle seeks;
    if (boxes) {
      corners(a.row[r], c.box, 1);
      seeks = rectangle(a.row[r]);
    } else {
      seeks = mean(a.at, a.row[r]);
      if (a.centres) seeks = join(seeks, mean(a.centres, a.row[r]));
      double reach = std::max(a.limit[a.row[r]], 0.0);
      double size = std::max(std::max(std::abs(seeks.left), std::abs(seeks.right)),
                             std::max(std::abs(seeks.top), std::abs(seeks.bottom)));
      reach += 2e-9 * (reach + size);  // for rounding
      seeks = {seeks.left - reach, seeks.top - reach, seeks.right + reach, seeks.bottom + reach};
    }
    c.left = float(seeks.left);
    c.top = float(seeks.top);
    c.right = float(seeks.right);
    c.bottom = float(seeks.bottom);
    return c;
  }

  Rectangle mean(const float* points, int64_t row) const {
    double x = 0, y = 0;
    for (int64_t q = 0; q < a.points; q++) {
      x += points[(row * a.points + q) * 2];
      y += points[(row * a.points + q) * 2 + 1];
    }
    x /= double(a.points);
    y /= double(a.points);
    return {x, y, x, y};
  }

  static Rectangle join(const Rectangle& r, const Rectangle& s) {
    return {std::min(r.left, s.left), std::min(r.top, s.top), std::max(r.right, s.right), std::max(r.bottom, s.bottom)};
  }
  static uint64_t cell(double x, double from, double to) {
    double part = (x - from) / (to - from) * 1023;  // NaN where all are at one place
    return part > 0 ? uint64_t(std::min(part, 1023.0)) : 0;
  }
  static uint64_t spread(uint64_t x) {  // ten bits, each to the place of twice its number
    uint64_t out = 0;
    for (int i = 0; i < 10; i++) out |= (x >> i & 1) << 2 * i;
    return out;
  }
};

struct Found {
  double mass;
  int64_t first, count;  // its members in a list of ranks; the best of them first
};

void image(const Call& call, int64_t b) {
  Ranks ranks(call, b);
  const Proposals& a = ranks.a;
  Places places(ranks);
  int64_t n = a.count, J = a.joints;
  int64_t words = (n + 63) / 64;
  std::vector<uint64_t> left(words, ~uint64_t(0)), hit(words, 0);
  std::vector<int> group(n), members;
  members.reserve(n);
  std::vector<Found> people;
  Array<float> poses(0);
  std::vector<uint16_t> bits;
  int64_t room = 0;
  auto overlapping = PICK(group_poses_overlapping);
  auto best_mode = PICK(group_poses_best_mode);
  for (int64_t r = 0; r < n; r++) {
    if (!(left[r >> 6] >> (r & 63) & 1)) continue;
    Centre c = places.centre(r);
    overlapping(a, places.f, c, call.th_iou, hit.data());
    hit[r >> 6] |= uint64_t(1) << (r & 63);
    places.f.alive[places.slot[r] / 16] &= uint16_t(~(1 << places.slot[r] % 16));
    int64_t m = 0;
    double total = 0;
    for (int64_t w = r >> 6; w < words; w++) {
      left[w] &= ~hit[w];
      for (; hit[w]; hit[w] &= hit[w] - 1) {
        group[m] = int(64 * w + __builtin_ctzll(hit[w]));
        total += a.score[group[m++]];
      }
    }
    if (total * (1 + 1e-9) < call.th_persondetect) continue;  // no mode of it can have the mass
    int64_t blocks = (m + 15) / 16;
    if (blocks > room) {
      room = std::max(blocks, 2 * room);
      poses = Array<float>(room * 16 * (3 * J + 1));
      bits.resize(4 * room);
    }
    Mode mode = best_mode(a, group.data(), m, call.th_pose3d, call.min_mode_score, poses, bits.data());
    if (!(mode.mass > call.th_persondetect)) continue;
    people.push_back({mode.mass, int64_t(members.size()), mode.count});
    for (int64_t k = 0; k < m; k++)
      if (mode.member[k / 16] >> k % 16 & 1) members.push_back(group[k]);
  }
  std::stable_sort(people.begin(), people.end(), [](const Found& x, const Found& y) { return x.mass > y.mass; });

  call.count[b] = int64_t(people.size());
  call.dropped[b] = ranks.dropped;
  auto merge = PICK(group_poses_merge);
  Array<double> sum(8 * J);
  for (int64_t p = 0; p < std::min(call.most, int64_t(people.size())); p++) {
    int64_t to = b * call.most + p;
    const int* member = members.data() + people[p].first;
    merge(a, member, people[p].count, sum, call.pose2d + to * 2 * J, call.pose3d + to * 3 * J, call.spread + to * J);
    call.mass[to] = float(people[p].mass);
    call.support[to] = people[p].count;
    call.best[to] = a.row[member[0]];
    for (int64_t k = 0; k < people[p].count; k++) call.person[b * call.proposals + a.row[member[k]]] = p;
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
  int64_t B = score.size(0), N = score.size(1), J = lower.size(0), P = max_people;
  auto ready = [](const Maybe& t) { return t ? t->contiguous() : at::Tensor(); };
  auto data = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; };
  auto wide = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<double>() : nullptr; };
  at::Tensor s = score.contiguous(), p2 = pose2d.contiguous(), p3 = pose3d.contiguous(), l = legs.contiguous();
  at::Tensor low = lower.contiguous(), b = ready(boxes), q = ready(points), x = ready(swapped), r = ready(limit);
  at::Tensor z = ready(centres), boxed = ready(joints), sides = ready(size);

  auto fill = [&](at::IntArrayRef shape, at::ScalarType type, int value) {
    at::Tensor t = at::empty(shape, score.options().dtype(type));
    return t.fill_(value);
  };
  at::Tensor mass = fill({B, P}, at::kFloat, 0), out2d = fill({B, P, J, 2}, at::kFloat, 0);
  at::Tensor out3d = fill({B, P, J, 3}, at::kFloat, 0), spread = fill({B, P, J}, at::kFloat, 0);
  at::Tensor support = fill({B, P}, at::kLong, 0), best = fill({B, P}, at::kLong, -1);
  at::Tensor person = fill({B, N}, at::kLong, -1), count = fill({B}, at::kLong, 0);
  at::Tensor dropped = fill({B}, at::kLong, 0);
  Call call = {{0, J, q.defined() ? q.size(2) : 0, nullptr, nullptr, data(p2), data(p3), data(l),
                reinterpret_cast<const uint8_t*>(low.const_data_ptr<bool>()), data(q), data(x), data(z), wide(r)},
               data(s), wide(b), boxed.defined() ? boxed.const_data_ptr<bool>() : nullptr,
               sides.defined() ? sides.const_data_ptr<int64_t>() : nullptr, N, P, th_iou, th_pose3d, min_mode_score,
               th_persondetect,
               mass.mutable_data_ptr<float>(), out2d.mutable_data_ptr<float>(), out3d.mutable_data_ptr<float>(),
               spread.mutable_data_ptr<float>(), support.mutable_data_ptr<int64_t>(), best.mutable_data_ptr<int64_t>(),
               person.mutable_data_ptr<int64_t>(), count.mutable_data_ptr<int64_t>(),
               dropped.mutable_data_ptr<int64_t>()};
  at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) image(call, i);
  });
  return {mass, out2d, out3d, spread, support, best, person, count, dropped};
}

}  // namespace

TORCH_LIBRARY_IMPL(lcrnet, CPU, m) { m.impl("group_poses", group_poses); }
