// What NMS on CPU and on CUDA have in common.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

inline void check_nms(const at::Tensor& boxes, const at::Tensor& scores, const std::optional<at::Tensor>& group,
                      double iou_threshold, int64_t max_keep) {
  TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4, "nms: boxes are (B, N, 4), not ", boxes.sizes());
  TORCH_CHECK(scores.sizes() == boxes.sizes().slice(0, 2), "nms: scores are (B, N), not ", scores.sizes());
  TORCH_CHECK(!group || group->sizes() == scores.sizes(), "nms: group is (B, N), not ", group->sizes());
  for (const auto& t : {boxes, scores})
    TORCH_CHECK(at::isFloatingType(t.scalar_type()), "nms: boxes and scores have a float type, not ", t.scalar_type());
  TORCH_CHECK(!group || group->scalar_type() == at::kLong, "nms: group is int64, not ", group->scalar_type());
  for (const auto& t : {scores, group.value_or(scores)})
    TORCH_CHECK(t.device() == boxes.device(), "nms: boxes, scores and group are on one device, not ", boxes.device(),
                " and ", t.device());
  TORCH_CHECK(boxes.size(1) <= int64_t(1) << 30, "nms: too many boxes, ", boxes.size(1));
  TORCH_CHECK(iou_threshold >= 0, "nms: iou_threshold is at least 0, not ", iou_threshold);
  TORCH_CHECK(max_keep >= 0, "nms: max_keep is at least 0, not ", max_keep);
}

// What it is computed in.
inline at::ScalarType nms_type(const at::Tensor& boxes, const at::Tensor& scores) {
  return boxes.scalar_type() == at::kDouble || scores.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// An IoU is a number of that type: above the threshold if above the largest such number which is not.
inline double nms_threshold(double threshold, at::ScalarType type) {
  if (type == at::kDouble) return threshold;
  float near = float(threshold);
  return near > threshold ? std::nextafter(near, 0.f) : near;
}
