// The schemas of torch.ops.fastnce_cuda.*, of which kernels register themselves in <op>.cpp.
#include "../common/schemas.h"

// What the library was built from; fastnce/backends/build.py finds it in the file.
extern "C" __attribute__((used, visibility("default"))) const char fastnce_cuda_build_stamp[] =
    FASTNCE_BUILD_STAMP;

STABLE_TORCH_LIBRARY(fastnce_cuda, m) { fastnce::define_shared_ops(m); }
