// Single rows: packing them with their norms before the passes (pairs.h), and the way back through
// the normalisation after them.
//
// Rows are packed as x' = 2^e x, contiguous and padded with zeros. The power of two is exact and
// brings the largest element to [1, 2), so that no product of rows of any size overflows. The unit
// row is x^ = scale x': scale multiplies products, not rows. Rows that are not normalised have e =
// 0 and scale 1.
#pragma once

#include "arguments.h"

namespace fastnce::cuda {

// R rows of (batch, rows) in order.
struct PackedRows {
  void* data = nullptr;      // (R, P) in the rows' dtype
  float* scale = nullptr;    // (R,)
  float* inverse = nullptr;  // (R,): 1 / ||x||, 0 for a zero row; 1 where rows are not normalised
};

// Rows alone, or pairs of rows x_i, y_i with their products.
struct Pack {
  RowsView x;
  PackedRows x_packed;
  RowsView y = {};  // like x in shape and dtype; no data: x alone
  PackedRows y_packed;
  float* products = nullptr;  // (R,): x'_i . y'_i
};

struct PackOptions {
  const char* op;
  int64_t padded_depth;
  Dtype dtype;  // of the rows: bfloat16 or float16
  bool normalize;
};

// Up to two sets of rows, of one dtype and depth, in one launch.
constexpr int kMostPacks = 2;
void launch_pack(const Pack* packs, int count, const PackOptions& options, Stream stream);

// A factor of a gradient: a float, or one on the device.
struct Upstream {
  const float* tensor = nullptr;
  float value = 1.0f;
};

// The gradient of rows. That of the unit row is g = (sum_p factor_p product_p + pair_weight pair^)
// upstream / t, through the normalisation (g - x^ (x^ . g)) / ||x||.
struct RowGradient {
  PackedRows rows;
  int64_t count;                   // R
  const float* product = nullptr;  // (parts, R, P)
  int64_t parts = 0;               // 0 for no products
  const float* factor = nullptr;  // (factor_parts, R), of the first parts; others count as they are
  int64_t factor_parts = 0;
  PackedRows pair = {};                // rows of which each takes part alone, or none
  const float* pair_weight = nullptr;  // (R,)
  void* out = nullptr;                 // (R, D), contiguous
};

struct RowGradientOptions {
  const char* op;
  int64_t depth, padded_depth;
  Dtype dtype;
  bool normalize;
  Temperature temperature;
  Upstream upstream;
};

// Up to three sets of rows in one launch.
constexpr int kMostRowGradients = 3;
void launch_row_gradients(const RowGradient* gradients, int count,
                          const RowGradientOptions& options, Stream stream);

}  // namespace fastnce::cuda
