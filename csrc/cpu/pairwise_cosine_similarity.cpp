// Pairwise cosine similarity on the CPU: s_ij = x^_i . y^_j / temperature.
//
// One product forward, from packed unit rows, and two backward: dx^ = G y^ / t, dy^ = G^T x^ / t.
// The similarities themselves are not needed again: x^_i . dx^_i, which takes the gradient back
// through the norm, also sums G_ij s_ij for the temperature. Of x with itself half the tiles are
// multiplied forward, and (G + G^T) x^ is the only product backward.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "huge_pages.h"
#include "op_arguments.h"
#include "unit_rows.h"

namespace fastnce {
namespace {

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

constexpr int64_t kRowBlock = 96;  // of a task; a multiple of every table's width
constexpr int64_t kSlabRun = 2;    // of a task: two threads seldom write one cache line
constexpr int64_t kDepthRows = StridedMatrix::kMostRows;  // summed in the columns' gradient
constexpr int64_t kPanelRows = 4 * kDepthRows;
constexpr int64_t kPanelBytes = int64_t{16} << 20;  // of packed upstream gradients at a time

struct Arguments {
  const char* op;
  const Tensor& x;
  const std::optional<Tensor>& y;  // none: x itself
  double temperature;

  const Tensor& columns() const { return y.has_value() ? *y : x; }
  int64_t n() const { return x.size(x.dim() - 2); }
  int64_t m() const { return columns().size(x.dim() - 2); }
  int64_t depth() const { return x.size(x.dim() - 1); }
  ScalarType acc() const { return accumulation_type(x.scalar_type()); }
  int64_t batch() const { return x.numel() / (n() * depth()); }
  std::vector<int64_t> result_shape() const {
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = m();
    return shape;
  }
};

void check(const Arguments& a) {
  const ScalarType dtype = a.x.scalar_type();
  check_supported(a.op, "x", a.x);
  STD_TORCH_CHECK(a.x.dim() >= 2, a.op, ": x must be (..., N, D).");
  std::vector<int64_t> shape(a.x.sizes().begin(), a.x.sizes().end());
  check_rows(a.op, "x", a.x, dtype, shape);
  if (!a.y.has_value()) return;
  STD_TORCH_CHECK(a.y->dim() == a.x.dim(), a.op, ": y must be (..., M, D), like x.");
  shape[shape.size() - 2] = a.m();
  check_rows(a.op, "y", *a.y, dtype, shape);
}

// Runs body(b) for every batch element: side by side where there are many.
template <class Body>
void for_batch(const Arguments& a, const Body& body) {
  const int64_t batch = a.batch();
  if (batch >= 4 * static_cast<int64_t>(torch::stable::get_num_threads())) {
    run_tasks(batch, (a.n() + 4) * (a.m() + 4) * a.depth(), body);
  } else {
    for (int64_t b = 0; b < batch; ++b) body(b);
  }
}

// The similarities of batch element b.
template <class T, class P>
void similarities(const Arguments& a, int64_t b, const Tensor& result) {
  const TileKernels<T>& kernels = tile_kernels<T>();
  const int64_t width = kernels.width, n = a.n(), m = a.m(), length = operands<P>(a.depth());
  const bool symmetric = !a.y.has_value();
  const ScalarType dtype = result.scalar_type();
  const auto item = static_cast<int64_t>(result.element_size());
  char* out = static_cast<char*>(result.mutable_data_ptr()) + b * n * m * item;

  SlabMatrix<P> rows, columns;
  Buffer<T> row_rests, column_rests;
  if (kPaired<P>) {
    row_rests = Buffer<T>(n);
    column_rests = Buffer<T>(padded(m, width), T(0));
  }
  pack_unit_rows<T, P>(kernels, TensorRows(a.x), b * n, n, true, 1.0,
                       {&rows, nullptr, nullptr, nullptr, row_rests.data()});
  pack_unit_rows<T, P>(kernels, TensorRows(a.columns()), b * m, m, true, 1.0,
                       {nullptr, &columns, nullptr, nullptr, column_rests.data()});
  // Here and not in the packing, so that the similarities of x with itself are exactly symmetric.
  const Buffer<T> factor(kRowBlock, static_cast<T>(1 / a.temperature));

  const int64_t runs = slab_count(m, kSlabRun * width);
  const int64_t work = kRowBlock * kSlabRun * width * a.depth();
  run_workers(slab_count(n, kRowBlock) * runs, work, [&](TaskQueue& queue) {
    Buffer<T> z(kRowBlock * width), mirrored(symmetric ? kRowBlock * width : 0);
    for (int64_t task; queue.next(task);) {
      const int64_t i0 = task / runs * kRowBlock, i1 = std::min(n, i0 + kRowBlock);
      const int64_t s0 = task % runs * kSlabRun, s1 = std::min(columns.slabs(), s0 + kSlabRun);
      for (int64_t s = s0; s < s1; ++s) {
        const int64_t j0 = s * width, lanes = columns.lanes(s);
        if (symmetric && j0 < i0) continue;  // written by the tile beyond the diagonal
        multiply(kernels, i1 - i0, length, lanes, rows.at(i0, 0), rows.slab_size(),
                 columns.at(0, s), z.data(), false);
        if constexpr (kPaired<P>) {
          kernels.pairs->scale_block(i1 - i0, lanes, z.data(), &column_rests[j0], &row_rests[i0]);
        }
        kernels.scale_rows(i1 - i0, lanes, z.data(), factor.data());
        store_tile(kernels, i1 - i0, lanes, z.data(), width, dtype, out + (i0 * m + j0) * item, m);
        if (!symmetric || j0 < i1) continue;
        for (int64_t c = 0; c < lanes; ++c) {
          for (int64_t r = 0; r < i1 - i0; ++r) mirrored[c * kRowBlock + r] = z[r * width + c];
        }
        store_tile(kernels, lanes, i1 - i0, mirrored.data(), kRowBlock, dtype,
                   out + (j0 * m + i0) * item, m);
      }
    }
  });
}

// x or y of one batch element, and what becomes its gradient.
template <class T, class P>
struct Side {
  TensorRows source;
  int64_t first, count;
  bool products;   // whether those that its gradient is made of are wanted
  OutputRows out;  // where `stored`
  bool stored;
  Buffer<double> inverse;  // 1 / ||row||
  SlabMatrix<P> summands;  // unit rows, summed over in the other side's gradient
  SlabMatrix<T> gradient;  // with respect to the unit rows, times the temperature

  Side(const TileKernels<T>& kernels, const Tensor& rows, int64_t b, bool products_,
       const Tensor& gradient_out, bool stored_)
      : source(rows),
        first(b * rows.size(rows.dim() - 2)),
        count(rows.size(rows.dim() - 2)),
        products(products_),
        out(gradient_out),
        stored(stored_),
        inverse(count) {
    if constexpr (kPaired<P>) {
      summands = SlabMatrix<P>(operands<P>(count), source.depth(), kernels.width);
      run_blocks(count, 16, 4 * source.depth(), [&](int64_t begin, int64_t end) {
        Buffer<P> row(operands<P>(source.depth()));
        Buffer<T> scratch(source.depth());
        for (int64_t r = begin; r < end; ++r) {
          const T* x = source.read(first + r, scratch.data());
          inverse[r] = inverse_norm(kernels, source.depth(), x);
          kernels.pairs->round_row(source.depth(), x, inverse[r], row.data());
          copy_half_in(summands, r, row.data());
        }
      });
    } else {
      pack_unit_rows<T, P>(kernels, source, first, count, true, 1.0,
                           {&summands, nullptr, nullptr, inverse.data(), nullptr});
    }
    if (products) gradient = SlabMatrix<T>(count, source.depth(), kernels.width);
  }

  // Stores the gradient of the rows; returns the sum of x^ . dx^ without the temperature.
  double finish(const TileKernels<T>& kernels, double temperature) const {
    const int64_t depth = source.depth();
    std::vector<double> along(count);
    run_blocks(count, 16, 8 * depth, [&](int64_t begin, int64_t end) {
      Buffer<T> row(depth), g(depth), written(depth);
      for (int64_t r = begin; r < end; ++r) {
        const T* x = source.read(first + r, row.data());
        gradient.copy_row_out(r, g.data());
        T* target = stored ? out.begin(first + r, written.data()) : written.data();
        along[r] = unit_row_gradient(kernels, depth, x, true, inverse[r], 1.0, g.data(), 0.0,
                                     g.data(), 1 / temperature, target);
        if (stored) out.finish(first + r, target);
      }
    });
    return std::accumulate(along.begin(), along.end(), 0.0);
  }
};

// Both products with the upstream gradient, packed once, a panel of its rows at a time. Symmetric:
// that of rows alone, with G + G^T.
template <class T, class P>
void multiply_upstream(const TileKernels<T>& kernels, const StridedMatrix& upstream, bool symmetric,
                       const Side<T, P>& rows, const Side<T, P>& columns) {
  const int64_t width = kernels.width, depth = rows.source.depth(), m = columns.count;
  const int64_t fit = kPanelBytes / operand_bytes<P>(m + 1) / kDepthRows * kDepthRows;
  const int64_t limit = std::min(rows.count, std::clamp(fit, kDepthRows, kPanelRows));
  const bool across = !symmetric && columns.products;
  SlabMatrix<P> kept;  // (rows of the panel, operands of m)
  if (rows.products) kept = SlabMatrix<P>(limit, operands<P>(m), width);
  if (across) columns.gradient.fill_zero();
  const Buffer<T> ones(kDepthRows, T(1));
  StridedMatrix mirrored = upstream;
  mirrored.transpose();
  const auto load = [&](int64_t i0, int64_t step, int64_t j0, int64_t lanes, T* z, T* other) {
    upstream.load(i0, step, j0, lanes, width, z);
    if (!symmetric) return;
    mirrored.load(i0, step, j0, lanes, width, other);
    for (int64_t r = 0; r < step; ++r) {
      for (int64_t c = 0; c < lanes; ++c) z[r * width + c] += other[r * width + c];
    }
  };
  const bool copied = !symmetric && upstream.dtype == ScalarType::BFloat16 && upstream.column == 1;
  for (int64_t r0 = 0; r0 < rows.count; r0 += limit) {
    const int64_t count = std::min(limit, rows.count - r0);
    // A task owns the columns of a slab, and so those rows of their gradient.
    const int64_t work = count * width * (across ? depth : 4);
    run_workers(slab_count(m, width), work, [&](TaskQueue& queue) {
      Buffer<T> block(kDepthRows * width), other(symmetric ? kDepthRows * width : 0);
      Buffer<P> pairs(kPaired<P> ? operands<P>(kDepthRows) * width : 0);
      Buffer<P> spare(kPaired<P> && !kept ? kDepthRows * width : 0);
      for (int64_t s; queue.next(s);) {
        const int64_t j0 = s * width, lanes = std::min(width, m - j0);
        for (int64_t begin = 0; begin < count; begin += kDepthRows) {
          const int64_t step = std::min(kDepthRows, count - begin);
          const int64_t i0 = r0 + begin;
          P* down = pairs.data();
          if constexpr (kPaired<P>) {
            P* along = kept ? kept.at(begin, s / 2) + s % 2 * (width / 2) : spare.data();
            if (copied) {
              upstream.copy_pairs(i0, step, j0, lanes, width, along);
              if (across) kernels.pairs->widen_block(step, lanes, along, block.data());
            } else {
              load(i0, step, j0, lanes, block.data(), other.data());
            }
            kernels.pairs->round_block(step, lanes, block.data(), ones.data(),
                                       across ? down : nullptr, copied ? nullptr : along);
          } else {
            down = kept ? kept.at(begin, s) : block.data();
            load(i0, step, j0, lanes, down, other.data());
          }
          for (int64_t d = 0; across && d < columns.gradient.slabs(); ++d) {
            multiply_transposed(kernels, lanes, operands<P>(step), columns.gradient.lanes(d), down,
                                rows.summands.at(i0 / (kPaired<P> ? 2 : 1), d),
                                columns.gradient.at(j0, d));
          }
        }
      }
    });
    if (!rows.products) continue;
    run_blocks(count, kRowBlock, m * depth, [&](int64_t begin, int64_t end) {
      for (int64_t d = 0; d < rows.gradient.slabs(); ++d) {
        multiply(kernels, end - begin, operands<P>(m), rows.gradient.lanes(d), kept.at(begin, 0),
                 kept.slab_size(), columns.summands.at(0, d), rows.gradient.at(r0 + begin, d),
                 false);
      }
    });
  }
}

struct Gradients {
  Tensor x, y;
  bool need_x, need_y;
};

// Stores the gradients of batch element b; returns the sum of G_ij s_ij.
template <class T, class P>
double gradients(const Arguments& a, const Tensor& grad, int64_t b, const Gradients& out) {
  const TileKernels<T>& kernels = tile_kernels<T>();
  StridedMatrix upstream(grad, b);
  if (!a.y.has_value()) {
    const Side<T, P> side(kernels, a.x, b, true, out.x, out.need_x);
    multiply_upstream(kernels, upstream, true, side, side);
    // Each pair is in G + G^T twice.
    return side.finish(kernels, a.temperature) / 2 / a.temperature;
  }
  // The temperature needs one of the products, but takes whichever there is.
  const bool x_products = out.need_x || !out.need_y;
  Side<T, P> x(kernels, a.x, b, x_products, out.x, out.need_x);
  Side<T, P> y(kernels, *a.y, b, out.need_y, out.y, out.need_y);
  // Threads share the columns: with few of them, the rows take their place.
  if (a.m() < 8 * kernels.width && a.n() > a.m()) {
    upstream.transpose();
    multiply_upstream(kernels, upstream, false, y, x);
  } else {
    multiply_upstream(kernels, upstream, false, x, y);
  }
  double sum = 0;
  if (y.products) sum = y.finish(kernels, a.temperature);
  if (x.products) sum = x.finish(kernels, a.temperature);
  return sum / a.temperature;
}

Tensor pairwise_cosine_similarity_forward(const Tensor& x, const std::optional<Tensor>& y,
                                          const std::optional<Tensor>& temperature_tensor,
                                          double temperature, bool bfloat16_products) {
  const char* op = "pairwise_cosine_similarity_forward";
  const Arguments a{op, x, y, temperature_value(op, temperature_tensor, temperature)};
  check(a);
  const Tensor result = new_tensor(x, a.result_shape(), x.scalar_type());
  ask_for_huge_pages(result);
  with_operands(a.acc(), bfloat16_products, [&](auto sum, auto operand) {
    for_batch(a, [&](int64_t b) { similarities<decltype(sum), decltype(operand)>(a, b, result); });
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> pairwise_cosine_similarity_backward(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& y,
    const std::optional<Tensor>& temperature_tensor, double temperature, bool bfloat16_products,
    bool need_x, bool need_y, bool need_temperature) {
  const char* op = "pairwise_cosine_similarity_backward";
  const Arguments a{op, x, y, temperature_value(op, temperature_tensor, temperature)};
  check(a);
  check_rows(op, "grad", grad, x.scalar_type(), a.result_shape());
  need_y = need_y && y.has_value();
  const Gradients out{new_gradient(x, need_x), new_gradient(a.columns(), need_y), need_x, need_y};
  std::vector<double> sums(a.batch(), 0.0);
  with_operands(a.acc(), bfloat16_products, [&](auto sum, auto operand) {
    for_batch(a, [&](int64_t b) {
      sums[b] = gradients<decltype(sum), decltype(operand)>(a, grad, b, out);
    });
  });
  const double sum = std::accumulate(sums.begin(), sums.end(), 0.0);
  return {out.x, out.y, new_scalar(x, need_temperature, -sum / a.temperature)};
}

STABLE_TORCH_LIBRARY_IMPL(fastnce, CPU, m) {
  m.impl("pairwise_cosine_similarity_forward", TORCH_BOX(&pairwise_cosine_similarity_forward));
  m.impl("pairwise_cosine_similarity_backward", TORCH_BOX(&pairwise_cosine_similarity_backward));
}

}  // namespace
}  // namespace fastnce
