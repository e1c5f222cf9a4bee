// Blocks of matrices whose elements lie anywhere: read from any strides, written as any dtype.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "operands.h"
#include "tensor_rows.h"

namespace fastnce {

// Writes n numbers of each row as `dtype`; strides between rows in elements.
template <class T>
void store_tile(const TileKernels<T>& kernels, int64_t rows, int64_t n, const T* z, int64_t stride,
                ScalarType dtype, char* out, int64_t out_stride) {
  if (dtype == kElementType<T>) {
    kernels.store_rows(rows, n, z, stride, reinterpret_cast<T*>(out), out_stride);
    return;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (dtype == ScalarType::BFloat16 && kernels.pairs != nullptr) {
      kernels.pairs->store_rows(rows, n, z, stride, reinterpret_cast<uint16_t*>(out), out_stride);
      return;
    }
  }
  constexpr int64_t kHalf = 2;  // bytes of what is left
  for (int64_t r = 0; r < rows; ++r) {
    store_elements(dtype, z + r * stride, n, 1, out + r * out_stride * kHalf);
  }
}

// A matrix of any strides and dtype, of one element of a batch.
struct StridedMatrix {
  static constexpr int64_t kMostRows = 144;  // of a block

  const char* data;
  ScalarType dtype;
  int64_t item, row, column;  // strides in elements

  StridedMatrix(const Tensor& g, int64_t b)
      : data(static_cast<const char*>(g.const_data_ptr())),
        dtype(g.scalar_type()),
        item(static_cast<int64_t>(g.element_size())),
        row(g.stride(g.dim() - 2)),
        column(g.stride(g.dim() - 1)) {
    for (int64_t d = g.dim() - 3; d >= 0; --d) {
      data += b % g.size(d) * g.stride(d) * item;
      b /= g.size(d);
    }
  }
  void transpose() { std::swap(row, column); }

  // bfloat16, packed like PairKernels' `across`: no rounding, no conversion.
  void copy_pairs(int64_t i0, int64_t rows, int64_t j0, int64_t lanes, int64_t width,
                  Pair* out) const {
    const char* block = data + (i0 * row + j0) * item;
    for (int64_t r = 0; r < rows; ++r, out += width) {
      if (lanes % 2 != 0) out[lanes / 2] = 0;
      std::memcpy(out, block + r * row * item, static_cast<size_t>(lanes * item));
    }
  }

  // Rows [i0, i0 + rows) and columns [j0, j0 + lanes) to z, whose rows are `width` apart, along
  // whichever side the elements are closer.
  template <class T>
  void load(int64_t i0, int64_t rows, int64_t j0, int64_t lanes, int64_t width, T* z) const {
    const char* block = data + (i0 * row + j0 * column) * item;
    if (column <= row) {
      for (int64_t r = 0; r < rows; ++r) {
        load_elements(dtype, block + r * row * item, column, lanes, z + r * width);
      }
      return;
    }
    T line[kMostRows];
    for (int64_t c = 0; c < lanes; ++c) {
      load_elements(dtype, block + c * column * item, row, rows, line);
      for (int64_t r = 0; r < rows; ++r) z[r * width + c] = line[r];
    }
  }
};

}  // namespace fastnce
