#define FASTNCE_ISA portable
#define FASTNCE_VECTOR_BYTES 16
#include "tile_kernels_table.h"

namespace fastnce::portable {

const TileKernels<float> kFloatKernels = make_table<float>("portable");
const TileKernels<double> kDoubleKernels = make_table<double>("portable");

}  // namespace fastnce::portable
