#pragma once

#include <cstdint>

#include "level.h"

// The usable proposals of one image. A proposal's rank is its place among them by falling score, of equals the first;
// its row is its place in the tensors.
struct Proposals {
  int64_t count, joints, points;
  const int64_t* row;    // of each rank
  const float* score;    // of each rank
  const float* pose2d;   // by row: (J, 2)
  const float* pose3d;   // by row: (J, 3)
  const float* legs;     // by row
  const uint8_t* lower;  // (J,)
  const float* at;       // by row: (Q, 2), where overlap is a distance of points; else null
  const float* swapped;  // by row: (Q, 2), or null
  const float* centres;  // by row: what `swapped` of others is compared with, where that is not `at`; else null
  const double* limit;   // by row
};

// Rectangles, a multiple of sixteen; those that meet nothing, because they do not exist or no more, have a NaN.
struct Edges {
  float *left, *top, *right, *bottom;
};

// The same proposals, neighbours in the image together: sixteen a block, sixteen blocks a district. Each proposal has a
// rectangle, and so have blocks and districts, round those in them; a proposal can overlap a centre only where it meets
// the rectangle that the centre seeks.
struct Field {
  int64_t districts;
  Edges district, block;
  uint16_t* alive;  // of each block: a bit for each that is in no group yet
  int* rank;        // (blocks, 16)
  double* box;      // (blocks, 5, 16): x1, y1, x2, y2, area
  float* at;        // (blocks, 2 Q, 16)
  float* swapped;
};
struct Centre {
  int rank;
  double box[5];
  float left, top, right, bottom;  // what it seeks
};

struct Mode {
  double mass;
  int64_t centre, count;  // its centre is a place in the group, as its members are
  const uint16_t* member;
};

// Marks in `found`, a bit a rank, those alive that overlap the centre, which are alive no more.
KERNEL(void group_poses_overlapping(const Proposals& a, const Field& f, const Centre& c, double th_iou,
                                    uint64_t* found))
// The mode of the largest mass of a group, ranks (n,). poses: memory for (blocks, 3 J + 1, 16); bits: for (4, blocks)
KERNEL(Mode group_poses_best_mode(const Proposals& a, const int* group, int64_t n, double th_pose3d,
                                  double min_mode_score, float* poses, uint16_t* bits))
// The weighted mean of ranks (n,). sum: memory for 8 J
KERNEL(void group_poses_merge(const Proposals& a, const int* member, int64_t n, double* sum, float* pose2d,
                              float* pose3d, float* spread))
