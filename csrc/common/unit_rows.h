// Rows of an input as the products need them: converted, L2-normalised and laid out in slabs; and
// the way back for their gradients.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "parallel.h"
#include "slabs.h"
#include "tensor_rows.h"
#include "tile_kernels.h"

namespace fastnce {

// ||x||; 0 for a zero row. Squares of float rows cannot leave double's range; those of double rows
// can, and are then taken relative to the largest element.
template <class T>
double row_norm(const TileKernels<T>& kernels, int64_t n, const T* x) {
  const double squares = kernels.sum_squares(n, x);
  const bool in_range = squares > 1e-280 && squares < 1e280;
  if (in_range || std::isnan(squares) || sizeof(T) < sizeof(double)) return std::sqrt(squares);
  double top = 0;
  for (int64_t i = 0; i < n; ++i) top = std::max(top, std::abs(static_cast<double>(x[i])));
  if (top == 0 || std::isinf(top)) return top;
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += (x[i] / top) * (x[i] / top);
  return top * std::sqrt(sum);
}

// A logit outside the matrix, rounded like those inside it: then exp(z - lse) is exactly 1 where z
// is the only logit.
template <class T>
T logit(const TileKernels<T>& kernels, int64_t n, const T* x, const T* y) {
  return static_cast<T>(kernels.dot(n, x, y));
}

// 1 / ||x||; 0 for a zero row, whose unit vector is 0.
template <class T>
double inverse_norm(const TileKernels<T>& kernels, int64_t n, const T* x) {
  const double norm = row_norm(kernels, n, x);
  return norm == 0 ? 0.0 : 1 / norm;
}

// Back through u = inverse * x, inverse = 1 / ||x|| (without normalisation u = x, inverse 1):
// fills `out` with `scale` times the gradient with respect to x, where that with respect to u is
// factor g + alpha y. Returns u . (factor g + alpha y). `out` may be g or y.
template <class T>
double unit_row_gradient(const TileKernels<T>& kernels, int64_t n, const T* x, bool normalize,
                         double inverse, double factor, const T* g, double alpha, const T* y,
                         double scale, T* out) {
  if (inverse == 0) {
    std::fill_n(out, n, T(0));
    return 0;
  }
  const double along = inverse * kernels.mix_and_dot(n, factor, g, alpha, y, x, out);
  kernels.subtract_and_scale(n, out, normalize ? inverse * along : 0.0, x, inverse * scale, out);
  return along;
}

// Reads the rows of a tensor as scaled unit vectors, one at a time.
template <class T>
class UnitRowReader {
 public:
  UnitRowReader(const TileKernels<T>& kernels, const TensorRows& source, bool normalize)
      : kernels_(kernels), source_(source), normalize_(normalize), scratch_(source.depth()) {}

  // Fills `unit` with scale * x / ||x|| (scale * x without normalisation; 0 for a zero row).
  void read(int64_t row, double scale, T* unit) {
    x_ = source_.read(row, scratch_.data());
    inverse_ = normalize_ ? inverse_norm(kernels_, source_.depth(), x_) : 1.0;
    kernels_.scale(source_.depth(), x_, inverse_ * scale, unit);
  }

  // Of the row last read: 1 / ||x||, 0 for a zero row, 1 without normalisation.
  double inverse() const { return inverse_; }

  // For the row last read: the gradient with respect to the row from that with respect to its unit
  // vector u. Returns u . gradient.
  double project(const T* gradient, T* out) const {
    return unit_row_gradient(kernels_, source_.depth(), x_, normalize_, inverse_, 1.0, gradient,
                             0.0, gradient, 1.0, out);
  }

 private:
  const TileKernels<T>& kernels_;
  const TensorRows& source_;
  const bool normalize_;
  Buffer<T> scratch_;
  const T* x_ = nullptr;
  double inverse_ = 1;
};

// Rows [first, first + rows) of `source` times `scale`, in slabs of rows and, where `transposed` is
// not null, also in slabs of columns. Either may be null. inverse_norms[r], unless null, is row
// first + r's 1 / ||x|| as UnitRowReader::inverse() has it.
template <class T>
void pack_unit_rows(const TileKernels<T>& kernels, const TensorRows& source, int64_t first,
                    int64_t rows, bool normalize, double scale, SlabMatrix<T>* straight,
                    SlabMatrix<T>* transposed, double* inverse_norms = nullptr) {
  const int64_t depth = source.depth(), width = kernels.width;
  if (straight != nullptr) *straight = SlabMatrix<T>(rows, depth, width);
  if (transposed != nullptr) *transposed = SlabMatrix<T>(depth, rows, width);
  // A block of `width` rows fills exactly one slab of the transposed matrix.
  run_blocks(rows, width, 4 * depth, [&](int64_t begin, int64_t end) {
    UnitRowReader<T> reader(kernels, source, normalize);
    Buffer<T> unit(depth);
    for (int64_t r = begin; r < end; ++r) {
      reader.read(first + r, scale, unit.data());
      if (inverse_norms != nullptr) inverse_norms[r] = reader.inverse();
      if (straight != nullptr) straight->copy_row_in(r, unit.data());
      if (transposed != nullptr) {
        T* lane = transposed->at(0, r / width) + r % width;
        for (int64_t d = 0; d < depth; ++d) lane[d * width] = unit[d];
      }
    }
    if (transposed != nullptr) {
      T* slab = transposed->at(0, begin / width);
      for (int64_t d = 0; d < depth; ++d) {
        std::fill(slab + d * width + (end - begin), slab + (d + 1) * width, T(0));
      }
    }
  });
}

// Turns gradients with respect to unit rows into gradients of the rows and stores them.
template <class T>
void store_row_gradients(const TileKernels<T>& kernels, const TensorRows& source, int64_t first,
                         bool normalize, const SlabMatrix<T>& gradient, const OutputRows& out) {
  const int64_t depth = source.depth();
  run_blocks(gradient.rows(), 16, 8 * depth, [&](int64_t begin, int64_t end) {
    UnitRowReader<T> reader(kernels, source, normalize);
    Buffer<T> unit(depth), row(depth);
    for (int64_t r = begin; r < end; ++r) {
      reader.read(first + r, 1.0, unit.data());
      gradient.copy_row_out(r, row.data());
      reader.project(row.data(), unit.data());
      out.store(first + r, unit.data());
    }
  });
}

}  // namespace fastnce
