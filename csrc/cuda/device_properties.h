// What the choice of a kernel depends on.
#pragma once

namespace fastnce::cuda {

struct DeviceProperties {
  int multiprocessors;
  int capability;  // 80, 90, 100: ten times the compute capability
};

// Asked for once per device; never waits for the device. Throws std::runtime_error.
// Emulated: what FASTNCE_EMULATED_MULTIPROCESSORS and FASTNCE_EMULATED_CAPABILITY say, or 4 and 80.
DeviceProperties device_properties(int device);

}  // namespace fastnce::cuda
