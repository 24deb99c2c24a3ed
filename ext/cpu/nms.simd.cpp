// Greedy NMS of an image: candidates by falling score, each compared with the boxes kept so far. Those lie in cells by
// their centres, in blocks of 64 bytes a coordinate: an IoU above the threshold bounds how far apart two centres are,
// so that only the cells nearby are visited.
#include "nms.h"

#include <cstdlib>

#include "vec.h"

namespace LEVEL {
namespace {

template <class T>
struct Array {
  T* at;
  explicit Array(int64_t count)
      : at(static_cast<T*>(std::aligned_alloc(64, (int64_t(sizeof(T)) * count + 63) / 64 * 64 + 64))) {}
  ~Array() { std::free(at); }
  Array(const Array&) = delete;
  void swap(Array& other) {
    T* mine = at;
    at = other.at;
    other.at = mine;
  }
  T& operator[](int64_t i) { return at[i]; }
};

// Sorts (key, index) by key: radix sort, stable.
template <class K>
void sort(Array<K>& key, Array<int32_t>& index, int64_t count) {
  constexpr int bits = 11, size = 1 << bits, digits = (8 * sizeof(K) + bits - 1) / bits;
  auto digit = [](K k, int d) { return int((k >> (d * bits)) & (size - 1)); };
  bool sorted = true;
  for (int64_t i = 1; i < count; i++) sorted &= key[i - 1] <= key[i];
  if (sorted) return;
  Array<int32_t> places(digits * size);
  memset(places.at, 0, sizeof(int32_t) * digits * size);
  for (int64_t i = 0; i < count; i++)
    for (int d = 0; d < digits; d++) places[d * size + digit(key[i], d)]++;
  Array<K> other_key(count);
  Array<int32_t> other_index(count);
  for (int d = 0; d < digits; d++) {
    int32_t* place = &places[d * size];
    if (place[digit(key[0], d)] == count) continue;  // all have the same digit
    int32_t next = 0;
    for (int i = 0; i < size; i++) {
      int32_t here = place[i];
      place[i] = next;
      next += here;
    }
    for (int64_t i = 0; i < count; i++) {
      int32_t to = place[digit(key[i], d)]++;
      other_key[to] = key[i];
      other_index[to] = index[i];
    }
    key.swap(other_key);
    index.swap(other_index);
  }
}

// A key that rises as the score falls: NaN first, zeros of both signs equal, as torch.sort has it.
INLINE uint32_t falling(float score) {
  uint32_t bits;
  score += 0.f;  // -0 becomes 0
  memcpy(&bits, &score, 4);
  return score != score ? 0 : bits >> 31 ? bits : bits ^ 0x7fffffff;
}
INLINE uint64_t falling(double score) {
  uint64_t bits;
  score += 0.;
  memcpy(&bits, &score, 8);
  return score != score ? 0 : bits >> 63 ? bits : bits ^ 0x7fffffffffffffff;
}

// A product as it is rounded: no FMA takes it up, so that IoUs are torchvision's to the bit.
template <class T>
INLINE T rounded(T product) {
  asm("" : "+m"(product));
  return product;
}

// Vectors of the machine's own length: wider ones are compared number by number (GCC 12).
#if defined(__AVX512F__)
constexpr int width = 64;
#elif defined(__AVX__)
constexpr int width = 32;
#else
constexpr int width = 16;
#endif
template <class S>
struct Vector {
  typedef S type __attribute__((vector_size(width)));
};

template <class V>
INLINE V least(V a, V b) {
  return a < b ? a : b;
}
template <class V>
INLINE V most(V a, V b) {
  return a > b ? a : b;
}

// Whether any number of `a` is above that of `b`.
template <class V>
INLINE bool any_above(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#endif
  auto above = a > b;
  uint64_t words[width / 8], all = 0;
  memcpy(words, &above, width);
  for (uint64_t word : words) all |= word;
  return all != 0;
}

template <class S>
struct Box {
  S x1, y1, x2, y2, area;
  bool solid;  // finite, of positive size and finite area: any other has no IoU above 0 with anything
  explicit Box(const S* p) : x1(p[0]), y1(p[1]), x2(p[2]), y2(p[3]) {
    S width = x2 - x1, height = y2 - y1;
    area = rounded(width * height);
    solid = width > 0 && height > 0 && area < S(__builtin_inff());
  }
};

// Kept boxes of a cell; those not in use are 0, which nothing overlaps.
template <class S>
struct alignas(64) Block {
  static constexpr int n = 64 / sizeof(S);
  S x1[n], y1[n], x2[n], y2[n], area[n];
  int32_t count, next;  // the block after this one, or -1
};

// One axis of the grid of cells: its lowest centre, cells a pixel, cells.
template <class S>
struct Axis {
  S low, scale;
  int cells;
  INLINE int cell(S centre) const {  // never falls as `centre` rises; 0 for NaN, which comes of infinity times scale 0
    S at = (centre - low) * scale;
    return at > 0 ? (at < S(cells - 1) ? int(at) : cells - 1) : 0;
  }
};

// Centres and sizes along an axis, of all boxes.
template <class S>
struct Extent {
  S low = S(__builtin_inff()), high = -low, size = 0;
  INLINE void add(S from, S to) {
    S centre = S(0.5) * from + S(0.5) * to;
    low = least(low, centre);
    high = most(high, centre);
    size += to - from;
  }
  Axis<S> axis(S reach, int64_t count, double most_cells) const {  // cells twice the reach of a mean box (measured)
    S range = high - low, fit = range / (2 * reach * size / S(count));
    int cells = !(fit >= 1 && most_cells >= 1) ? 1 : fit < S(most_cells) ? int(fit) : int(most_cells);
    return {low, range > 0 ? S(cells) / range : S(0), cells};
  }
};

// Groups of boxes -> numbers from 0 in `of`; how many there are.
int64_t number_groups(Array<int32_t>& of, const int64_t* group, int64_t count) {
  int64_t low = count ? group[0] : 0, groups = 0;
  for (int64_t i = 0; i < count; i++) low = least(low, group[i]);
  Array<uint64_t> key(count);
  Array<int32_t> order(count);
  for (int64_t i = 0; i < count; i++) {
    key[i] = uint64_t(group[i]) - uint64_t(low);
    order[i] = int32_t(i);
  }
  sort(key, order, count);
  for (int64_t i = 0; i < count; i++) {
    groups += i == 0 || key[i] != key[i - 1];
    of[order[i]] = int32_t(groups - 1);
  }
  return groups;
}

template <class S, class K>
void image(const Nms& a, int64_t b) {
  typedef typename Vector<S>::type V;
  constexpr int lanes = width / sizeof(S);
  const S* boxes = static_cast<const S*>(a.boxes) + 4 * a.count * b;
  const S* scores = static_cast<const S*>(a.scores) + a.count * b;

  Array<K> key(a.count);
  Array<int32_t> order(a.count);
  int64_t count = 0;
  for (int64_t i = 0; i < a.count; i++) {
    key[count] = falling(scores[i]);
    order[count] = int32_t(i);
    count += scores[i] != -S(__builtin_inff());
  }
  sort(key, order, count);
  Array<int32_t> group(a.group ? a.count : 0);
  int64_t groups = a.group ? number_groups(group, a.group + a.count * b, a.count) : 1;

  // inter / (area + area - inter) > t means inter > share * (area + area); a little less, for rounding's sake.
  S threshold = S(a.threshold), share = S(a.threshold / (1 + a.threshold) * (1 - 1e-5));
  // Along each axis it means a distance of centres of at most (1 - t) / 2 of the union's width, which is less than
  // either box's own / t.
  S reach = S((1 - a.threshold) / (2 * a.threshold) * (1 + 1e-4) + 1e-4);
  Extent<S> across, down;
  int64_t solid = 0;
  for (int64_t i = 0; i < a.count; i++) {
    Box<S> box(boxes + 4 * i);
    if (!box.solid) continue;
    across.add(box.x1, box.x2);
    down.add(box.y1, box.y2);
    solid++;
  }
  double side = __builtin_sqrt(double(solid) / double(Block<S>::n * groups));
  Axis<S> x = across.axis(reach, solid, side), y = down.axis(reach, solid, side);
  int64_t cells = int64_t(x.cells) * y.cells;
  Array<int32_t> head(groups * cells);  // the first block of a cell, or -1
  Array<Block<S>> blocks(groups * cells + solid / Block<S>::n + 1);
  memset(head.at, -1, sizeof(int32_t) * groups * cells);

  int32_t used = 0;
  int64_t* keep = a.keep + a.max_keep * b;
  int64_t kept = 0;
  for (int64_t k = 0; k < count && kept < a.max_keep; k++) {
    Box<S> box(boxes + 4 * int64_t(order[k]));
    if (box.solid) {
      // The bounds hold where numbers are rounded finely against the box's size, and its area is far from underflow.
      bool bounded = a.threshold > 1e-6 && box.area > S(1e-24);
      S part = bounded ? share : 0, least_inter = part * box.area;
      int32_t* first = &head[groups > 1 ? group[order[k]] * cells : 0];
      auto suppressed = [&](int64_t cell) {
        for (int32_t at = first[cell]; at >= 0; at = blocks[at].next) {
          const Block<S>& o = blocks[at];
          for (int n = 0; n < Block<S>::n; n += lanes) {
            auto load = [n](const S* p) {
              V v;
              memcpy(&v, p + n, width);
              return v;
            };
            V across = least(load(o.x2), V{} + box.x2) - most(load(o.x1), V{} + box.x1);
            V down = least(load(o.y2), V{} + box.y2) - most(load(o.y1), V{} + box.y1);
            V area = load(o.area), inter = most(across, V{}) * down;
            if (!any_above(inter, area * part + least_inter)) continue;
            inter = rounded(inter);
            if (any_above(inter / (area + box.area - inter), V{} + threshold)) return true;
          }
        }
        return false;
      };
      S centre_x = S(0.5) * box.x1 + S(0.5) * box.x2, centre_y = S(0.5) * box.y1 + S(0.5) * box.y2;
      int64_t own = int64_t(y.cell(centre_y)) * x.cells + x.cell(centre_x);
      if (suppressed(own)) continue;
      int i0 = 0, i1 = x.cells - 1, j0 = 0, j1 = y.cells - 1;
      if (bounded) {
        S dx = reach * (box.x2 - box.x1) + S(1e-6) * most(most(box.x1, -box.x1), most(box.x2, -box.x2));
        S dy = reach * (box.y2 - box.y1) + S(1e-6) * most(most(box.y1, -box.y1), most(box.y2, -box.y2));
        i0 = x.cell(centre_x - dx), i1 = x.cell(centre_x + dx);
        j0 = y.cell(centre_y - dy), j1 = y.cell(centre_y + dy);
      }
      bool dead = false;
      for (int j = j0; j <= j1 && !dead; j++)
        for (int i = i0; i <= i1 && !dead; i++) {
          int64_t cell = int64_t(j) * x.cells + i;
          dead = cell != own && suppressed(cell);
        }
      if (dead) continue;
      int32_t at = first[own];
      if (at < 0 || blocks[at].count == Block<S>::n) {
        memset(&blocks[used], 0, sizeof(Block<S>));
        blocks[used].next = at;
        first[own] = at = used++;
      }
      Block<S>& o = blocks[at];
      int32_t n = o.count++;
      o.x1[n] = box.x1;
      o.y1[n] = box.y1;
      o.x2[n] = box.x2;
      o.y2[n] = box.y2;
      o.area[n] = box.area;
    }
    keep[kept++] = order[k];
  }
  a.kept[b] = kept;
  for (; kept < a.max_keep; kept++) keep[kept] = -1;
}

}  // namespace

void nms_images(const Nms& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; b++) {
    if (a.wide)
      image<double, uint64_t>(a, b);
    else
      image<float, uint32_t>(a, b);
  }
}

}  // namespace LEVEL
