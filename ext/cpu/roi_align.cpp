#include "roi_align.h"

#include "tensors.h"

namespace {

struct Call {
  RoiAlign a;
  std::vector<const void*> maps;
  std::vector<int> rows, columns;
  std::vector<double> scale;
  std::vector<int64_t> order, start;
  at::Tensor rois, level;
};

// What forward and backward have in common: all but the maps' memory.
void describe(Call& call, at::ScalarType type, const at::Tensor& rois, const std::optional<at::Tensor>& level,
              at::ArrayRef<double> scales, int64_t images, int64_t channels, int64_t height, int64_t width,
              int64_t sampling_ratio, bool aligned, int64_t step) {
  size_t levels = scales.size();
  TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5, "roi_align: boxes are (R, 5), not ", rois.sizes());
  TORCH_CHECK(height > 0 && width > 0 && step > 0, "roi_align: output_size and step are at least 1");
  TORCH_CHECK(height < 1 << 20 && width < 1 << 20 && sampling_ratio < 1 << 20, "roi_align: too many bins or samples");
  TORCH_CHECK(levels == 1 || level, "roi_align: several maps need the level of each region");
  RoiAlign& a = call.a;
  a.type = type_of(type);
  call.rois = rois.to(type == at::kDouble ? at::kDouble : at::kFloat).contiguous();
  if (levels > 1) {
    TORCH_CHECK(level->dim() == 1 && level->size(0) == rois.size(0), "roi_align: level is (R,), not ", level->sizes());
    call.level = level->to(at::kLong).contiguous();
  }
  call.scale = scales.vec();
  a.levels = int(levels);
  a.scale = call.scale.data();
  a.images = images;
  a.channels = channels;
  a.rois = call.rois.const_data_ptr();
  a.regions = rois.size(0);
  a.bins_down = int(height);
  a.bins_across = int(width);
  a.step = int(step);
  a.out_down = int((height + step - 1) / step);
  a.out_across = int((width + step - 1) / step);
  a.sampling_ratio = int(sampling_ratio);
  a.aligned = aligned;
  const int64_t* at = levels > 1 ? call.level.const_data_ptr<int64_t>() : nullptr;
  sort_rois(call.rois, at, int64_t(levels), images, call.order, call.start);
  a.order = call.order.data();
  a.start = call.start.data();
}

at::Tensor forward(at::TensorList maps, const at::Tensor& rois, const std::optional<at::Tensor>& level,
                   at::ArrayRef<double> scales, int64_t height, int64_t width, int64_t sampling_ratio, bool aligned,
                   int64_t step) {
  TORCH_CHECK(maps.size() > 0 && maps.size() == scales.size(), "roi_align: one scale for each map");
  for (const auto& map : maps)
    TORCH_CHECK(map.dim() == 4 && map.size(0) == maps[0].size(0) && map.size(1) == maps[0].size(1) &&
                    map.scalar_type() == maps[0].scalar_type(),
                "roi_align: maps are (B, C, H, W), of one type, B and C");
  Call call;
  describe(call, maps[0].scalar_type(), rois, level, scales, maps[0].size(0), maps[0].size(1), height, width,
           sampling_ratio, aligned, step);
  RoiAlign& a = call.a;
  auto format = format_of(maps[0]);
  a.channels_last = format == at::MemoryFormat::ChannelsLast;
  std::vector<at::Tensor> keep;
  for (const auto& map : maps) {
    keep.push_back(map.contiguous(format));
    call.maps.push_back(keep.back().const_data_ptr());
    call.rows.push_back(int(map.size(2)));
    call.columns.push_back(int(map.size(3)));
  }
  a.maps = call.maps.data();
  a.rows = call.rows.data();
  a.columns = call.columns.data();
  at::Tensor out = fresh({a.regions, a.channels, a.out_down, a.out_across}, maps[0].options(), format);
  void* to = out.mutable_data_ptr();
  if (a.channels_last) {
    auto run = PICK(roi_align_regions);
    at::parallel_for(0, a.regions, 1, [&](int64_t begin, int64_t end) { run(a, to, begin, end); });
  } else {
    for (int64_t k = call.start.back(); k < a.regions; k++) out[a.order[k]].zero_();
    int64_t cells = 1;
    for (size_t l = 0; l < call.rows.size(); l++) cells = std::max(cells, int64_t(call.rows[l]) * call.columns[l]);
    a.block = block_of(cells * out.element_size(), 16, 64);
    auto run = PICK(roi_align_planes);
    int64_t tasks = int64_t(maps.size()) * a.images * ((a.channels + a.block - 1) / a.block);
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { run(a, to, begin, end); });
  }
  return out;
}

std::vector<at::Tensor> backward(const at::Tensor& grad, const at::Tensor& rois, const std::optional<at::Tensor>& level,
                                 at::ArrayRef<double> scales, at::IntArrayRef shape, int64_t height, int64_t width,
                                 int64_t sampling_ratio, bool aligned, int64_t step, bool channels_last) {
  TORCH_CHECK(shape.size() == 2 + 2 * scales.size(), "roi_align_backward: shape is B, C, then H, W of each map");
  Call call;
  describe(call, grad.scalar_type(), rois, level, scales, shape[0], shape[1], height, width, sampling_ratio, aligned,
           step);
  RoiAlign& a = call.a;
  a.channels_last = channels_last;
  auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  at::Tensor from = grad.contiguous(format);
  std::vector<at::Tensor> out;
  int64_t cells = 1;
  for (size_t l = 0; l < scales.size(); l++) {
    out.push_back(fresh({shape[0], shape[1], shape[2 + 2 * l], shape[3 + 2 * l]}, grad.options(), format));
    call.maps.push_back(out.back().mutable_data_ptr());
    call.rows.push_back(int(shape[2 + 2 * l]));
    call.columns.push_back(int(shape[3 + 2 * l]));
    cells = std::max(cells, shape[2 + 2 * l] * shape[3 + 2 * l]);
  }
  a.maps = call.maps.data();
  a.rows = call.rows.data();
  a.columns = call.columns.data();
  // Channels-last, whole cells are read and written best: no more blocks than threads need.
  int64_t blocks = (at::get_num_threads() + out.size() * a.images - 1) / std::max<int64_t>(out.size() * a.images, 1);
  a.block = channels_last ? int(std::max<int64_t>((a.channels / blocks + 63) / 64 * 64, 64)) : block_of(cells * 4, 64, 256);
  auto run = PICK(roi_align_backward);
  int64_t tasks = int64_t(scales.size()) * a.images * ((a.channels + a.block - 1) / a.block);
  const void* data = from.const_data_ptr();
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { run(a, data, begin, end); });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(lcrnet, CPU, m) {
  m.impl("roi_align", forward);
  m.impl("roi_align_backward", backward);
}
