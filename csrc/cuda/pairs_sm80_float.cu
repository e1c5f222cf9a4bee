#include "pairs_sm80.cuh"

namespace fastnce::cuda {

void launch_sums_float(const Pairs& pairs, const SumsPlan& plan, const Sums& out, Stream stream) {
  launch_sums_of<float>(pairs, plan, out, stream);
}

void launch_products_float(const Pairs& pairs, const ProductsPlan& plan, const Products& out,
                           Stream stream) {
  launch_products_of<float>(pairs, plan, out, stream);
}

}  // namespace fastnce::cuda
