// Loops of instance norm over the pixels of a map.
#pragma once

#include "elements.h"

namespace fastnce::FASTNCE_ISA {

// Channels whose sums are in registers together.
constexpr int kSumVectors = 4;

template <class Element, int kVectors>
void channel_sums_of(int64_t pixels, int64_t channels, const Element* x, const float* shift,
                     float* sum, float* squares) {
  Floats total[kVectors] = {}, square[kVectors] = {};
  for (int64_t p = 0; p < pixels; ++p, x += channels) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Floats d = load_floats(x + v * kFloatLanes) - load(shift + v * kFloatLanes);
      total[v] += d;
      square[v] += d * d;
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store(sum + v * kFloatLanes, total[v]);
    store(squares + v * kFloatLanes, square[v]);
  }
}

template <class Element>
void channel_sums(int64_t pixels, int64_t channels, const Element* x, const float* shift,
                  float* sum, float* squares) {
  constexpr int64_t kWide = kSumVectors * kFloatLanes;
  int64_t c = 0;
  for (; c + kWide <= channels; c += kWide) {
    channel_sums_of<Element, kSumVectors>(pixels, channels, x + c, shift + c, sum + c, squares + c);
  }
  for (; c < channels; c += kFloatLanes) {
    channel_sums_of<Element, 1>(pixels, channels, x + c, shift + c, sum + c, squares + c);
  }
}

inline Floats normalized(Floats x, const Normalization& norm, int64_t c) {
  return x * load(norm.scale + c) + load(norm.shift + c);
}

template <class Element>
void normalize(int64_t pixels, int64_t channels, const Element* x, const Normalization& norm,
               const Element* residual, Element* out) {
  for (int64_t p = 0; p < pixels; ++p, x += channels, out += channels) {
    for (int64_t c = 0; c < channels; c += kFloatLanes) {
      const Floats z = normalized(load_floats(x + c), norm, c);
      Floats y = z > 0 ? z : norm.slope * z;
      if (residual != nullptr) y += load_floats(residual + p * channels + c);
      store_floats(out + c, y);
    }
  }
}

template <class Element, int kVectors>
void normalize_sums_of(int64_t pixels, int64_t channels, int64_t first, const Element* x,
                       const Element* g, const Normalization& norm, float* sum, float* product) {
  Floats total[kVectors] = {}, products[kVectors] = {};
  for (int64_t p = 0; p < pixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t c = first + v * kFloatLanes;
      const Floats z = normalized(load_floats(x + p * channels + c), norm, c);
      const Floats arriving = load_floats(g + p * channels + c);
      const Floats e = z > 0 ? arriving : norm.slope * arriving;
      total[v] += e;
      products[v] += e * z;
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store(sum + first + v * kFloatLanes, total[v]);
    store(product + first + v * kFloatLanes, products[v]);
  }
}

template <class Element>
void normalize_sums(int64_t pixels, int64_t channels, const Element* x, const Element* g,
                    const Normalization& norm, float* sum, float* product) {
  constexpr int64_t kWide = kSumVectors * kFloatLanes;
  int64_t c = 0;
  for (; c + kWide <= channels; c += kWide) {
    normalize_sums_of<Element, kSumVectors>(pixels, channels, c, x, g, norm, sum, product);
  }
  for (; c < channels; c += kFloatLanes) {
    normalize_sums_of<Element, 1>(pixels, channels, c, x, g, norm, sum, product);
  }
}

template <class Element>
void normalize_gradient(int64_t pixels, int64_t channels, const Element* x, const Element* g,
                        const Normalization& norm, const float* mean_e, const float* mean_ez,
                        Element* out) {
  for (int64_t p = 0; p < pixels; ++p, x += channels, g += channels, out += channels) {
    for (int64_t c = 0; c < channels; c += kFloatLanes) {
      const Floats z = normalized(load_floats(x + c), norm, c);
      const Floats arriving = load_floats(g + c);
      const Floats e = z > 0 ? arriving : norm.slope * arriving;
      const Floats centred = e - load(mean_e + c) - z * load(mean_ez + c);
      store_floats(out + c, load(norm.scale + c) * centred);
    }
  }
}

}  // namespace fastnce::FASTNCE_ISA
