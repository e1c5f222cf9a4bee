#define FASTNCE_ISA avx2
#define FASTNCE_VECTOR_BYTES 32
#include "tile_kernels_table.h"
