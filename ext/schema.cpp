// The schemas of all operators. Kernels register themselves under the same library in cpu/ and cuda/; fake kernels and
// autograd are in register.py. What an operator means is said once, in the docstring of lcrnet/ops.py.
#include <torch/library.h>

// The tests compile the CUDA kernels for the CPU too, into a library of another name (cuda/device.h).
#ifndef LIBRARY
#define LIBRARY lcrnet
#endif
#define DEFINE(library, m) TORCH_LIBRARY(library, m)

DEFINE(LIBRARY, m) {
  // maps (B, C, H, W), one a level; rois (R, 5); level (R,) int64, none with one map; a scale a map; every `step`-th bin
  m.def(
      "roi_align(Tensor[] maps, Tensor rois, Tensor? level, float[] scales, int height, int width, int sampling_ratio, "
      "bool aligned, int step) -> Tensor");
  // shape: B, C, then H, W of every map
  m.def(
      "roi_align_backward(Tensor grad, Tensor rois, Tensor? level, float[] scales, SymInt[] shape, int height, "
      "int width, int sampling_ratio, bool aligned, int step, bool channels_last) -> Tensor[]");

  // their backward passes look for maxima in the map again: cheaper than writing and reading where they were
  m.def("roi_pool(Tensor map, Tensor rois, float scale, int height, int width) -> Tensor");
  m.def("roi_pool_backward(Tensor grad, Tensor map, Tensor rois, float scale) -> Tensor");

  m.def("roi_crop(Tensor map, Tensor rois, float scale, int height, int width, bool max_pool) -> Tensor");
  m.def("roi_crop_backward(Tensor grad, Tensor map, Tensor rois, float scale, bool max_pool) -> Tensor");

  m.def(
      "nms(Tensor boxes, Tensor scores, Tensor? group, float iou_threshold, SymInt max_keep) -> (Tensor, Tensor)");

  m.def(
      "group_poses(Tensor score, Tensor pose2d, Tensor pose3d, Tensor legs, Tensor lower, Tensor? boxes, Tensor? joints, "
      "Tensor? size, Tensor? points, Tensor? swapped, Tensor? centres, Tensor? limit, float th_iou, float th_pose3d, "
      "float min_mode_score, float th_persondetect, int max_people) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
