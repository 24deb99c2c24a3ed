#include "nms.h"

#include "../nms.h"
#include "tensors.h"

namespace {

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& boxes, const at::Tensor& scores,
                                           const std::optional<at::Tensor>& group, double iou_threshold,
                                           int64_t max_keep) {
  check_nms(boxes, scores, group, iou_threshold, max_keep);
  auto type = nms_type(boxes, scores);
  int64_t images = boxes.size(0);
  at::Tensor box = boxes.to(type).contiguous(), score = scores.to(type).contiguous(), groups;
  if (group) groups = group->contiguous();
  auto options = boxes.options().dtype(at::kLong);
  at::Tensor keep = at::empty({images, max_keep}, options), count = at::empty({images}, options);
  Nms a;
  a.wide = type == at::kDouble;
  a.boxes = box.const_data_ptr();
  a.scores = score.const_data_ptr();
  a.group = group ? groups.const_data_ptr<int64_t>() : nullptr;
  a.count = boxes.size(1);
  a.threshold = nms_threshold(iou_threshold, type);
  a.max_keep = max_keep;
  a.keep = keep.mutable_data_ptr<int64_t>();
  a.kept = count.mutable_data_ptr<int64_t>();
  auto run = PICK(nms_images);
  at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) { run(a, begin, end); });
  return {keep, count};
}

}  // namespace

TORCH_LIBRARY_IMPL(lcrnet, CPU, m) { m.impl("nms", forward); }
