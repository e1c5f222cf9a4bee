#define FASTNCE_ISA avx512
#define FASTNCE_VECTOR_BYTES 64
#include "tile_kernels_table.h"

namespace fastnce::avx512 {

const TileKernels<float> kFloatKernels = make_table<float>("avx512");
const TileKernels<double> kDoubleKernels = make_table<double>("avx512");

}  // namespace fastnce::avx512
