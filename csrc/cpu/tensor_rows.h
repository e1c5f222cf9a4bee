// Tensors as rows: any strides and any of the four dtypes in, contiguous rows of the input's dtype
// out, with T (float, or double for double) in between.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "../common/tensors.h"

namespace fastnce {

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// The dtype that sums, losses and temperature gradients are kept in.
inline ScalarType accumulation_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
constexpr ScalarType kElementType =
    std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// Calls f with a value of the C++ type of `dtype`, which must be supported.
template <class F>
void with_element_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    default:
      return f(torch::headeronly::Half{});
  }
}

// n elements of `dtype`, `stride` elements apart, as T.
template <class T>
void load_elements(ScalarType dtype, const char* data, int64_t stride, int64_t n, T* out) {
  with_element_type(dtype, [&](auto zero) {
    using Element = decltype(zero);
    const Element* p = reinterpret_cast<const Element*>(data);
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(p[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(p[i * stride]);
    }
  });
}

template <class T>
void store_elements(ScalarType dtype, const T* x, int64_t n, int64_t stride, char* data) {
  with_element_type(dtype, [&](auto zero) {
    using Element = decltype(zero);
    Element* p = reinterpret_cast<Element*>(data);
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (std::is_same_v<Element, double> || std::is_same_v<Element, float>) {
        p[i * stride] = static_cast<Element>(x[i]);
      } else {
        p[i * stride] = static_cast<Element>(static_cast<float>(x[i]));
      }
    }
  });
}

// A tensor (..., D) seen as a list of rows; the leading dimensions are flattened in order.
class TensorRows {
 public:
  TensorRows() = default;
  explicit TensorRows(const Tensor& tensor)
      : data_(static_cast<const char*>(tensor.const_data_ptr())),
        dtype_(tensor.scalar_type()),
        item_(static_cast<int64_t>(tensor.element_size())),
        depth_(tensor.size(tensor.dim() - 1)),
        stride_(tensor.stride(tensor.dim() - 1)) {
    for (int64_t d = 0; d + 1 < tensor.dim(); ++d) {
      sizes_.push_back(tensor.size(d));
      strides_.push_back(tensor.stride(d));
    }
  }

  int64_t depth() const { return depth_; }

  template <class T>
  void load(int64_t row, T* out) const {
    load_elements(dtype_, at(row), stride_, depth_, out);
  }

  // The row where it lies if its elements are neighbours of type T, else loaded into `scratch`.
  template <class T>
  const T* read(int64_t row, T* scratch) const {
    if (stride_ == 1 && dtype_ == kElementType<T>) return reinterpret_cast<const T*>(at(row));
    load(row, scratch);
    return scratch;
  }

 private:
  const char* at(int64_t row) const {
    int64_t offset = 0;
    for (size_t d = sizes_.size(); d-- > 0;) {
      offset += row % sizes_[d] * strides_[d];
      row /= sizes_[d];
    }
    return data_ + offset * item_;
  }

  const char* data_ = nullptr;
  ScalarType dtype_ = ScalarType::Float;
  int64_t item_ = 0, depth_ = 0, stride_ = 0;
  std::vector<int64_t> sizes_, strides_;
};

// A contiguous tensor (..., D) being written row by row.
class OutputRows {
 public:
  OutputRows() = default;
  // Of an undefined tensor: no elements.
  explicit OutputRows(const Tensor& tensor) {
    if (!tensor.defined()) return;
    data_ = static_cast<char*>(tensor.mutable_data_ptr());
    dtype_ = tensor.scalar_type();
    item_ = static_cast<int64_t>(tensor.element_size());
    depth_ = tensor.size(tensor.dim() - 1);
  }

  template <class T>
  void store(int64_t row, const T* x) const {
    store_elements(dtype_, x, depth_, 1, at(row));
  }

  // Where to put a row before finish(): the row itself if its elements are of type T.
  template <class T>
  T* begin(int64_t row, T* scratch) const {
    return dtype_ == kElementType<T> ? reinterpret_cast<T*>(at(row)) : scratch;
  }
  template <class T>
  void finish(int64_t row, const T* x) const {
    if (dtype_ != kElementType<T>) store(row, x);
  }

 private:
  char* at(int64_t row) const { return data_ + row * depth_ * item_; }

  char* data_ = nullptr;
  ScalarType dtype_ = ScalarType::Float;
  int64_t item_ = 0, depth_ = 0;
};

}  // namespace fastnce
