#include "one_map.h"

namespace {

struct Call : Regions {
  at::Tensor cells, boxes;  // what `map` and `rois` point to
  at::MemoryFormat format;
  std::vector<int64_t> orders, starts;

  Call(const char* name, const at::Tensor& map, const at::Tensor& rois, double scale_, int64_t height_, int64_t width_,
       bool max_pool_) {
    constexpr int64_t most = int64_t(1) << 31;
    TORCH_CHECK(map.dim() == 4, name, ": the map is (B, C, H, W), not ", map.sizes());
    TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5, name, ": boxes are (R, 5), not ", rois.sizes());
    TORCH_CHECK(height_ > 0 && width_ > 0 && height_ < 1 << 20 && width_ < 1 << 20, name,
                ": output_size is from 1 to 2^20, not ", height_, ", ", width_);
    TORCH_CHECK(map.size(2) < most && map.size(3) < most && map.size(2) * map.size(3) < most, name,
                ": a map has less than 2^31 cells, not ", map.sizes());
    type = type_of(map.scalar_type());
    format = format_of(map);
    cells = map.contiguous(format);
    this->map = cells.const_data_ptr();
    images = map.size(0);
    channels = map.size(1);
    rows = int(map.size(2));
    columns = int(map.size(3));
    channels_last = format == at::MemoryFormat::ChannelsLast;
    boxes = rois.to(map.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
    this->rois = boxes.const_data_ptr();
    scale = scale_;
    height = int(height_);
    width = int(width_);
    max_pool = max_pool_;
    count = rois.size(0);
    sort_rois(boxes, nullptr, 1, images, orders, starts);
    order = orders.data();
    start = starts.data();
  }
  Call(const Call&) = delete;

  // Tasks of (image, block of channels), with `bytes` of memory for a cell's channel: long lines of channels, but two
  // tasks or more for every thread, and not too much memory. Results do not depend on it.
  int64_t tasks(int64_t bytes, int64_t largest) {
    int64_t fit = (int64_t(4) << 20) / std::max<int64_t>(bytes * rows * columns, 1);
    int64_t share = images * channels / (2 * at::get_num_threads());
    block = int(std::clamp(std::min(fit, share) / 16 * 16, int64_t(16), largest));
    return images * ((channels + block - 1) / block);
  }
};

}  // namespace

at::Tensor one_map_forward(const char* name, const at::Tensor& map, const at::Tensor& rois, double scale,
                           int64_t height, int64_t width, bool max_pool, Forward regions, Forward planes) {
  Call call(name, map, rois, scale, height, width, max_pool);
  at::Tensor out = fresh({call.count, call.channels, height, width}, map.options(), call.format);
  void* to = out.mutable_data_ptr();
  if (call.channels_last) {
    at::parallel_for(0, call.count, 1, [&](int64_t begin, int64_t end) { regions(call, to, begin, end); });
  } else {
    for (int64_t k = call.starts.back(); k < call.count; k++) out[call.order[k]].zero_();
    at::parallel_for(0, call.tasks(map.element_size(), 64), 1,
                     [&](int64_t begin, int64_t end) { planes(call, to, begin, end); });
  }
  return out;
}

at::Tensor one_map_backward(const char* name, const at::Tensor& grad, const at::Tensor& map, const at::Tensor& rois,
                            double scale, bool max_pool, Backward blocks) {
  TORCH_CHECK(grad.dim() == 4, name, ": grad is (R, C, h, w), not ", grad.sizes());
  Call call(name, map, rois, scale, grad.size(2), grad.size(3), max_pool);
  TORCH_CHECK(grad.size(0) == call.count && grad.size(1) == call.channels && grad.scalar_type() == map.scalar_type(),
              name, ": grad is (R, C, h, w) and of the map's type, not ", grad.sizes(), ", ", grad.scalar_type());
  at::Tensor from = grad.contiguous(call.format), out = fresh(map.sizes(), map.options(), call.format);
  const void* data = from.const_data_ptr();
  void* to = out.mutable_data_ptr();
  at::parallel_for(0, call.tasks(8, 128), 1, [&](int64_t begin, int64_t end) { blocks(call, data, to, begin, end); });
  return out;
}
