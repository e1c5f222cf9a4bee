// The table of inner loops over feature maps, one per instruction set and element type. Maps are
// channels-last: the channels of a pixel are neighbours, their number a multiple of kChannelStep.
#pragma once

#include <cstdint>

namespace fastnce {

// The bits of a bfloat16.
struct Bfloat16 {
  uint16_t bits;
};

constexpr int64_t kChannelStep = 16;

// Winograd's F(4x4, 3x3): 4x4 outputs, which depend on a patch of 6x6 inputs, cost 36 products per
// pair of channels, not 144. A transformed patch is 36 planes.
constexpr int kOutputs = 4, kPatch = 6, kPlanes = kPatch * kPatch;
// Output channels that are computed together.
constexpr int64_t kChannelBlock = 64;

// Per channel; xhat = x scale + shift.
struct Normalization {
  const float* scale;
  const float* shift;
  float slope;
};

// What an output of a resampling is the sum of: weight[i] * input[index[i]].
struct Taps {
  static constexpr int kMost = 4;
  int count = 0;
  int64_t index[kMost];
  float weight[kMost];
};

template <class Element>
struct ImageKernels {
  // Patches B^T d B: out[plane * plane_size + tile * channels + c] from kPlanes pixels per tile.
  void (*transform_patches)(int64_t tiles, int64_t channels, const Element* const* pixels,
                            float* out, int64_t plane_size);
  // Row `row` of them alone, kPatch planes, of `channels` channels from pixels[..][first] on.
  void (*transform_patch_row)(int row, int64_t tiles, int64_t first, int64_t channels,
                              const Element* const* pixels, float* out, int64_t plane_size);
  // Row `row` of A dy A^T, kPatch planes of strips, from kOutputs^2 pixels per tile.
  void (*transform_gradient_row)(int row, int64_t tiles, int64_t channels,
                                 const Element* const* pixels, float* out, int64_t plane_size);
  // A^T m A + bias to kOutputs^2 pixels per tile, at channel `first`; null pixels are left out.
  // m[plane * plane_size + tile * kChannelBlock + lane].
  void (*transform_products)(int64_t tiles, int64_t first, int64_t lanes, const float* m,
                             int64_t plane_size, const float* bias, Element* const* pixels);

  // Sums over pixels of x - shift and of its square, per channel.
  void (*channel_sums)(int64_t pixels, int64_t channels, const Element* x, const float* shift,
                       float* sum, float* squares);
  // out = act(x scale + shift) + residual, act(z) = z > 0 ? z : slope z; residual may be null.
  void (*normalize)(int64_t pixels, int64_t channels, const Element* x, const Normalization& norm,
                    const Element* residual, Element* out);
  // With z = x scale + shift and e = g act'(z): sums over pixels of e and of e z, per channel.
  void (*normalize_sums)(int64_t pixels, int64_t channels, const Element* x, const Element* g,
                         const Normalization& norm, float* sum, float* product);
  // out = scale (e - mean_e - z mean_ez).
  void (*normalize_gradient)(int64_t pixels, int64_t channels, const Element* x, const Element* g,
                             const Normalization& norm, const float* mean_e, const float* mean_ez,
                             Element* out);

  // out[i] = sum over rows of weight * row[i], n elements.
  void (*blend_rows)(int64_t n, const Taps& taps, const Element* const* rows, float* out);
  // The pixels of a row: out(x) = sum of taps[x] over the pixels of `row`.
  void (*blend_pixels)(int64_t width, int64_t channels, const Taps* taps, const float* row,
                       Element* out);
};

struct WinogradKernels {
  // The right factors b (depth, lanes) of the products lie in strips of so many lanes, (depth,
  // strip) each, kChannelBlock a multiple: what the tiles of a product share stays in the
  // first-level cache, where rows of many lanes would meet in a few of its sets.
  int64_t strip;
  // c (rows, lanes) = a (rows, depth) b (depth, lanes), rows of a and c `*_stride` apart.
  void (*multiply)(int64_t rows, int64_t depth, int64_t lanes, const float* a, int64_t a_stride,
                   const float* b, float* c, int64_t c_stride);
  // c += a^T b for a (depth, rows).
  void (*multiply_transposed)(int64_t rows, int64_t depth, int64_t lanes, const float* a,
                              int64_t a_stride, const float* b, float* c, int64_t c_stride);
  // G w G^T of kChannelStep filters w[lane * lane_stride + tap * tap_step], taps 0 .. 8 row by row:
  // out[plane * plane_size + lane].
  void (*transform_filters)(const float* w, int64_t lane_stride, int64_t tap_step, float* out,
                            int64_t plane_size);
  // Its adjoint: G^T u G of kChannelStep filters.
  void (*transform_filter_gradients)(const float* u, int64_t plane_size, float* w,
                                     int64_t lane_stride);
};

template <class Element>
const ImageKernels<Element>& image_kernels();
const WinogradKernels& winograd_kernels();

}  // namespace fastnce
