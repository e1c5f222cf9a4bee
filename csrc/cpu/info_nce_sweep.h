// Walks over the matrix of logits between a panel of queries and all keys.
//
// Blocks of 144 keys x `width` queries, keys down and queries across the lanes, stay in the caches
// from the product that makes them, through exp and its sums (which run down the lanes), to the
// product that uses them. Queries are few per panel and packed as needed; keys stand in one layout
// that serves both products. A task is a group of queries against a run of keys; tasks and the
// partial sums that they leave depend on the shapes alone, so the result does not depend on the
// threads.
#pragma once

#include "info_nce_problem.h"

namespace fastnce {

// A run of keys that one task walks.
struct KeyRun {
  int64_t set, begin, end;
};

// What is done to the logits before the products use them.
enum class Epilogue {
  kMaximum,    // nothing; the row maxima are wanted
  kExp,        // exp(z - row offset) and row sums
  kExpBoth,    // the same and column sums (symmetric)
  kScaleBoth,  // (row weight + column weight) exp(z - offset)
  kApart,      // exp(z - row offset) row weight + exp(z - column offset) column weight
};

template <class T>
struct Panel {
  const InfoNceProblem<T>& problem;
  const int64_t r0, rows, group;
  std::vector<KeyRun> runs;
  SlabMatrix<T> queries;              // (D, rows) unit rows / temperature, transposed
  std::vector<SlabMatrix<T>> logits;  // per run (its keys, rows), where they are kept
  SlabMatrix<T> products;             // (runs * rows, D), where wanted
  Buffer<double> sums;                // (runs, padded rows)
  Buffer<T> maxima;                   // (runs, padded rows)
  Buffer<T> column_sums;              // (groups, keys): symmetric only

  // `alone`: walked by a single thread, which needs no more than one task.
  Panel(InfoNceProblem<T>& p, int64_t r0_, int64_t rows_, bool alone)
      : problem(p), r0(r0_), rows(rows_), group(p.group_rows()) {
    pack_unit_rows<T>(p.kernels, p.call.query, p.first + r0, rows, p.call.normalize,
                      1 / p.call.temperature, nullptr, &queries, &p.query_inverse[r0]);
    for (size_t s = 0; s < p.sets.size(); ++s) {
      add_runs(static_cast<int64_t>(s), p.sets[s]->count, alone);
    }
    logits.resize(runs.size());
  }

  int64_t groups() const { return (rows + group - 1) / group; }
  int64_t padded() const { return queries.slabs() * problem.kernels.width; }
  int64_t run_count() const { return static_cast<int64_t>(runs.size()); }
  int64_t keys_of(int64_t run) const { return runs[run].end - runs[run].begin; }

  // Cuts keys into runs: at least about 8 tasks where each is worth it, 32 where there are many,
  // and none too large for its logits to be kept.
  void add_runs(int64_t set, int64_t count, bool alone) {
    const int64_t few = std::clamp<int64_t>(8 / groups(), 1, (count + kKeyBlock - 1) / kKeyBlock);
    const int64_t many = std::clamp<int64_t>(32 / groups(), 1, (count + 2047) / 2048);
    const int64_t bytes = count * rows * static_cast<int64_t>(sizeof(T));
    const int64_t fit = (bytes + kKeptBytes - 1) / kKeptBytes;
    const int64_t cuts = alone ? std::max<int64_t>(fit, 1) : std::max({few, many, fit});
    const int64_t length = ((count + cuts - 1) / cuts + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
    for (int64_t j = 0; j < count; j += length)
      runs.push_back({set, j, std::min(count, j + length)});
  }

  void keep_logits(int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      logits[run] = SlabMatrix<T>(keys_of(run), rows, problem.kernels.width);
    }
  }
  void forget_logits() {
    for (SlabMatrix<T>& kept : logits) kept = SlabMatrix<T>();
  }

  // Sum of the exponentials of panel row r over all runs, relative to its offset.
  double sum(int64_t r) const {
    double total = 0;
    for (size_t run = 0; run < runs.size(); ++run) total += sums[run * padded() + r];
    return total;
  }
  T maximum(int64_t r) const {
    T top = -std::numeric_limits<T>::infinity();
    for (size_t run = 0; run < runs.size(); ++run) {
      const T x = maxima[run * padded() + r];
      top = x > top ? x : top;
    }
    return std::isfinite(top) ? top : T(0);
  }
};

// Reads blocks of unit keys: packed already, or packed now.
template <class T>
class KeyBlocks {
 public:
  KeyBlocks(const InfoNceProblem<T>& p, const KeySet<T>& set)
      : set_(set), reader_(p.kernels, set.source, p.call.normalize), row_(p.call.depth) {
    if (!set.units) block_ = SlabMatrix<T>(kKeyBlock, p.call.depth, p.kernels.width);
  }
  void move_to(int64_t begin, int64_t end) {
    if (set_.units) {
      base_ = set_.units.at(begin, 0);
      return;
    }
    base_ = block_.at(0, 0);
    for (int64_t j = begin; j < end; ++j) {
      reader_.read(set_.first + j, 1.0, row_.data());
      block_.copy_row_in(j - begin, row_.data());
    }
  }
  int64_t slab_size() const { return set_.units ? set_.units.slab_size() : block_.slab_size(); }
  const T* at(int64_t slab) const { return base_ + slab * slab_size(); }

 private:
  const KeySet<T>& set_;
  UnitRowReader<T> reader_;
  Buffer<T> row_;
  SlabMatrix<T> block_;
  const T* base_ = nullptr;
};

// Takes the positives out of a block: rows are keys from j0 on, lanes are queries from i0 on.
template <class T>
void take_positives(InfoNceProblem<T>& p, int64_t j0, int64_t j1, int64_t i0, int64_t lanes, T* z) {
  for (int64_t i = std::max(j0, i0); i < std::min(j1, i0 + lanes); ++i) {
    T& x = z[(i - j0) * p.kernels.width + (i - i0)];
    p.positive[i] = x;
    x = -std::numeric_limits<T>::infinity();
  }
}

struct SweepOptions {
  Epilogue epilogue;
  bool again = false;     // the logits, or their exponentials, were kept by an earlier walk
  bool products = false;  // multiply the results with the keys
};

// One walk over runs [first, last).
template <class T>
void sweep(InfoNceProblem<T>& p, Panel<T>& panel, const SweepOptions& options, int64_t first,
           int64_t last) {
  const TileKernels<T>& kernels = p.kernels;
  const auto [epilogue, again, products] = options;
  const int64_t width = kernels.width, depth = p.call.depth, groups = panel.groups();
  const int64_t padded = panel.padded(), run_count = panel.run_count();
  if (products && first == 0) panel.products = SlabMatrix<T>(run_count * panel.rows, depth, width);
  const bool sum = epilogue == Epilogue::kExp || epilogue == Epilogue::kExpBoth;
  if (sum && first == 0) panel.sums = Buffer<double>(run_count * padded, 0.0);
  if (epilogue == Epilogue::kMaximum) {
    panel.maxima = Buffer<T>(run_count * padded, -std::numeric_limits<T>::infinity());
  }
  if (epilogue == Epilogue::kExpBoth) panel.column_sums = Buffer<T>(groups * p.rows, T(0));

  if (first == last) return;
  const int64_t work = panel.keys_of(first) * depth * panel.group;
  run_workers(groups * (last - first), work, [&](TaskQueue& queue) {
    Buffer<T> scratch(kKeyBlock * width), block_sum(width);
    for (int64_t task; queue.next(task);) {
      const int64_t run = first + task / groups, g = task % groups;
      const KeyRun& keys = panel.runs[run];
      const KeySet<T>& set = *p.sets[keys.set];
      const SlabMatrix<T>& kept = panel.logits[run];
      const int64_t s0 = g * panel.group / width;
      const int64_t s1 = slab_count(std::min(panel.rows, (g + 1) * panel.group), width);
      if (products) {
        const int64_t begin = s0 * width, end = std::min(panel.rows, s1 * width);
        for (int64_t d = 0; d < panel.products.slabs(); ++d) {
          std::fill_n(panel.products.at(run * panel.rows + begin, d), (end - begin) * width, T(0));
        }
      }
      KeyBlocks<T> units(p, set);
      for (int64_t j0 = keys.begin; j0 < keys.end; j0 += kKeyBlock) {
        const int64_t j1 = std::min(keys.end, j0 + kKeyBlock), count = j1 - j0;
        units.move_to(j0, j1);
        for (int64_t s = s0; s < s1; ++s) {
          const int64_t lanes = panel.queries.lanes(s), row = panel.r0 + s * width;
          T* z = kept ? kept.at(j0 - keys.begin, s) : scratch.data();
          if (!again) {
            kernels.multiply(count, depth, lanes, units.at(0), units.slab_size(),
                             panel.queries.at(0, s), z, false);
            if (set.own) take_positives(p, j0, j1, row, lanes, z);
          }
          switch (epilogue) {
            case Epilogue::kMaximum:
              kernels.block_maximum(count, lanes, z, &panel.maxima[run * padded + s * width]);
              break;
            case Epilogue::kExp:
            case Epilogue::kExpBoth: {
              T* across =
                  epilogue == Epilogue::kExp ? nullptr : &panel.column_sums[g * p.rows + j0];
              kernels.block_exp(count, lanes, z, &p.offset[row], block_sum.data(), across);
              double* total = &panel.sums[run * padded + s * width];
              for (int64_t i = 0; i < lanes; ++i) total[i] += block_sum[i];
              break;
            }
            case Epilogue::kScaleBoth:
              if (!again)
                kernels.block_exp(count, lanes, z, &p.offset[row], block_sum.data(), nullptr);
              kernels.block_scale_both(count, lanes, z, &p.row_weight[row], &p.column_weight[j0]);
              break;
            case Epilogue::kApart:
              kernels.block_exp_both(count, lanes, z, &p.offset[row], &p.row_weight[row],
                                     &p.column_offset[j0], &p.column_weight[j0]);
              break;
          }
          if (!products) continue;
          for (int64_t d = 0; d < panel.products.slabs(); ++d) {
            kernels.multiply_transposed(lanes, count, panel.products.lanes(d), z, units.at(d),
                                        panel.products.at(run * panel.rows + s * width, d));
          }
        }
      }
    }
  });
}

// Adds the kept values of runs [first, last), times `queries` (rows, D), to the keys' gradients.
template <class T>
void add_to_keys(const InfoNceProblem<T>& p, const Panel<T>& panel, const SlabMatrix<T>& queries,
                 int64_t first, int64_t last) {
  constexpr int64_t kBlock = 64;
  for (int64_t run = first; run < last; ++run) {
    const KeySet<T>& set = *p.sets[panel.runs[run].set];
    if (!set.gradient) continue;
    const SlabMatrix<T>& kept = panel.logits[run];
    const int64_t j0 = panel.runs[run].begin;
    run_blocks(panel.keys_of(run), kBlock, panel.rows * p.call.depth, [&](int64_t b, int64_t e) {
      for (int64_t d = 0; d < queries.slabs(); ++d) {
        p.kernels.multiply(e - b, panel.rows, queries.lanes(d), kept.at(b, 0), kept.slab_size(),
                           queries.at(0, d), set.gradient.at(j0 + b, d), true);
      }
    });
  }
}

}  // namespace fastnce
