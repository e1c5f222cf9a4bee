// Blocks of the matrix of logits: a panel of rows against a run of column slabs. The blocks are the
// only place where logits exist; their size does not grow with the number of rows or columns.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "parallel.h"
#include "slabs.h"
#include "tile_kernels.h"

namespace fastnce {

constexpr int64_t kPanelBytes = int64_t{16} << 20;  // of logits kept at a time
constexpr int64_t kPanelRows = 512;
constexpr int64_t kBlockColumns = 8192;  // where not all columns are kept
constexpr int64_t kTaskRows = 64;        // rows of a task where the columns alone are too few

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

// log(1 + exp(d)).
inline double softplus(double d) {
  return d > 0 ? d + std::log1p(std::exp(-d)) : std::log1p(std::exp(d));
}

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

// What an epilogue leaves of the exponentials of a block's rows: sum exp(offset).
template <class T>
struct RowParts {
  T *offset, *sum;
};

// Adds to totals[k][row] the exponentials of all rows against all columns, of each of kKinds kinds:
// epilogue(slab, first row, last row, z, parts) fills parts[k] for those rows of one slab.
template <class T, size_t kKinds, class Epilogue>
void sum_logits(const TileKernels<T>& kernels, const SlabMatrix<T>& rows,
                const SlabMatrix<T>& columns,
                const std::array<std::vector<ExpSum>*, kKinds>& totals, const Epilogue& epilogue) {
  const int64_t slabs = columns.slabs(), limit = std::min(slabs, block_slabs(kernels));
  const int64_t panel = std::min(kPanelRows, rows.rows());
  std::array<Buffer<T>, kKinds> offset, sum;
  for (size_t k = 0; k < kKinds; ++k) {
    offset[k] = Buffer<T>(limit * panel);
    sum[k] = Buffer<T>(limit * panel);
  }
  for (int64_t r0 = 0; r0 < rows.rows(); r0 += panel) {
    const int64_t height = std::min(panel, rows.rows() - r0);
    for (int64_t s0 = 0; s0 < slabs; s0 += limit) {
      const int64_t s1 = std::min(slabs, s0 + limit);
      for_logits<T>(kernels, rows, r0, height, columns, s0, s1, nullptr, task_rows(height, s1 - s0),
                    [&](int64_t slab, int64_t begin, int64_t end, T* z) {
                      const int64_t at = (slab - s0) * height + begin;
                      std::array<RowParts<T>, kKinds> parts;
                      for (size_t k = 0; k < kKinds; ++k) parts[k] = {&offset[k][at], &sum[k][at]};
                      epilogue(slab, r0 + begin, r0 + end, z, parts);
                    });
      const int64_t work = 16 * static_cast<int64_t>(kKinds) * (s1 - s0);
      run_blocks(height, kTaskRows, work, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          for (int64_t at = r; at < (s1 - s0) * height; at += height) {
            for (size_t k = 0; k < kKinds; ++k) {
              (*totals[k])[r0 + r].add(offset[k][at], sum[k][at]);
            }
          }
        }
      });
    }
  }
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

}  // namespace fastnce
