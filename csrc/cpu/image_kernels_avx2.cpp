#define FASTNCE_ISA avx2
#define FASTNCE_VECTOR_BYTES 32
#include "image_kernels_table.h"
