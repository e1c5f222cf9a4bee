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

template <class T, class P>
struct Panel {
  const InfoNceProblem<T, P>& problem;
  const int64_t r0, rows, group;
  std::vector<KeyRun> runs;
  SlabMatrix<P> queries;  // (operands of D, rows) unit rows / temperature, transposed
  Buffer<T> rests;        // pairs only: of the queries, padded to whole slabs
  // Per run (its keys, operands of rows), where they are kept: logits and then exponentials, of
  // pairs exponentials alone.
  std::vector<SlabMatrix<P>> logits;
  SlabMatrix<T> products;  // (runs * rows, D), where wanted
  Buffer<double> sums;     // (runs, padded rows)
  Buffer<T> maxima;        // (runs, padded rows)
  Buffer<T> column_sums;   // (groups, keys): symmetric only

  // `alone`: walked by a single thread, which needs no more than one task.
  Panel(InfoNceProblem<T, P>& p, int64_t r0_, int64_t rows_, bool alone)
      : problem(p), r0(r0_), rows(rows_), group(p.group_rows()) {
    if (kPaired<P>) rests = Buffer<T>(slab_count(rows, p.kernels.width) * p.kernels.width, T(0));
    pack_unit_rows<T, P>(p.kernels, p.call.query, p.first + r0, rows, p.call.normalize,
                         1 / p.call.temperature,
                         {nullptr, &queries, nullptr, &p.query_inverse[r0], rests.data()});
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
    // A single block of a single group is cut smaller, or there would be one task.
    const int64_t step = count <= kKeyBlock && groups() == 1 ? kSmallRun : kKeyBlock;
    const int64_t most = step == kSmallRun ? 4 : 8 / groups();
    const int64_t few = std::clamp<int64_t>(most, 1, (count + step - 1) / step);
    const int64_t many = std::clamp<int64_t>(32 / groups(), 1, (count + 2047) / 2048);
    const int64_t bytes = operand_bytes<P>(count * rows);
    const int64_t fit = (bytes + kKeptBytes - 1) / kKeptBytes;
    const int64_t cuts = alone ? std::max<int64_t>(fit, 1) : std::max({few, many, fit});
    const int64_t length = ((count + cuts - 1) / cuts + step - 1) / step * step;
    for (int64_t j = 0; j < count; j += length)
      runs.push_back({set, j, std::min(count, j + length)});
  }

  void keep_logits(int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      logits[run] = SlabMatrix<P>(keys_of(run), operands<P>(rows), problem.kernels.width);
    }
  }
  void forget_logits() {
    for (SlabMatrix<P>& kept : logits) kept = SlabMatrix<P>();
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
    // Under an infinite maximum every finite logit's exponential is 0, as its softmax.
    if (top > std::numeric_limits<T>::max()) return std::numeric_limits<T>::max();
    return std::isfinite(top) ? top : T(0);
  }
};

// Reads blocks of unit keys: packed already, or packed now. Blocks begin at even keys.
template <class T, class P>
class KeyBlocks {
 public:
  KeyBlocks(const InfoNceProblem<T, P>& p, const KeySet<T, P>& set)
      : set_(set), reader_(p.kernels, set.source, p.call.normalize) {
    if (set.units) return;
    const int64_t length = operands<P>(p.call.depth), width = p.kernels.width;
    row_ = Buffer<P>(length);
    block_ = SlabMatrix<P>(kKeyBlock, length, width);
    if (!kPaired<P>) return;
    block_summands_ = SlabMatrix<P>(operands<P>(kKeyBlock), p.call.depth, width);
    block_rests_ = Buffer<T>(kKeyBlock);
  }

  void move_to(int64_t begin, int64_t end) {
    if (set_.units) {
      at_ = begin;
      return;
    }
    for (int64_t j = begin; j < end; ++j) {
      const int64_t row = j - begin;
      if constexpr (kPaired<P>) {
        block_rests_[row] = reader_.read_pairs(set_.first + j, 1.0, row_.data());
        copy_half_in(block_summands_, row, row_.data());
      } else {
        reader_.read(set_.first + j, 1.0, row_.data());
      }
      block_.copy_row_in(row, row_.data());
    }
  }

  int64_t slab_size() const { return units().slab_size(); }
  const P* units_at(int64_t slab) const { return units().at(at_, slab); }
  const P* summands_at(int64_t slab) const {
    if constexpr (!kPaired<P>) return units_at(slab);
    return (set_.units ? set_.summands : block_summands_).at(at_ / 2, slab);
  }
  const T* rests() const { return (set_.units ? set_.rests : block_rests_).data() + at_; }

 private:
  const SlabMatrix<P>& units() const { return set_.units ? set_.units : block_; }

  const KeySet<T, P>& set_;
  UnitRowReader<T> reader_;
  Buffer<P> row_;
  SlabMatrix<P> block_, block_summands_;
  Buffer<T> block_rests_;
  int64_t at_ = 0;
};

// Takes the positives out of a block: rows are keys from j0 on, lanes are queries from i0 on.
template <class T, class P>
void take_positives(InfoNceProblem<T, P>& p, int64_t j0, int64_t j1, int64_t i0, int64_t lanes,
                    T* z) {
  for (int64_t i = std::max(j0, i0); i < std::min(j1, i0 + lanes); ++i) {
    T& x = z[(i - j0) * p.kernels.width + (i - i0)];
    p.positive[i] = x;
    x = -std::numeric_limits<T>::infinity();
  }
}

// Where the values of a block are: in scratch memory of the task or, of numbers, where they are
// kept. Pairs are kept beside it, for the products need them paired along the other side too.
template <class T, class P>
struct BlockValues {
  T* z = nullptr;
  P *down = nullptr, *kept = nullptr;

  BlockValues(const SlabMatrix<P>& matrix, int64_t row, int64_t slab, T* scratch, P* pairs) {
    if constexpr (kPaired<P>) {
      z = scratch;
      down = pairs;
      const int64_t width = matrix ? matrix.slab_size() / matrix.rows() : 0;
      if (matrix) kept = matrix.at(row, slab / 2) + slab % 2 * (width / 2);
    } else {
      down = z = matrix ? matrix.at(row, slab) : scratch;
    }
  }
};

struct SweepOptions {
  Epilogue epilogue;
  bool again = false;     // the logits, or their exponentials, were kept by an earlier walk
  bool products = false;  // multiply the results with the keys
};

// One walk over runs [first, last).
template <class T, class P>
void sweep(InfoNceProblem<T, P>& p, Panel<T, P>& panel, const SweepOptions& options, int64_t first,
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
    Buffer<P> pairs;
    if (kPaired<P>) pairs = Buffer<P>(operands<P>(kKeyBlock) * width);
    for (int64_t task; queue.next(task);) {
      const int64_t run = first + task / groups, g = task % groups;
      const KeyRun& keys = panel.runs[run];
      const KeySet<T, P>& set = *p.sets[keys.set];
      const SlabMatrix<P>& kept = panel.logits[run];
      const int64_t s0 = g * panel.group / width;
      const int64_t s1 = slab_count(std::min(panel.rows, (g + 1) * panel.group), width);
      if (products) {
        const int64_t begin = s0 * width, end = std::min(panel.rows, s1 * width);
        for (int64_t d = 0; d < panel.products.slabs(); ++d) {
          std::fill_n(panel.products.at(run * panel.rows + begin, d), (end - begin) * width, T(0));
        }
      }
      KeyBlocks<T, P> units(p, set);
      for (int64_t j0 = keys.begin; j0 < keys.end; j0 += kKeyBlock) {
        const int64_t j1 = std::min(keys.end, j0 + kKeyBlock), count = j1 - j0;
        units.move_to(j0, j1);
        for (int64_t s = s0; s < s1; ++s) {
          const int64_t lanes = panel.queries.lanes(s), row = panel.r0 + s * width;
          const BlockValues<T, P> block(kept, j0 - keys.begin, s, scratch.data(), pairs.data());
          T* z = block.z;
          if (!again) {
            multiply(kernels, count, operands<P>(depth), lanes, units.units_at(0),
                     units.slab_size(), panel.queries.at(0, s), z, false);
            if constexpr (kPaired<P>) {
              kernels.pairs->scale_block(count, lanes, z, &panel.rests[s * width], units.rests());
            }
            if (set.own) take_positives(p, j0, j1, row, lanes, z);
          } else if constexpr (kPaired<P>) {
            kernels.pairs->widen_block(count, lanes, block.kept, z);
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
          if constexpr (kPaired<P>) {
            kernels.pairs->round_block(count, lanes, z, units.rests(),
                                       products ? block.down : nullptr, block.kept);
          }
          if (!products) continue;
          for (int64_t d = 0; d < panel.products.slabs(); ++d) {
            multiply_transposed(kernels, lanes, operands<P>(count), panel.products.lanes(d),
                                block.down, units.summands_at(d),
                                panel.products.at(run * panel.rows + s * width, d));
          }
        }
      }
    }
  });
}

// Adds the kept values of runs [first, last), times `queries` (operands of rows, D), to the keys'
// gradients.
template <class T, class P>
void add_to_keys(const InfoNceProblem<T, P>& p, const Panel<T, P>& panel,
                 const SlabMatrix<P>& queries, int64_t first, int64_t last) {
  constexpr int64_t kBlock = 64;
  struct Block {
    int64_t run, begin;
  };
  std::vector<Block> blocks;
  for (int64_t run = first; run < last; ++run) {
    if (!p.sets[panel.runs[run].set]->gradient) continue;
    for (int64_t j = 0; j < panel.keys_of(run); j += kBlock) blocks.push_back({run, j});
  }
  const int64_t work = kBlock * panel.rows * p.call.depth;
  run_tasks(static_cast<int64_t>(blocks.size()), work, [&](int64_t task) {
    const auto [run, begin] = blocks[task];
    const SlabMatrix<P>& kept = panel.logits[run];
    const SlabMatrix<T>& gradient = p.sets[panel.runs[run].set]->gradient;
    const int64_t rows = std::min(kBlock, panel.keys_of(run) - begin);
    for (int64_t d = 0; d < queries.slabs(); ++d) {
      multiply(p.kernels, rows, operands<P>(panel.rows), queries.lanes(d), kept.at(begin, 0),
               kept.slab_size(), queries.at(0, d), gradient.at(panel.runs[run].begin + begin, d),
               true);
    }
  });
}

}  // namespace fastnce
