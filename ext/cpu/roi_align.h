#pragma once

#include <cstdint>

#include "level.h"

enum Type { kFloat, kDouble, kBF16, kFP16 };

// One call: what the loops of roi_align.simd.cpp need to know.
struct RoiAlign {
  Type type;  // of maps and output; regions are double where it is kDouble, else float
  int levels;
  const void* const* maps;  // of each level; for the backward pass where its gradient goes
  const int* rows;          // cells down and across, of each level
  const int* columns;
  const double* scale;
  int64_t images, channels;
  bool channels_last;  // (B, H, W, C) and (R, h, w, C) in memory, else (B, C, H, W) and (R, C, h, w)
  const void* rois;    // (R, 5)
  const int64_t* level;
  int64_t regions;
  int bins_down, bins_across, step, out_down, out_across, sampling_ratio;
  bool aligned;
  // Regions sorted by (level, image), stable: those of the k-th such pair are order[start[k] .. start[k + 1]). The rest,
  // from start[levels * images] on, lie in no image: they give zeros.
  const int64_t* order;
  const int64_t* start;
  int block;  // channels a task of the backward pass, or of the (B, C, H, W) forward pass, takes
};

KERNEL(void roi_align_regions(const RoiAlign& a, void* out, int64_t begin, int64_t end))
KERNEL(void roi_align_planes(const RoiAlign& a, void* out, int64_t begin, int64_t end))
KERNEL(void roi_align_backward(const RoiAlign& a, const void* grad, int64_t begin, int64_t end))
