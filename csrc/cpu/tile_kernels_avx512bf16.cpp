#define FASTNCE_ISA avx512bf16
#define FASTNCE_VECTOR_BYTES 64
#include "products.h"
// After the products, whose multiply_add it uses.
#include "pair_blocks.h"

namespace fastnce::avx512bf16 {

extern const PairKernels kPairKernels;
const PairKernels kPairKernels = {
    multiply<Pair>, multiply_transposed<Pair>, round_row, scale_block, round_block, widen_block,
    store_rounded,  multiply_pairs_rounds};

}  // namespace fastnce::avx512bf16
