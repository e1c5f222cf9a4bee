// Blocks of the matrix of logits: a panel of rows against a run of column slabs. The blocks are the
// only place where logits exist; their size does not grow with the number of rows or columns.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "parallel.h"
#include "slabs.h"
#include "tile_kernels.h"

namespace fastnce {

constexpr int64_t kPanelBytes = int64_t{16} << 20;  // of logits kept at a time
constexpr int64_t kPanelRows = 512;
constexpr int64_t kBlockColumns = 8192;  // where not all columns are kept
constexpr int64_t kTaskRows = 64;        // rows of a task where the columns alone are too few

// Columns of the matrix: the unit rows of keys, or of negatives.
template <class T>
struct Columns {
  int64_t count = 0;
  SlabMatrix<T> transposed;  // (D, count), the right-hand side of the logits
  SlabMatrix<T> straight;    // (count, D), that of the rows' gradient; empty where not needed
  SlabMatrix<T> gradient;    // (count, D) with respect to the unit rows; empty where not needed
};

// A sum of exponentials relative to its largest exponent, in double.
struct ExpSum {
  double maximum = -std::numeric_limits<double>::infinity();
  double sum = 0;

  // Adds `value` * exp(offset), offset finite.
  void add(double offset, double value) {
    if (value == 0) return;
    if (offset > maximum) {
      sum = scaled(sum, maximum - offset) + value;
      maximum = offset;
    } else {
      sum += scaled(value, offset - maximum);
    }
  }
  // An infinite sum stays so, however far below the maximum its offset is.
  static double scaled(double value, double exponent) {
    return std::isinf(value) ? value : value * std::exp(exponent);
  }
  void add_logit(double z) {
    const double offset = std::isfinite(z) ? z : 0.0;
    add(offset, std::exp(z - offset));
  }
  double log() const { return maximum + std::log(sum); }
  // log of the sum - z, with nothing lost where z is the largest exponent.
  double log_minus(double z) const { return std::log(sum) - (z - maximum); }
};

// Rows of a panel so that `columns` of them fit the budget.
template <class T>
int64_t panel_rows(int64_t columns) {
  const int64_t fit = kPanelBytes / (columns * static_cast<int64_t>(sizeof(T)));
  return std::clamp<int64_t>(fit / 8 * 8, 8, kPanelRows);
}

template <class T>
int64_t block_slabs(const TileKernels<T>& kernels) {
  return kBlockColumns / kernels.width;
}

// Row blocks that the rows of a panel are cut into so that every thread has work.
inline int64_t task_rows(int64_t rows, int64_t slabs) {
  return slabs >= 4 * static_cast<int64_t>(torch::stable::get_num_threads()) ? rows : kTaskRows;
}

// Computes the logits of rows [r0, r0 + rows) against slabs [s0, s1) of `columns` and hands them to
// epilogue(slab, begin, end, z): rows begin .. end - 1 of the panel, `width` lanes each. They stay
// in `panel` (slab after slab of `rows` rows) or, if that is null, are gone afterwards.
template <class T, class Epilogue>
void for_logits(const TileKernels<T>& kernels, const SlabMatrix<T>& queries, int64_t r0,
                int64_t rows, const SlabMatrix<T>& columns, int64_t s0, int64_t s1, T* panel,
                int64_t rows_per_task, const Epilogue& epilogue) {
  const int64_t width = kernels.width, depth = queries.columns();
  const int64_t per_task = std::min(rows_per_task, rows);
  const int64_t cuts = (rows + per_task - 1) / per_task;
  run_workers((s1 - s0) * cuts, per_task * width * depth, [&](TaskQueue& queue) {
    Buffer<T> scratch;
    if (panel == nullptr) scratch = Buffer<T>(per_task * width);
    for (int64_t task; queue.next(task);) {
      const int64_t local = task / cuts, slab = s0 + local;
      const int64_t begin = task % cuts * per_task, end = std::min(rows, begin + per_task);
      T* z = panel == nullptr ? scratch.data() : panel + (local * rows + begin) * width;
      kernels.multiply(end - begin, depth, columns.lanes(slab), queries.at(r0 + begin, 0),
                       queries.slab_size(), columns.at(0, slab), z, false);
      epilogue(slab, begin, end, z);
    }
  });
}

// out (rows, D) [+]= panel (rows, slabs s0 .. s1 - 1) times those rows of `columns` (count, D).
// With few rows the sum over columns is cut into pieces, so that there is work for every thread;
// the pieces depend on the shapes alone and are added in order.
template <class T>
void add_row_gradient(const TileKernels<T>& kernels, int64_t rows, const T* panel,
                      const SlabMatrix<T>& columns, int64_t s0, int64_t s1,
                      const SlabMatrix<T>& out, bool accumulate) {
  constexpr int64_t kFewRows = 32, kPiece = 2048, kMaxPieces = 32;
  const int64_t width = kernels.width, first = s0 * width;
  const int64_t depth = std::min(columns.rows(), s1 * width) - first;
  int64_t piece = depth;
  if (rows <= kFewRows) {
    piece = std::max(kPiece, (depth + kMaxPieces - 1) / kMaxPieces);
    piece = (piece + width - 1) / width * width;
  }
  const int64_t pieces = (depth + piece - 1) / piece;
  SlabMatrix<T> partial;
  if (pieces > 1) partial = SlabMatrix<T>(pieces * rows, out.columns(), width);

  const int64_t cuts = (rows + kTaskRows - 1) / kTaskRows;
  const int64_t work = std::min(rows, kTaskRows) * piece * width;
  run_tasks(cuts * pieces * out.slabs(), work, [&](int64_t task) {
    const int64_t slab = task % out.slabs(), rest = task / out.slabs();
    const int64_t p = rest % pieces, begin = rest / pieces * kTaskRows;
    const int64_t end = std::min(rows, begin + kTaskRows), start = p * piece;
    T* target = pieces > 1 ? partial.at(p * rows + begin, slab) : out.at(begin, slab);
    kernels.multiply(end - begin, std::min(piece, depth - start), out.lanes(slab),
                     panel + start * rows + begin * width, rows * width,
                     columns.at(first + start, slab), target, accumulate && pieces == 1);
  });
  if (pieces == 1) return;
  run_tasks(out.slabs(), pieces * rows * width, [&](int64_t slab) {
    T* target = out.at(0, slab);
    for (int64_t p = 0; p < pieces; ++p) {
      const T* source = partial.at(p * rows, slab);
      for (int64_t i = 0; i < rows * width; ++i) {
        target[i] = p == 0 && !accumulate ? source[i] : target[i] + source[i];
      }
    }
  });
}

// Adds panel slab `slab` (g), transposed, times columns [d0, d1) in slabs of rows [r0, r0 + rows)
// of `queries` to the gradient of its columns. Whoever owns the slab owns those rows of the
// gradient.
template <class T>
void add_column_gradient(const TileKernels<T>& kernels, int64_t rows, const T* g,
                         const SlabMatrix<T>& queries, int64_t r0, const Columns<T>& columns,
                         int64_t slab, int64_t d0, int64_t d1) {
  for (int64_t d = d0; d < d1; ++d) {
    kernels.multiply_transposed(columns.transposed.lanes(slab), rows, queries.lanes(d), g,
                                queries.at(r0, d), columns.gradient.at(slab * kernels.width, d));
  }
}

}  // namespace fastnce
