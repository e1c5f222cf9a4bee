#include "pairs_sm80.cuh"

namespace fastnce::cuda {

void launch_sums_half(const Pairs& pairs, const SumsPlan& plan, const Sums& out, Stream stream) {
  const bool brain = pairs.dtype == Dtype::kBfloat16;
  (brain ? launch_sums_of<bfloat16> : launch_sums_of<float16>)(pairs, plan, out, stream);
}

void launch_products_half(const Pairs& pairs, const ProductsPlan& plan, const Products& out,
                          Stream stream) {
  const bool brain = pairs.dtype == Dtype::kBfloat16;
  (brain ? launch_products_of<bfloat16> : launch_products_of<float16>)(pairs, plan, out, stream);
}

}  // namespace fastnce::cuda
