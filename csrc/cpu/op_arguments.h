// Arguments of the ops: checks, temperature, types, labels, and outputs that may not be needed.
#pragma once

#include <initializer_list>
#include <optional>
#include <vector>

#include "tensor_rows.h"
#include "tile_kernels.h"

namespace fastnce {

inline void check_rows(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                       const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU for this backend.");
  check_shape(op, name, tensor, dtype, shape);
}

inline void check_supported(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(is_supported(tensor.scalar_type()), op, ": ", name, " has the unsupported dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), ".");
}

// Of that many dimensions, `shape` in words.
inline void check_floating(const char* op, const char* name, const Tensor& tensor, int64_t dims,
                           const char* shape) {
  check_supported(op, name, tensor);
  STD_TORCH_CHECK(tensor.dim() == dims, op, ": ", name, " must be ", shape, ".");
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

// Calls f with a value of the type of sums.
template <class F>
void with_sums(ScalarType acc, const F& f) {
  acc == ScalarType::Double ? f(double{}) : f(float{});
}

// Calls f with values of the types of sums and of operands.
template <class F>
void with_operands(ScalarType acc, bool bfloat16_products, const F& f) {
  if (acc == ScalarType::Double) {
    f(double{}, double{});
  } else if (bfloat16_products && tile_kernels<float>().pairs != nullptr) {
    f(float{}, Pair{});
  } else {
    f(float{}, float{});
  }
}

// (N,) int64 of any stride.
inline std::vector<int64_t> label_values(const Tensor& labels) {
  const int64_t* data = labels.const_data_ptr<int64_t>();
  std::vector<int64_t> out(static_cast<size_t>(labels.size(0)));
  for (size_t i = 0; i < out.size(); ++i) out[i] = data[static_cast<int64_t>(i) * labels.stride(0)];
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
