#define FASTNCE_ISA avx512
#define FASTNCE_VECTOR_BYTES 64
#include "image_kernels_table.h"

namespace fastnce::avx512 {

const ImageKernels<float> kFloatImages = make_image_table<float>();
const ImageKernels<Bfloat16> kBfloat16Images = make_image_table<Bfloat16>();
const WinogradKernels kWinograd = make_winograd_table();

}  // namespace fastnce::avx512
