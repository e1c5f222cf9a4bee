// InfoNCE on the CPU, and CUT's PatchNCE as many InfoNCE problems at once.
//
// A problem: rows of queries against the same columns (the keys of their batch element, shared
// negatives, both or neither). A batch is a list of problems. Below, in this order: what belongs to
// single rows; walks over the matrix between rows and columns; in which order these are made; the
// list of problems, shared among the threads; the operators.
//
// The positive of a row is kept out of the matrix: with s the sum of the other exponentials
// relative to the positive's, loss = log(1 + s) and the gradient at the positive is -s / (1 + s).
// Nothing cancels where the positive dominates, as it does when training works.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "exclusions.h"
#include "logit_blocks.h"
#include "op_arguments.h"
#include "patch_pairs.h"
#include "unit_rows.h"

namespace fastnce::info_nce {
namespace {

struct Needs {
  bool query, key, negatives, temperature;
};

// Of masked_info_nce: which pairs are left out.
struct Masks {
  const std::optional<Tensor>&query_ids, &key_ids, &negative_ids;
  const std::optional<Tensor>&guide_query, &guide_key, &guide_negatives;
};

struct Arguments {
  const char* op;
  const Tensor& query;
  const Tensor& key;
  const std::optional<Tensor>& negatives;
  double temperature;
  bool normalize, symmetric, in_batch;
  std::optional<double> self_logit;
  bool bfloat16_products;
  Needs needs;
  const Masks* masks = nullptr;
  bool decoupled = false;  // the positive is not in the sum

  int64_t batch() const { return query.size(0); }
  int64_t rows() const { return query.size(1); }
  int64_t depth() const { return query.size(2); }
  ScalarType acc() const { return accumulation_type(query.scalar_type()); }
  std::vector<int64_t> lse_shape() const {
    return symmetric ? std::vector<int64_t>{2, batch(), rows()} : std::vector{batch(), rows()};
  }
  bool own_negatives() const { return negatives.has_value() && negatives->dim() == 4; }
  bool shared_negatives() const { return negatives.has_value() && !own_negatives(); }
};

struct Gradients {
  Tensor query, key, negatives;
  double temperature = 0;
};

// --- single rows ---

constexpr int64_t kKeyBlock = 144, kSmallRun = 16;
constexpr int64_t kGroupRows = 96;  // a multiple of every table's width, like the next
constexpr int64_t kPartRows = 48;   // of a small problem, solved by one thread
constexpr int64_t kFewRows = 256;   // no more than one group, where keys are packed on the way
constexpr int64_t kKeptBytes = int64_t{112} << 20;   // of logits kept at a time
constexpr int64_t kCachedBytes = int64_t{16} << 20;  // of these, what the last cache may hold
constexpr double kSafeBound = 40;                    // exp(-2 * 40) is far from underflow
constexpr double kUsefulBound = 1e3;
const double kLeastSum = std::exp(-60.0);

// What a call asks for. Rows are flattened: row b * N + i is query i of batch element b.
template <class T>
struct Call {
  const Arguments& a;
  TensorRows query, key, negatives;
  int64_t depth;
  int64_t own_negatives = 0;             // M of negatives (B, N, M, D), else 0
  std::optional<double> constant_logit;  // already divided by the temperature
  double* weights = nullptr;             // d L / d loss_i per row; null: no gradients wanted
  OutputRows grad_query, grad_key, grad_negatives;
  double* temperature_terms = nullptr;  // per row: its part of sum_ij G_ij z_ij
  T *loss = nullptr, *row_lse = nullptr, *column_lse = nullptr;
  // How many logits of the row or column are above its positive's; null: not wanted.
  int64_t *row_ranks = nullptr, *column_ranks = nullptr;
  // Numbers of the ids, see IdNumbers; null: no in-batch key is left out by its id. The ids of own
  // negatives, and of queries next to them, are compared as they are.
  const LaneInteger<T>*query_numbers = nullptr, *key_numbers = nullptr;
  const int64_t *query_ids = nullptr, *own_ids = nullptr;
  TensorRows guide_query, guide_key;  // of depth 0: no guide

  // Whether negative m of those of row i's own is left out.
  bool left_out(int64_t i, int64_t m) const {
    if (own_ids == nullptr) return false;
    const int64_t id = own_ids[i * own_negatives + m];
    return id == kLeftOut || (query_ids != nullptr && id == query_ids[i]);
  }
};

// Columns of the matrix.
template <class T, class P>
struct KeySet {
  TensorRows source;
  int64_t first = 0, count = 0;  // rows of the source
  bool own = false;              // key i is the positive of query i
  // Unit rows (count, D) as operands of P, see PackedRows; empty: packed block by block when
  // needed.
  SlabMatrix<P> units, summands;
  Buffer<T> rests;
  SlabMatrix<T> gradient;               // (count, D) with respect to the unit rows, or empty
  const LaneInteger<T>* ids = nullptr;  // null: none is left out by its id
  SlabMatrix<T> guide;                  // (count, G), or empty

  // Padding: what is in the row must reach nothing, not even as a product with 0.
  bool is_left_out(int64_t j) const { return ids != nullptr && ids[j] == kEveryId; }

  void pack(const TileKernels<T>& kernels, bool normalize, double* inverse_norms) {
    if (kPaired<P>) rests = Buffer<T>(count);
    pack_unit_rows<T, P>(
        kernels, source, first, count, normalize, 1.0,
        {&units, nullptr, kPaired<P> ? &summands : nullptr, inverse_norms, rests.data()});
    if (ids == nullptr) return;
    const Buffer<P> zeros(operands<P>(source.depth()), P(0));
    for (int64_t j = 0; j < count; ++j) {
      if (!is_left_out(j)) continue;
      units.copy_row_in(j, zeros.data());
      if constexpr (kPaired<P>) {
        clear_half(summands, j);
        rests[j] = 0;
      }
    }
  }
  void pack_guide(const TileKernels<T>& kernels, const TensorRows& rows) {
    pack_unit_rows<T, T>(kernels, rows, first, count, false, 1.0, {&guide});
  }
};

// log of the other exponentials' sum over the positive's. An infinite positive makes the loss
// inf - inf.
double log_ratio(const ExpSum& others, double positive) {
  return others.log() - positive + 0 * std::max(positive, 0.0);
}

// log of the sum of all, from it over the positive's. Infinite logits are those of dot products
// alone.
double log_all(const ExpSum& others, double positive, double loss) {
  if (std::isinf(positive)) return others.log() + std::max(positive, 0.0);
  return positive + loss;
}

// Of one sum: share is the softmax's weight on all but the positive.
struct SumLoss {
  double loss, lse, share;

  SumLoss(const ExpSum& others, double positive, bool decoupled) {
    const double d = log_ratio(others, positive);
    if (decoupled) {
      loss = d;
      lse = others.log();
      share = 1;
    } else {
      loss = softplus(d);
      lse = log_all(others, positive, loss);
      share = 1 / (1 + std::exp(-d));
    }
  }
};

// What a logit must exceed to be above the positive's: unit rows of double are rounded twice.
template <class T>
T rank_bound_of(T positive) {
  constexpr double kSlack = 4 * std::numeric_limits<double>::epsilon();
  return static_cast<T>(positive + kSlack * std::abs(static_cast<double>(positive)));
}

constexpr double kEmptyLse = -std::numeric_limits<double>::infinity();

// P: what the large products multiply. All else is of T.
template <class T, class P>
struct Problem {
  const TileKernels<T>& kernels;
  const Call<T>& call;
  const Arguments& a;
  const int64_t first, rows;  // in the flattened rows of the call
  KeySet<T, P> keys;
  std::vector<const KeySet<T, P>*> sets;
  Buffer<double> query_inverse, key_inverse;  // 1 / ||x|| of the rows, known once they are packed
  Buffer<double> positive;                    // z of the positive
  Buffer<double> lse;                         // of the row, positive included
  Buffer<double> column_lse;
  Buffer<double> missing;  // the softmax's weight on all but the positive, times the row's weight
  Buffer<T> offset;        // subtracted before exp; padded to whole slabs
  bool fixed_offset = false;  // the same for all rows, from a bound of the logits
  bool safe_offset = false;   // under which no exponential becomes 0
  // Padded to whole slabs too. rank_bound: the positives' logits as the matrix would have them.
  Buffer<LaneInteger<T>> query_numbers;
  Buffer<T> rank_bound;
  // Symmetric: the same of the columns, and the factors from exponentials to the gradient.
  Buffer<T> column_offset, row_weight, column_weight;
  // What the last panel has kept its logits in: fresh pages for each panel would take a sixth of
  // the time at D = 128.
  mutable std::vector<SlabMatrix<P>> spare;

  Problem(const TileKernels<T>& kernels_, const Call<T>& call_, int64_t first_, int64_t rows_,
          const KeySet<T, P>* shared)
      : kernels(kernels_),
        call(call_),
        a(call_.a),
        first(first_),
        rows(rows_),
        query_inverse(rows_),
        key_inverse(rows_),
        positive(rows_),
        lse(rows_),
        missing(rows_, 0.0),
        offset(padded_rows(), T(0)) {
    keys.source = call.key;
    keys.first = first;
    keys.own = true;
    if (a.in_batch) {
      keys.count = rows;
      if (call.key_numbers != nullptr) keys.ids = call.key_numbers + first;
      keys.pack(kernels, a.normalize, key_inverse.data());
      sets.push_back(&keys);
      if (call.guide_key.depth() > 0) keys.pack_guide(kernels, call.guide_key);
    }
    if (call.query_numbers != nullptr) {
      query_numbers = Buffer<LaneInteger<T>>(padded_rows(), IdNumbers<LaneInteger<T>>::kNoId);
      std::copy_n(call.query_numbers + first, rows, query_numbers.data());
    }
    if (wants_gradients() && a.needs.key && a.in_batch) {
      keys.gradient = SlabMatrix<T>(rows, call.depth, kernels.width);
      keys.gradient.fill_zero();
    }
    if (shared != nullptr) sets.push_back(shared);
    if (wants_ranks()) rank_bound = Buffer<T>(padded_rows(), T(0));
    if (a.symmetric) column_lse = Buffer<double>(rows);
    if (!a.in_batch || has_key_left_out()) dot_positives();
    if (call.loss != nullptr) set_fixed_offset();
  }

  // Leaves it where no fixed offset will do.
  void set_fixed_offset() {
    const double bound = logit_bound();
    if (bound > kUsefulBound) return;
    fixed_offset = true;
    safe_offset = bound <= kSafeBound;
    // Beyond the safe bound the top of exp's range is used as well.
    const double top = safe_offset ? bound : bound - kSafeBound;
    std::fill_n(offset.data(), offset.size(), static_cast<T>(top));
  }

  bool has_key_left_out() const {
    return keys.ids != nullptr && std::count(keys.ids, keys.ids + rows, kEveryId) > 0;
  }

  // Whether a sum relative to the fixed offset has not lost what is in it.
  bool is_trusted(double sum) const { return !(sum < kLeastSum) || (sum == 0 && safe_offset); }

  // Whether its rows can be solved apart from one another.
  bool separable() const { return !a.symmetric && !wants_column_products(); }
  bool wants_gradients() const { return call.weights != nullptr; }
  bool wants_ranks() const { return call.row_ranks != nullptr; }
  bool wants_row_products() const {
    return wants_gradients() && (a.needs.query || a.needs.temperature);
  }
  bool wants_column_products() const {
    bool any = false;
    for (const KeySet<T, P>* set : sets) any = any || set->gradient;
    return any;
  }
  int64_t columns() const {
    int64_t count = 0;
    for (const KeySet<T, P>* set : sets) count += set->count;
    return count;
  }
  // Rows that a task takes on. Keys that are not packed are best read by a single group.
  int64_t group_rows() const {
    for (const KeySet<T, P>* set : sets) {
      if (!set->units) return rows;
    }
    return kGroupRows;
  }
  int64_t padded_rows() const { return padded(rows, kernels.width); }

  void dot_positives() {
    run_blocks(rows, 16, 8 * call.depth, [&](int64_t begin, int64_t end) {
      UnitRowReader<T> queries(kernels, call.query, a.normalize);
      UnitRowReader<T> reader(kernels, call.key, a.normalize);
      Buffer<T> query(call.depth), key(call.depth);
      for (int64_t i = begin; i < end; ++i) {
        queries.read(first + i, 1 / a.temperature, query.data());
        reader.read(first + i, 1.0, key.data());
        query_inverse[i] = queries.inverse();
        key_inverse[i] = reader.inverse();
        positive[i] = logit(kernels, call.depth, query.data(), key.data());
      }
    });
  }

  // An upper bound of all logits; infinite where it is of no use.
  double logit_bound() const {
    if (a.normalize) return 1 / a.temperature;
    double longest_key = 0;
    for (const KeySet<T, P>* set : sets) {
      const auto counts = [set](int64_t j) { return !set->is_left_out(j); };
      longest_key = std::max(longest_key, longest_row(set->source, set->first, set->count, counts));
    }
    const auto all = [](int64_t) { return true; };
    const double bound = longest_row(call.query, first, rows, all) * longest_key / a.temperature;
    return std::isfinite(bound) ? bound : std::numeric_limits<double>::infinity();
  }

  template <class Counts>
  double longest_row(const TensorRows& source, int64_t begin, int64_t count,
                     const Counts& counts) const {
    constexpr int64_t kBlock = 64;
    std::vector<double> longest((count + kBlock - 1) / kBlock, 0.0);
    run_blocks(count, kBlock, 2 * call.depth, [&](int64_t b, int64_t e) {
      Buffer<T> row(call.depth);
      double top = 0;
      for (int64_t r = b; r < e; ++r) {
        if (!counts(r)) continue;
        source.load(begin + r, row.data());
        const double norm = row_norm(kernels, call.depth, row.data());
        top = norm > top || std::isnan(norm) ? norm : top;
      }
      longest[b / kBlock] = top;
    });
    double top = 0;
    for (double x : longest) top = x > top || std::isnan(x) ? x : top;
    return top;
  }

  // The row's exponentials that stand neither in the matrix nor for the positive. Counts in `above`
  // which are above the positive's, unless that is null.
  ExpSum other_terms(int64_t i, int64_t* above = nullptr) const {
    ExpSum sum;
    if (call.constant_logit) sum.add_logit(*call.constant_logit);
    if (call.own_negatives == 0) return sum;
    UnitRowReader<T> queries(kernels, call.query, a.normalize);
    UnitRowReader<T> reader(kernels, call.negatives, a.normalize);
    Buffer<T> query(call.depth), negative(call.depth);
    queries.read(first + i, 1 / a.temperature, query.data());
    T bound = 0;
    if (above != nullptr) {
      UnitRowReader<T> keys_reader(kernels, call.key, a.normalize);
      keys_reader.read(first + i, 1.0, negative.data());
      bound = rank_bound_of(logit(kernels, call.depth, query.data(), negative.data()));
    }
    for (int64_t m = 0; m < call.own_negatives; ++m) {
      if (call.left_out(first + i, m)) continue;
      reader.read((first + i) * call.own_negatives + m, 1.0, negative.data());
      const T z = logit(kernels, call.depth, query.data(), negative.data());
      sum.add_logit(z);
      if (above != nullptr && z > bound) ++*above;
    }
    return sum;
  }

  // Completes rows [begin, end) from sum(i), the matrix's exponentials relative to offset[i].
  template <class RowSum>
  void finish_sums(int64_t begin, int64_t end, const RowSum& sum) {
    const int64_t work = 64 + 4 * call.own_negatives * call.depth;
    run_blocks(end - begin, 16, work, [&](int64_t b, int64_t e) {
      for (int64_t i = begin + b; i < begin + e; ++i) {
        ExpSum others = other_terms(i, wants_ranks() ? &call.row_ranks[first + i] : nullptr);
        const double of_matrix = sum(i);
        others.add(offset[i], of_matrix);
        const SumLoss found(others, positive[i], a.decoupled);
        lse[i] = found.lse;
        call.row_lse[first + i] = static_cast<T>(found.lse);
        call.loss[first + i] = static_cast<T>(found.loss);
        if (wants_gradients()) missing[i] = call.weights[first + i] * found.share;
        if (of_matrix != 0) continue;
        if (found.lse == kEmptyLse) drop(i);
        offset[i] = static_cast<T>(lse[i]);  // any would do; under this one no factor is infinite
      }
    });
  }

  // Completes a symmetric problem.
  void finish_both_sums(const std::vector<ExpSum>& row, const std::vector<ExpSum>& column) {
    for (int64_t i = 0; i < rows; ++i) {
      const SumLoss by_row(row[i], positive[i], a.decoupled);
      const SumLoss by_column(column[i], positive[i], a.decoupled);
      lse[i] = by_row.lse;
      column_lse[i] = by_column.lse;
      call.row_lse[first + i] = static_cast<T>(lse[i]);
      call.column_lse[first + i] = static_cast<T>(column_lse[i]);
      call.loss[first + i] = static_cast<T>(0.5 * (by_row.loss + by_column.loss));
      if (wants_gradients()) {
        missing[i] = call.weights[first + i] * 0.5 * (by_row.share + by_column.share);
      }
      if (lse[i] == kEmptyLse || column_lse[i] == kEmptyLse) drop(i);
      if (row[i].sum == 0) lse[i] = offset[i];  // as in finish_sums
      if (column[i].sum == 0) column_lse[i] = offset[i];
    }
  }

  // A loss with nothing in one of its sums has no gradient, and leaves no number that is infinite.
  void drop(int64_t i) {
    if (wants_gradients()) call.weights[first + i] = 0;
    missing[i] = 0;
    if (lse[i] == kEmptyLse) lse[i] = 0;
    if (a.symmetric && column_lse[i] == kEmptyLse) column_lse[i] = 0;
  }

  // Adds the gradients of rows [r0, r0 + count) that the matrix does not give and goes back from
  // unit rows to the inputs. `products`: sum_j exp(z_ij - offset) k_j as a sum over its parts, each
  // `count` rows; factor(i): from these to the gradient with respect to z.
  template <class Factor>
  void finish_rows(int64_t r0, int64_t count, const SlabMatrix<T>& products,
                   const Factor& factor) const {
    const int64_t depth = call.depth;
    const int64_t parts = products ? products.rows() / count : 0;
    const int64_t work = depth * (16 + 2 * parts + 8 * call.own_negatives);
    run_blocks(count, call.own_negatives > 0 ? 1 : 16, work, [&](int64_t begin, int64_t end) {
      Buffer<T> gradient(depth), part(depth), query_row(depth), key_row(depth), out_row(depth);
      for (int64_t i = r0 + begin; i < r0 + end; ++i) {
        const T* query = call.query.read(first + i, query_row.data());
        const T* key = call.key.read(first + i, key_row.data());
        if (parts == 0) std::fill_n(gradient.data(), depth, T(0));
        for (int64_t p = 0; p < parts; ++p) {
          products.copy_row_out(p * count + i - r0, p == 0 ? gradient.data() : part.data());
          if (p > 0) kernels.add_scaled(depth, T(1), part.data(), gradient.data());
        }
        double scale = factor(i), term = 0;
        if (call.own_negatives > 0) {
          kernels.scale(depth, gradient.data(), scale, gradient.data());
          own_negatives_gradient(i, query, gradient.data());
          scale = 1;
        }
        if (call.constant_logit) {
          const double p = call.weights[first + i] * std::exp(*call.constant_logit - lse[i]);
          term += p * *call.constant_logit;
        }
        // With respect to the unit query: scale * gradient - missing * unit key.
        T* out = a.needs.query ? call.grad_query.begin(first + i, out_row.data()) : out_row.data();
        term += unit_row_gradient(kernels, depth, query, a.normalize, query_inverse[i], scale,
                                  gradient.data(), -missing[i] * key_inverse[i], key,
                                  1 / a.temperature, out) /
                a.temperature;
        call.temperature_terms[first + i] = term;
        if (a.needs.query) call.grad_query.finish(first + i, out);
        if (a.in_batch || !a.needs.key) continue;
        out = call.grad_key.begin(first + i, out_row.data());
        unit_row_gradient(kernels, depth, key, a.normalize, key_inverse[i],
                          -missing[i] * query_inverse[i], query, 0.0, query, 1 / a.temperature,
                          out);
        call.grad_key.finish(first + i, out);
      }
    });
  }

  // Adds the gradient with respect to the unit query that its own negatives give.
  void own_negatives_gradient(int64_t i, const T* query, T* gradient) const {
    constexpr int64_t kBlock = 64;  // summed apart, which bounds the rounding error
    UnitRowReader<T> reader(kernels, call.negatives, a.normalize);
    Buffer<T> unit_query(call.depth), row(call.depth), partial(call.depth);
    // Rounded as in other_terms, so that the softmax of a logit that dominates is 1.
    kernels.scale(call.depth, query, query_inverse[i] * (1 / a.temperature), unit_query.data());
    for (int64_t m = 0; m < call.own_negatives; ++m) {
      if (m % kBlock == 0) std::fill_n(partial.data(), call.depth, T(0));
      const int64_t source = (first + i) * call.own_negatives + m;
      const bool left_out = call.left_out(first + i, m);
      T g = 0;
      if (!left_out) {
        reader.read(source, 1.0, row.data());
        const double z = logit(kernels, call.depth, unit_query.data(), row.data());
        g = static_cast<T>(call.weights[first + i] * std::exp(z - lse[i]));
        kernels.add_scaled(call.depth, g, row.data(), partial.data());
      }
      if ((m + 1) % kBlock == 0 || m + 1 == call.own_negatives) {
        kernels.add_scaled(call.depth, T(1), partial.data(), gradient);
      }
      if (!a.needs.negatives) continue;
      if (left_out) {
        std::fill_n(row.data(), call.depth, T(0));
      } else {
        kernels.scale(call.depth, unit_query.data(), g, row.data());
        reader.project(row.data(), row.data());
      }
      call.grad_negatives.store(source, row.data());
    }
  }

  // The gradient of in-batch keys: what the matrix gave, and each key's part as a positive.
  void finish_keys() const {
    if (!keys.gradient) return;
    const int64_t depth = call.depth;
    run_blocks(rows, 16, 16 * depth, [&](int64_t begin, int64_t end) {
      Buffer<T> gradient(depth), query_row(depth), key_row(depth), out_row(depth);
      for (int64_t i = begin; i < end; ++i) {
        const T* query = call.query.read(first + i, query_row.data());
        const T* key = call.key.read(first + i, key_row.data());
        keys.gradient.copy_row_out(i, gradient.data());
        T* out = call.grad_key.begin(first + i, out_row.data());
        unit_row_gradient(kernels, depth, key, a.normalize, key_inverse[i], 1.0, gradient.data(),
                          -missing[i] * query_inverse[i] / a.temperature, query, 1.0, out);
        call.grad_key.finish(first + i, out);
      }
    });
  }
};

// --- walks over the matrix of logits between a panel of queries and all keys ---
//
// Blocks of 144 keys x `width` queries, keys down and queries across the lanes, stay in the caches
// from the product that makes them, through exp and its sums (which run down the lanes), to the
// product that uses them. Queries are few per panel and packed as needed; keys stand in one layout
// that serves both products. A task is a group of queries against a run of keys; tasks and the
// partial sums that they leave depend on the shapes alone, so the result does not depend on the
// threads.

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
  const Problem<T, P>& problem;
  const int64_t r0, rows, group;
  std::vector<KeyRun> runs;
  SlabMatrix<P> queries;  // (operands of D, rows) unit rows / temperature, transposed
  SlabMatrix<T> guide;    // (G, rows), or empty
  Buffer<T> rests;        // pairs only: of the queries, padded to whole slabs
  // Per run (its keys, operands of rows), where they are kept: logits and then exponentials, of
  // pairs exponentials alone.
  std::vector<SlabMatrix<P>> logits;
  SlabMatrix<T> products;  // (runs * rows, D), where wanted
  Buffer<double> sums;     // (runs, padded rows)
  Buffer<T> maxima;        // (runs, padded rows)
  Buffer<T> column_sums;   // (groups, keys): symmetric only
  // How many are above the positive; as the sums.
  Buffer<LaneInteger<T>> above, column_above;

  // `alone`: walked by a single thread, which needs no more than one task.
  Panel(Problem<T, P>& p, int64_t r0_, int64_t rows_, bool alone)
      : problem(p), r0(r0_), rows(rows_), group(p.group_rows()) {
    if (kPaired<P>) rests = Buffer<T>(fastnce::padded(rows, p.kernels.width), T(0));
    pack_unit_rows<T, P>(p.kernels, p.call.query, p.first + r0, rows, p.a.normalize,
                         1 / p.a.temperature,
                         {nullptr, &queries, nullptr, &p.query_inverse[r0], rests.data()});
    if (p.call.guide_query.depth() > 0) {
      pack_unit_rows<T, T>(p.kernels, p.call.guide_query, p.first + r0, rows, false, 1.0,
                           {nullptr, &guide});
    }
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
    std::vector<SlabMatrix<P>> spare = std::exchange(problem.spare, {});
    spare.resize(runs.size());
    for (int64_t run = begin; run < end; ++run) {
      const int64_t keys = keys_of(run), columns = operands<P>(rows);
      const bool fits = spare[run].rows() == keys && spare[run].columns() == columns;
      logits[run] =
          fits ? std::move(spare[run]) : SlabMatrix<P>(keys, columns, problem.kernels.width);
    }
  }
  // For the next panel, if these are all.
  void forget_logits() {
    const bool all = std::all_of(logits.begin(), logits.end(),
                                 [](const SlabMatrix<P>& kept) { return static_cast<bool>(kept); });
    if (all) std::swap(problem.spare, logits);
    logits = std::vector<SlabMatrix<P>>(runs.size());
  }

  int64_t kept_bytes() const {
    int64_t bytes = 0;
    for (const SlabMatrix<P>& kept : logits) {
      bytes += kept.slabs() * kept.slab_size() * static_cast<int64_t>(sizeof(P));
    }
    return bytes;
  }

  // Sum of the exponentials of panel row r over all runs, relative to its offset.
  double sum(int64_t r) const {
    double total = 0;
    for (size_t run = 0; run < runs.size(); ++run) total += sums[run * padded() + r];
    return total;
  }
  int64_t count_above(int64_t r) const {
    int64_t total = 0;
    for (size_t run = 0; run < runs.size(); ++run) total += above[run * padded() + r];
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
  KeyBlocks(const Problem<T, P>& p, const KeySet<T, P>& set)
      : set_(set), reader_(p.kernels, set.source, p.a.normalize) {
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
      if (set_.is_left_out(j)) {
        std::fill_n(row_.data(), row_.size(), P(0));
        if constexpr (kPaired<P>) {
          block_rests_[row] = 0;
          copy_half_in(block_summands_, row, row_.data());
        }
      } else if constexpr (kPaired<P>) {
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

// Takes the positives out of a block: rows are keys from j0 on, lanes are queries from i0 on. Those
// of keys that are left out as negatives are known already.
template <class T, class P>
void take_positives(Problem<T, P>& p, int64_t j0, int64_t j1, int64_t i0, int64_t lanes, T* z) {
  for (int64_t i = std::max(j0, i0); i < std::min(j1, i0 + lanes); ++i) {
    T& x = z[(i - j0) * p.kernels.width + (i - i0)];
    if (!p.keys.is_left_out(i)) p.positive[i] = x;
    x = -std::numeric_limits<T>::infinity();
  }
}

// Leaves pairs out of a block of logits; `scratch` is for the guide's products.
template <class T, class P>
void exclude(const Problem<T, P>& p, const Panel<T, P>& panel, const KeySet<T, P>& set, int64_t j0,
             int64_t count, int64_t slab, T* z, T* scratch) {
  const TileKernels<T>& kernels = p.kernels;
  const int64_t lanes = panel.queries.lanes(slab);
  if (set.ids != nullptr) {
    kernels.block_exclude_equal(count, lanes, z, set.ids + j0,
                                &p.query_numbers[panel.r0 + slab * kernels.width], nullptr,
                                nullptr);
  }
  if (!set.guide) return;
  kernels.multiply(count, panel.guide.rows(), lanes, set.guide.at(j0, 0), set.guide.slab_size(),
                   panel.guide.at(0, slab), scratch, false);
  kernels.block_exclude_positive(count, lanes, scratch, z);
}

// The positives' logits by the products that make the matrix: no duplicate is above its original.
template <class T, class P>
void find_rank_bounds(Problem<T, P>& p, const Panel<T, P>& panel) {
  const int64_t width = p.kernels.width, depth = operands<P>(p.call.depth);
  run_workers(panel.queries.slabs(), width * width * depth, [&](TaskQueue& queue) {
    KeyBlocks<T, P> units(p, p.keys);
    Buffer<T> z(width * width);
    for (int64_t s; queue.next(s);) {
      const int64_t lanes = panel.queries.lanes(s), row = panel.r0 + s * width;
      units.move_to(row, row + lanes);
      multiply(p.kernels, lanes, depth, lanes, units.units_at(0), units.slab_size(),
               panel.queries.at(0, s), z.data(), false);
      if constexpr (kPaired<P>) {
        p.kernels.pairs->scale_block(lanes, lanes, z.data(), &panel.rests[s * width],
                                     units.rests());
      }
      for (int64_t i = 0; i < lanes; ++i) {
        const bool known = p.keys.is_left_out(row + i);
        const double positive = known ? p.positive[row + i] : z[i * width + i];
        p.rank_bound[row + i] = rank_bound_of(static_cast<T>(positive));
      }
    }
  });
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
  bool ranks = false;     // count the logits above their positives'
};

// One walk over runs [first, last).
template <class T, class P>
void sweep(Problem<T, P>& p, Panel<T, P>& panel, const SweepOptions& options, int64_t first,
           int64_t last) {
  const TileKernels<T>& kernels = p.kernels;
  const auto [epilogue, again, products, ranks] = options;
  const int64_t width = kernels.width, depth = p.call.depth, groups = panel.groups();
  const int64_t padded = panel.padded(), run_count = panel.run_count();
  if (products && first == 0) panel.products = SlabMatrix<T>(run_count * panel.rows, depth, width);
  const bool sum = epilogue == Epilogue::kExp || epilogue == Epilogue::kExpBoth;
  if (sum && first == 0) panel.sums = Buffer<double>(run_count * padded, 0.0);
  if (epilogue == Epilogue::kMaximum) {
    panel.maxima = Buffer<T>(run_count * padded, -std::numeric_limits<T>::infinity());
  }
  if (epilogue == Epilogue::kExpBoth) panel.column_sums = Buffer<T>(groups * p.rows, T(0));
  if (ranks) panel.above = Buffer<LaneInteger<T>>(run_count * padded, 0);
  if (ranks && p.call.column_ranks != nullptr) {
    panel.column_above = Buffer<LaneInteger<T>>(groups * p.rows, 0);
  }

  if (first == last) return;
  const SlabMatrix<P> nothing_kept;
  const bool large = panel.kept_bytes() > kCachedBytes;
  const int64_t work = panel.keys_of(first) * depth * panel.group;
  run_workers(groups * (last - first), work, [&](TaskQueue& queue) {
    Buffer<T> scratch(kKeyBlock * width), block_sum(width), guide_scratch;
    if (panel.guide) guide_scratch = Buffer<T>(kKeyBlock * width);
    Buffer<P> pairs;
    if (kPaired<P>) pairs = Buffer<P>(operands<P>(kKeyBlock) * width);
    for (int64_t task; queue.next(task);) {
      const int64_t run = first + task / groups, g = task % groups;
      const KeyRun& keys = panel.runs[run];
      const KeySet<T, P>& set = *p.sets[keys.set];
      const SlabMatrix<P>& kept = panel.logits[run];
      const bool streamed = !kPaired<P> && !again && kept && large;
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
          const BlockValues<T, P> block(streamed ? nothing_kept : kept, j0 - keys.begin, s,
                                        scratch.data(), pairs.data());
          T* z = block.z;
          if (!again) {
            multiply(kernels, count, operands<P>(depth), lanes, units.units_at(0),
                     units.slab_size(), panel.queries.at(0, s), z, false);
            if constexpr (kPaired<P>) {
              kernels.pairs->scale_block(count, lanes, z, &panel.rests[s * width], units.rests());
            }
            if (set.own) take_positives(p, j0, j1, row, lanes, z);
            exclude(p, panel, set, j0, count, s, z, guide_scratch.data());
            if (ranks) {
              const bool both = panel.column_above.size() > 0;
              kernels.block_count_above(count, lanes, z, &p.rank_bound[row],
                                        &panel.above[run * padded + s * width],
                                        both ? &p.rank_bound[j0] : nullptr,
                                        both ? &panel.column_above[g * p.rows + j0] : nullptr);
            }
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
          if constexpr (!kPaired<P>) {
            if (streamed) stream(z, count * width, kept.at(j0 - keys.begin, s));
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
void add_to_keys(const Problem<T, P>& p, const Panel<T, P>& panel, const SlabMatrix<P>& queries,
                 int64_t first, int64_t last) {
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

// --- in which order a problem's products are made ---
//
//   keys without gradient: loss and gradient in one walk, 2 products
//   both gradients: a panel's exponentials are kept until its sums are known, 3 products
//   more columns than can be kept, or an unreduced loss: sums first, then again, 4 products
//   symmetric: the same 4, or 3 where the whole matrix can be kept
//
// Logits are at most 1 / temperature, so a fixed offset usually takes the place of their maximum.
// Where a row's sum then comes out too small to be trusted, the maximum is taken after all.

constexpr int64_t kPanelLimit = 8 * kGroupRows;

// NaN counts as trusted: it is what the equation gives.
template <class T, class P>
bool sums_are_trusted(const Panel<T, P>& panel) {
  for (int64_t r = 0; r < panel.rows; ++r) {
    if (!panel.problem.is_trusted(panel.sum(r))) return false;
  }
  return true;
}

// Exponentials and their sums of a panel; `products` as in SweepOptions.
template <class T, class P>
void sum_panel(Problem<T, P>& p, Panel<T, P>& panel, bool products, bool fixed) {
  const int64_t runs = panel.run_count();
  const bool ranks = p.wants_ranks();
  if (fixed) {
    sweep(p, panel, {Epilogue::kExp, false, products, ranks}, 0, runs);
    if (sums_are_trusted(panel)) return;
  }
  sweep(p, panel, {Epilogue::kMaximum, false, false, ranks && !fixed}, 0, runs);
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
RowRange all_rows(const Problem<T, P>& p) {
  return {0, p.rows, false};
}

template <class T, class P, class Body>
void for_panels(Problem<T, P>& p, const RowRange& range, int64_t limit, const Body& body) {
  for (int64_t r0 = range.begin; r0 < range.end; r0 += limit) {
    Panel<T, P> panel(p, r0, std::min(limit, range.end - r0), range.alone);
    body(panel);
  }
}

// What must be known before ranks are counted.
template <class T, class P>
void prepare_ranks(Problem<T, P>& p, const RowRange& range) {
  if (!p.wants_ranks()) return;
  for_panels(p, range, kPanelLimit, [&](Panel<T, P>& panel) { find_rank_bounds(p, panel); });
}

template <class T, class P>
void store_ranks(const Problem<T, P>& p, const Panel<T, P>& panel) {
  if (!p.wants_ranks()) return;
  for (int64_t r = 0; r < panel.rows; ++r) {
    p.call.row_ranks[p.first + panel.r0 + r] = panel.count_above(r);
  }
}

// Unit queries of a panel / temperature, times factor(row), to be summed over the rows.
template <class T, class P, class Factor>
SlabMatrix<P> scaled_queries(const Problem<T, P>& p, const Panel<T, P>& panel,
                             const Factor& factor) {
  SlabMatrix<P> out(operands<P>(panel.rows), p.call.depth, p.kernels.width);
  run_blocks(panel.rows, 16, 4 * p.call.depth, [&](int64_t begin, int64_t end) {
    Buffer<P> row(operands<P>(p.call.depth));
    Buffer<T> scratch(p.call.depth);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t i = panel.r0 + r;
      const T* query = p.call.query.read(p.first + i, scratch.data());
      const double scale = factor(i) * p.query_inverse[i] / p.a.temperature;
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
int64_t rows_kept(const Problem<T, P>& p) {
  const int64_t row_bytes = operand_bytes<P>(std::max<int64_t>(1, p.columns()));
  const int64_t fit = kKeptBytes / row_bytes;
  return fit >= p.rows ? p.rows : fit / kGroupRows * kGroupRows;
}

// Gradients from known offsets. factor(i): from a row's exponentials to its gradient;
// after_row_sums is called for each panel once its walk is done.
struct Nothing {
  template <class Panel>
  void operator()(const Panel&) const {}
};
template <class T, class P, class Factor, class AfterSums = Nothing>
void gradient_pass(Problem<T, P>& p, const RowRange& range, Epilogue epilogue, const Factor& factor,
                   const AfterSums& after_sums = {}) {
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
      if (keep) panel.forget_logits();
      if (last == panel.run_count()) break;
    }
    after_sums(panel);
    p.finish_rows(panel.r0, panel.rows, panel.products, factor);
  });
}

template <class T, class P>
void solve_rows(Problem<T, P>& p, const RowRange& range) {
  const bool keep = p.wants_column_products();
  const int64_t fit = keep ? rows_kept(p) : kPanelLimit;
  const bool one_pass = p.wants_gradients() && fit > 0;
  const auto factor = [&](int64_t i) {
    return p.call.weights[p.first + i] * std::exp(p.offset[i] - p.lse[i]);
  };
  const int64_t limit = one_pass ? std::min(fit, kPanelLimit) : kPanelLimit;
  prepare_ranks(p, range);
  for_panels(p, range, limit, [&](Panel<T, P>& panel) {
    if (one_pass && keep) panel.keep_logits(0, panel.run_count());
    sum_panel(p, panel, one_pass && p.wants_row_products(), p.fixed_offset);
    store_ranks(p, panel);
    p.finish_sums(panel.r0, panel.r0 + panel.rows,
                  [&](int64_t i) { return panel.sum(i - panel.r0); });
    if (!one_pass) return;
    if (keep) add_to_keys(p, panel, scaled_queries(p, panel, factor), 0, panel.run_count());
    if (keep) panel.forget_logits();
    p.finish_rows(panel.r0, panel.rows, panel.products, factor);
  });
  if (p.wants_gradients() && !one_pass) {
    gradient_pass(p, range, Epilogue::kExp, factor);
  }
}

// From the lse of the forward: the exponentials then are the softmax itself.
template <class T, class P>
void solve_rows_from_lse(Problem<T, P>& p, const RowRange& range, const T* row_lse) {
  for (int64_t i = range.begin; i < range.end; ++i) {
    p.lse[i] = row_lse[p.first + i];
    if (p.lse[i] == kEmptyLse && p.a.decoupled) p.drop(i);
    p.offset[i] = static_cast<T>(p.lse[i]);
  }
  const auto weight = [&](int64_t i) { return p.call.weights[p.first + i]; };
  gradient_pass(p, range, Epilogue::kExp, weight, [&](const Panel<T, P>& panel) {
    const int64_t work = 16 + 4 * p.call.own_negatives * p.call.depth;
    run_blocks(panel.rows, 16, work, [&](int64_t begin, int64_t end) {
      for (int64_t i = panel.r0 + begin; i < panel.r0 + end; ++i) {
        if (p.a.decoupled) {
          p.missing[i] = weight(i);
          continue;
        }
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
std::vector<ExpSum> sums_by_maximum(Problem<T, P>& p) {
  std::vector<ExpSum> sums(p.rows);
  prepare_ranks(p, all_rows(p));
  for_panels(p, all_rows(p), kPanelLimit, [&](Panel<T, P>& panel) {
    sum_panel(p, panel, false, false);
    store_ranks(p, panel);
    for (int64_t r = 0; r < panel.rows; ++r) {
      sums[panel.r0 + r].add(p.offset[panel.r0 + r], panel.sum(r));
    }
  });
  return sums;
}

template <class T, class P>
void symmetric_gradients(Problem<T, P>& p, bool fixed) {
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
void solve_symmetric(Problem<T, P>& p) {
  const auto one = [](int64_t) { return 1.0; };
  const bool whole = p.wants_gradients() && rows_kept(p) == p.rows;  // in one panel
  bool fixed = p.fixed_offset;
  if (fixed) {
    std::vector<ExpSum> row(p.rows), column(p.rows);
    std::vector<double> column_sum(p.rows, 0.0);
    const auto finish_sums = [&] {
      for (int64_t i = 0; i < p.rows; ++i) {
        column[i].add(p.offset[i], column_sum[i]);
        fixed = fixed && p.is_trusted(row[i].sum) && p.is_trusted(column[i].sum);
      }
      if (fixed) p.finish_both_sums(row, column);
    };
    prepare_ranks(p, all_rows(p));
    for_panels(p, all_rows(p), whole ? p.rows : kPanelLimit, [&](Panel<T, P>& panel) {
      if (whole) panel.keep_logits(0, panel.run_count());
      sweep(p, panel, {Epilogue::kExpBoth, false, false, p.wants_ranks()}, 0, panel.run_count());
      store_ranks(p, panel);
      for (int64_t r = 0; r < panel.rows; ++r) {
        row[panel.r0 + r].add(p.offset[panel.r0 + r], panel.sum(r));
      }
      for (int64_t g = 0; g < panel.groups(); ++g) {
        for (int64_t j = 0; j < p.rows; ++j) column_sum[j] += panel.column_sums[g * p.rows + j];
        for (int64_t j = 0; j < p.rows && p.wants_ranks(); ++j) {
          p.call.column_ranks[p.first + j] += panel.column_above[g * p.rows + j];
        }
      }
      if (!whole) return;
      finish_sums();
      if (!fixed) return;
      symmetric_gradients(p, true);
      sweep(p, panel, {Epilogue::kScaleBoth, true, p.wants_row_products()}, 0, panel.run_count());
      if (p.wants_column_products()) {
        add_to_keys(p, panel, scaled_queries(p, panel, one), 0, panel.run_count());
      }
      p.finish_rows(0, p.rows, panel.products, one);
    });
    if (!whole) finish_sums();
    if (whole && fixed) return;
  }
  if (!fixed) {
    Call<T> swapped = p.call;
    std::swap(swapped.query, swapped.key);
    std::swap(swapped.query_numbers, swapped.key_numbers);
    swapped.row_ranks = std::exchange(swapped.column_ranks, nullptr);
    swapped.weights = nullptr;
    Problem<T, P> columns(p.kernels, swapped, p.first, p.rows, nullptr);
    p.finish_both_sums(sums_by_maximum(p), sums_by_maximum(columns));
  }
  if (!p.wants_gradients()) return;
  symmetric_gradients(p, fixed);
  gradient_pass(p, all_rows(p), fixed ? Epilogue::kScaleBoth : Epilogue::kApart, one);
}

template <class T, class P>
void solve_symmetric_from_lse(Problem<T, P>& p, const T* row_lse, const T* column_lse) {
  p.dot_positives();
  for (int64_t i = 0; i < p.rows; ++i) {
    p.lse[i] = row_lse[p.first + i];
    p.column_lse[i] = column_lse[p.first + i];
    const double by_row = std::expm1(p.positive[i] - p.lse[i]);
    const double by_column = std::expm1(p.positive[i] - p.column_lse[i]);
    const double shares = p.a.decoupled ? 2 : -(by_row + by_column);
    p.missing[i] = 0.5 * p.call.weights[p.first + i] * shares;
    const bool empty = p.lse[i] == kEmptyLse || p.column_lse[i] == kEmptyLse;
    if (empty && p.a.decoupled) p.drop(i);
  }
  symmetric_gradients(p, false);
  gradient_pass(p, all_rows(p), Epilogue::kApart, [](int64_t) { return 1.0; });
}

// --- the problems of a call ---

// One call's problems: one per batch element, for only rows of the same element share columns; but
// one alone without in-batch keys, where all rows see the same.
template <class T, class P>
class Job {
 public:
  const int64_t rows, problems, size;  // of the whole call; `size` rows in each problem

  Job(const Arguments& a, double* weights, Gradients& gradients, T* loss, T* lse,
      int64_t* ranks = nullptr)
      : rows(a.batch() * a.rows()),
        problems(a.in_batch ? a.batch() : 1),
        size(rows / problems),
        kernels_(tile_kernels<T>()),
        gradients_(gradients),
        temperature_terms_(rows, 0.0),
        call_{a, TensorRows(a.query), TensorRows(a.key)} {
    if (a.negatives.has_value()) call_.negatives = TensorRows(*a.negatives);
    call_.depth = a.depth();
    call_.own_negatives = a.own_negatives() ? a.negatives->size(2) : 0;
    if (a.self_logit) call_.constant_logit = static_cast<T>(*a.self_logit / a.temperature);
    call_.weights = weights;
    call_.grad_query = OutputRows(gradients.query);
    call_.grad_key = OutputRows(gradients.key);
    call_.grad_negatives = OutputRows(gradients.negatives);
    call_.temperature_terms = temperature_terms_.data();
    call_.loss = loss;
    call_.row_lse = lse;
    call_.column_lse = a.symmetric ? lse + rows : nullptr;
    call_.row_ranks = ranks;
    if (a.symmetric && ranks != nullptr) {
      call_.column_ranks = ranks + rows;
      std::fill_n(call_.column_ranks, rows, 0);
    }
    if (a.masks != nullptr) set_masks(*a.masks);
    if (!a.shared_negatives()) return;
    shared_.source = call_.negatives;
    shared_.count = a.negatives->size(0);
    // Few queries meet each key once: then keys are packed on the way.
    if (problems > 1 || size > kFewRows || shared_.count < 4 * size) {
      shared_.pack(kernels_, a.normalize, nullptr);
    }
    if (a.masks != nullptr && a.masks->guide_negatives.has_value()) {
      shared_.pack_guide(kernels_, TensorRows(*a.masks->guide_negatives));
    }
    if (weights != nullptr && a.needs.negatives) {
      shared_.gradient = SlabMatrix<T>(shared_.count, a.depth(), kernels_.width);
      shared_.gradient.fill_zero();
    }
  }

  std::unique_ptr<Problem<T, P>> problem(int64_t b) const {
    return std::make_unique<Problem<T, P>>(kernels_, call_, b * size, size,
                                           shared_.count > 0 ? &shared_ : nullptr);
  }
  int64_t columns() const { return (call_.a.in_batch ? size : 0) + shared_.count; }
  // In multiply-adds.
  int64_t packing_per_row() const { return 4 * call_.depth; }
  int64_t work_per_row() const { return (2 * columns() + 16) * call_.depth; }
  // Whether its problems may be solved at the same time, each by one thread.
  bool small() const {
    constexpr int64_t kSmallBytes = int64_t{4} << 20;
    const int64_t bytes = size * columns() * static_cast<int64_t>(sizeof(T));
    return bytes <= kSmallBytes && !shared_.gradient;
  }

  // What its problems' gradients share.
  void finish() const {
    if (shared_.gradient) {
      store_row_gradients(kernels_, call_.negatives, call_.a.normalize, shared_.gradient,
                          call_.grad_negatives);
      const Buffer<T> zeros(call_.depth, T(0));
      for (int64_t j = 0; j < shared_.count && shared_.ids != nullptr; ++j) {
        if (shared_.is_left_out(j)) call_.grad_negatives.store(j, zeros.data());
      }
    }
    const double sum = std::accumulate(temperature_terms_.begin(), temperature_terms_.end(), 0.0);
    gradients_.temperature = -sum / call_.a.temperature;
  }

 private:
  using Label = LaneInteger<T>;

  void set_masks(const Masks& masks) {
    const bool own = call_.a.own_negatives(), of_negatives = masks.negative_ids.has_value();
    if (masks.key_ids.has_value() || (of_negatives && !own)) {
      const IdNumbers<Label> numbers(masks.query_ids, rows);
      query_numbers_ = numbers.queries();
      call_.query_numbers = query_numbers_.data();
      if (masks.key_ids.has_value()) {
        key_numbers_ = numbers.of_keys(*masks.key_ids);
        call_.key_numbers = key_numbers_.data();
      }
      if (of_negatives && !own) {
        negative_numbers_ = numbers.of_keys(*masks.negative_ids);
        shared_.ids = negative_numbers_.data();
      }
    }
    if (of_negatives && own) {
      own_ids_.emplace(*masks.negative_ids);
      call_.own_ids = own_ids_->data();
      if (masks.query_ids.has_value()) query_ids_.emplace(*masks.query_ids);
      if (masks.query_ids.has_value()) call_.query_ids = query_ids_->data();
    }
    if (!masks.guide_query.has_value()) return;
    call_.guide_query = TensorRows(*masks.guide_query);
    if (masks.guide_key.has_value()) call_.guide_key = TensorRows(*masks.guide_key);
  }

  const TileKernels<T>& kernels_;
  Gradients& gradients_;
  std::vector<double> temperature_terms_;
  std::vector<Label> query_numbers_, key_numbers_, negative_numbers_;
  std::optional<Ids> query_ids_, own_ids_;
  Call<T> call_;
  KeySet<T, P> shared_;
};

// Calls run(problem, range) until all rows of all problems are solved.
//
// Problems that are large, or alone, or add to the same gradient are solved one after the other by
// all threads together. The others are shared out: whole where there are many, else by groups of
// rows where the rows do not depend on one another. Their shapes alone decide.
template <class T, class P, class Run>
void solve(const std::vector<std::unique_ptr<Job<T, P>>>& jobs, const Run& run) {
  constexpr size_t kMany = 64;
  struct Item {
    const Job<T, P>* job;
    int64_t b;
    std::unique_ptr<Problem<T, P>> problem = nullptr;
  };
  std::vector<Item> items;
  int64_t packing = 0, work = 0;  // multiply-adds
  for (const auto& job : jobs) {
    for (int64_t b = 0; job->small() && b < job->problems; ++b) items.push_back({job.get(), b});
    if (!job->small()) continue;
    packing += job->rows * job->packing_per_row();
    work += job->rows * job->work_per_row();
  }
  const bool together = items.size() == 1;
  for (const auto& job : jobs) {
    if (job->small() && !together) continue;
    for (int64_t b = 0; b < job->problems; ++b) {
      const auto problem = job->problem(b);
      run(*problem, all_rows(*problem));
      problem->finish_keys();
    }
  }
  if (together || items.empty()) return;
  const auto count = static_cast<int64_t>(items.size());
  if (items.size() >= kMany) {
    run_tasks(count, work / count, [&](int64_t i) {
      const auto problem = items[i].job->problem(items[i].b);
      run(*problem, {0, problem->rows, true});
      problem->finish_keys();
    });
    return;
  }
  run_tasks(count, packing / count,
            [&](int64_t i) { items[i].problem = items[i].job->problem(items[i].b); });
  std::vector<std::pair<Problem<T, P>*, RowRange>> parts;
  for (const Item& item : items) {
    const int64_t step = item.problem->separable() ? kPartRows : item.problem->rows;
    for (int64_t r = 0; r < item.problem->rows; r += step) {
      parts.push_back({item.problem.get(), {r, std::min(item.problem->rows, r + step), true}});
    }
  }
  const auto tasks = static_cast<int64_t>(parts.size());
  run_tasks(tasks, work / tasks, [&](int64_t i) {
    const auto& [problem, range] = parts[i];
    run(*problem, range);
    if (!problem->separable()) problem->finish_keys();
  });
}

template <class T, class P, class Run>
void solve_one(std::unique_ptr<Job<T, P>> job, const Run& run) {
  std::vector<std::unique_ptr<Job<T, P>>> jobs;
  jobs.push_back(std::move(job));
  solve<T, P>(jobs, run);
  jobs[0]->finish();
}

// --- operators ---

void check(const Arguments& a) {
  check_floating(a.op, "query", a.query, 3, "(B, N, D)");
  const ScalarType dtype = a.query.scalar_type();
  const std::vector<int64_t> shape = {a.batch(), a.rows(), a.depth()};
  check_rows(a.op, "query", a.query, dtype, shape);
  check_rows(a.op, "key", a.key, dtype, shape);
  if (a.own_negatives()) {
    check_rows(a.op, "negatives", *a.negatives, dtype,
               {a.batch(), a.rows(), a.negatives->size(2), a.depth()});
  } else if (a.shared_negatives()) {
    STD_TORCH_CHECK(a.negatives->dim() == 2, a.op, ": negatives must be (M, D) or (B, N, M, D).");
    check_rows(a.op, "negatives", *a.negatives, dtype, {a.negatives->size(0), a.depth()});
  }
  STD_TORCH_CHECK(!a.symmetric || (a.in_batch && !a.negatives.has_value() && !a.self_logit), a.op,
                  ": symmetric needs in_batch, no negatives and no self_logit.");
}

void check(const Arguments& a, const Masks& masks) {
  check(a);
  const auto check_ids = [&](const char* name, const std::optional<Tensor>& ids,
                             const std::vector<int64_t>& shape) {
    if (ids.has_value()) check_rows(a.op, name, *ids, ScalarType::Long, shape);
  };
  const std::vector<int64_t> rows = {a.batch(), a.rows()};
  check_ids("query_ids", masks.query_ids, rows);
  check_ids("key_ids", masks.key_ids, rows);
  if (a.negatives.has_value()) {
    const auto sizes = a.negatives->sizes();
    check_ids("negative_ids", masks.negative_ids, {sizes.begin(), sizes.end() - 1});
  }
  STD_TORCH_CHECK(a.negatives.has_value() || !masks.negative_ids.has_value(), a.op,
                  ": negative_ids without negatives.");
  const auto check_guide = [&](const char* name, const std::optional<Tensor>& guide, bool wanted,
                               std::vector<int64_t> shape) {
    STD_TORCH_CHECK(guide.has_value() == wanted, a.op, ": ", name,
                    wanted ? " is missing." : " without its rows.");
    if (wanted) shape.push_back(masks.guide_query->size(masks.guide_query->dim() - 1));
    if (wanted) check_rows(a.op, name, *guide, a.acc(), shape);
  };
  const bool guided = masks.guide_query.has_value();
  check_guide("guide_query", masks.guide_query, guided, rows);
  check_guide("guide_key", masks.guide_key, guided && a.in_batch, rows);
  check_guide("guide_negatives", masks.guide_negatives, guided && a.shared_negatives(),
              {a.shared_negatives() ? a.negatives->size(0) : 0});
  STD_TORCH_CHECK(!guided || !(a.symmetric || a.own_negatives()), a.op,
                  ": a guide needs one direction and no negatives of each query's own.");
}

Gradients new_gradients(const Arguments& a, bool wanted) {
  const bool negatives = a.negatives.has_value() && wanted && a.needs.negatives;
  return {new_gradient(a.query, wanted && a.needs.query),
          new_gradient(a.key, wanted && a.needs.key),
          new_gradient(negatives ? *a.negatives : a.query, negatives), 0};
}

template <class T, class P>
void solve_forward(Problem<T, P>& problem, const RowRange& range) {
  problem.a.symmetric ? solve_symmetric(problem) : solve_rows(problem, range);
}

// loss, lse and gradients. weights: one of each loss, or null for no gradients. ranks: filled,
// unless null.
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results forward(const Arguments& a, double* weights, int64_t* ranks) {
  Gradients gradients = new_gradients(a, weights != nullptr);
  const Tensor loss = new_tensor(a.query, {a.batch(), a.rows()}, a.acc());
  const Tensor lse = new_tensor(a.query, a.lse_shape(), a.acc());
  with_operands(a.acc(), a.bfloat16_products, [&](auto sum, auto operand) {
    using T = decltype(sum);
    using P = decltype(operand);
    solve_one(std::make_unique<Job<T, P>>(a, weights, gradients, loss.mutable_data_ptr<T>(),
                                          lse.mutable_data_ptr<T>(), ranks),
              solve_forward<T, P>);
  });
  return {loss,
          lse,
          gradients.query,
          gradients.key,
          gradients.negatives,
          new_scalar(a.query, weights != nullptr && a.needs.temperature, gradients.temperature)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Arguments& a, const Tensor& grad_loss,
                                                    const Tensor& lse) {
  check_rows(a.op, "grad_loss", grad_loss, a.acc(), {a.batch(), a.rows()});
  check_rows(a.op, "lse", lse, a.acc(), a.lse_shape());
  const Tensor sums = torch::stable::contiguous(lse);
  Gradients gradients = new_gradients(a, true);
  std::vector<double> weights = to_vector<double>(grad_loss);
  with_operands(a.acc(), a.bfloat16_products, [&](auto sum, auto operand) {
    using T = decltype(sum);
    using P = decltype(operand);
    const T* row_lse = sums.const_data_ptr<T>();
    const T* column_lse = a.symmetric ? row_lse + a.batch() * a.rows() : nullptr;
    solve_one(std::make_unique<Job<T, P>>(a, weights.data(), gradients, nullptr, nullptr),
              [&](Problem<T, P>& problem, const RowRange& range) {
                if (a.symmetric) {
                  solve_symmetric_from_lse(problem, row_lse, column_lse);
                } else {
                  solve_rows_from_lse(problem, range, row_lse);
                }
              });
  });
  return {gradients.query, gradients.key, gradients.negatives,
          new_scalar(a.query, a.needs.temperature, gradients.temperature)};
}

Results info_nce_forward(const Tensor& query, const Tensor& key,
                         const std::optional<Tensor>& negatives,
                         const std::optional<Tensor>& temperature_tensor, double temperature,
                         bool normalize, bool symmetric, bool in_batch,
                         std::optional<double> self_logit, bool bfloat16_products,
                         std::optional<double> grad_scale, bool mean, bool need_query,
                         bool need_key, bool need_negatives, bool need_temperature) {
  const char* op = "info_nce_forward";
  const double tau = temperature_value(op, temperature_tensor, temperature);
  const Needs needs{need_query, need_key, need_negatives, need_temperature};
  const Arguments a{op,        query,    key,        negatives,         tau,  normalize,
                    symmetric, in_batch, self_logit, bfloat16_products, needs};
  check(a);
  if (grad_scale && mean) *grad_scale /= static_cast<double>(a.batch() * a.rows());
  std::vector<double> weights;
  if (grad_scale) weights.assign(a.batch() * a.rows(), *grad_scale);
  return forward(a, grad_scale ? weights.data() : nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_backward(
    const Tensor& grad_loss, const Tensor& query, const Tensor& key,
    const std::optional<Tensor>& negatives, const std::optional<Tensor>& temperature_tensor,
    double temperature, const Tensor& lse, bool normalize, bool symmetric, bool in_batch,
    std::optional<double> self_logit, bool bfloat16_products, bool need_query, bool need_key,
    bool need_negatives, bool need_temperature) {
  const char* op = "info_nce_backward";
  const double tau = temperature_value(op, temperature_tensor, temperature);
  const Needs needs{need_query, need_key, need_negatives, need_temperature};
  const Arguments a{op,        query,    key,        negatives,         tau,  normalize,
                    symmetric, in_batch, self_logit, bfloat16_products, needs};
  check(a);
  return backward(a, grad_loss, lse);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> masked_info_nce_forward(
    const Tensor& query, const Tensor& key, const std::optional<Tensor>& negatives,
    const std::optional<Tensor>& query_ids, const std::optional<Tensor>& key_ids,
    const std::optional<Tensor>& negative_ids, const std::optional<Tensor>& guide_query,
    const std::optional<Tensor>& guide_key, const std::optional<Tensor>& guide_negatives,
    const std::optional<Tensor>& weights, const std::optional<Tensor>& temperature_tensor,
    double temperature, bool normalize, bool symmetric, bool in_batch, bool decoupled,
    bool bfloat16_products, bool rank, bool need_query, bool need_key, bool need_negatives,
    bool need_temperature) {
  const char* op = "masked_info_nce_forward";
  const double tau = temperature_value(op, temperature_tensor, temperature);
  const Needs needs{need_query, need_key, need_negatives, need_temperature};
  const Masks masks{query_ids, key_ids, negative_ids, guide_query, guide_key, guide_negatives};
  const Arguments a{op,        query,     key,      negatives,    tau,
                    normalize, symmetric, in_batch, std::nullopt, bfloat16_products,
                    needs,     &masks,    decoupled};
  check(a, masks);
  const std::vector<int64_t> rows = {a.batch(), a.rows()};
  if (weights.has_value()) check_rows(op, "weights", *weights, a.acc(), rows);
  const Tensor ranks =
      new_tensor(query, rank ? a.lse_shape() : std::vector<int64_t>{0}, ScalarType::Long);
  std::vector<double> of_losses;
  if (weights.has_value()) of_losses = to_vector<double>(*weights);
  const auto found = forward(a, weights.has_value() ? of_losses.data() : nullptr,
                             rank ? ranks.mutable_data_ptr<int64_t>() : nullptr);
  const auto& [loss, lse, of_query, of_key, of_negatives, of_temperature] = found;
  return {loss, lse, ranks, of_query, of_key, of_negatives, of_temperature};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_info_nce_backward(
    const Tensor& grad_loss, const Tensor& query, const Tensor& key,
    const std::optional<Tensor>& negatives, const std::optional<Tensor>& query_ids,
    const std::optional<Tensor>& key_ids, const std::optional<Tensor>& negative_ids,
    const std::optional<Tensor>& guide_query, const std::optional<Tensor>& guide_key,
    const std::optional<Tensor>& guide_negatives, const std::optional<Tensor>& temperature_tensor,
    double temperature, const Tensor& lse, bool normalize, bool symmetric, bool in_batch,
    bool decoupled, bool bfloat16_products, bool need_query, bool need_key, bool need_negatives,
    bool need_temperature) {
  const char* op = "masked_info_nce_backward";
  const double tau = temperature_value(op, temperature_tensor, temperature);
  const Needs needs{need_query, need_key, need_negatives, need_temperature};
  const Masks masks{query_ids, key_ids, negative_ids, guide_query, guide_key, guide_negatives};
  const Arguments a{op,        query,     key,      negatives,    tau,
                    normalize, symmetric, in_batch, std::nullopt, bfloat16_products,
                    needs,     &masks,    decoupled};
  check(a, masks);
  return backward(a, grad_loss, lse);
}

// Returns the loss of all layers and fills their gradients.
template <class T, class P>
double solve_layers(const std::vector<Arguments>& layers, const std::vector<double>& loss_scales,
                    const std::vector<double>& grad_scales, std::vector<Gradients>& gradients) {
  std::vector<std::unique_ptr<Job<T, P>>> jobs;
  std::vector<Buffer<T>> loss, lse;
  std::vector<std::vector<double>> weights;
  for (size_t l = 0; l < layers.size(); ++l) {
    const int64_t rows = layers[l].batch() * layers[l].rows();
    loss.emplace_back(rows);
    lse.emplace_back(rows);
    weights.emplace_back(rows, grad_scales.empty() ? 0.0 : grad_scales[l]);
    jobs.push_back(std::make_unique<Job<T, P>>(layers[l],
                                               grad_scales.empty() ? nullptr : weights[l].data(),
                                               gradients[l], loss[l].data(), lse[l].data()));
  }
  solve<T, P>(jobs, solve_forward<T, P>);
  double total = 0;
  for (size_t l = 0; l < jobs.size(); ++l) {
    jobs[l]->finish();
    double sum = 0;
    for (int64_t r = 0; r < loss[l].size(); ++r) sum += loss[l][r];
    total += loss_scales[l] * sum;
  }
  return total;
}

// The same where rows meet more than keys, or keys are queries too.
double solve_layers_of_pairs(const PairForm& form, const std::vector<Arguments>& layers,
                             const std::vector<double>& loss_scales,
                             const std::vector<double>& grad_scales,
                             std::vector<Gradients>& gradients) {
  std::vector<PairLayer> pairs;
  for (size_t l = 0; l < layers.size(); ++l) {
    const Arguments& a = layers[l];
    const bool now = !grad_scales.empty();
    pairs.push_back({{{{TensorRows(a.query), OutputRows(gradients[l].query), now && a.needs.query},
                       {TensorRows(a.key), OutputRows(gradients[l].key), now && a.needs.key}}},
                     a.batch(),
                     a.rows(),
                     now && a.needs.temperature,
                     now ? grad_scales[l] : 0.0});
  }
  double total = 0;
  with_sums(layers[0].acc(), [&](auto zero) {
    const std::vector<PairSums> sums = solve_pairs<decltype(zero)>(form, pairs);
    for (size_t l = 0; l < layers.size(); ++l) {
      total += loss_scales[l] * sums[l].loss;
      gradients[l].temperature = -sums[l].temperature / form.temperature;
    }
  });
  return total;
}

std::tuple<Tensor, Tensors, Tensors, Tensor> patch_nce_forward(
    const Tensors& queries, const Tensors& keys, const std::optional<Tensor>& temperature_tensor,
    double temperature, double self_logit, bool symmetric, bool query_negatives, bool detach_keys,
    bool bfloat16_products, std::vector<double> loss_scales, std::vector<double> grad_scales,
    int64_t loss_layers, int64_t grad_layers, const std::vector<bool>& need_queries,
    const std::vector<bool>& need_keys, bool need_temperature) {
  const char* op = "patch_nce_forward";
  const size_t count = queries.size();
  STD_TORCH_CHECK(count > 0 && keys.size() == count && loss_scales.size() == count &&
                      (grad_scales.empty() || grad_scales.size() == count) &&
                      need_queries.size() == count && need_keys.size() == count,
                  op, ": the lists differ in length.");
  const double tau = temperature_value(op, temperature_tensor, temperature);
  const std::optional<Tensor> no_negatives;
  std::vector<Arguments> layers;
  std::vector<Gradients> gradients;
  for (size_t l = 0; l < count; ++l) {
    const Needs needs{need_queries[l], need_keys[l], false, need_temperature};
    layers.push_back({op, queries[l], keys[l], no_negatives, tau, true, false, true, self_logit,
                      bfloat16_products, needs});
    check(layers[l]);
    const int64_t rows = layers[l].batch() * layers[l].rows();
    if (loss_layers > 0) loss_scales[l] /= static_cast<double>(rows * loss_layers);
    if (grad_layers > 0 && !grad_scales.empty()) {
      grad_scales[l] /= static_cast<double>(rows * grad_layers);
    }
    STD_TORCH_CHECK(queries[l].scalar_type() == queries[0].scalar_type(), op,
                    ": all layers must have one dtype.");
    gradients.push_back(new_gradients(layers[l], !grad_scales.empty()));
  }
  double loss = 0;
  if (symmetric || query_negatives) {
    const PairForm form{symmetric, query_negatives, detach_keys, tau, self_logit};
    loss = solve_layers_of_pairs(form, layers, loss_scales, grad_scales, gradients);
  } else {
    with_operands(layers[0].acc(), bfloat16_products, [&](auto sum, auto operand) {
      loss = solve_layers<decltype(sum), decltype(operand)>(layers, loss_scales, grad_scales,
                                                            gradients);
    });
  }
  Tensors grad_queries, grad_keys;
  double grad_temperature = 0;
  for (size_t l = 0; l < count; ++l) {
    if (grad_scales.empty()) continue;
    if (need_queries[l]) grad_queries.push_back(gradients[l].query);
    if (need_keys[l]) grad_keys.push_back(gradients[l].key);
    grad_temperature += gradients[l].temperature * (loss_scales[l] / grad_scales[l]);
  }
  return {new_scalar(queries[0], true, loss), grad_queries, grad_keys,
          new_scalar(queries[0], !grad_scales.empty() && need_temperature, grad_temperature)};
}

STABLE_TORCH_LIBRARY_IMPL(fastnce, CPU, m) {
  m.impl("info_nce_forward", TORCH_BOX(&info_nce_forward));
  m.impl("patch_nce_forward", TORCH_BOX(&patch_nce_forward));
  m.impl("info_nce_backward", TORCH_BOX(&info_nce_backward));
  m.impl("masked_info_nce_forward", TORCH_BOX(&masked_info_nce_forward));
  m.impl("masked_info_nce_backward", TORCH_BOX(&masked_info_nce_backward));
}

}  // namespace
}  // namespace fastnce::info_nce
