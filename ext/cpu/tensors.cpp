#include "tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

at::Tensor fresh(at::IntArrayRef shape, const at::TensorOptions& options, at::MemoryFormat format) {
  at::Tensor out = at::empty(shape, options, format);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  uintptr_t from = (reinterpret_cast<uintptr_t>(out.mutable_data_ptr()) + page - 1) / page * page;
  uintptr_t to = (reinterpret_cast<uintptr_t>(out.mutable_data_ptr()) + out.nbytes()) / page * page;
  if (to > from + page) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // a hint: it may fail
#endif
  return out;
}

namespace {

template <class S>
void sort(const S* rois, int64_t count, const int64_t* level, int64_t levels, int64_t images,
          std::vector<int64_t>& order, std::vector<int64_t>& start) {
  std::vector<int64_t> pair(count);
  start.assign(levels * images + 2, 0);
  for (int64_t r = 0; r < count; r++) {
    S image = rois[5 * r];
    int64_t l = level ? level[r] : 0;
    bool inside = image > S(-1) && image < S(images) && l >= 0 && l < levels;  // false for NaN
    pair[r] = inside ? l * images + int64_t(image) : levels * images;
    start[pair[r] + 1]++;
  }
  for (size_t k = 1; k < start.size(); k++) start[k] += start[k - 1];
  order.resize(count);
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t r = 0; r < count; r++) order[next[pair[r]]++] = r;
  start.pop_back();
}

}  // namespace

void sort_rois(const at::Tensor& rois, const int64_t* level, int64_t levels, int64_t images,
               std::vector<int64_t>& order, std::vector<int64_t>& start) {
  if (rois.scalar_type() == at::kDouble)
    sort(rois.const_data_ptr<double>(), rois.size(0), level, levels, images, order, start);
  else
    sort(rois.const_data_ptr<float>(), rois.size(0), level, levels, images, order, start);
}
