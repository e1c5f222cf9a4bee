// The supervised contrastive loss with a maximum for each row: for temperatures at which one offset
// for all logits would let exp leave its range.
//
// All logits are computed for the sums. The gradient's matrix G + G^T is symmetric like the
// similarities: blocks on and right of the diagonal are enough, each used for its rows and,
// transposed, for its columns.
#pragma once

#include <limits>

#include "sup_con_rows.h"

namespace fastnce::sup_con {

template <class T>
class RunningMaximum {
 public:
  explicit RunningMaximum(Rows<T>& rows) : r_(rows), kernels_(rows.kernels) {
    pack_unit_rows<T, T>(kernels_, r_.feature_rows, 0, r_.rows, true, r_.scale,
                         {&scaled_, &transposed_});
  }

  const SlabMatrix<T>& units() const { return scaled_; }

  // With a maximum for each row, so row by row.
  void sum() {
    const int64_t limit = run_slabs(), slabs = transposed_.slabs();
    const int64_t panel = std::min(kPanelRows, r_.rows), size = limit * panel;
    Buffer<T> offset(size), sum(size), moment(size);
    for (int64_t r0 = 0; r0 < r_.rows; r0 += panel) {
      const int64_t rows = std::min(panel, r_.rows - r0);
      for (int64_t s0 = 0; s0 < slabs; s0 += limit) {
        const int64_t s1 = std::min(slabs, s0 + limit);
        for_logits<T>(kernels_, scaled_, r0, rows, transposed_, s0, s1, nullptr,
                      task_rows(rows, s1 - s0),
                      [&](int64_t slab, int64_t begin, int64_t end, T* z) {
                        const int64_t at = (slab - s0) * rows + begin;
                        fill_diagonal(slab, r0 + begin, r0 + end, z, -kInfinity);
                        kernels_.exp_rows(end - begin, transposed_.lanes(slab), z, &offset[at],
                                          &sum[at], &moment[at]);
                      });
        run_blocks(rows, kTaskRows, 16 * (s1 - s0), [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            for (int64_t at = r; at < (s1 - s0) * rows; at += rows) {
              r_.sums[r0 + r].add(offset[at], sum[at]);
            }
          }
        });
      }
    }
  }

  // Fills the gradient of the features if it is needed; returns that of the temperature.
  double gradients(const Tensor& grad_features) {
    const OutputRows out(grad_features);
    set_softmax();
    r_.sum_targets(scaled_);
    const int64_t width = kernels_.width, limit = run_slabs(), panel = panel_height(limit);
    Buffer<T> z(panel * limit * width), moment(panel * limit);
    if (r_.rows > panel) {
      column_gradient_ = SlabMatrix<T>(r_.rows, r_.a.depth(), width);
      column_gradient_.fill_zero();
    }
    std::vector<double> terms(r_.rows, 0.0);
    for (int64_t r0 = 0; r0 < r_.rows; r0 += panel) {
      const int64_t rows = std::min(panel, r_.rows - r0), first = r0 / width;
      SlabMatrix<T> products(rows, r_.a.depth(), width);
      for (int64_t s0 = first; s0 < transposed_.slabs(); s0 += limit) {
        const int64_t s1 = std::min(transposed_.slabs(), s0 + limit);
        const int64_t per_task = task_rows(rows, s1 - s0), cuts = (rows + per_task - 1) / per_task;
        for_logits(kernels_, scaled_, r0, rows, transposed_, s0, s1, z.data(), per_task,
                   [&](int64_t slab, int64_t begin, int64_t end, T* block) {
                     logits_to_gradient(slab, r0 + begin, r0 + end, block,
                                        &moment[(slab - s0) * rows + begin]);
                     if (cuts > 1 || slab * width < r0 + rows) return;
                     for (int64_t d = 0; d < scaled_.slabs(); ++d) {
                       add_to_columns(r0, rows, slab, d, block);
                     }
                   });
        // Where a block was cut into tasks, its columns wait until it is whole.
        const int64_t beyond = std::max(s0, (r0 + rows + width - 1) / width);
        if (cuts > 1 && beyond < s1) {
          run_tasks((s1 - beyond) * scaled_.slabs(), rows * width * width, [&](int64_t task) {
            const int64_t slab = beyond + task / scaled_.slabs();
            add_to_columns(r0, rows, slab, task % scaled_.slabs(), &z[(slab - s0) * rows * width]);
          });
        }
        add_row_gradient(kernels_, rows, z.data(), scaled_, s0, s1, products, s0 > first);
      }
      r_.finish_rows(
          r0, r0 + rows, scaled_, [&](int64_t i, T* gradient) { load(i, products, r0, gradient); },
          out, terms.data());
    }
    return r_.temperature_gradient(terms);
  }

 private:
  int64_t run_slabs() const { return std::min(transposed_.slabs(), block_slabs(kernels_)); }

  // Rows of a panel: whole slabs, so that no block lies on both sides of the diagonal blocks' edge.
  // Few rows have lower panels, for the blocks on the diagonal are computed on both sides of it.
  int64_t panel_height(int64_t limit) const {
    constexpr int64_t kLeast = 96;
    const int64_t width = kernels_.width;
    const int64_t most = std::min(panel_rows<T>(limit * width), std::max(kLeast, r_.rows / 8));
    return std::min(r_.padded, std::max(width, most / width * width));
  }

  // Sets z_ii of rows [begin, end) where the slab has it.
  void fill_diagonal(int64_t slab, int64_t begin, int64_t end, T* z, T value) const {
    const int64_t width = kernels_.width, c0 = slab * width;
    for (int64_t i = std::max(begin, c0); i < std::min(end, c0 + width); ++i) {
      z[(i - begin) * width + (i - c0)] = value;
    }
  }

  // Rows without a weight need their offset as well: 0 times an exp that overflows would be NaN.
  void set_softmax() {
    for (Buffer<T>* b : {&softmax_offset_, &softmax_weight_, &center_}) {
      *b = Buffer<T>(r_.padded, T(0));
    }
    for (int64_t i = 0; i < r_.rows; ++i) {
      if (r_.sums[i].sum != 0) softmax_offset_[i] = static_cast<T>(r_.sums[i].maximum);
      softmax_weight_[i] = r_.softmax_weight(i, softmax_offset_[i]);
    }
  }

  SoftmaxValues<T> side(int64_t i) const {
    return {&softmax_offset_[i], &softmax_weight_[i], &center_[i]};
  }

  // Logits of rows [begin, end) to G + G^T of the log-sum-exps.
  void logits_to_gradient(int64_t slab, int64_t begin, int64_t end, T* z, T* moment) const {
    const int64_t c0 = slab * kernels_.width;
    kernels_.softmax_both(end - begin, transposed_.lanes(slab), z, side(begin), side(c0), moment);
    fill_diagonal(slab, begin, end, z, T(0));
  }

  void add_to_columns(int64_t r0, int64_t rows, int64_t slab, int64_t d, const T* block) const {
    kernels_.multiply_transposed(transposed_.lanes(slab), rows, scaled_.lanes(d), block,
                                 scaled_.at(r0, d), column_gradient_.at(slab * kernels_.width, d));
  }

  // What the panel from row r0 on and those before it give to row i.
  void load(int64_t i, const SlabMatrix<T>& products, int64_t r0, T* gradient) const {
    products.copy_row_out(i - r0, gradient);
    if (!column_gradient_) return;
    Buffer<T> left(r_.a.depth());
    column_gradient_.copy_row_out(i, left.data());
    kernels_.add_scaled(r_.a.depth(), T(1), left.data(), gradient);
  }

  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  Rows<T>& r_;
  const TileKernels<T>& kernels_;
  SlabMatrix<T> scaled_, transposed_;                   // unit features times the scale
  Buffer<T> softmax_offset_, softmax_weight_, center_;  // padded to whole slabs
  SlabMatrix<T> column_gradient_;                       // what panels leave for the rows below them
};

}  // namespace fastnce::sup_con
