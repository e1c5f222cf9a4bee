// What the products multiply: numbers of type T, or pairs of bfloat16 that are summed in float.
//
// A Pair holds two neighbours along the dimension that is summed over, the first in its low half. A
// matrix of pairs then has half as many operands in that dimension, and is otherwise laid out like
// one of numbers: the same slabs, the same walk. It is the unit of AVX-512's vdpbf16ps.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tile_kernels.h"

namespace fastnce {

template <class P>
constexpr bool kPaired = std::is_same_v<P, Pair>;

// Operands that `numbers` numbers make.
template <class P>
constexpr int64_t operands(int64_t numbers) {
  return kPaired<P> ? (numbers + 1) / 2 : numbers;
}

// Bytes that `numbers` numbers take.
template <class P>
constexpr int64_t operand_bytes(int64_t numbers) {
  return numbers * static_cast<int64_t>(sizeof(P)) / (kPaired<P> ? 2 : 1);
}

// As in TileKernels; depth in operands.
template <class T>
void multiply(const TileKernels<T>& kernels, int64_t rows, int64_t depth, int64_t lanes, const T* a,
              int64_t a_slab, const T* b, T* c, bool accumulate) {
  kernels.multiply(rows, depth, lanes, a, a_slab, b, c, accumulate);
}
inline void multiply(const TileKernels<float>& kernels, int64_t rows, int64_t depth, int64_t lanes,
                     const Pair* a, int64_t a_slab, const Pair* b, float* c, bool accumulate) {
  kernels.pairs->multiply(rows, depth, lanes, a, a_slab, b, c, accumulate);
}

template <class T>
void multiply_transposed(const TileKernels<T>& kernels, int64_t columns, int64_t depth,
                         int64_t lanes, const T* a, const T* b, T* c) {
  kernels.multiply_transposed(columns, depth, lanes, a, b, c);
}
inline void multiply_transposed(const TileKernels<float>& kernels, int64_t columns, int64_t depth,
                                int64_t lanes, const Pair* a, const Pair* b, float* c) {
  kernels.pairs->multiply_transposed(columns, depth, lanes, a, b, c);
}

}  // namespace fastnce
