// The operators of torch.ops.fastnce are declared in Python, in fastnce/ops/<op>.py; their kernels
// register themselves in cpu/<op>.cpp. What this library was built from, which
// fastnce/backends/build.py finds in the file:
extern "C" __attribute__((used, visibility("default"))) const char fastnce_build_stamp[] =
    FASTNCE_BUILD_STAMP;
