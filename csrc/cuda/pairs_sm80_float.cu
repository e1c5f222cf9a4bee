#include "pairs_sm80_launch.cuh"

namespace fastnce::cuda {

void launch_sums_float(const Pairs& pairs, const SumsPlan& plan, const Sums& out, Stream stream) {
  const bool exact = pairs.precision == Precision::kFloat32;
  (exact ? launch_sums_of<Tf32Pair> : launch_sums_of<Tf32>)(pairs, plan, out, stream);
}

void launch_products_float(const Pairs& pairs, const ProductsPlan& plan, const Products& out,
                           Stream stream) {
  const bool exact = pairs.precision == Precision::kFloat32;
  (exact ? launch_products_of<Tf32Pair> : launch_products_of<Tf32>)(pairs, plan, out, stream);
}

}  // namespace fastnce::cuda
