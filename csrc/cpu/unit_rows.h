// Rows of an input as the products need them: converted, L2-normalised and laid out in slabs; and
// the way back for their gradients.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "operands.h"
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

// 1 / ||x||; 0 for a zero row, whose unit vector is 0; NaN for a row with an infinite element,
// which has no unit vector: 0 would pass for a zero row's, and take the gradient away.
inline double inverse_of(double norm) {
  if (norm == 0) return 0;
  return std::isfinite(norm) ? 1 / norm : std::numeric_limits<double>::quiet_NaN();
}

template <class T>
double inverse_norm(const TileKernels<T>& kernels, int64_t n, const T* x) {
  return inverse_of(row_norm(kernels, n, x));
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
  if (normalize) {
    kernels.subtract_and_scale(n, out, inverse * along, x, inverse * scale, out);
  } else {
    kernels.scale(n, out, scale, out);  // not less 0 x, which is NaN where x is infinite
  }
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

  // Fills `pairs` with the row, rounded after a power of two has brought its norm near 1, which
  // loses nothing of rows that are bfloat16 already. Returns the factor that is left to scale * x /
  // ||x||.
  T read_pairs(int64_t row, double scale, Pair* pairs) {
    const int64_t n = source_.depth();
    x_ = source_.read(row, scratch_.data());
    const double norm = row_norm(kernels_, n, x_);
    inverse_ = normalize_ ? inverse_of(norm) : 1.0;
    const bool usual = norm > 0 && std::isfinite(norm);
    const double power = usual ? std::ldexp(1.0, -std::ilogb(norm)) : 1.0;
    kernels_.pairs->round_row(n, x_, power, pairs);
    // A zero row's products are 0 whatever the factor, unless that is 0 and they are taken away.
    return norm == 0 ? T(1) : static_cast<T>(inverse_ * scale / power);
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

// Unit rows in the layouts that products ask for; those that are not wanted are null.
//
// Pairs of bfloat16 are not unit rows yet: what a row still has to be multiplied by is its rest.
template <class T, class P = T>
struct PackedRows {
  SlabMatrix<P>* straight = nullptr;    // (rows, operands of D): summed over D, from the left
  SlabMatrix<P>* transposed = nullptr;  // (operands of D, rows): summed over D, from the right
  SlabMatrix<P>* summands = nullptr;    // pairs only: (pairs of rows, D), summed over the rows
  double* inverse_norms = nullptr;      // (rows,) as UnitRowReader::inverse() has it
  T* rests = nullptr;                   // pairs only: (rows,)
  // Of numbers: the first row that is filled, the first of a slab, and how many rows there are.
  // From at = 0 on the matrices are made.
  int64_t at = 0, all = 0;
};

// Writes row r, n numbers, into a matrix of pairs of rows. The row without neighbour has 0 beside
// it.
inline void copy_half_in(const SlabMatrix<Pair>& out, int64_t row, const Pair* numbers) {
  const auto* x = reinterpret_cast<const uint16_t*>(numbers);
  const int64_t width = out.slab_size() / out.rows();
  for (int64_t s = 0; s < out.slabs(); ++s) {
    Pair* target = out.at(row / 2, s);
    const int64_t lanes = out.lanes(s), first = s * width;
    if (row % 2 == 0) {
      for (int64_t c = 0; c < lanes; ++c) target[c] = x[first + c];
      for (int64_t c = lanes; c < width; ++c) target[c] = 0;
    } else {
      for (int64_t c = 0; c < lanes; ++c) target[c] |= static_cast<Pair>(x[first + c]) << 16;
    }
  }
}

// Makes row r of a matrix of pairs of rows 0.
inline void clear_half(const SlabMatrix<Pair>& matrix, int64_t row) {
  const int64_t width = matrix.slab_size() / matrix.rows();
  const Pair kept = row % 2 == 0 ? 0xffff0000 : 0x0000ffff;
  for (int64_t s = 0; s < matrix.slabs(); ++s) {
    Pair* target = matrix.at(row / 2, s);
    for (int64_t c = 0; c < width; ++c) target[c] &= kept;
  }
}

// Fills one slab, (depth, width), with the transpose of `rows` rows of depth numbers; lanes beyond
// become 0. A few of its rows at a time, which stay in the first-level cache.
template <class P>
void transpose_into(const P* x, int64_t rows, int64_t depth, int64_t width, P* slab) {
  constexpr int64_t kBlock = 16;
  for (int64_t d0 = 0; d0 < depth; d0 += kBlock) {
    const int64_t d1 = std::min(depth, d0 + kBlock);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = d0; d < d1; ++d) slab[d * width + r] = x[r * depth + d];
    }
    for (int64_t d = d0; d < d1; ++d) {
      std::fill(slab + d * width + rows, slab + (d + 1) * width, P(0));
    }
  }
}

// Rows [first, first + rows) of `source` times `scale`.
template <class T, class P>
void pack_unit_rows(const TileKernels<T>& kernels, const TensorRows& source, int64_t first,
                    int64_t rows, bool normalize, double scale, const PackedRows<T, P>& out) {
  const int64_t depth = source.depth(), width = kernels.width, length = operands<P>(depth);
  const int64_t all = std::max(rows, out.all);
  if (out.at == 0 && out.straight != nullptr) *out.straight = SlabMatrix<P>(all, length, width);
  if (out.at == 0 && out.transposed != nullptr) *out.transposed = SlabMatrix<P>(length, all, width);
  if (out.summands != nullptr) *out.summands = SlabMatrix<P>(operands<P>(rows), depth, width);
  // A block of `width` rows fills exactly one slab of the transposed matrix.
  run_blocks(rows, width, 4 * depth, [&](int64_t begin, int64_t end) {
    UnitRowReader<T> reader(kernels, source, normalize);
    Buffer<P> units(length * (out.transposed != nullptr ? end - begin : 1));
    for (int64_t r = begin; r < end; ++r) {
      P* unit = units.data() + (out.transposed != nullptr ? (r - begin) * length : 0);
      if constexpr (kPaired<P>) {
        out.rests[r] = reader.read_pairs(first + r, scale, unit);
        if (out.summands != nullptr) copy_half_in(*out.summands, r, unit);
      } else {
        reader.read(first + r, scale, unit);
      }
      if (out.inverse_norms != nullptr) out.inverse_norms[out.at + r] = reader.inverse();
      if (out.straight != nullptr) out.straight->copy_row_in(out.at + r, unit);
    }
    if (out.transposed != nullptr) {
      transpose_into(units.data(), end - begin, length, width,
                     out.transposed->at(0, (out.at + begin) / width));
    }
  });
}

// Turns gradients with respect to unit rows into gradients of the rows and stores them.
template <class T>
void store_row_gradients(const TileKernels<T>& kernels, const TensorRows& source, bool normalize,
                         const SlabMatrix<T>& gradient, const OutputRows& out) {
  const int64_t depth = source.depth();
  run_blocks(gradient.rows(), 16, 8 * depth, [&](int64_t begin, int64_t end) {
    UnitRowReader<T> reader(kernels, source, normalize);
    Buffer<T> unit(depth), row(depth);
    for (int64_t r = begin; r < end; ++r) {
      reader.read(r, 1.0, unit.data());
      gradient.copy_row_out(r, row.data());
      reader.project(row.data(), unit.data());
      out.store(r, unit.data());
    }
  });
}

}  // namespace fastnce
