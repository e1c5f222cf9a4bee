// In which order an InfoNceProblem's products are made.
//
//   keys without gradient: loss and gradient in one walk, 2 products
//   both gradients: a panel's exponentials are kept until its sums are known, 3 products
//   more columns than can be kept, or an unreduced loss: sums first, then again, 4 products
//   symmetric: the same 4, or 3 where the whole matrix can be kept
//
// Logits are at most 1 / temperature, so a fixed offset usually takes the place of their maximum.
// Where a row's sum then comes out too small to be trusted, the maximum is taken after all.
#pragma once

#include "info_nce_sweep.h"

namespace fastnce {

constexpr int64_t kPanelLimit = 8 * kGroupRows;
const double kLeastSum = std::exp(-60.0);

// NaN counts as trusted: it is what the equation gives.
template <class T, class P>
bool sums_are_trusted(const Panel<T, P>& panel) {
  for (int64_t r = 0; r < panel.rows; ++r) {
    if (panel.sum(r) < kLeastSum) return false;
  }
  return true;
}

// Exponentials and their sums of a panel; `products` as in SweepOptions.
template <class T, class P>
void sum_panel(InfoNceProblem<T, P>& p, Panel<T, P>& panel, bool products, bool fixed) {
  const int64_t runs = panel.run_count();
  if (fixed) {
    sweep(p, panel, {Epilogue::kExp, false, products}, 0, runs);
    if (sums_are_trusted(panel)) return;
  }
  sweep(p, panel, {Epilogue::kMaximum}, 0, runs);
  for (int64_t r = 0; r < panel.rows; ++r) p.offset[panel.r0 + r] = panel.maximum(r);
  const bool kept = !kPaired<P> && runs > 0 && panel.logits[0];  // of pairs, exponentials alone
  sweep(p, panel, {Epilogue::kExp, kept, products}, 0, runs);
}

// Rows [begin, end) of a problem; all others are somebody else's at the same time, or nobody's.
struct RowRange {
  int64_t begin, end;
  bool alone;  // on this thread
};

template <class T, class P>
RowRange all_rows(const InfoNceProblem<T, P>& p) {
  return {0, p.rows, false};
}

template <class T, class P, class Body>
void for_panels(InfoNceProblem<T, P>& p, const RowRange& range, int64_t limit, const Body& body) {
  for (int64_t r0 = range.begin; r0 < range.end; r0 += limit) {
    Panel<T, P> panel(p, r0, std::min(limit, range.end - r0), range.alone);
    body(panel);
  }
}

// Unit queries of a panel / temperature, times factor(row), to be summed over the rows.
template <class T, class P, class Factor>
SlabMatrix<P> scaled_queries(const InfoNceProblem<T, P>& p, const Panel<T, P>& panel,
                             const Factor& factor) {
  SlabMatrix<P> out(operands<P>(panel.rows), p.call.depth, p.kernels.width);
  run_blocks(panel.rows, 16, 4 * p.call.depth, [&](int64_t begin, int64_t end) {
    Buffer<P> row(operands<P>(p.call.depth));
    Buffer<T> scratch(p.call.depth);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t i = panel.r0 + r;
      const T* query = p.call.query.read(p.first + i, scratch.data());
      const double scale = factor(i) * p.query_inverse[i] / p.call.temperature;
      if constexpr (kPaired<P>) {
        p.kernels.pairs->round_row(p.call.depth, query, scale, row.data());
        copy_half_in(out, r, row.data());
      } else {
        p.kernels.scale(p.call.depth, query, scale, row.data());
        out.copy_row_in(r, row.data());
      }
    }
  });
  return out;
}

// Rows whose logits with all columns can be kept.
template <class T, class P>
int64_t rows_kept(const InfoNceProblem<T, P>& p) {
  const int64_t row_bytes = operand_bytes<P>(std::max<int64_t>(1, p.columns()));
  const int64_t fit = kKeptBytes / row_bytes;
  return fit >= p.rows ? p.rows : fit / kGroupRows * kGroupRows;
}

// Gradients from known offsets. factor(i): from a row's exponentials to its gradient;
// after_row_sums is called for each panel once its walk is done.
template <class T, class P, class Factor, class AfterSums>
void gradient_pass(InfoNceProblem<T, P>& p, const RowRange& range, Epilogue epilogue,
                   const Factor& factor, const AfterSums& after_sums) {
  const bool keep = p.wants_column_products();
  for_panels(p, range, kPanelLimit, [&](Panel<T, P>& panel) {
    SlabMatrix<P> queries;
    if (keep) queries = scaled_queries(p, panel, factor);
    const SweepOptions options{epilogue, false, p.wants_row_products()};
    // Runs are walked together as far as their logits can be kept.
    for (int64_t first = 0, last = 0; first < panel.run_count() || last == 0; first = last) {
      int64_t bytes = 0;
      for (; last < panel.run_count(); ++last) {
        bytes += operand_bytes<P>(panel.keys_of(last) * panel.rows);
        if (keep && last > first && bytes > kKeptBytes) break;
      }
      if (keep) panel.keep_logits(first, last);
      sweep(p, panel, options, first, last);
      if (keep) add_to_keys(p, panel, queries, first, last);
      panel.forget_logits();
      if (last == panel.run_count()) break;
    }
    after_sums(panel);
    p.finish_rows(panel.r0, panel.rows, panel.products, factor);
  });
}

template <class T, class P>
void solve_rows(InfoNceProblem<T, P>& p, const RowRange& range) {
  const bool keep = p.wants_column_products();
  const int64_t fit = keep ? rows_kept(p) : kPanelLimit;
  const bool one_pass = p.wants_gradients() && fit > 0;
  const auto factor = [&](int64_t i) {
    return p.call.weights[p.first + i] * std::exp(p.offset[i] - p.lse[i]);
  };
  const int64_t limit = one_pass ? std::min(fit, kPanelLimit) : kPanelLimit;
  for_panels(p, range, limit, [&](Panel<T, P>& panel) {
    if (one_pass && keep) panel.keep_logits(0, panel.run_count());
    sum_panel(p, panel, one_pass && p.wants_row_products(), p.fixed_offset);
    p.finish_sums(panel.r0, panel.r0 + panel.rows,
                  [&](int64_t i) { return panel.sum(i - panel.r0); });
    if (!one_pass) return;
    if (keep) add_to_keys(p, panel, scaled_queries(p, panel, factor), 0, panel.run_count());
    p.finish_rows(panel.r0, panel.rows, panel.products, factor);
  });
  if (p.wants_gradients() && !one_pass) {
    gradient_pass(p, range, Epilogue::kExp, factor, [](const Panel<T, P>&) {});
  }
}

// From the lse of the forward: the exponentials then are the softmax itself.
template <class T, class P>
void solve_rows_from_lse(InfoNceProblem<T, P>& p, const RowRange& range, const T* row_lse) {
  for (int64_t i = range.begin; i < range.end; ++i) {
    p.lse[i] = row_lse[p.first + i];
    p.offset[i] = row_lse[p.first + i];
  }
  const auto weight = [&](int64_t i) { return p.call.weights[p.first + i]; };
  gradient_pass(p, range, Epilogue::kExp, weight, [&](const Panel<T, P>& panel) {
    const int64_t work = 16 + 4 * p.call.own_negatives * p.call.depth;
    run_blocks(panel.rows, 16, work, [&](int64_t begin, int64_t end) {
      for (int64_t i = panel.r0 + begin; i < panel.r0 + end; ++i) {
        const double others = std::exp(p.other_terms(i).log() - p.lse[i]);
        const double rest = std::isinf(p.lse[i]) ? 1 - std::exp(p.positive[i] - p.lse[i])
                                                 : panel.sum(i - panel.r0) + others;
        p.missing[i] = weight(i) * rest;
      }
    });
  });
}

// Sums of the rows' exponentials, each relative to its row's maximum.
template <class T, class P>
std::vector<ExpSum> sums_by_maximum(InfoNceProblem<T, P>& p) {
  std::vector<ExpSum> sums(p.rows);
  for_panels(p, all_rows(p), kPanelLimit, [&](Panel<T, P>& panel) {
    sum_panel(p, panel, false, false);
    for (int64_t r = 0; r < panel.rows; ++r) {
      sums[panel.r0 + r].add(p.offset[panel.r0 + r], panel.sum(r));
    }
  });
  return sums;
}

template <class T, class P>
void symmetric_gradients(InfoNceProblem<T, P>& p, bool fixed) {
  p.row_weight = Buffer<T>(p.padded_rows(), T(0));
  p.column_weight = Buffer<T>(p.rows);
  if (!fixed) p.column_offset = Buffer<T>(p.rows);
  // From exponentials relative to an offset to those relative to the lse, which may be infinite.
  const auto shift = [](double offset, double lse) {
    return std::isinf(lse) ? 1.0 : std::exp(offset - lse);
  };
  for (int64_t i = 0; i < p.rows; ++i) {
    const double weight = 0.5 * p.call.weights[p.first + i];
    if (fixed) {
      p.row_weight[i] = static_cast<T>(weight * std::exp(p.offset[i] - p.lse[i]));
      p.column_weight[i] = static_cast<T>(weight * std::exp(p.offset[i] - p.column_lse[i]));
    } else {
      p.offset[i] = static_cast<T>(p.lse[i]);
      p.column_offset[i] = static_cast<T>(p.column_lse[i]);
      p.row_weight[i] = static_cast<T>(weight * shift(p.offset[i], p.lse[i]));
      p.column_weight[i] = static_cast<T>(weight * shift(p.column_offset[i], p.column_lse[i]));
    }
  }
}

template <class T, class P>
void solve_symmetric(InfoNceProblem<T, P>& p) {
  const auto one = [](int64_t) { return 1.0; };
  const bool whole = p.wants_gradients() && rows_kept(p) == p.rows;
  std::vector<double> row_sum(p.rows), column_sum(p.rows, 0.0);
  bool fixed = p.fixed_offset, done = false;
  if (fixed) {
    for_panels(p, all_rows(p), whole ? p.rows : kPanelLimit, [&](Panel<T, P>& panel) {
      if (whole) panel.keep_logits(0, panel.run_count());
      sweep(p, panel, {Epilogue::kExpBoth}, 0, panel.run_count());
      for (int64_t r = 0; r < panel.rows; ++r) row_sum[panel.r0 + r] = panel.sum(r);
      for (int64_t g = 0; g < panel.groups(); ++g) {
        for (int64_t j = 0; j < p.rows; ++j) column_sum[j] += panel.column_sums[g * p.rows + j];
      }
      if (!whole) return;
      for (int64_t i = 0; i < p.rows; ++i) {
        fixed = fixed && !(row_sum[i] < kLeastSum) && !(column_sum[i] < kLeastSum);
      }
      if (!fixed) return;
      const auto sum = [&](const std::vector<double>& of) {
        return [&](int64_t i) {
          ExpSum total;
          total.add(p.offset[i], of[i]);
          return total;
        };
      };
      p.finish_both_sums(sum(row_sum), sum(column_sum));
      symmetric_gradients(p, true);
      sweep(p, panel, {Epilogue::kScaleBoth, true, p.wants_row_products()}, 0, panel.run_count());
      if (p.wants_column_products()) {
        add_to_keys(p, panel, scaled_queries(p, panel, one), 0, panel.run_count());
      }
      p.finish_rows(0, p.rows, panel.products, one);
      done = true;
    });
    if (done) return;
    for (int64_t i = 0; i < p.rows; ++i) {
      fixed = fixed && !(row_sum[i] < kLeastSum) && !(column_sum[i] < kLeastSum);
    }
  }
  if (fixed) {
    const auto sum = [&](const std::vector<double>& of) {
      return [&](int64_t i) {
        ExpSum total;
        total.add(p.offset[i], of[i]);
        return total;
      };
    };
    p.finish_both_sums(sum(row_sum), sum(column_sum));
  } else {
    const std::vector<ExpSum> row = sums_by_maximum(p);
    InfoNceCall<T> swapped = p.call;
    std::swap(swapped.query, swapped.key);
    swapped.weights = nullptr;
    swapped.symmetric = false;
    InfoNceProblem<T, P> columns(p.kernels, swapped, p.first, p.rows, nullptr);
    const std::vector<ExpSum> column = sums_by_maximum(columns);
    p.finish_both_sums([&](int64_t i) { return row[i]; }, [&](int64_t i) { return column[i]; });
  }
  if (!p.wants_gradients()) return;
  symmetric_gradients(p, fixed);
  gradient_pass(p, all_rows(p), fixed ? Epilogue::kScaleBoth : Epilogue::kApart, one,
                [](const Panel<T, P>&) {});
}

template <class T, class P>
void solve_symmetric_from_lse(InfoNceProblem<T, P>& p, const T* row_lse, const T* column_lse) {
  p.dot_positives();
  for (int64_t i = 0; i < p.rows; ++i) {
    p.lse[i] = row_lse[p.first + i];
    p.column_lse[i] = column_lse[p.first + i];
    p.missing[i] =
        -0.5 * p.call.weights[p.first + i] *
        (std::expm1(p.positive[i] - p.lse[i]) + std::expm1(p.positive[i] - p.column_lse[i]));
  }
  symmetric_gradients(p, false);
  gradient_pass(
      p, all_rows(p), Epilogue::kApart, [](int64_t) { return 1.0; }, [](const Panel<T, P>&) {});
}

}  // namespace fastnce
