#define FASTNCE_ISA portable
#define FASTNCE_VECTOR_BYTES 16
#include "image_kernels_table.h"

namespace fastnce::portable {

const ImageKernels<float> kFloatImages = make_image_table<float>();
const ImageKernels<Bfloat16> kBfloat16Images = make_image_table<Bfloat16>();
const WinogradKernels kWinograd = make_winograd_table();

}  // namespace fastnce::portable
