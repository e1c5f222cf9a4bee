// What every op's launchers take: plain values, no PyTorch. For <op>.cu and for the thin <op>.cpp
// that registers it.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace fastnce::cuda {

using Stream = CUstream_st*;  // cudaStream_t

enum class Dtype : int { kFloat32, kBfloat16, kFloat16 };

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

// What the choice of a kernel depends on.
struct DeviceProperties {
  int multiprocessors;
  int capability;  // 80, 90, 100: ten times the compute capability
};
// Asked for once per device; never waits for the device. Throws std::runtime_error.
// Emulated: what FASTNCE_EMULATED_MULTIPROCESSORS and FASTNCE_EMULATED_CAPABILITY say, or 4 and 80.
DeviceProperties device_properties(int device);

// Runs a kernel that does nothing on the current device, and waits for it: "ok", or what keeps this
// library's kernels from running there. Not while a graph is captured.
const char* try_a_kernel();

}  // namespace fastnce::cuda
