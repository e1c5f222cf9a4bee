// The table of inner loops that every CPU op is built from, one table per instruction set.
//
// Matrices live in slabs: a slab holds `width` neighbouring columns of all rows, row after row, so
// element (r, c) of a matrix with R rows is slab[c / width][r * width + c % width]. Every operand
// of a product then streams contiguously, whichever of its two dimensions is summed over. A new
// instruction set is one more table; the ops do not change.
#pragma once

#include <cstdint>

namespace fastnce {

// Integers as wide as T: the class numbers that are compared lane by lane with logits.
template <class T>
struct LaneIntegerOf;
template <>
struct LaneIntegerOf<float> {
  using type = int32_t;
};
template <>
struct LaneIntegerOf<double> {
  using type = int64_t;
};
template <class T>
using LaneInteger = typename LaneIntegerOf<T>::type;

// The number of a row or lane that block_exclude_equal leaves out whatever the other's is.
constexpr int kEveryId = -1;

// Softmax weights weight * exp(z - offset) along one side of the matrix of logits. Moments of
// logits are taken relative to `center`: rows of the gradient sum to 0, so it may be any number,
// and one near the largest logit keeps large numbers from cancelling.
template <class T>
struct SoftmaxValues {
  const T* offset;
  const T* weight;
  const T* center;
};

// Numerator and denominator sums of one slab of labelled logits (conditional_contrastive).
template <class T>
struct LabelSums {
  T* all_offset;   // (rows,) what was subtracted before exp, over all allowed columns
  T* all_sum;      // (rows,)
  T* same_offset;  // (rows,) the same over the columns of the row's own class
  T* same_sum;     // (rows,)
};

// exp(z - offset) * weight along one side of the similarity matrix, for all columns and for those
// of the same class.
template <class T>
struct LabelWeights {
  const T* all_offset;
  const T* all_weight;
  const T* same_offset;
  const T* same_weight;
  const T* center;  // of the row's moment
};

// Sums of exponentials under one offset for all.
template <class T>
struct LabelExpSums {
  T *row_all, *row_same;        // (rows,)
  T *column_all, *column_same;  // (width,)
};

// Factors of exponentials along one side of the similarity matrix.
template <class T>
struct LabelFactors {
  const T* other;
  const T* same;
};

// Two bfloat16, the first in the low half (see operands.h).
using Pair = uint32_t;

// Products of bfloat16 with sums in float, and the ways there. Widths are those of the float table.
struct PairKernels {
  // As in TileKernels, depths in pairs.
  void (*multiply)(int64_t rows, int64_t depth, int64_t lanes, const Pair* a, int64_t a_slab,
                   const Pair* b, float* c, bool accumulate);
  void (*multiply_transposed)(int64_t columns, int64_t depth, int64_t lanes, const Pair* a,
                              const Pair* b, float* c);

  // out = n numbers x * factor, rounded; a last one without neighbour is paired with 0.
  void (*round_row)(int64_t n, const float* x, double factor, Pair* out);

  // Blocks (rows, lanes) as in TileKernels. z *= lane_scale[lane] * row_scale[row].
  void (*scale_block)(int64_t rows, int64_t lanes, float* z, const float* lane_scale,
                      const float* row_scale);
  // Rounds z row_scale[row] to pairs down its columns, `down` (rows / 2, width), and z to pairs
  // along its rows, `across` (rows, width of which lanes / 2 are used). Either may be null. What
  // has no neighbour is paired with 0.
  void (*round_block)(int64_t rows, int64_t lanes, const float* z, const float* row_scale,
                      Pair* down, Pair* across);
  // z from `across`.
  void (*widen_block)(int64_t rows, int64_t lanes, const Pair* across, float* z);

  // As in TileKernels, rounded to bfloat16.
  void (*store_rows)(int64_t rows, int64_t n, const float* x, int64_t stride, uint16_t* out,
                     int64_t out_stride);

  int64_t (*multiply_add_rounds)(int64_t rounds);
};

template <class T>
struct TileKernels {
  using Label = LaneInteger<T>;

  // Lanes of one slab. Rows of slabs are aligned to 64 bytes where width * sizeof(T) allows.
  int64_t width;

  // c (rows, lanes) [+]= a (rows, depth) b (depth, lanes). `a` starts at a slab boundary of its
  // depth and its slabs are a_slab elements apart; b and c are single slabs.
  void (*multiply)(int64_t rows, int64_t depth, int64_t lanes, const T* a, int64_t a_slab,
                   const T* b, T* c, bool accumulate);

  // c (columns, lanes) += a (depth, columns)^T b (depth, lanes); all three are single slabs.
  void (*multiply_transposed)(int64_t columns, int64_t depth, int64_t lanes, const T* a, const T* b,
                              T* c);

  // offset[r] = row maximum (0 where that is not finite), sum[r] = row sum of exp(z - offset).
  void (*exp_rows)(int64_t rows, int64_t lanes, const T* z, T* offset, T* sum);

  // z[r, :] *= factor[r].
  void (*scale_rows)(int64_t rows, int64_t lanes, T* z, const T* factor);

  // z -> g = weight exp(z - offset) by row, plus the same by column; moment[r] is the row sum of
  // both g (z - center).
  void (*softmax_both)(int64_t rows, int64_t lanes, T* z, const SoftmaxValues<T>& row,
                       const SoftmaxValues<T>& column, T* moment);

  // Offsets and sums as exp_rows gives them, over all columns and over those whose label is the
  // row's. Column `self + r` is left out of row r. Leaves z alone.
  void (*label_sums)(int64_t rows, int64_t lanes, const T* z, int64_t self, const Label* row_label,
                     const Label* column_label, const LabelSums<T>& out);

  // z -> [all_weight exp(z - all_offset) - (same label) same_weight exp(z - same_offset)] summed
  // over the row's and the column's values; 0 at column `self + r`. moment[r] is the row sum of the
  // row's terms times z - center.
  void (*label_gradient)(int64_t rows, int64_t lanes, T* z, int64_t self, const Label* row_label,
                         const Label* column_label, const LabelWeights<T>& row,
                         const LabelWeights<T>& column, T* moment);

  // In place z -> e = exp(z - offset), and its sums over each row and each column, `all` of them
  // and those where both have the same label. Column values are padded to the width.
  void (*label_exp)(int64_t rows, int64_t lanes, T* z, T offset, const Label* row_label,
                    const Label* column_label, const LabelExpSums<T>& out);

  // e *= row + column of `same` where the labels are the same, else of `other`.
  void (*label_scale)(int64_t rows, int64_t lanes, T* e, const Label* row_label,
                      const Label* column_label, const LabelFactors<T>& row,
                      const LabelFactors<T>& column);

  // Blocks (rows, lanes) whose rows are keys and whose lanes are queries. Per-lane values are read
  // and written a vector at a time; the caller pads them to the slab's width.
  // maximum[lane] = max(maximum[lane], column maximum).
  void (*block_maximum)(int64_t rows, int64_t lanes, const T* z, T* maximum);
  // In place z -> e = exp(z - offset[lane]); sum[lane] = column sum of e; and, unless it is null,
  // column_sum[row] += row sum of e.
  void (*block_exp)(int64_t rows, int64_t lanes, T* z, const T* offset, T* sum, T* column_sum);
  // e *= lane_weight[lane] + row_weight[row].
  void (*block_scale_both)(int64_t rows, int64_t lanes, T* e, const T* lane_weight,
                           const T* row_weight);
  // In place z -> exp(z - lane_offset) lane_weight + exp(z - row_offset) row_weight.
  void (*block_exp_both)(int64_t rows, int64_t lanes, T* z, const T* lane_offset,
                         const T* lane_weight, const T* row_offset, const T* row_weight);

  // z = -inf where row and lane have the same number, or one of them is kEveryId.
  void (*block_exclude_equal)(int64_t rows, int64_t lanes, T* z, const Label* row_id,
                              const Label* lane_id);
  // z = -inf where guide > 0.
  void (*block_exclude_positive)(int64_t rows, int64_t lanes, const T* guide, T* z);
  // lane_count[lane] += how many of its column are above lane_bound[lane]; and, unless it is null,
  // row_count[row] += how many of its row are above row_bound[row].
  void (*block_count_above)(int64_t rows, int64_t lanes, const T* z, const T* lane_bound,
                            Label* lane_count, const T* row_bound, Label* row_count);

  // The sigmoid loss: x = z + bias, or its opposite where the labels are the same. loss[lane] =
  // column sum of log(1 + exp(x)); unless lane_weight is null, in place z -> its gradient times
  // lane_weight[lane], and sum[lane] = column sum of that.
  void (*sigmoid_block)(int64_t rows, int64_t lanes, T* z, T bias, const Label* row_label,
                        const Label* lane_label, const T* lane_weight, T* loss, T* sum);

  // Vectors of n elements; sums are taken in double.
  double (*sum_squares)(int64_t n, const T* x);
  double (*dot)(int64_t n, const T* x, const T* y);
  // out = x * scale, rounded once.
  void (*scale)(int64_t n, const T* x, double scale, T* out);
  // y += alpha x.
  void (*add_scaled)(int64_t n, T alpha, const T* x, T* y);
  // out = factor g + alpha y; returns x . out.
  double (*mix_and_dot)(int64_t n, double factor, const T* g, double alpha, const T* y, const T* x,
                        T* out);
  // out = (g - back x) factor.
  void (*subtract_and_scale)(int64_t n, const T* g, double back, const T* x, double factor, T* out);

  // Copies n numbers of each row to memory of any alignment; strides between rows in elements.
  void (*store_rows)(int64_t rows, int64_t n, const T* x, int64_t stride, T* out,
                     int64_t out_stride);

  // Keeps the arithmetic units busy from registers alone; returns the floating-point operations.
  int64_t (*multiply_add_rounds)(int64_t rounds);

  // Null where the processor has no products of bfloat16.
  const PairKernels* pairs;
};

// The table that FASTNCE_CPU_ISA or the processor asks for. Throws for a level that is unknown or
// that this processor lacks.
template <class T>
const TileKernels<T>& tile_kernels();

// Its name: portable, avx2, avx512 or avx512bf16.
const char* instruction_set_name();

}  // namespace fastnce
