// The operators of torch.ops.fastnce_cuda are declared in Python, in fastnce/ops/<op>.py; their
// kernels register themselves in <op>.cpp. What this library was built from, which
// fastnce/backends/build.py finds in the file:
extern "C" __attribute__((used, visibility("default"))) const char fastnce_cuda_build_stamp[] =
    FASTNCE_BUILD_STAMP;
