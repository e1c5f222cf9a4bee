// Sums of the columns of a tile over the 64 rows of a warp group, in a fixed order.
#pragma once

#include "pairs_sm90_tiles.cuh"

namespace fastnce::cuda::sm90 {

// Half of the sums to each of two lanes: kCount values become kCount / 2, of the first half where
// the lane's bit is not set. Three steps over the lanes of a column cost 28 exchanges for 32
// columns, where sums for all would cost 96.
template <int kCount>
__device__ __forceinline__ void share_sums(float (&v)[32], int bit) {
  const bool upper = (static_cast<int>(threadIdx.x) & bit) != 0;
#pragma unroll
  for (int k = 0; k < kCount / 2; ++k) {
    const float keep = upper ? v[k + kCount / 2] : v[k];
    const float give = upper ? v[k] : v[k + kCount / 2];
    v[k] = keep + shuffle_xor(give, bit);
  }
}

// A thread's share of 128 columns is 2 i + r for column 8 i + 2 t + r. One warp's sums, relative to
// a maximum of its own 16 rows (from logits), or to the offset that they already are relative to
// (from exponentials).
struct WarpColumns {
  float *largest, *sum;  // (128,) in shared memory

  __device__ __forceinline__ void store_sums(float (&v)[32], const Lane& lane) const {
    share_sums<32>(v, 16);
    share_sums<16>(v, 8);
    share_sums<8>(v, 4);
    const int first = static_cast<int>(threadIdx.x) & 28;
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[8 * ((first + k) / 2) + 2 * lane.t + k % 2] = v[k];
  }

  __device__ __forceinline__ void from_exponentials(const float (&e)[64], float offset,
                                                    const Lane& lane) const {
    float v[32];
#pragma unroll
    for (int k = 0; k < 32; ++k) {
      v[k] = e[4 * (k / 2) + k % 2] + e[4 * (k / 2) + 2 + k % 2];
      largest[8 * (k / 2) + 2 * lane.t + k % 2] = offset;
    }
    store_sums(v, lane);
  }

  __device__ __forceinline__ void from_logits(const float (&z)[64], const Lane& lane) const {
    float v[32];
#pragma unroll
    for (int k = 0; k < 32; ++k) {
      const float low = z[4 * (k / 2) + k % 2], high = z[4 * (k / 2) + 2 + k % 2];
      float top = fmaxf(low, high);
#pragma unroll
      for (int bit = 4; bit < kWarp; bit *= 2) top = fmaxf(top, shuffle_xor(top, bit));
      const float finite = top == -infinity() ? 0.0f : top;
      v[k] = exp2_fast(low - finite) + exp2_fast(high - finite);
      largest[8 * (k / 2) + 2 * lane.t + k % 2] = top;
    }
    store_sums(v, lane);
  }
};

// The four warps together, by one thread for a column.
__device__ __forceinline__ float2 join_warps(const float (&largest)[4][128],
                                             const float (&sum)[4][128], int column) {
  float top = -infinity(), total = 0.0f;
#pragma unroll
  for (int w = 0; w < 4; ++w) top = fmaxf(top, largest[w][column]);
  const float finite = top == -infinity() ? 0.0f : top;
#pragma unroll
  for (int w = 0; w < 4; ++w) total += sum[w][column] * exp2_fast(largest[w][column] - finite);
  return make_float2(top, total);
}

}  // namespace fastnce::cuda::sm90
