// The passes of pairs.h by Hopper's own instructions, for 16-bit rows of 64 to 512 elements.
#pragma once

#include "pairs.h"

namespace fastnce::cuda::sm90 {

// Whether the passes over these pairs can be made here.
inline bool runs(const Pairs& pairs, const Machine& machine) {
  constexpr int64_t kMost = int64_t{1} << 30;  // columns, and a tile more, are counted by an int
  return machine.capability == 90 && pairs.dtype != Dtype::kFloat32 && pairs.depth >= 64 &&
         pairs.depth <= 512 && pairs.rows <= kMost && pairs.columns <= kMost;
}

SumsPlan plan_sums(const Pairs& pairs, const Machine& machine, bool with_product);
void launch_sums(const Pairs& pairs, const SumsPlan& plan, const Sums& out, Stream stream);

ProductsPlan plan_products(const Pairs& pairs, const Machine& machine, bool of_x, bool of_y);
void launch_products(const Pairs& pairs, const ProductsPlan& plan, const Products& out,
                     Stream stream);

}  // namespace fastnce::cuda::sm90
