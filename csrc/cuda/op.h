// For the thin <op>.cpp: PyTorch's tensors to the launchers' plain arguments, and the registration.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "arguments.h"

// The kernels are operators of torch.ops.fastnce_cuda; emulated (see device.cuh), for CPU tensors.
#ifdef FASTNCE_EMULATED
#define FASTNCE_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastnce_cuda, CPU, m)
#else
#define FASTNCE_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastnce_cuda, CUDA, m)
#endif

namespace fastnce::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// PyTorch's current stream on the tensor's device.
Stream current_stream(const Tensor& tensor);
// Multiprocessors of the tensor's device; compute capability as 80, 90, 100. Emulated: 4, and what
// FASTNCE_EMULATED_CAPABILITY says, or 80.
int multiprocessors(const Tensor& tensor);
int compute_capability(const Tensor& tensor);

inline Dtype dtype_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBfloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, op, ": the CUDA kernels take float32, bfloat16 and float16, got ",
                  torch::headeronly::toString(tensor.scalar_type()),
                  ". Use backend='torch' for others.");
  return Dtype::kFloat32;
}

Temperature temperature_of(const char* op, const std::optional<Tensor>& tensor, double value);
// (N, D) or (B, N, D).
RowsView rows_of(const char* op, const Tensor& tensor);

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}
// An output of `like`'s shape and dtype, contiguous, or an empty tensor if it is not needed.
Tensor new_gradient(const Tensor& like, bool needed);
// A float32 scalar likewise.
Tensor new_scalar(const Tensor& like, bool needed);

}  // namespace fastnce::cuda
