// Rounding to pairs of bfloat16 and back (see operands.h). Needs AVX-512 with BF16 and BW.
#pragma once

#include "tile_kernels.h"
#include "vector.h"

namespace fastnce::FASTNCE_ISA {

// The lanes that hold a column, of the vector at lane j.
inline __mmask16 lanes_from(int64_t j, int64_t lanes) {
  return lanes - j >= 16 ? 0xffff : static_cast<__mmask16>((1u << (lanes - j)) - 1);
}

inline void round_row(int64_t n, const float* x, double factor, Pair* out) {
  const float narrow = static_cast<float>(factor);
  auto* numbers = reinterpret_cast<uint16_t*>(out);
  const float magnitude = narrow < 0 ? -narrow : narrow;
  if (magnitude < 1e30f && magnitude > 1e-30f) {
    const __m512 by = _mm512_set1_ps(narrow);
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 valid = lanes_from(i, n);
      const __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(valid, x + i), by);
      // A last number without neighbour is written with the 0 beside it.
      const __mmask16 written = n - i >= 16 ? valid : static_cast<__mmask16>(valid | (valid << 1));
      _mm256_mask_storeu_epi16(numbers + i, n % 2 == 0 ? valid : written,
                               (__m256i)_mm512_cvtneps_pbh(y));
    }
    return;
  }
  for (int64_t i = 0; i < n; i += 2) {
    const float low = static_cast<float>(x[i] * factor);
    const float high = i + 1 < n ? static_cast<float>(x[i + 1] * factor) : 0.0f;
    const __m128 both = _mm_setr_ps(low, high, 0, 0);
    out[i / 2] = static_cast<Pair>(_mm_cvtsi128_si32((__m128i)_mm_cvtneps_pbh(both)));
  }
}

inline void scale_block(int64_t rows, int64_t lanes, float* z, const float* lane_scale,
                        const float* row_scale) {
  for (int64_t r = 0; r < rows; ++r, z += kWidth<float>) {
    for (int64_t j = 0; j < lanes; j += kLanes<float>) {
      store(z + j, load(z + j) * (load(lane_scale + j) * row_scale[r]));
    }
  }
}

template <bool kDown, bool kAcross>
void round_rows(int64_t rows, int64_t lanes, const float* z, const float* row_scale, Pair* down,
                Pair* across) {
  // Element i of the first vector, then element i of the second.
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
  constexpr int64_t kStep = kWidth<float>;
  for (int64_t r = 0; r < rows; r += 2, z += 2 * kStep, down += kStep, across += 2 * kStep) {
    const bool two = r + 1 < rows;
    const __m512 first_scale = _mm512_set1_ps(row_scale[r]);
    const __m512 second_scale = _mm512_set1_ps(two ? row_scale[r + 1] : 0.0f);
    for (int64_t j = 0; j < lanes; j += kLanes<float>) {
      const __mmask16 valid = lanes_from(j, lanes);
      const __m512 first = _mm512_maskz_load_ps(valid, z + j);
      const __m512 second = _mm512_maskz_load_ps(two ? valid : 0, z + kStep + j);
      if constexpr (kDown) {
        const auto both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(second, second_scale),
                                                       _mm512_mul_ps(first, first_scale));
        _mm512_store_si512(down + j, _mm512_permutexvar_epi16(interleave, both));
      }
      if constexpr (kAcross) {
        const auto both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(across + j / 2),
                            _mm512_castsi512_si256(both));
        if (two) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(across + kStep + j / 2),
                              _mm512_extracti64x4_epi64(both, 1));
        }
      }
    }
  }
}

inline void round_block(int64_t rows, int64_t lanes, const float* z, const float* row_scale,
                        Pair* down, Pair* across) {
  if (down != nullptr && across != nullptr) {
    round_rows<true, true>(rows, lanes, z, row_scale, down, across);
  } else if (down != nullptr) {
    round_rows<true, false>(rows, lanes, z, row_scale, down, nullptr);
  } else if (across != nullptr) {
    round_rows<false, true>(rows, lanes, z, row_scale, nullptr, across);
  }
}

inline void widen_block(int64_t rows, int64_t lanes, const Pair* across, float* z) {
  for (int64_t r = 0; r < rows; ++r, z += kWidth<float>, across += kWidth<float>) {
    for (int64_t j = 0; j < lanes; j += kLanes<float>) {
      const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(across + j / 2));
      const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
      store(z + j, (Vector<float>)wide);
    }
  }
}

inline void store_rounded(int64_t rows, int64_t n, const float* x, int64_t stride, uint16_t* out,
                          int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r, x += stride, out += out_stride) {
    for (int64_t i = 0; i < n; i += kLanes<float>) {
      const __m256bh narrow = _mm512_cvtneps_pbh((__m512)load(x + i));
      _mm256_mask_storeu_epi16(out + i, lanes_from(i, n), (__m256i)narrow);
    }
  }
}

// As multiply_add_rounds in peak.h; two products an element, which cancel: (0.5, 0.5) (0.5, -0.5).
inline int64_t multiply_pairs_rounds(int64_t rounds) {
  volatile uint32_t hidden_x = 0x3f003f00, hidden_y = 0xbf003f00;
  const Pair x = hidden_x;
  const Vector<Pair> y = splat<Pair>(hidden_y);
  constexpr int kSums = 20;
  Vector<float> sum[kSums];
  for (int c = 0; c < kSums; ++c) sum[c] = splat<float>(static_cast<float>(1 + c));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int c = 0; c < kSums; ++c) sum[c] = multiply_add(x, y, sum[c]);
  }
  Vector<float> total = sum[0];
  for (int c = 1; c < kSums; ++c) total += sum[c];
  volatile float used = reduce<Sum, float>(total);
  (void)used;
  return rounds * kSums * kLanes<float> * 4;
}

}  // namespace fastnce::FASTNCE_ISA
