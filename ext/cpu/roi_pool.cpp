#include "roi_pool.h"

#include "one_map.h"

namespace {

at::Tensor forward(const at::Tensor& map, const at::Tensor& rois, double scale, int64_t height, int64_t width) {
  return one_map_forward("roi_pool", map, rois, scale, height, width, false, PICK(roi_pool_regions),
                         PICK(roi_pool_planes));
}

at::Tensor backward(const at::Tensor& grad, const at::Tensor& map, const at::Tensor& rois, double scale) {
  return one_map_backward("roi_pool_backward", grad, map, rois, scale, false, PICK(roi_pool_backward));
}

}  // namespace

TORCH_LIBRARY_IMPL(lcrnet, CPU, m) {
  m.impl("roi_pool", forward);
  m.impl("roi_pool_backward", backward);
}
