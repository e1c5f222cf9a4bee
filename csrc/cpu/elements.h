// Vectors of float read from and written to float or bfloat16. Compiled once per instruction set,
// see vector.h.
#pragma once

#include "image_kernels.h"
#include "vector.h"

namespace fastnce::FASTNCE_ISA {

using Floats = Vector<float>;
constexpr int kFloatLanes = kLanes<float>;
using Halves = typename VectorOf<uint16_t, FASTNCE_VECTOR_BYTES / 2>::type;

inline Floats load_floats(const float* p) { return load(p); }
inline void store_floats(float* p, Floats x) { store(p, x); }

inline Floats load_floats(const Bfloat16* p) {
  const Halves halves = *reinterpret_cast<const Halves*>(p);
  return (Floats)(__builtin_convertvector(halves, Vector<uint32_t>) << 16);
}

// To the nearest, ties to even.
inline void store_floats(Bfloat16* p, Floats x) {
  const Vector<uint32_t> bits = (Vector<uint32_t>)x;
  const Vector<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Vector<uint32_t> kept = x == x ? rounded : (bits >> 16) | 0x40;  // a NaN stays one
  *reinterpret_cast<Halves*>(p) = __builtin_convertvector(kept, Halves);
}

}  // namespace fastnce::FASTNCE_ISA
