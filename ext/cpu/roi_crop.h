#pragma once

#include "regions.h"

KERNEL(void roi_crop_regions(const Regions& a, void* out, int64_t begin, int64_t end))
KERNEL(void roi_crop_planes(const Regions& a, void* out, int64_t begin, int64_t end))
KERNEL(void roi_crop_backward(const Regions& a, const void* grad, void* out, int64_t begin, int64_t end))
