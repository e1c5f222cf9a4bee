// What kernels share: the temperature, and numbers of rows.
#pragma once

#include "arguments.h"
#include "device.cuh"

namespace fastnce::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ double value_of(const Temperature& t) {
  if (t.tensor == nullptr) return t.value;
  return t.is_double ? *static_cast<const double*>(t.tensor) : *static_cast<const float*>(t.tensor);
}

// What turns a product into a logit in units of log 2: scales and this number multiply it, rounded
// once.
__device__ __forceinline__ double base_2_factor(double temperature) {
  return 1.4426950408889634 / temperature;
}
__device__ __forceinline__ double base_2_factor(const Temperature& t) {
  return base_2_factor(value_of(t));
}
__device__ __forceinline__ float to_base_2(float x, double factor) {
  return static_cast<float>(x * factor);
}

// 2^e with largest * 2^e in [1, 2), as far as e fits.
__device__ __forceinline__ float power_of_two(float largest) {
  const int exponent = (__float_as_int(largest) >> 23) & 255;
  const int shifted = 254 - exponent;
  return __int_as_float((shifted < 1 ? 1 : shifted) << 23);
}

// 1 / sqrt, 0 for 0. In double: logits are as exact as the norms in them, and there are few norms.
__device__ __forceinline__ float inverse_root(double squares) {
  return squares == 0 ? 0.0f : static_cast<float>(1 / sqrt(squares));
}

__device__ __forceinline__ double warp_sum_double(double x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// combine of what all threads have, for all of them. To be called by all threads, again after a
// barrier only.
template <class T, class Combine>
__device__ __forceinline__ T of_block(T mine, Combine combine) {
  T* shared = shared_memory<T>();
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) mine = combine(mine, shuffle_xor(mine, mask));
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = mine;
  sync_threads();
  T out = shared[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
    out = combine(out, shared[warp]);
  }
  return out;
}

template <class T>
__device__ __forceinline__ T block_sum(T mine) {
  return of_block(mine, [](T a, T b) { return a + b; });
}

// Calls run(T{}) with the type of a dtype.
template <class Run>
void with_type(Dtype dtype, const Run& run) {
  if (dtype == Dtype::kFloat16) return run(float16{});
  dtype == Dtype::kBfloat16 ? run(bfloat16{}) : run(float{});
}

}  // namespace fastnce::cuda
