// What roi_pool and roi_crop do alike around their loops: checks, memory, sharing out the work.
#pragma once

#include "regions.h"
#include "tensors.h"

typedef void (*Forward)(const Regions& a, void* out, int64_t begin, int64_t end);
typedef void (*Backward)(const Regions& a, const void* grad, void* out, int64_t begin, int64_t end);

// `regions` takes regions of channels-last maps, `planes` takes tasks of (image, block of channels) of other maps.
at::Tensor one_map_forward(const char* name, const at::Tensor& map, const at::Tensor& rois, double scale,
                           int64_t height, int64_t width, bool max_pool, Forward regions, Forward planes);
// `blocks` takes tasks of (image, block of channels).
at::Tensor one_map_backward(const char* name, const at::Tensor& grad, const at::Tensor& map, const at::Tensor& rois,
                            double scale, bool max_pool, Backward blocks);
