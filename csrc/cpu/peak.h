// Multiply-adds that wait for nothing but the arithmetic units: what a product could reach at best.
#pragma once

#include "vector.h"

namespace fastnce::FASTNCE_ISA {

// Independent chains, enough to hide the latency of a multiply-add. With two factors they fill the
// registers (32 with AVX-512, else 16).
constexpr int kChains = FASTNCE_VECTOR_BYTES == 64 ? 24 : 12;

// `rounds` multiply-adds on each chain; returns how many floating-point operations those are.
//
// The factors are unknown to the compiler, and no two chains are alike, or it would keep one of
// them. The factor is near -1, so that the numbers neither settle nor leave the normal range.
template <class T>
int64_t multiply_add_rounds(int64_t rounds) {
  volatile T hidden_factor = static_cast<T>(-0.9999999), hidden_term = static_cast<T>(0.5);
  const Vector<T> factor = splat<T>(hidden_factor), term = splat<T>(hidden_term);
  Vector<T> chain[kChains];
  for (int c = 0; c < kChains; ++c) chain[c] = splat<T>(static_cast<T>(1 + c)) * term;
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) chain[c] = chain[c] * factor + term;
  }
  Vector<T> total = chain[0];
  for (int c = 1; c < kChains; ++c) total += chain[c];
  volatile T used = reduce<Sum, T>(total);
  (void)used;
  return rounds * kChains * kLanes<T> * 2;
}

}  // namespace fastnce::FASTNCE_ISA
