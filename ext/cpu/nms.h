#pragma once

#include <cstdint>

#include "level.h"

// One call: what the loops of nms.simd.cpp need to know.
struct Nms {
  bool wide;             // boxes and scores are double, else float
  const void* boxes;     // (B, N, 4)
  const void* scores;    // (B, N)
  const int64_t* group;  // (B, N), or none
  int64_t count;         // N, at most 2^30
  double threshold;      // a number of the boxes' type
  int64_t max_keep;
  int64_t* keep;  // (B, max_keep)
  int64_t* kept;  // (B,)
};

KERNEL(void nms_images(const Nms& a, int64_t begin, int64_t end))
