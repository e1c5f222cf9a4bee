// Vectors of FASTNCE_VECTOR_BYTES bytes through the compiler's vector extension, and exp on them.
//
// Included only by the files that are compiled once per instruction set, which define
// FASTNCE_ISA and FASTNCE_VECTOR_BYTES. Everything lives in a namespace of that name: an inline
// function shared between them would let the linker keep the copy that old processors cannot run.
// For the same reason no library header with inline functions is included here, but for the
// compiler's own intrinsics, which are always inlined.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "tile_kernels.h"

namespace fastnce::FASTNCE_ISA {

template <class T, int kBytes = FASTNCE_VECTOR_BYTES>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
using Signed = Vector<LaneInteger<T>>;

template <class T>
constexpr int kLanes = FASTNCE_VECTOR_BYTES / static_cast<int>(sizeof(T));

// Vectors across a tile and rows down it: the accumulators, one row of b and one broadcast fill the
// registers (32 with AVX-512, else 16, less one where multiply and add are separate).
#if FASTNCE_VECTOR_BYTES == 64
constexpr int kTileVectors = 3, kTileRows = 8;
#elif FASTNCE_VECTOR_BYTES == 32
constexpr int kTileVectors = 3, kTileRows = 4;
#else
constexpr int kTileVectors = 2, kTileRows = 4;
#endif

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Lanes of one slab.
template <class T>
constexpr int64_t kWidth = kTileVectors * kLanes<T>;

// Calls run(number of vectors that `lanes` fill, as a Constant).
template <class T, class Run>
inline void with_vectors(int64_t lanes, const Run& run) {
  const int64_t vectors = (lanes + kLanes<T> - 1) / kLanes<T>;
  if (vectors == 1) {
    run(Constant<1>{});
  } else if (vectors == 2) {
    run(Constant<2>{});
  } else {
    run(Constant<kTileVectors>{});
  }
}

template <class T>
inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}

template <class T>
inline void store(T* p, Vector<T> v) {
  *reinterpret_cast<Vector<T>*>(p) = v;
}

template <class T>
inline Vector<T> splat(T x) {
  return x - Vector<T>{};
}

template <class T>
inline Signed<T> lane_numbers() {
  Signed<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = i;
  return v;
}

struct Sum {
  template <class V>
  static V apply(V a, V b) {
    return a + b;
  }
};
struct Max {
  template <class V>
  static V apply(V a, V b) {
    return a > b ? a : b;
  }
};

// Folds the lanes of v by halves.
template <class Op, class T, int kBytes = FASTNCE_VECTOR_BYTES>
inline T reduce(typename VectorOf<T, kBytes>::type v) {
  if constexpr (kBytes > 16) {
    typename VectorOf<T, kBytes / 2>::type low, high;
    __builtin_memcpy(&low, &v, kBytes / 2);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + kBytes / 2, kBytes / 2);
    return reduce<Op, T, kBytes / 2>(Op::apply(low, high));
  } else {
    T result = v[0];
    for (int i = 1; i < kBytes / static_cast<int>(sizeof(T)); ++i) {
      result = Op::apply(result, static_cast<T>(v[i]));
    }
    return result;
  }
}

// exp with 1 to 2 ulp; results below the smallest normal number are 0 or denormal; NaN stays NaN.
//
// x = n ln 2 + r, |r| <= ln 2 / 2, and exp(x) = 2^n exp(r). The polynomial is the minimax fit of
// exp(r) = 1 + r + r^2 q(r) with relative error 3e-9.
inline Vector<float> exp_of_rest(Vector<float> r) {
  Vector<float> q = splat(0.00138145986467f);
  q = q * r + 0.00836871687973f;
  q = q * r + 0.0416683880453f;
  q = q * r + 0.166665206317f;
  q = q * r + 0.499999934478f;
  return (q * r + 1.0f) * r + 1.0f;
}

// ln 2 in two parts, the first with enough trailing zeros for n * part to be exact.
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kLog2E = 1.44269504f;

#ifdef __AVX512F__

inline Vector<float> exp(Vector<float> x) {
  // Beyond, the result is 0 or inf all the same; at infinity itself r would be inf - inf. In this
  // order NaN passes.
  const __m512 within =
      _mm512_min_ps(_mm512_set1_ps(128.0f), _mm512_max_ps(_mm512_set1_ps(-128.0f), (__m512)x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(within, _mm512_set1_ps(kLog2E)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vector<float> steps = (Vector<float>)n;
  const Vector<float> r = (Vector<float>)within - steps * kLn2High - steps * kLn2Low;
  return (Vector<float>)_mm512_scalef_ps((__m512)exp_of_rest(r), n);
}

#else

inline Vector<float> exp(Vector<float> x) {
  using Bits = Vector<uint32_t>;
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const Vector<float> shifted = x * kLog2E + kRound, n = shifted - kRound;
  const Vector<float> r = x - n * kLn2High - n * kLn2Low;
  // 2^n is added to the exponent's bits.
  Vector<float> y = (Vector<float>)((Bits)exp_of_rest(r) + ((Bits)shifted << 23));
  y = x < -87.33f ? splat(0.0f) : y;
  y = x > 88.72f ? splat(__builtin_inff()) : y;
  return x == x ? y : x;
}

#endif

inline Vector<double> exp(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

}  // namespace fastnce::FASTNCE_ISA
