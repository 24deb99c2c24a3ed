// What group_poses takes, the same on CPU and CUDA.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>
#include <optional>

inline void check_group_poses(const at::Tensor& score, const at::Tensor& pose2d, const at::Tensor& pose3d,
                              const at::Tensor& legs, const at::Tensor& lower, const std::optional<at::Tensor>& boxes,
                              const std::optional<at::Tensor>& joints, const std::optional<at::Tensor>& size,
                              const std::optional<at::Tensor>& points, const std::optional<at::Tensor>& swapped,
                              const std::optional<at::Tensor>& centres, const std::optional<at::Tensor>& limit,
                              double th_iou, int64_t max_people) {
  auto check = [&](const char* name, const at::Tensor& t, at::ScalarType type, at::IntArrayRef shape) {
    TORCH_CHECK(t.scalar_type() == type, "group_poses: ", name, " is ", type, ", not ", t.scalar_type());
    TORCH_CHECK(t.sizes() == shape, "group_poses: ", name, " has shape ", shape, ", not ", t.sizes());
    TORCH_CHECK(t.device() == score.device(), "group_poses: ", name, " is on ", t.device(), ", score on ",
                score.device());
  };
  TORCH_CHECK(score.dim() == 2, "group_poses: score is (B, N), not ", score.sizes());
  TORCH_CHECK(lower.dim() == 1 && lower.size(0) > 0, "group_poses: lower is (J,), not ", lower.sizes());
  int64_t B = score.size(0), N = score.size(1), J = lower.size(0);
  TORCH_CHECK(N < std::numeric_limits<int>::max() / 2, "group_poses: too many proposals");
  check("score", score, at::kFloat, {B, N});
  check("pose2d", pose2d, at::kFloat, {B, N, J, 2});
  check("pose3d", pose3d, at::kFloat, {B, N, J, 3});
  check("legs", legs, at::kFloat, {B, N});
  check("lower", lower, at::kBool, {J});
  TORCH_CHECK(max_people >= 0, "group_poses: max_people is at least 0, not ", max_people);
  TORCH_CHECK(int(boxes.has_value()) + int(joints.has_value()) + int(points.has_value()) == 1 &&
                  joints.has_value() == size.has_value() && points.has_value() == limit.has_value() &&
                  (points || !swapped) && (swapped || !centres),
              "group_poses: either boxes, or joints and size, or points and limit (and swapped, and centres)");
  if (!points) {
    if (boxes) check("boxes", *boxes, at::kDouble, {B, N, 4});
    if (joints) {
      check("joints", *joints, at::kBool, {J});
      check("size", *size, at::kLong, {B, 2});
    }
    TORCH_CHECK(th_iou >= 0, "group_poses: th_iou is at least 0, not ", th_iou);
  } else {
    TORCH_CHECK(points->dim() == 4 && points->size(2) > 0, "group_poses: points is (B, N, Q, 2), not ",
                points->sizes());
    check("points", *points, at::kFloat, {B, N, points->size(2), 2});
    check("limit", *limit, at::kDouble, {B, N});
    if (swapped) check("swapped", *swapped, at::kFloat, points->sizes());
    if (centres) check("centres", *centres, at::kFloat, points->sizes());
  }
}
