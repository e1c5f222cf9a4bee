// The transforms of Winograd's F(4x4, 3x3), and the products between them.
//
// Toom-Cook interpolation at 0, +-a, +-b and infinity. With a = 3/4, b = 3/2 the error is half of
// that of the usual +-1, +-2, and the squares are exact.
//   y = A^T [ (G w G^T) . (B^T d B) ] A
#pragma once

#include "elements.h"

namespace fastnce::FASTNCE_ISA {

// Of a product's tile: accumulators, a row of b and one broadcast fill the registers.
#if FASTNCE_VECTOR_BYTES == 64
constexpr int kProductRows = 6, kProductVectors = 4;
#elif FASTNCE_VECTOR_BYTES == 32
constexpr int kProductRows = 6, kProductVectors = 2;
#else
constexpr int kProductRows = 4, kProductVectors = 2;
#endif
constexpr int64_t kProductLanes = kProductVectors * kFloatLanes;
constexpr int64_t kStrip = kProductLanes > kChannelStep ? kProductLanes : kChannelStep;

constexpr float kPointA = 0.75f, kPointB = 1.5f;
constexpr float kA2 = kPointA * kPointA, kB2 = kPointB * kPointB;
constexpr float kA3 = kA2 * kPointA, kB3 = kB2 * kPointB;

// x -> B^T x: the coefficients of the products of all (t - point) but one.
inline void patch_transform(const Floats (&d)[kPatch], Floats (&out)[kPatch]) {
  const Floats even_a = d[4] - kB2 * d[2], odd_a = kPointA * (d[3] - kB2 * d[1]);
  const Floats even_b = d[4] - kA2 * d[2], odd_b = kPointB * (d[3] - kA2 * d[1]);
  out[0] = d[4] - (kA2 + kB2) * d[2] + (kA2 * kB2) * d[0];
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = d[5] - (kA2 + kB2) * d[3] + (kA2 * kB2) * d[1];
}

// One element of B^T x.
template <int kRow>
inline Floats patch_transform_row(const Floats (&d)[kPatch]) {
  Floats out[kPatch];
  patch_transform(d, out);
  return out[kRow];
}

// m -> A^T m: the values of the polynomial's four coefficients.
inline void product_transform(const Floats (&m)[kPatch], Floats (&out)[kOutputs]) {
  const Floats sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  const Floats sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  out[0] = m[0] + sum_a + sum_b;
  out[1] = kPointA * difference_a + kPointB * difference_b;
  out[2] = kA2 * sum_a + kB2 * sum_b;
  out[3] = kA3 * difference_a + kB3 * difference_b + m[5];
}

// g -> A g.
inline void gradient_transform(const Floats (&g)[kOutputs], Floats (&out)[kPatch]) {
  const Floats even_a = g[0] + kA2 * g[2], odd_a = kPointA * g[1] + kA3 * g[3];
  const Floats even_b = g[0] + kB2 * g[2], odd_b = kPointB * g[1] + kB3 * g[3];
  out[0] = g[0];
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = g[3];
}

template <int kRow>
inline Floats gradient_transform_row(const Floats (&g)[kOutputs]) {
  Floats out[kPatch];
  gradient_transform(g, out);
  return out[kRow];
}

// Row p of G is (1, p, p^2) / the product of the differences to the other points.
constexpr float kScale0 = 1 / (kA2 * kB2);
constexpr float kScaleA = 1 / (2 * kA2 * (kA2 - kB2)), kScaleB = 1 / (2 * kB2 * (kB2 - kA2));

inline void filter_transform(const Floats (&w)[3], Floats (&out)[kPatch]) {
  const Floats even_a = kScaleA * w[0] + (kScaleA * kA2) * w[2], odd_a = (kScaleA * kPointA) * w[1];
  const Floats even_b = kScaleB * w[0] + (kScaleB * kB2) * w[2], odd_b = (kScaleB * kPointB) * w[1];
  out[0] = kScale0 * w[0];
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = w[2];
}

inline void filter_gradient_transform(const Floats (&u)[kPatch], Floats (&out)[3]) {
  const Floats sum_a = kScaleA * (u[1] + u[2]), difference_a = kScaleA * (u[1] - u[2]);
  const Floats sum_b = kScaleB * (u[3] + u[4]), difference_b = kScaleB * (u[3] - u[4]);
  out[0] = kScale0 * u[0] + sum_a + sum_b;
  out[1] = kPointA * difference_a + kPointB * difference_b;
  out[2] = kA2 * sum_a + kB2 * sum_b + u[5];
}

template <class Element>
void transform_patches(int64_t tiles, int64_t channels, const Element* const* pixels, float* out,
                       int64_t plane_size) {
  for (int64_t tile = 0; tile < tiles; ++tile, pixels += kPlanes, out += channels) {
    for (int64_t c = 0; c < channels; c += kFloatLanes) {
      Floats half[kPatch][kPatch];
#pragma GCC unroll 6
      for (int x = 0; x < kPatch; ++x) {
        Floats column[kPatch], transformed[kPatch];
#pragma GCC unroll 6
        for (int y = 0; y < kPatch; ++y) column[y] = load_floats(pixels[y * kPatch + x] + c);
        patch_transform(column, transformed);
#pragma GCC unroll 6
        for (int y = 0; y < kPatch; ++y) half[y][x] = transformed[y];
      }
#pragma GCC unroll 6
      for (int y = 0; y < kPatch; ++y) {
        Floats row[kPatch];
        patch_transform(half[y], row);
#pragma GCC unroll 6
        for (int x = 0; x < kPatch; ++x) store(out + (y * kPatch + x) * plane_size + c, row[x]);
      }
    }
  }
}

template <class Element, int kRow>
void patch_row(int64_t tiles, int64_t first, int64_t channels, const Element* const* pixels,
               float* out, int64_t plane_size) {
  for (int64_t tile = 0; tile < tiles; ++tile, pixels += kPlanes, out += channels) {
    for (int64_t c = 0; c < channels; c += kFloatLanes) {
      Floats half[kPatch], row[kPatch];
#pragma GCC unroll 6
      for (int x = 0; x < kPatch; ++x) {
        Floats column[kPatch];
#pragma GCC unroll 6
        for (int y = 0; y < kPatch; ++y) {
          column[y] = load_floats(pixels[y * kPatch + x] + first + c);
        }
        half[x] = patch_transform_row<kRow>(column);
      }
      patch_transform(half, row);
#pragma GCC unroll 6
      for (int x = 0; x < kPatch; ++x) store(out + x * plane_size + c, row[x]);
    }
  }
}

template <class Element>
void transform_patch_row(int row, int64_t tiles, int64_t first, int64_t channels,
                         const Element* const* pixels, float* out, int64_t plane_size) {
  using Run = void (*)(int64_t, int64_t, int64_t, const Element* const*, float*, int64_t);
  constexpr Run kRuns[kPatch] = {patch_row<Element, 0>, patch_row<Element, 1>,
                                 patch_row<Element, 2>, patch_row<Element, 3>,
                                 patch_row<Element, 4>, patch_row<Element, 5>};
  kRuns[row](tiles, first, channels, pixels, out, plane_size);
}

template <class Element, int kRow>
void gradient_row(int64_t tiles, int64_t channels, const Element* const* pixels, float* out,
                  int64_t plane_size) {
  for (int64_t tile = 0; tile < tiles; ++tile, pixels += kOutputs * kOutputs) {
    for (int64_t c = 0; c < channels; c += kFloatLanes) {
      Floats half[kOutputs], row[kPatch];
#pragma GCC unroll 4
      for (int x = 0; x < kOutputs; ++x) {
        Floats column[kOutputs];
#pragma GCC unroll 4
        for (int y = 0; y < kOutputs; ++y) column[y] = load_floats(pixels[y * kOutputs + x] + c);
        half[x] = gradient_transform_row<kRow>(column);
      }
      gradient_transform(half, row);
      float* to = out + c / kStrip * tiles * kStrip + tile * kStrip + c % kStrip;
#pragma GCC unroll 6
      for (int x = 0; x < kPatch; ++x) store(to + x * plane_size, row[x]);
    }
  }
}

template <class Element>
void transform_gradient_row(int row, int64_t tiles, int64_t channels, const Element* const* pixels,
                            float* out, int64_t plane_size) {
  using Run = void (*)(int64_t, int64_t, const Element* const*, float*, int64_t);
  constexpr Run kRuns[kPatch] = {gradient_row<Element, 0>, gradient_row<Element, 1>,
                                 gradient_row<Element, 2>, gradient_row<Element, 3>,
                                 gradient_row<Element, 4>, gradient_row<Element, 5>};
  kRuns[row](tiles, channels, pixels, out, plane_size);
}

template <class Element>
void transform_products(int64_t tiles, int64_t first, int64_t lanes, const float* m,
                        int64_t plane_size, const float* bias, Element* const* pixels) {
  for (int64_t tile = 0; tile < tiles; ++tile, pixels += kOutputs * kOutputs, m += kChannelBlock) {
    for (int64_t c = 0; c < lanes; c += kFloatLanes) {
      Floats half[kOutputs][kPatch];
#pragma GCC unroll 6
      for (int x = 0; x < kPatch; ++x) {
        Floats column[kPatch], transformed[kOutputs];
#pragma GCC unroll 6
        for (int y = 0; y < kPatch; ++y) column[y] = load(m + (y * kPatch + x) * plane_size + c);
        product_transform(column, transformed);
#pragma GCC unroll 4
        for (int y = 0; y < kOutputs; ++y) half[y][x] = transformed[y];
      }
      const Floats shift = bias == nullptr ? Floats{} : load(bias + first + c);
#pragma GCC unroll 4
      for (int y = 0; y < kOutputs; ++y) {
        Floats row[kOutputs];
        product_transform(half[y], row);
#pragma GCC unroll 4
        for (int x = 0; x < kOutputs; ++x) {
          Element* pixel = pixels[y * kOutputs + x];
          if (pixel != nullptr) store_floats(pixel + first + c, row[x] + shift);
        }
      }
    }
  }
}

inline void transform_filters(const float* w, int64_t lane_stride, int64_t tap_step, float* out,
                              int64_t plane_size) {
  for (int64_t c = 0; c < kChannelStep; c += kFloatLanes, w += kFloatLanes * lane_stride) {
    Floats taps[3][3], half[3][kPatch];
    for (int tap = 0; tap < 9; ++tap) {
      for (int lane = 0; lane < kFloatLanes; ++lane) {
        taps[tap % 3][tap / 3][lane] = w[lane * lane_stride + tap * tap_step];
      }
    }
    for (int x = 0; x < 3; ++x) filter_transform(taps[x], half[x]);
    for (int y = 0; y < kPatch; ++y) {
      const Floats row[3] = {half[0][y], half[1][y], half[2][y]};
      Floats transformed[kPatch];
      filter_transform(row, transformed);
      for (int x = 0; x < kPatch; ++x) {
        store(out + (y * kPatch + x) * plane_size + c, transformed[x]);
      }
    }
  }
}

inline void transform_filter_gradients(const float* u, int64_t plane_size, float* w,
                                       int64_t lane_stride) {
  for (int64_t c = 0; c < kChannelStep; c += kFloatLanes, w += kFloatLanes * lane_stride) {
    Floats half[3][kPatch];
    for (int x = 0; x < kPatch; ++x) {
      Floats column[kPatch], transformed[3];
      for (int y = 0; y < kPatch; ++y) column[y] = load(u + (y * kPatch + x) * plane_size + c);
      filter_gradient_transform(column, transformed);
      for (int y = 0; y < 3; ++y) half[y][x] = transformed[y];
    }
    for (int y = 0; y < 3; ++y) {
      Floats taps[3];
      filter_gradient_transform(half[y], taps);
      for (int x = 0; x < 3; ++x) {
        for (int lane = 0; lane < kFloatLanes; ++lane) {
          w[lane * lane_stride + y * 3 + x] = taps[x][lane];
        }
      }
    }
  }
}

// c (kRows, kVectors * lanes) = or += a b, each element one chain of multiply-adds.
template <bool kTransposed, int kRows, int kVectors>
inline __attribute__((always_inline)) void product_tile(int64_t depth, const float* a,
                                                        int64_t a_stride, const float* b,
                                                        int64_t b_stride, float* c,
                                                        int64_t c_stride) {
  Floats sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = kTransposed ? load(c + i * c_stride + v * kFloatLanes) : Floats{};
    }
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    Floats row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kFloatLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const float x = kTransposed ? a[k * a_stride + i] : a[i * a_stride + k];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] += x * row[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + i * c_stride + v * kFloatLanes, sum[i][v]);
  }
}

template <bool kTransposed, int kRows, int kVectors>
void product_rows(int64_t rows, int64_t depth, const float* a, int64_t a_stride, const float* b,
                  int64_t b_stride, float* c, int64_t c_stride) {
  const int64_t a_step = kTransposed ? 1 : a_stride;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    product_tile<kTransposed, kRows, kVectors>(depth, a + i * a_step, a_stride, b, b_stride,
                                               c + i * c_stride, c_stride);
  }
  if constexpr (kRows > 1) {
    if (i < rows) {
      product_rows<kTransposed, kRows / 2, kVectors>(rows - i, depth, a + i * a_step, a_stride, b,
                                                     b_stride, c + i * c_stride, c_stride);
    }
  }
}

template <bool kTransposed, int kVectors>
void product_lanes(int64_t rows, int64_t depth, int64_t lanes, const float* a, int64_t a_stride,
                   const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  constexpr int64_t kWide = kVectors * kFloatLanes;
  int64_t lane = 0;
  for (; lane + kWide <= lanes; lane += kWide) {
    product_rows<kTransposed, kProductRows, kVectors>(rows, depth, a, a_stride, b + lane, b_stride,
                                                      c + lane, c_stride);
  }
  if constexpr (kVectors > 1) {
    if (lane < lanes) {
      product_lanes<kTransposed, kVectors - 1>(rows, depth, lanes - lane, a, a_stride, b + lane,
                                               b_stride, c + lane, c_stride);
    }
  }
}

template <bool kTransposed>
void multiply_planes(int64_t rows, int64_t depth, int64_t lanes, const float* a, int64_t a_stride,
                     const float* b, float* c, int64_t c_stride) {
  for (int64_t lane = 0; lane < lanes; lane += kStrip) {
    const int64_t left = lanes - lane;
    product_lanes<kTransposed, kProductVectors>(rows, depth, left < kStrip ? left : kStrip, a,
                                                a_stride, b + lane * depth, kStrip, c + lane,
                                                c_stride);
  }
}

}  // namespace fastnce::FASTNCE_ISA
