// Starting a kernel, and saying what went wrong.
#pragma once

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "device.cuh"

namespace fastnce::cuda {

struct Launch {
  const char* op;  // for the error's message
  dim3 grid;
  dim3 block;           // a multiple of 32 threads
  size_t shared_bytes;  // dynamic
  cudaStream_t stream;
};

// The message names op, shape and cause; the op's shapes are known to the caller, who may add them.
class LaunchError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline std::string describe(const Launch& l) {
  const auto size = [](dim3 d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
  };
  return std::string(l.op) + ": grid " + size(l.grid) + ", block " + size(l.block) + ", " +
         std::to_string(l.shared_bytes) + " bytes of shared memory";
}

[[noreturn]] inline void refuse(const Launch& l, const std::string& cause) {
  throw LaunchError(describe(l) + ": the kernel could not be run: " + cause +
                    ". Use backend='triton' or backend='torch' for this call.");
}

inline void check(cudaError_t error, const Launch& l) {
  if (error != cudaSuccess) refuse(l, cudaGetErrorString(error));
}

// A kernel has 48 KiB of shared memory unasked. The first launch of more on a device asks for all
// that it has, once: a limit of each launch's own could fall below that of another thread's, just
// before it begins.
inline void allow_shared_memory(const Launch& l, const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0, most = 0;
  check(cudaGetDevice(&device), l);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) > 0) return;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), l);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), l);
  allowed.insert({kernel, device});
}

// Runs kernel(arguments...) in the stream. Throws LaunchError.
template <class... Parameters, class... Arguments>
void launch(const Launch& l, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const void* const address = reinterpret_cast<const void*>(kernel);
  if (l.shared_bytes > 48 * 1024) allow_shared_memory(l, address);
#ifdef FASTNCE_EMULATED
  try {
    emulator::launch(l.op, address, l.grid, l.block, l.shared_bytes,
                     [&] { kernel(static_cast<Parameters>(arguments)...); });
  } catch (const std::runtime_error& error) {
    refuse(l, error.what());
  }
#else
  cudaLaunchConfig_t config{};
  config.gridDim = l.grid;
  config.blockDim = l.block;
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = l.stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), l);
#endif
}

}  // namespace fastnce::cuda
