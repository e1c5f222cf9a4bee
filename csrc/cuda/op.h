// For the thin <op>.cpp: PyTorch's tensors to the launchers' plain arguments, and the registration.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "../common/tensors.h"
#include "arguments.h"

// The kernels are operators of torch.ops.fastnce_cuda; emulated (see device.cuh), for CPU tensors.
#ifdef FASTNCE_EMULATED
#define FASTNCE_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastnce_cuda, CPU, m)
#else
#define FASTNCE_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastnce_cuda, CUDA, m)
#endif

// TORCH_BOX of an op that makes the device of its first tensor the current one meanwhile:
//   m.impl("info_nce_forward", FASTNCE_CUDA_BOX(&info_nce_forward));
#define FASTNCE_CUDA_BOX(function) TORCH_BOX((&::fastnce::cuda::OnDevice<function>::run))

namespace fastnce::cuda {

// PyTorch's current stream on the tensor's device.
Stream current_stream(const Tensor& tensor);
// Of the tensor's device.
int multiprocessors(const Tensor& tensor);
int compute_capability(const Tensor& tensor);

Dtype dtype_of(const char* op, const Tensor& tensor);
// What keeps memory safe; users' mistakes are caught in Python, with better words. Tensors must be
// on the current device.
Temperature temperature_of(const char* op, const std::optional<Tensor>& tensor, double value);
// (N, D) or (B, N, D).
RowsView rows_of(const char* op, const Tensor& tensor);
// Of that dtype and shape, and not empty; any strides.
void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                  const std::vector<int64_t>& shape);

// A float32 scalar; undefined, None in Python, if it is not needed.
Tensor new_scalar(const Tensor& like, bool needed);

inline const Tensor* first_tensor(const Tensor& tensor) { return &tensor; }
inline const Tensor* first_tensor(const Tensors& tensors) {
  return tensors.empty() ? nullptr : &tensors[0];
}

template <auto function>
struct OnDevice;
template <class Result, class First, class... Others, Result (*function)(First, Others...)>
struct OnDevice<function> {
  static Result run(First first, Others... others) {
#ifndef FASTNCE_EMULATED
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    const Tensor* tensor = first_tensor(first);
    if (tensor && tensor->is_cuda()) guard.emplace(tensor->get_device_index());
#endif
    return function(first, others...);
  }
};

}  // namespace fastnce::cuda
