// Weighted sums of rows and of pixels: a separable resampling.
#pragma once

#include "elements.h"

namespace fastnce::FASTNCE_ISA {

template <class Element, int kCount>
void blend_rows_of(int64_t n, const Taps& taps, const Element* const* rows, float* out) {
  for (int64_t i = 0; i < n; i += kFloatLanes) {
    Floats sum = taps.weight[0] * load_floats(rows[0] + i);
#pragma GCC unroll 4
    for (int t = 1; t < kCount; ++t) sum += taps.weight[t] * load_floats(rows[t] + i);
    store(out + i, sum);
  }
}

template <class Element>
void blend_rows(int64_t n, const Taps& taps, const Element* const* rows, float* out) {
  using Run = void (*)(int64_t, const Taps&, const Element* const*, float*);
  constexpr Run kRuns[Taps::kMost] = {blend_rows_of<Element, 1>, blend_rows_of<Element, 2>,
                                      blend_rows_of<Element, 3>, blend_rows_of<Element, 4>};
  kRuns[taps.count - 1](n, taps, rows, out);
}

template <class Element, int kCount>
inline void blend_pixel(int64_t channels, const Taps& taps, const float* row, Element* out) {
  for (int64_t c = 0; c < channels; c += kFloatLanes) {
    Floats sum = taps.weight[0] * load(row + taps.index[0] * channels + c);
#pragma GCC unroll 4
    for (int t = 1; t < kCount; ++t) {
      sum += taps.weight[t] * load(row + taps.index[t] * channels + c);
    }
    store_floats(out + c, sum);
  }
}

template <class Element>
void blend_pixels(int64_t width, int64_t channels, const Taps* taps, const float* row,
                  Element* out) {
  for (int64_t x = 0; x < width; ++x, ++taps, out += channels) {
    switch (taps->count) {
      case 1:
        blend_pixel<Element, 1>(channels, *taps, row, out);
        break;
      case 2:
        blend_pixel<Element, 2>(channels, *taps, row, out);
        break;
      case 3:
        blend_pixel<Element, 3>(channels, *taps, row, out);
        break;
      default:
        blend_pixel<Element, 4>(channels, *taps, row, out);
    }
  }
}

}  // namespace fastnce::FASTNCE_ISA
