// What the CPU operators share: types, fresh memory, regions sorted by image, blocks of channels.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "roi_align.h"

inline Type type_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return kFloat;
    case at::kDouble: return kDouble;
    case at::kBFloat16: return kBF16;
    case at::kHalf: return kFP16;
    default: TORCH_CHECK_NOT_IMPLEMENTED(false, "lcrnet: float, double, bfloat16 or half, not ", type);
  }
}

// How a map lies in memory, and with it the result: as `channels_last` of register.py says it.
inline at::MemoryFormat format_of(const at::Tensor& map) {
  bool last = map.is_contiguous(at::MemoryFormat::ChannelsLast) && !map.is_contiguous();
  return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// Memory that is about to be written once. Page faults would cost more than the writing: a large output asks for huge
// pages (where the system lets a program ask: transparent_hugepage = madvise).
at::Tensor fresh(at::IntArrayRef shape, const at::TensorOptions& options, at::MemoryFormat format);

// rois (R, 5) contiguous -> the order of the regions by (level, image), stable, and where each pair starts; regions of
// no level or image come last.
void sort_rois(const at::Tensor& rois, const int64_t* level, int64_t levels, int64_t images,
               std::vector<int64_t>& order, std::vector<int64_t>& start);

// Channels a task, so that `bytes_a_channel` of each stay in a core's own cache; a multiple of `least`, at most `most`.
inline int block_of(int64_t bytes_a_channel, int64_t least, int64_t most) {
  int64_t fit = (int64_t(768) << 10) / std::max<int64_t>(bytes_a_channel, 1) / least * least;
  return int(std::clamp(fit, least, most));
}
