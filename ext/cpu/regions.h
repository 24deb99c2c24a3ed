// A call of an operator that takes regions of one map (roi_pool, roi_crop), as its loops need to know it.
#pragma once

#include <cstdint>

#include "level.h"
#include "roi_align.h"

struct Regions {
  Type type;        // of map and output; regions are double where it is kDouble, else float
  const void* map;  // (B, H, W, C) in memory where channels_last, else (B, C, H, W)
  int64_t images, channels;
  int rows, columns;
  bool channels_last;
  const void* rois;  // (R, 5)
  double scale;      // cells a pixel
  int height, width;  // of the output
  bool max_pool;      // of roi_crop: each output is the greatest of 2 x 2 points
  int64_t count;      // R
  // Regions sorted by image, stable: those of image k are order[start[k] .. start[k + 1]); the rest, from start[images]
  // on, lie in no image: they give zeros.
  const int64_t* order;
  const int64_t* start;
  int block;  // channels a task takes that works on (image, block of channels)
};
