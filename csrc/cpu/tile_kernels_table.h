// Fills the table of inner loops for the instruction set that the including file is compiled for.
#pragma once

#include "epilogues.h"
#include "peak.h"
#include "products.h"
#include "rows.h"
#include "tile_kernels.h"

namespace fastnce::FASTNCE_ISA {

template <class T>
constexpr TileKernels<T> make_table() {
  return {kWidth<T>,
          multiply<T>,
          multiply_transposed<T>,
          exp_rows<T>,
          scale_rows<T>,
          softmax_both<T>,
          label_sums<T>,
          label_gradient<T>,
          label_exp<T>,
          label_scale<T>,
          block_maximum<T>,
          block_exp<T>,
          block_scale_both<T>,
          block_exp_both<T>,
          block_exclude_equal<T>,
          block_exclude_positive<T>,
          block_count_above<T>,
          sigmoid_block<T>,
          sum_squares<T>,
          dot<T>,
          scale<T>,
          add_scaled<T>,
          mix_and_dot<T>,
          subtract_and_scale<T>,
          store_rows<T>,
          multiply_add_rounds<T>,
          nullptr};
}

extern const TileKernels<float> kFloatKernels;
extern const TileKernels<double> kDoubleKernels;
const TileKernels<float> kFloatKernels = make_table<float>();
const TileKernels<double> kDoubleKernels = make_table<double>();

}  // namespace fastnce::FASTNCE_ISA
