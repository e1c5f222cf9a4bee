#define FASTNCE_ISA avx512
#define FASTNCE_VECTOR_BYTES 64
#include "tile_kernels_table.h"
