#define FASTNCE_ISA avx512
#define FASTNCE_VECTOR_BYTES 64
#include "image_kernels_table.h"
