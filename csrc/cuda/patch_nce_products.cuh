// The two products of a warp of patch_nce: 16 rows with 16 columns, both in shared memory, and 16 x
// 16 coefficients with those columns. Elements of the 16 x 16 results lie as multiply_* leaves
// them: with g = lane / 4, t = lane % 4, s[n][i] is of row g + 8 (i / 2) and column 8 n + 2 t + i
// % 2.
#pragma once

#include "device.cuh"

namespace fastnce::cuda {

// Elements from one row to the next: 16 bytes more than a row, so that 8 rows at one depth are in
// different banks.
template <class P, int Depth>
constexpr int kPitch = Depth + 16 / static_cast<int>(sizeof(P));

// 16-bit elements. Fragments of rows stay in registers up to a depth of 128; beyond, the sums need
// them.
template <class P, int Depth>
struct Products {
  static constexpr int kRowPitch = kPitch<P, Depth>;
  static constexpr int kSteps = Depth / 16, kHeld = kSteps < 8 ? kSteps : 8;
  const P* rows;
  uint32_t held[kHeld][4];

  __device__ __forceinline__ void load(const P* x, int lane) {
    rows = x + (lane % 16) * kRowPitch + lane / 16 * 8;
#pragma unroll
    for (int d = 0; d < kHeld; ++d) load_matrix_x4(held[d], rows + 16 * d);
  }

  // s = x y^T. Even and odd steps have sums of their own: half the length of the chain of dependent
  // instructions.
  __device__ __forceinline__ void similarities(float (&s)[2][4], const P* y, int lane) const {
    const P* at = y + (lane / 16 * 8 + lane % 8) * kRowPitch + lane / 8 % 2 * 8;
    float odd[2][4] = {};
    const auto add = [&](float (&sum)[2][4], const uint32_t (&a)[4], int d) {
      uint32_t b[4];
      load_matrix_x4(b, at + 16 * d);
      multiply_m16n8k16<P>(sum[0], a, {b[0], b[1]});
      multiply_m16n8k16<P>(sum[1], a, {b[2], b[3]});
    };
#pragma unroll
    for (int d = 0; d < kHeld; ++d) add(d % 2 ? odd : s, held[d], d);
#pragma unroll 1
    for (int d = kHeld; d < kSteps; d += 2) {
      uint32_t a[2][4];
      load_matrix_x4(a[0], rows + 16 * d);
      load_matrix_x4(a[1], rows + 16 * d + 16);
      add(s, a[0], d);
      add(odd, a[1], d + 1);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i / 4][i % 4] += odd[i / 4][i % 4];
  }

  // sum += e y, the coefficients rounded.
  __device__ __forceinline__ void accumulate(float (&sum)[Depth / 8][4], const float (&e)[2][4],
                                             const P* y, int lane) const {
    const uint32_t a[4] = {pack_pair<P>(e[0][0], e[0][1]), pack_pair<P>(e[0][2], e[0][3]),
                           pack_pair<P>(e[1][0], e[1][1]), pack_pair<P>(e[1][2], e[1][3])};
    const P* at = y + (lane % 16) * kRowPitch + lane / 16 * 8;
#pragma unroll
    for (int d = 0; d < Depth / 16; ++d) {
      uint32_t b[4];
      load_matrix_x4_transposed(b, at + 16 * d);
      multiply_m16n8k16<P>(sum[2 * d], a, {b[0], b[1]});
      multiply_m16n8k16<P>(sum[2 * d + 1], a, {b[2], b[3]});
    }
  }
};

// float32 as the sum of two tf32 numbers; of the four products the smallest is left out, which is
// below float's rounding.
struct Split {
  uint32_t high, low;
  __device__ __forceinline__ explicit Split(float x) {
    high = round_to_tf32(x);
    low = round_to_tf32(x - __uint_as_float(high));
  }
};
__device__ __forceinline__ void multiply_split(float (&c)[4], const Split (&a)[4],
                                               const Split (&b)[2]) {
  const uint32_t high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
  multiply_m16n8k8_tf32(c, {a[0].low, a[1].low, a[2].low, a[3].low}, {b[0].high, b[1].high});
  multiply_m16n8k8_tf32(c, high, {b[0].low, b[1].low});
  multiply_m16n8k8_tf32(c, high, {b[0].high, b[1].high});
}

template <int Depth>
struct Products<float, Depth> {
  static constexpr int kRowPitch = kPitch<float, Depth>;
  const float* rows;

  __device__ __forceinline__ void load(const float* x, int) { rows = x; }

  __device__ __forceinline__ void similarities(float (&s)[2][4], const float* y, int lane) const {
    const int at = lane / 4 * kRowPitch + lane % 4;
#pragma unroll 4
    for (int d = 0; d < Depth; d += 8) {
      const float* x = rows + at + d;
      const Split a[4] = {Split(x[0]), Split(x[8 * kRowPitch]), Split(x[4]),
                          Split(x[8 * kRowPitch + 4])};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float* column = y + at + d + 8 * n * kRowPitch;
        multiply_split(s[n], a, {Split(column[0]), Split(column[4])});
      }
    }
  }

  // The instruction's k = t and t + 4 are the columns 2 t and 2 t + 1, which is how the
  // coefficients lie.
  __device__ __forceinline__ void accumulate(float (&sum)[Depth / 8][4], const float (&e)[2][4],
                                             const float* y, int lane) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const Split a[4] = {Split(e[n][0]), Split(e[n][2]), Split(e[n][1]), Split(e[n][3])};
      const float* column = y + (8 * n + 2 * (lane % 4)) * kRowPitch + lane / 4;
#pragma unroll
      for (int d = 0; d < Depth / 8; ++d) {
        multiply_split(sum[d], a, {Split(column[8 * d]), Split(column[8 * d + kRowPitch])});
      }
    }
  }
};

}  // namespace fastnce::cuda
