#include "roi_crop.h"

#include "one_map.h"

namespace {

at::Tensor forward(const at::Tensor& map, const at::Tensor& rois, double scale, int64_t height, int64_t width,
                   bool max_pool) {
  return one_map_forward("roi_crop", map, rois, scale, height, width, max_pool, PICK(roi_crop_regions),
                         PICK(roi_crop_planes));
}

at::Tensor backward(const at::Tensor& grad, const at::Tensor& map, const at::Tensor& rois, double scale,
                    bool max_pool) {
  return one_map_backward("roi_crop_backward", grad, map, rois, scale, max_pool, PICK(roi_crop_backward));
}

}  // namespace

TORCH_LIBRARY_IMPL(lcrnet, CPU, m) {
  m.impl("roi_crop", forward);
  m.impl("roi_crop_backward", backward);
}
