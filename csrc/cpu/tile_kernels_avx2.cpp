#define FASTNCE_ISA avx2
#define FASTNCE_VECTOR_BYTES 32
#include "tile_kernels_table.h"

namespace fastnce::avx2 {

const TileKernels<float> kFloatKernels = make_table<float>("avx2");
const TileKernels<double> kDoubleKernels = make_table<double>("avx2");

}  // namespace fastnce::avx2
