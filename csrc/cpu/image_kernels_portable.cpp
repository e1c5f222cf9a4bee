#define FASTNCE_ISA portable
#define FASTNCE_VECTOR_BYTES 16
#include "image_kernels_table.h"
