// InfoNCE's negatives that belong to a single query each: matrices times vectors, as fast as memory
// gives the negatives.
#pragma once

#include "arguments.h"
#include "rows.h"

namespace fastnce::cuda {

struct OwnNegatives {
  const char* op;
  // Negatives (B, N, M, D) of these strides, in elements; R = B N.
  const void* data;
  Dtype dtype;
  int64_t total, queries, count, depth;  // R, N, M, D
  int64_t strides[4];
  PackedRows query;  // (R, P)
  Dtype packed;
  int64_t padded_depth;
  bool normalize;
  Temperature temperature;
  float* logits;   // (R, M), to base 2: filled by the sums
  float* inverse;  // (R, M): 1 / ||n||: likewise
};

// Of each query, total 2^largest is the sum of the exponentials of its negatives, (R,) each.
void launch_own_sums(const OwnNegatives& own, float* largest, float* sum, Stream stream);

struct OwnGradients {
  const float* row_statistics;  // (3, R): log-sum-exp, weight
  Upstream upstream;
  float* product = nullptr;   // (R, P): sum_m G_im n^_m, with
  float* term = nullptr;      // (R,): sum_m G_im z_im
  void* negatives = nullptr;  // (R, M, D), contiguous
};
void launch_own_gradients(const OwnNegatives& own, const OwnGradients& out, Stream stream);

}  // namespace fastnce::cuda
