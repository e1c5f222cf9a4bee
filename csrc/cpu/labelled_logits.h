// Logits of labelled rows against labelled columns, with a maximum for each row: at any
// temperature, and for columns that are not the rows themselves. All logits are computed twice, for
// the sums and for the gradient, in which row and column meet:
// d L / d u_i = sum_j (G_ij + G_ji) v_j / t.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "logit_blocks.h"
#include "op_arguments.h"

namespace fastnce {

// Labels as the numbers of their classes among `all`, narrow enough to be compared in a logit's
// lane.
template <class Label>
void number_classes(const std::vector<int64_t>& labels, std::vector<int64_t> all,
                    const Buffer<Label>& out) {
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  for (size_t i = 0; i < labels.size(); ++i) {
    const auto at = std::lower_bound(all.begin(), all.end(), labels[i]);
    out[static_cast<int64_t>(i)] = static_cast<Label>(at - all.begin());
  }
}

// One side's LabelWeights, padded to whole slabs.
template <class T>
struct LabelStatistics {
  Buffer<T> all_offset, all_weight, same_offset, same_weight, center;

  explicit LabelStatistics(int64_t padded)
      : all_offset(padded, T(0)),
        all_weight(padded, T(0)),
        same_offset(padded, T(0)),
        same_weight(padded, T(0)),
        center(padded, T(0)) {}

  // The gradient of a row's log-sum-exps: weight softmax. An empty sum has no column that would use
  // it.
  void set(int64_t i, const ExpSum& all, double all_gradient, const ExpSum& same,
           double same_gradient) const {
    set(all_offset[i], all_weight[i], all, all_gradient);
    set(same_offset[i], same_weight[i], same, same_gradient);
  }

  LabelWeights<T> at(int64_t i) const {
    return {&all_offset[i], &all_weight[i], &same_offset[i], &same_weight[i], &center[i]};
  }

 private:
  static void set(T& offset, T& weight, const ExpSum& total, double gradient) {
    if (total.maximum == -std::numeric_limits<double>::infinity()) return;
    offset = static_cast<T>(total.maximum);
    weight = static_cast<T>(gradient / total.sum * std::exp(offset - total.maximum));
  }
};

template <class T>
struct LabelledLogits {
  using Label = typename TileKernels<T>::Label;

  const TileKernels<T>& kernels;
  // Unit rows / sqrt(t) on both sides of every product, so that z_ij and z_ji, of another process
  // too, are the same number to the last bit. Columns transposed and, for gradients, straight.
  const SlabMatrix<T>&rows, &transposed, &straight;
  const Buffer<Label>&row_labels, &column_labels;  // the second padded to whole slabs
  bool own;                                        // row i leaves out column i

  // Adds up each row's exponentials, over all columns and over those of its label.
  void sum(std::vector<ExpSum>& all, std::vector<ExpSum>& same) const {
    sum_logits<T, 2>(kernels, rows, transposed, {&all, &same},
                     [&](int64_t slab, int64_t begin, int64_t end, T* z, const auto& parts) {
                       const int64_t c0 = slab * kernels.width;
                       kernels.label_sums(
                           end - begin, transposed.lanes(slab), z, self(begin, c0),
                           &row_labels[begin], &column_labels[c0],
                           {parts[0].offset, parts[0].sum, parts[1].offset, parts[1].sum});
                     });
  }

  // Calls add_moments(first row, rows, slabs, moments (slabs, rows)) for each block, and
  // finish(first row, products (rows, D)) for each panel of rows: sum_j (G_ij + G_ji) v_j.
  template <class AddMoments, class Finish>
  void gradients(const LabelStatistics<T>& of_rows, const LabelStatistics<T>& of_columns,
                 const AddMoments& add_moments, const Finish& finish) const {
    const int64_t width = kernels.width, slabs = transposed.slabs(), count = rows.rows();
    const int64_t limit = std::min(slabs, block_slabs(kernels));
    const int64_t panel = std::min(panel_rows<T>(limit * width), count);
    Buffer<T> z(panel * limit * width), moment(panel * limit);
    for (int64_t r0 = 0; r0 < count; r0 += panel) {
      const int64_t height = std::min(panel, count - r0);
      SlabMatrix<T> products(height, rows.columns(), width);
      for (int64_t s0 = 0; s0 < slabs; s0 += limit) {
        const int64_t s1 = std::min(slabs, s0 + limit);
        for_logits(
            kernels, rows, r0, height, transposed, s0, s1, z.data(), task_rows(height, s1 - s0),
            [&](int64_t slab, int64_t begin, int64_t end, T* block) {
              const int64_t r = r0 + begin, c0 = slab * width;
              kernels.label_gradient(end - begin, transposed.lanes(slab), block, self(r, c0),
                                     &row_labels[r], &column_labels[c0], of_rows.at(r),
                                     of_columns.at(c0), &moment[(slab - s0) * height + begin]);
            });
        add_moments(r0, height, s1 - s0, moment.data());
        add_row_gradient(kernels, height, z.data(), straight, s0, s1, products, s0 > 0);
      }
      finish(r0, products);
    }
  }

 private:
  // The column, counted from c0, that row r leaves out.
  int64_t self(int64_t r, int64_t c0) const {
    return own ? r - c0 : std::numeric_limits<int64_t>::min() / 2;
  }
};

}  // namespace fastnce
