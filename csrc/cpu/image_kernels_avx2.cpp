#define FASTNCE_ISA avx2
#define FASTNCE_VECTOR_BYTES 32
#include "image_kernels_table.h"

namespace fastnce::avx2 {

const ImageKernels<float> kFloatImages = make_image_table<float>();
const ImageKernels<Bfloat16> kBfloat16Images = make_image_table<Bfloat16>();
const WinogradKernels kWinograd = make_winograd_table();

}  // namespace fastnce::avx2
