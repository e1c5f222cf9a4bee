// What every op's launchers take: plain values, no PyTorch. For <op>.cu and for the thin <op>.cpp
// that registers it.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace fastnce::cuda {

using Stream = CUstream_st*;  // cudaStream_t

enum class Dtype : int { kFloat32, kBfloat16, kFloat16 };

// How the products of float32 rows are made: the factors in three products of tf32 parts, which is
// as good as float32; rounded to tf32; rounded to bfloat16. 16-bit rows have one way.
enum class Precision : int { kFloat32, kTf32, kBfloat16 };

// A float, or a 0-d tensor on the device, of float32 or float64: the host never waits for it.
struct Temperature {
  const void* tensor = nullptr;
  bool is_double = false;
  float value = 1.0f;
};

// Rows (batch, rows, depth) of any strides, in elements.
struct RowsView {
  const void* data;
  Dtype dtype;
  int64_t batch, rows, depth;
  int64_t strides[3];
};

}  // namespace fastnce::cuda
