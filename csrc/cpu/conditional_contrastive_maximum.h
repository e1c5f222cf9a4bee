// The conditional contrastive loss with a maximum for each row: for temperatures at which one
// offset for all logits would let exp leave its range. All logits are computed twice, for the sums
// and for the gradient, in which row and column meet: d L / d u_i = sum_j (G_ij + G_ji) u_j / t.
#pragma once

#include <numeric>

#include "conditional_contrastive_rows.h"

namespace fastnce::conditional_contrastive {

template <class T>
class RunningMaximum {
 public:
  explicit RunningMaximum(Rows<T>& rows) : r_(rows), kernels_(rows.kernels), inverse_(rows.rows) {
    pack_unit_rows<T, T>(kernels_, r_.embedding_rows, 0, r_.rows, true, r_.scale,
                         {&scaled_, &transposed_, nullptr, inverse_.data()});
    r_.add_proxies(scaled_);
  }

  void sum() {
    const int64_t width = kernels_.width, slabs = transposed_.slabs();
    const int64_t limit = std::min(slabs, block_slabs(kernels_));
    const int64_t panel = std::min(kPanelRows, r_.rows), size = limit * panel;
    Buffer<T> all_offset(size), all_sum(size), same_offset(size), same_sum(size);
    for (int64_t r0 = 0; r0 < r_.rows; r0 += panel) {
      const int64_t rows = std::min(panel, r_.rows - r0);
      for (int64_t s0 = 0; s0 < slabs; s0 += limit) {
        const int64_t s1 = std::min(slabs, s0 + limit);
        for_logits<T>(
            kernels_, scaled_, r0, rows, transposed_, s0, s1, nullptr, task_rows(rows, s1 - s0),
            [&](int64_t slab, int64_t begin, int64_t end, T* block) {
              const int64_t at = (slab - s0) * rows + begin;
              const int64_t r = r0 + begin, c0 = slab * width;
              kernels_.label_sums(end - begin, transposed_.lanes(slab), block, r - c0,
                                  &r_.labels[r], &r_.labels[c0],
                                  {&all_offset[at], &all_sum[at], &same_offset[at], &same_sum[at]});
            });
        run_blocks(rows, kTaskRows, 32 * (s1 - s0), [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            for (int64_t at = r; at < (s1 - s0) * rows; at += rows) {
              r_.all[r0 + r].add(all_offset[at], all_sum[at]);
              r_.same[r0 + r].add(same_offset[at], same_sum[at]);
            }
          }
        });
      }
    }
  }

  // Fills the gradients that are needed; returns that of the temperature.
  double gradients(const Tensor& grad_embeddings, const Tensor& grad_proxies) {
    make_weights();
    const OutputRows embeddings_out(grad_embeddings), proxies_out(grad_proxies);
    const int64_t width = kernels_.width, slabs = transposed_.slabs();
    const int64_t limit = std::min(slabs, block_slabs(kernels_));
    const int64_t panel = std::min(panel_rows<T>(limit * width), r_.rows);
    Buffer<T> z(panel * limit * width), moment(panel * limit);
    std::vector<double> terms(r_.rows, 0.0);
    for (int64_t r0 = 0; r0 < r_.rows; r0 += panel) {
      const int64_t rows = std::min(panel, r_.rows - r0);
      SlabMatrix<T> products(rows, r_.a.depth(), width);
      for (int64_t s0 = 0; s0 < slabs; s0 += limit) {
        const int64_t s1 = std::min(slabs, s0 + limit);
        for_logits(kernels_, scaled_, r0, rows, transposed_, s0, s1, z.data(),
                   task_rows(rows, s1 - s0),
                   [&](int64_t slab, int64_t begin, int64_t end, T* block) {
                     const int64_t r = r0 + begin, c0 = slab * width;
                     kernels_.label_gradient(end - begin, transposed_.lanes(slab), block, r - c0,
                                             &r_.labels[r], &r_.labels[c0], side(r), side(c0),
                                             &moment[(slab - s0) * rows + begin]);
                   });
        for (int64_t s = 0; s < s1 - s0; ++s) {
          for (int64_t r = 0; r < rows; ++r) terms[r0 + r] += moment[s * rows + r];
        }
        add_row_gradient(kernels_, rows, z.data(), scaled_, s0, s1, products, s0 > 0);
      }
      // The proxies add nothing to the moments, which are taken relative to their logits.
      r_.finish_rows(r0, products, 1.0, inverse_.data(), embeddings_out, proxies_out,
                     [](int64_t, double) {});
    }
    return -std::accumulate(terms.begin(), terms.end(), 0.0) / r_.a.temperature;
  }

 private:
  void make_weights() {
    for (Buffer<T>* b : {&all_offset_, &all_weight_, &same_offset_, &same_weight_, &center_}) {
      *b = Buffer<T>(r_.padded, T(0));
    }
    for (int64_t i = 0; i < r_.rows; ++i) {
      center_[i] = static_cast<T>(r_.proxy_logit(i));
      set_weight(all_offset_, all_weight_, i, r_.all[i]);
      set_weight(same_offset_, same_weight_, i, r_.same[i]);
    }
  }

  void set_weight(const Buffer<T>& offset, const Buffer<T>& weight, int64_t i,
                  const ExpSum& total) const {
    offset[i] = static_cast<T>(total.maximum);
    weight[i] = static_cast<T>(r_.weights[i] / total.sum * std::exp(offset[i] - total.maximum));
  }

  LabelWeights<T> side(int64_t i) const {
    return {&all_offset_[i], &all_weight_[i], &same_offset_[i], &same_weight_[i], &center_[i]};
  }

  Rows<T>& r_;
  const TileKernels<T>& kernels_;
  Buffer<double> inverse_;             // 1 / ||x|| of the embeddings
  SlabMatrix<T> scaled_, transposed_;  // unit embeddings times the scale
  Buffer<T> all_offset_, all_weight_, same_offset_, same_weight_, center_;  // padded to whole slabs
};

}  // namespace fastnce::conditional_contrastive
