#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "arguments.h"
#include "device.cuh"

namespace fastnce::cuda {

#ifdef FASTNCE_EMULATED

DeviceProperties device_properties(int) {
  const auto number = [](const char* name, int otherwise) {
    const char* value = std::getenv(name);
    return value ? std::atoi(value) : otherwise;
  };
  return {number("FASTNCE_EMULATED_MULTIPROCESSORS", 4), number("FASTNCE_EMULATED_CAPABILITY", 80)};
}

const char* try_a_kernel() { return "ok"; }

#else

namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  if (error != cudaSuccess) {
    throw std::runtime_error("fastnce: the properties of GPU " + std::to_string(device) +
                             " cannot be read: " + cudaGetErrorString(error) +
                             ". Use backend='triton' or backend='torch'.");
  }
  return value;
}

__global__ void nothing_kernel() {}

}  // namespace

const char* try_a_kernel() {
  cudaStream_t stream = nullptr;
  cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchConfig_t config{};
  config.gridDim = config.blockDim = dim3(1);
  config.stream = stream;
  error = cudaLaunchKernelEx(&config, nothing_kernel);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  return error == cudaSuccess ? "ok" : cudaGetErrorString(error);
}

DeviceProperties device_properties(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceProperties> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const DeviceProperties properties = {attribute(cudaDevAttrMultiProcessorCount, device),
                                       10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                                           attribute(cudaDevAttrComputeCapabilityMinor, device)};
  return known[device] = properties;
}

#endif

}  // namespace fastnce::cuda
