// Sums of the columns of a tile over the 64 rows of a warp group, in a fixed order.
#pragma once

#include "pairs_sm90_work.cuh"
#include "pairs_sums.cuh"

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

// One warp's sums to its line of the scratch, of logits with maxima over its own 16 rows if the
// offset is running, else of exponentials. A thread's share of the columns is 2 n + r for column
// 8 n + 2 t + r.
__device__ __forceinline__ void sum_columns_of_warp(const float (&tile)[16][4], Offset offset,
                                                    float (&largest)[128], float (&sum)[128]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, t2 = 2 * (lane % 4);
  float v[32];
#pragma unroll
  for (int k = 0; k < 32; ++k) {
    float first = tile[k / 2][k % 2], second = tile[k / 2][k % 2 + 2], top = offset.fixed;
    if (offset.running) {
      top = over_rows_max(fmaxf(first, second));
      first = exp2_fast(first - finite(top));
      second = exp2_fast(second - finite(top));
    }
    v[k] = first + second;
    if (lane < 4) largest[8 * (k / 2) + t2 + k % 2] = top;
  }
  share_sums<32>(v, 16);
  share_sums<16>(v, 8);
  share_sums<8>(v, 4);
#pragma unroll
  for (int k = 0; k < 4; ++k) sum[8 * (((lane & 28) + k) / 2) + t2 + k % 2] = v[k];
}

// The four warps together with what is in memory of earlier rows if `more`, by one thread for a
// column.
__device__ __forceinline__ void store_column(const float (&largest)[4][128],
                                             const float (&sum)[4][128], int column,
                                             float* out_largest, float* out_sum, bool more) {
  const float old = more ? *out_largest : FASTNCE_NO_LOGIT;
  float top = old;
#pragma unroll
  for (int w = 0; w < 4; ++w) top = fmaxf(top, largest[w][column]);
  float total = more ? *out_sum * exp2_fast(old - finite(top)) : 0.0f;
#pragma unroll
  for (int w = 0; w < 4; ++w) total += sum[w][column] * exp2_fast(largest[w][column] - finite(top));
  *out_largest = top;
  *out_sum = total;
}

}  // namespace fastnce::cuda::sm90
