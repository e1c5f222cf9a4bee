// The passes over the matrix of similarities, which is never built: s_ij = r_i r_j x_i . y_j,
// logits z_ij = s_ij / t.
//
// Rows x and columns y of `problems` equal problems are packed, contiguous: x (R, P) with R =
// problems * rows, and y (C, P) with C = problems * columns; problem b has the rows from b * rows
// and the columns from b * columns. P is padded_depth(depth); elements beyond the depth are zero.
// Scales r and all results are float. Logits inside are in units of log 2.
//
// Sums: of each row the largest logit m_i and sum_j E_ij with E_ij = 2^(z_ij - m_i); with them, on
// request, sum_j E_ij z_ij, sum_j E_ij r_j y_j, sums over the row's own label, and sums of columns.
//
// Products: sum_j G_ij r_j y_j of rows and sum_i G_ij r_i x_i of columns, where G = d L / d z
// follows from the statistics of the rows' and the columns' losses; sum_j G_ij z_ij. A row of scale
// 0, which has no gradient, may have 0 instead.
//
// A pass is planned from sizes alone (plan_*), so that a call always gives the same bits; the plan
// says how much room the results take; then it is launched. Columns are cut into `splits` parts,
// whose results stand one after another: sums of different parts have different m_i, products of
// parts just add.
#pragma once

#include "arguments.h"

namespace fastnce::cuda {

// Which columns count for a row, and which of them are positives.
enum class Kind : int {
  kQueue,    // all
  kInBatch,  // all but the row's own (row i, column i), which is its positive and kept apart
  kSupCon,   // all but the row's own; those with its label are positives, by their mean logit
  kTwoC,     // the same, positives by their own log-sum-exp
};

inline bool labelled(Kind kind) { return kind == Kind::kSupCon || kind == Kind::kTwoC; }

struct Machine {
  int capability;  // 80, 90, 100
  int multiprocessors;
};

struct Pairs {
  const char* op;  // for errors
  const void* x;
  const float* x_scale;  // (R,)
  const void* y;
  const float* y_scale;  // (C,)
  int64_t problems, rows, columns;
  int64_t depth;   // P
  Dtype dtype;     // of x and y: of 16 bits
  bool unit_rows;  // s are cosines: see offset_of in pairs_tile.cuh
  Kind kind;
  const int64_t* x_labels = nullptr;  // (R,) and (C,), of labelled kinds
  const int64_t* y_labels = nullptr;
  Temperature temperature;
};

// What rows of `depth` elements are padded to with zeros: the depth of one matrix instruction.
constexpr int64_t padded_depth(int64_t depth) { return (depth + 15) / 16 * 16; }

// --- sums ---

struct SumsPlan {
  int64_t splits;     // parts of the columns
  int64_t row_block;  // rows of a block; blocks do not cross problems
  // Of one problem: parts of the column sums, of one or more blocks of rows each.
  int64_t row_blocks;
  int64_t blocks = 0;  // of the persistent grid of pairs_sm90.cu; 0 for pairs_sm80.cuh
};

// Base 2, `sum 2^largest`; largest may be -inf where nothing was summed up.
struct Sums {
  float* largest = nullptr;  // (splits, R)
  float* sum = nullptr;      // (splits, R)

  // With the product alone, optional:
  float* product = nullptr;  // (splits, R, P): sum_j E_ij r_j y_j
  float* term = nullptr;     // (splits, R): sum_j E_ij z_ij, z natural

  // Without the product alone.
  // Of labelled kinds, (splits, R): kSupCon: the sum of the positives' logits (natural), and their
  // number; kTwoC: largest and sum as above, of the positives.
  float* label_a = nullptr;
  float* label_b = nullptr;
  // Optional, of kinds without labels, with splits of any number: (row_blocks, C), largest and sum
  // of columns.
  float* column_largest = nullptr;
  float* column_sum = nullptr;
};

// Whether the sums and the product with them can be made in one pass.
bool can_sum_with_product(const Pairs& pairs, const Machine& machine);
SumsPlan plan_sums(const Pairs& pairs, const Machine& machine, bool with_product);
void launch_sums(const Pairs& pairs, const SumsPlan& plan, const Sums& out, Stream stream);

// --- products ---

struct ProductsPlan {
  int64_t x_splits, y_splits;  // parts of the products, 0 for those not wanted; of the term as of x
  int64_t workspace_bytes;     // aligned to 16; 0 for none
  // For the launch: rows of a block, of x and of y, or rows and problems of a panel of
  // coefficients.
  int64_t x_row_block, y_row_block;
  int64_t panel_rows, panel_problems, panel_splits;
  int64_t blocks = 0;  // as in SumsPlan
};

// The statistics of a row's (column's) loss: [log-sum-exp (natural), weight, third], (3, R)
// contiguous. The loss's coefficient at a pair is weight exp(z - lse), less for a positive:
// kSupCon: third; kTwoC: weight exp(z - third). G adds up those of the row and of the column, as
// far as there are statistics.
struct Products {
  const float* x_statistics = nullptr;  // (3, R), or none
  const float* y_statistics = nullptr;  // (3, C), or none
  float* x_product = nullptr;           // (x_splits, R, P): sum_j G_ij r_j y_j
  float* y_product = nullptr;           // (y_splits, C, P): sum_i G_ij r_i x_i
  // Optional with x_product, (x_splits, R): sum_j G_ij z_ij, z natural.
  float* x_term = nullptr;
  void* workspace = nullptr;
};

ProductsPlan plan_products(const Pairs& pairs, const Machine& machine, bool of_x, bool of_y);
void launch_products(const Pairs& pairs, const ProductsPlan& plan, const Products& out,
                     Stream stream);

}  // namespace fastnce::cuda
