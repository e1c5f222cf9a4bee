// Fills the tables of loops over feature maps for the instruction set of the including file.
#pragma once

#include "normalization.h"
#include "resampling.h"
#include "winograd.h"

namespace fastnce::FASTNCE_ISA {

template <class Element>
constexpr ImageKernels<Element> make_image_table() {
  return {
      transform_patches<Element>,  transform_patch_row<Element>, transform_gradient_row<Element>,
      transform_products<Element>, channel_sums<Element>,        normalize<Element>,
      normalize_sums<Element>,     normalize_gradient<Element>,  blend_rows<Element>,
      blend_pixels<Element>};
}

constexpr WinogradKernels make_winograd_table() {
  return {kStrip, multiply_planes<false>, multiply_planes<true>, transform_filters,
          transform_filter_gradients};
}

extern const ImageKernels<float> kFloatImages;
extern const ImageKernels<Bfloat16> kBfloat16Images;
extern const WinogradKernels kWinograd;
const ImageKernels<float> kFloatImages = make_image_table<float>();
const ImageKernels<Bfloat16> kBfloat16Images = make_image_table<Bfloat16>();
const WinogradKernels kWinograd = make_winograd_table();

}  // namespace fastnce::FASTNCE_ISA
