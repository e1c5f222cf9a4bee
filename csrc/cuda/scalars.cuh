// What kernels share: numbers of rows, and four elements at a time.
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

// Of batches of `rows` rows each, all numbered in order.
template <class T>
__device__ __forceinline__ const T* row_of(const void* data, int64_t rows, const int64_t* strides,
                                           int64_t row) {
  const int64_t batch = row / rows;
  return static_cast<const T*>(data) + batch * strides[0] + (row - batch * rows) * strides[1];
}

// Elements d ... d + 3 of a row, zeros from `depth` on. `whole`: they lie side by side, aligned to
// their size, and the depth is a multiple of 4.
template <class T>
__device__ __forceinline__ float4 load_four(const T* row, int64_t d, int64_t depth, int64_t stride,
                                            bool whole) {
  if (whole) {
    if (d >= depth) return make_float4(0, 0, 0, 0);
    if constexpr (sizeof(T) == 4) {
      return *reinterpret_cast<const float4*>(row + d);
    } else {
      union {
        uint2 bits;
        T elements[4];
      } four;
      four.bits = *reinterpret_cast<const uint2*>(row + d);
      return make_float4(to_float(four.elements[0]), to_float(four.elements[1]),
                         to_float(four.elements[2]), to_float(four.elements[3]));
    }
  }
  float out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = d + i < depth ? to_float(row[(d + i) * stride]) : 0.0f;
  return make_float4(out[0], out[1], out[2], out[3]);
}

template <class T>
__device__ __forceinline__ void store_four(T* row, int64_t d, int64_t depth, float4 x, bool whole) {
  const T out[4] = {from_float<T>(x.x), from_float<T>(x.y), from_float<T>(x.z), from_float<T>(x.w)};
  if (whole) {
    if (d >= depth) return;
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<float4*>(row + d) = x;
    } else {
      union {
        uint2 bits;
        T elements[4];
      } four = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) four.elements[i] = out[i];
      *reinterpret_cast<uint2*>(row + d) = four.bits;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (d + i < depth) row[d + i] = out[i];
  }
}

__device__ __forceinline__ float4 operator*(float4 a, float b) {
  return make_float4(a.x * b, a.y * b, a.z * b, a.w * b);
}
__device__ __forceinline__ void add_product(float4& sum, float a, float4 b) {
  sum.x += a * b.x;
  sum.y += a * b.y;
  sum.z += a * b.z;
  sum.w += a * b.w;
}
__device__ __forceinline__ float dot(float4 a, float4 b) {
  return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}
__device__ __forceinline__ float largest_of(float4 a) {
  return fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(a.z), fabsf(a.w)));
}
__device__ __forceinline__ double dot_double(float4 a, float4 b) {
  const double low = static_cast<double>(a.x) * b.x + static_cast<double>(a.y) * b.y;
  return low + static_cast<double>(a.z) * b.z + static_cast<double>(a.w) * b.w;
}

// Whether load_four may take the elements as they lie.
inline bool lie_in_fours(const void* data, Dtype dtype, int64_t depth, const int64_t* strides,
                         int dimensions) {
  bool out = strides[dimensions - 1] == 1 && depth % 4 == 0;
  for (int i = 0; i < dimensions - 1; ++i) out = out && strides[i] % 4 == 0;
  const int64_t bytes = dtype == Dtype::kFloat32 ? 16 : 8;
  return out && reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

// Calls run(T{}, U{}) with the types of rows and of packed rows.
template <class Run>
void with_types(Dtype rows, Dtype packed, const Run& run) {
  if (rows == Dtype::kFloat16) return run(float16{}, float16{});
  if (rows == Dtype::kBfloat16) return run(bfloat16{}, bfloat16{});
  if (packed == Dtype::kBfloat16) return run(float{}, bfloat16{});
  run(float{}, float{});
}

}  // namespace fastnce::cuda
