// What both libraries do with the tensors of their operators: checks that keep memory safe (users'
// mistakes are caught in Python, with better words), and outputs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

namespace fastnce {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Of that dtype and shape, and not empty; any strides.
inline void check_shape(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                        const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " must have the dtype ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()), ".");
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; same && d < shape.size(); ++d) {
    same = tensor.size(static_cast<int64_t>(d)) == shape[d] && shape[d] > 0;
  }
  STD_TORCH_CHECK(same, op, ": ", name, " has a wrong or empty shape.");
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

// An output of `like`'s shape and dtype, contiguous; undefined, None in Python, if it is not
// needed.
inline Tensor new_gradient(const Tensor& like, bool needed) {
  if (!needed) return {};
  return new_tensor(like, {like.sizes().begin(), like.sizes().end()}, like.scalar_type());
}

}  // namespace fastnce
