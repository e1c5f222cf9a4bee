// The schemas of torch.ops.fastnce_cuda.*, of which kernels register themselves in <op>.cpp.
#include "../common/schemas.h"

STABLE_TORCH_LIBRARY(fastnce_cuda, m) { fastnce::define_shared_ops(m); }
