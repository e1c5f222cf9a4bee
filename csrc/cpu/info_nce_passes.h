// The walks over the matrix of logits of an InfoNceProblem, a panel of rows at a time.
#pragma once

#include "info_nce_problem.h"

namespace fastnce {

// Calls body(columns, first slab, last slab, number of slabs before them) for runs of at most
// `limit` slabs of one segment.
template <class T, class Body>
void for_runs(const InfoNceProblem<T>& p, int64_t limit, const Body& body) {
  int64_t before = 0;
  for (const Columns<T>* columns : p.segments) {
    const int64_t slabs = columns->transposed.slabs();
    for (int64_t s = 0; s < slabs; s += limit) {
      body(*columns, s, std::min(slabs, s + limit), before + s);
    }
    before += slabs;
  }
}

// What exp_rows leaves for each slab and row of a panel, slab after slab.
template <class T>
struct SlabSums {
  Buffer<T> offset, sum, moment;
  explicit SlabSums(int64_t size) : offset(size), sum(size), moment(size) {}
};

// Replaces logits of rows [r0 + begin, r0 + end) by exponentials; their sums go to `at` and on.
template <class T>
void exponentiate(InfoNceProblem<T>& p, const Columns<T>& columns, int64_t slab, int64_t r0,
                  int64_t begin, int64_t end, T* z, const SlabSums<T>& sums, int64_t at) {
  p.for_positives(columns, slab, r0 + begin, r0 + end, z,
                  [&](int64_t i, T& x) { p.positive[i] = x; });
  const int64_t lanes = columns.transposed.lanes(slab), c0 = slab * p.kernels.width;
  if (p.call.symmetric) {
    p.kernels.exp_columns(end - begin, lanes, z, &p.column_maximum[c0], &p.column_sum[c0]);
  }
  p.kernels.exp_rows(end - begin, lanes, z, &sums.offset[at + begin], &sums.sum[at + begin],
                     &sums.moment[at + begin]);
}

// Sums of all rows (and columns, if symmetric); keeps no logits.
template <class T>
void sum_pass(InfoNceProblem<T>& p) {
  const int64_t limit = std::min(p.slabs, block_slabs(p.kernels));
  const int64_t panel = std::min(kPanelRows, p.rows);
  const SlabSums<T> sums(limit * panel);
  for (int64_t r0 = 0; r0 < p.rows; r0 += panel) {
    const int64_t rows = std::min(panel, p.rows - r0);
    for_runs(p, limit, [&](const Columns<T>& columns, int64_t s0, int64_t s1, int64_t) {
      // The columns' sums run down the panels in order, so there each slab must be one task.
      const int64_t per_task = p.call.symmetric ? rows : task_rows(rows, s1 - s0);
      for_logits<T>(p.kernels, p.queries, r0, rows, columns.transposed, s0, s1, nullptr, per_task,
                    [&](int64_t slab, int64_t begin, int64_t end, T* z) {
                      exponentiate(p, columns, slab, r0, begin, end, z, sums, (slab - s0) * rows);
                    });
      run_blocks(rows, kTaskRows, 16 * (s1 - s0), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          for (int64_t s = 0; s < s1 - s0; ++s) {
            p.sums[r0 + r].add(sums.offset[s * rows + r], sums.sum[s * rows + r]);
          }
        }
      });
    });
  }
  for (int64_t i = 0; i < p.rows; ++i) p.store_loss(i);
}

// Adds every row's slab sums, stores its loss, and turns each slab's offset into the factor from
// its exponentials to the gradient: weight exp(offset - maximum) / sum.
template <class T>
void finish_sums(InfoNceProblem<T>& p, int64_t r0, int64_t rows, const SlabSums<T>& sums) {
  run_blocks(rows, kTaskRows, 32 * p.slabs, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      ExpSum& total = p.sums[r0 + r];
      for (int64_t at = r; at < p.slabs * rows; at += rows)
        total.add(sums.offset[at], sums.sum[at]);
      p.store_loss(r0 + r);
      p.row_side.set(r0 + r, total, p.side_weight(r0 + r), total.maximum);
      const double scale = p.side_weight(r0 + r) / total.sum;
      double& term = p.call.temperature_terms[p.first + r0 + r];
      for (int64_t at = r; at < p.slabs * rows; at += rows) {
        const double t = sums.offset[at] - total.maximum, factor = scale * std::exp(t);
        term += factor * (sums.moment[at] + t * sums.sum[at]);
        sums.offset[at] = static_cast<T>(factor);
      }
    }
  });
}

// Adds the weights of one slab of a panel, all its rows, to the gradient of the slab's columns.
template <class T>
void add_slab_to_columns(const InfoNceProblem<T>& p, const Columns<T>& columns, int64_t r0,
                         int64_t rows, int64_t slab, const T* block) {
  if (!columns.gradient) return;
  add_column_gradient(p.kernels, rows, block, p.queries, r0, columns, slab, 0, p.queries.slabs());
}

// The same for a whole panel, cut across the depth as well: for few columns and many rows.
template <class T>
void add_panel_to_columns(const InfoNceProblem<T>& p, const Columns<T>& columns, int64_t r0,
                          int64_t rows, int64_t s0, int64_t s1, const T* panel) {
  if (!columns.gradient) return;
  const int64_t width = p.kernels.width, cuts = p.queries.slabs();
  run_tasks((s1 - s0) * cuts, rows * width * width, [&](int64_t task) {
    const int64_t local = task / cuts, d = task % cuts;
    add_column_gradient(p.kernels, rows, panel + local * rows * width, p.queries, r0, columns,
                        s0 + local, d, d + 1);
  });
}

template <class T>
SlabMatrix<T> row_products(const InfoNceProblem<T>& p, int64_t rows) {
  if (!p.call.needs_row_products() || p.slabs == 0) return {};
  return SlabMatrix<T>(rows, p.call.depth, p.kernels.width);
}

// Whether a panel of all columns can be kept with enough rows to be worth it.
template <class T>
bool fits_one_pass(const InfoNceProblem<T>& p) {
  constexpr int64_t kWorthwhileRows = 48;
  const int64_t row_bytes = p.slabs * p.kernels.width * static_cast<int64_t>(sizeof(T));
  return p.slabs > 0 && std::min(p.rows, kWorthwhileRows) * row_bytes <= kPanelBytes;
}

// Losses and gradients with each product made once: the exponentials of a panel's rows are kept
// until their sums are known.
template <class T>
void one_pass(InfoNceProblem<T>& p) {
  const int64_t width = p.kernels.width;
  const int64_t panel = std::min(panel_rows<T>(p.slabs * width), p.rows);
  Buffer<T> z(panel * p.slabs * width);
  const SlabSums<T> sums(panel * p.slabs);
  p.row_side = SoftmaxSide<T>(p.rows);
  for (int64_t r0 = 0; r0 < p.rows; r0 += panel) {
    const int64_t rows = std::min(panel, p.rows - r0);
    const int64_t per_task = task_rows(rows, p.slabs), cuts = (rows + per_task - 1) / per_task;
    for_runs(p, p.slabs, [&](const Columns<T>& columns, int64_t s0, int64_t s1, int64_t before) {
      for_logits(
          p.kernels, p.queries, r0, rows, columns.transposed, s0, s1, &z[before * rows * width],
          per_task, [&](int64_t slab, int64_t begin, int64_t end, T* block) {
            exponentiate(p, columns, slab, r0, begin, end, block, sums, (before + slab) * rows);
          });
    });
    finish_sums(p, r0, rows, sums);
    SlabMatrix<T> products = row_products(p, rows);
    for_runs(p, p.slabs, [&](const Columns<T>& columns, int64_t s0, int64_t s1, int64_t before) {
      T* block_of_columns = &z[before * rows * width];
      run_tasks((s1 - s0) * cuts, per_task * width * p.call.depth, [&](int64_t task) {
        const int64_t local = task / cuts, slab = s0 + local, begin = task % cuts * per_task;
        const int64_t end = std::min(rows, begin + per_task);
        T* block = block_of_columns + (local * rows + begin) * width;
        p.kernels.scale_rows(end - begin, columns.transposed.lanes(slab), block,
                             &sums.offset[(before + slab) * rows + begin]);
        p.subtract_targets(columns, slab, r0 + begin, r0 + end, block);
        if (cuts == 1) add_slab_to_columns(p, columns, r0, rows, slab, block);
      });
      if (cuts > 1) add_panel_to_columns(p, columns, r0, rows, s0, s1, block_of_columns);
      if (products) {
        add_row_gradient(p.kernels, rows, block_of_columns, columns.straight, s0, s1, products,
                         before > 0);
      }
    });
    p.finish_rows(r0, rows, products);
  }
}

// Replaces the logits of rows [r0 + begin, r0 + end) by d L / d z. moment: per row of the panel.
template <class T>
void logits_to_gradient(InfoNceProblem<T>& p, const Columns<T>& columns, int64_t slab, int64_t r0,
                        int64_t begin, int64_t end, T* z, T* moment) {
  const int64_t first = r0 + begin, last = r0 + end, count = end - begin;
  p.for_positives(columns, slab, first, last, z, [&](int64_t i, T& x) { p.positive[i] = x; });
  const int64_t lanes = columns.transposed.lanes(slab), c0 = slab * p.kernels.width;
  if (p.call.symmetric) {
    p.kernels.softmax_both(count, lanes, z, p.row_side.at(first), p.column_side.at(c0),
                           moment + begin);
  } else {
    p.kernels.softmax_rows(count, lanes, z, p.row_side.at(first), moment + begin);
  }
  p.subtract_targets(columns, slab, first, last, z);
}

// Gradients from known sums: the logits are computed again, block by block.
template <class T>
void gradient_pass(InfoNceProblem<T>& p) {
  const int64_t width = p.kernels.width, limit = std::min(p.slabs, block_slabs(p.kernels));
  const int64_t panel = std::min(panel_rows<T>(std::max<int64_t>(1, limit * width)), p.rows);
  Buffer<T> z(panel * limit * width), moment(panel * limit);
  for (int64_t r0 = 0; r0 < p.rows; r0 += panel) {
    const int64_t rows = std::min(panel, p.rows - r0);
    SlabMatrix<T> products = row_products(p, rows);
    for_runs(p, limit, [&](const Columns<T>& columns, int64_t s0, int64_t s1, int64_t before) {
      const int64_t per_task = task_rows(rows, s1 - s0), cuts = (rows + per_task - 1) / per_task;
      for_logits(p.kernels, p.queries, r0, rows, columns.transposed, s0, s1, z.data(), per_task,
                 [&](int64_t slab, int64_t begin, int64_t end, T* block) {
                   logits_to_gradient(p, columns, slab, r0, begin, end, block,
                                      &moment[(slab - s0) * rows]);
                   if (cuts == 1) add_slab_to_columns(p, columns, r0, rows, slab, block);
                 });
      for (int64_t s = 0; s < s1 - s0; ++s) {
        for (int64_t r = 0; r < rows; ++r) {
          p.call.temperature_terms[p.first + r0 + r] += moment[s * rows + r];
        }
      }
      if (cuts > 1) add_panel_to_columns(p, columns, r0, rows, s0, s1, z.data());
      if (products) {
        add_row_gradient(p.kernels, rows, z.data(), columns.straight, s0, s1, products, before > 0);
      }
    });
    p.finish_rows(r0, rows, products);
  }
}

}  // namespace fastnce
