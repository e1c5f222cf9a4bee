// Arguments shared by the ops: validation that keeps memory safe (users' mistakes are caught in
// Python, with better words), temperature, and outputs that may not be needed.
#pragma once

#include <initializer_list>
#include <optional>
#include <vector>

#include "tensor_rows.h"

namespace fastnce {

inline void check_rows(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                       const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU for this backend.");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " must have the dtype ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()), ".");
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; same && d < shape.size(); ++d) {
    same = tensor.size(static_cast<int64_t>(d)) == shape[d] && shape[d] > 0;
  }
  STD_TORCH_CHECK(same, op, ": ", name, " has a wrong or empty shape.");
}

inline double temperature_value(const char* op, const std::optional<Tensor>& tensor, double value) {
  if (!tensor.has_value()) return value;
  STD_TORCH_CHECK(tensor->is_cpu() && tensor->dim() == 0, op,
                  ": temperature must be a 0-d tensor on the CPU.");
  if (tensor->scalar_type() == ScalarType::Double) return *tensor->const_data_ptr<double>();
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float, op,
                  ": temperature must be float32 or float64.");
  return *tensor->const_data_ptr<float>();
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

// An output of `like`'s shape and dtype; undefined, None in Python, if it is not needed.
inline Tensor new_gradient(const Tensor& like, bool needed) {
  if (!needed) return {};
  return new_tensor(like, {like.sizes().begin(), like.sizes().end()}, like.scalar_type());
}

inline Tensor new_scalar(const Tensor& like, bool needed, double value) {
  if (!needed) return {};
  const ScalarType dtype = accumulation_type(like.scalar_type());
  const Tensor out = new_tensor(like, {}, dtype);
  if (dtype == ScalarType::Double) {
    *out.mutable_data_ptr<double>() = value;
  } else {
    *out.mutable_data_ptr<float>() = static_cast<float>(value);
  }
  return out;
}

// Elements of a tensor of at most two dimensions, in order, as T.
template <class T>
std::vector<T> to_vector(const Tensor& tensor) {
  std::vector<T> out(static_cast<size_t>(tensor.numel()));
  const int64_t inner = tensor.size(tensor.dim() - 1);
  const auto item = static_cast<int64_t>(tensor.element_size());
  for (int64_t row = 0; row * inner < tensor.numel(); ++row) {
    const char* data = static_cast<const char*>(tensor.const_data_ptr());
    if (tensor.dim() == 2) data += row * tensor.stride(0) * item;
    load_elements(tensor.scalar_type(), data, tensor.stride(tensor.dim() - 1), inner,
                  out.data() + row * inner);
  }
  return out;
}

}  // namespace fastnce
