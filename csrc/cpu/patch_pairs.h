// PatchNCE where patches meet those of their own image too (query_negatives), or where both images'
// patches are queries (symmetric).
//
// An image's queries and keys are the two sides of a similarity, so each pair of rows has one
// exponential e_ab. With w_a the weight that makes row a's exponentials its softmax,
// the gradient with respect to unit row a is
//   w_a sum_b e_ab u_b     over all rows that a is compared with, and
//   sum_b e_ab w_b u_b     over those that are compared with it and let gradients through.
// A row that is no query has w = 0. The positive is kept out of the matrix, as in info_nce.cpp.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "logit_blocks.h"
#include "op_arguments.h"
#include "self_similarity.h"
#include "unit_rows.h"

namespace fastnce {

struct PairForm {
  bool symmetric, query_negatives, detach_keys;
  double temperature, self_logit;

  int64_t directions() const { return symmetric ? 2 : 1; }
  // The log of what stands in a row's sum for the similarities that are left out.
  double constant_logit() const {
    return self_logit / temperature + (query_negatives ? std::log(2.0) : 0.0);
  }
  // Whether what a pair gives to its rows differs by more than their units.
  bool apart() const { return symmetric && detach_keys; }
  // Whether one offset serves all rows. Exponentials that are multiplied before they are weighted
  // must be far from the smallest numbers.
  bool fixed_offset() const { return temperature >= (apart() ? 2 : 1) * kFixedOffsetTemperature; }
};

// One of the two images of a layer, (B, P, D).
struct PairSide {
  TensorRows rows;
  OutputRows gradient;
  bool needed;
};

struct PairLayer {
  std::array<PairSide, 2> sides;  // queries, keys
  int64_t images, rows;
  bool need_temperature;
  double grad_scale;  // d L / d loss of a row; of no gradients 0

  bool wants_gradients() const { return sides[0].needed || sides[1].needed || need_temperature; }
};

// Of an image: the sum of its rows' losses, and of what the gradient of the temperature is made of.
struct PairSums {
  double loss = 0, temperature = 0;
};

template <class T>
class ImagePairs {
 public:
  ImagePairs(const PairForm& form, const PairLayer& layer, int64_t image)
      : kernels_(tile_kernels<T>()),
        form_(form),
        layer_(layer),
        first_(image * layer.rows),
        similarity_(kernels_, {side(0), side(1)}, form.temperature, form.detach_keys),
        offset_(padded(similarity_.rows(), kernels_.width), static_cast<T>(1 / form.temperature)),
        weight_(offset_.size(), T(0)),
        sums_(similarity_.rows()),
        positive_(layer.rows),
        missing_(similarity_.rows(), 0.0),
        terms_(similarity_.rows(), 0.0) {}

  PairSums solve() {
    form_.fixed_offset() ? sum() : sum_by_maximum();
    PairSums sums{finish_sums(), 0};
    if (!layer_.wants_gradients()) return sums;
    multiply();
    for (int s = 0; s < 2; ++s) finish_rows(s);
    for (int64_t a = 0; a < terms_.size(); ++a) sums.temperature += terms_[a];
    return sums;
  }

 private:
  // Whether rows of the side have a gradient at all.
  bool flows(int s) const { return s == 0 || form_.symmetric || !form_.detach_keys; }
  bool wanted(int s) const {
    return flows(s) && (layer_.sides[s].needed || layer_.need_temperature);
  }
  SimilaritySide side(int s) const {
    const bool own = form_.query_negatives && (s == 0 || form_.symmetric);
    return {layer_.sides[s].rows, first_, layer_.rows, own, wanted(s)};
  }
  int64_t start(int s) const { return s == 0 ? 0 : similarity_.second(); }
  // The other row of a positive pair.
  int64_t partner(int64_t a) const {
    return similarity_.of_second(a) ? a - similarity_.second() : a + similarity_.second();
  }

  // Queries are rows and keys columns.
  void take_positives(const Tile<T>& tile) const {
    const int64_t first = tile.c0 - similarity_.second();
    const int64_t end = std::min(tile.r0 + tile.rows, first + tile.lanes);
    for (int64_t i = std::max(tile.r0, first); i < end; ++i) {
      T& z = tile.values[(i - tile.r0) * kernels_.width + i - first];
      positive_[i] = z;
      z = kNone;
    }
  }

  // Logits to exponentials where the offset is fixed; else they stay logits.
  auto exponentials() const {
    return [this](const Tile<T>& tile, const typename SelfSimilarity<T>::TileSums& sums) {
      take_positives(tile);
      if (!form_.fixed_offset()) return;
      std::fill_n(sums.row[0], tile.rows, T(0));
      kernels_.block_exp(tile.rows, tile.lanes, tile.values, offset_.data(), sums.column[0],
                         sums.row[0]);
    };
  }

  void sum() {
    std::array<Buffer<double>, 2> total;
    similarity_.sum(1, exponentials(), total);
    for (int64_t a = 0; a < similarity_.rows(); ++a) sums_[a].add(offset_[a], total[0][a]);
  }

  void sum_by_maximum() {
    const int64_t width = kernels_.width;
    sum_logits<T, 1>(kernels_, similarity_.units(), similarity_.transposed(), {&sums_},
                     [&](int64_t slab, int64_t begin, int64_t end, T* z, const auto& parts) {
                       const int64_t c0 = slab * width, lanes = similarity_.lanes(c0);
                       std::fill_n(parts[0].sum, end - begin, T(0));
                       for (int s = 0; s < form_.directions() && lanes > 0; ++s) {
                         const int64_t r0 = std::max(begin, start(s));
                         const int64_t r1 = std::min(end, start(s) + layer_.rows);
                         if (r0 >= r1 || !similarity_.meet(r0, c0)) continue;
                         T* rows = z + (r0 - begin) * width;
                         for (int64_t a = r0; a < r1; ++a)
                           leave_out(a, c0, lanes, rows + (a - r0) * width);
                         kernels_.exp_rows(r1 - r0, lanes, rows, parts[0].offset + r0 - begin,
                                           parts[0].sum + r0 - begin);
                       }
                     });
  }

  // What row `a` of a slab has of itself and of its positive.
  void leave_out(int64_t a, int64_t c0, int64_t lanes, T* z) const {
    const int64_t self = a - c0, positive = partner(a) - c0;
    if (self >= 0 && self < lanes) z[self] = kNone;
    if (positive < 0 || positive >= lanes) return;
    if (!similarity_.of_second(a)) positive_[a] = z[positive];
    z[positive] = kNone;
  }

  // Completes the rows; returns the sum of their losses.
  double finish_sums() {
    const double share = 1.0 / static_cast<double>(form_.directions());
    const double constant = form_.constant_logit(), t = form_.temperature;
    Buffer<double> loss(form_.directions() * layer_.rows);
    run_blocks(loss.size(), kTaskRows, kTaskRows, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t i = r % layer_.rows, a = start(r < layer_.rows ? 0 : 1) + i;
        sums_[a].add_logit(constant);
        const double d = sums_[a].log_minus(positive_[i]), lse = positive_[i] + softplus(d);
        loss[r] = share * softplus(d);
        if (!form_.fixed_offset()) offset_[a] = static_cast<T>(sums_[a].maximum);
        weight_[a] = static_cast<T>(share * std::exp(offset_[a] - lse));
        missing_[a] = share / (1 + std::exp(-d));
        terms_[a] = layer_.grad_scale * share * std::exp(constant - lse) * form_.self_logit / t;
      }
    });
    return std::accumulate(loss.data(), loss.data() + loss.size(), 0.0);
  }

  void multiply() {
    similarity_.multiply(exponentials(), [this](const Tile<T>& tile) {
      const int64_t r0 = tile.r0, c0 = tile.c0;
      if (!form_.fixed_offset()) {
        kernels_.block_exp_both(tile.rows, tile.lanes, tile.values, &offset_[c0], &weight_[c0],
                                &offset_[r0], &weight_[r0]);
      } else if (!form_.apart() || !similarity_.cross(tile)) {
        kernels_.block_scale_both(tile.rows, tile.lanes, tile.values, &weight_[c0], &weight_[r0]);
      }
    });
  }

  // Back from unit rows to the inputs.
  void finish_rows(int s) {
    const PairSide &side = layer_.sides[s], &others = layer_.sides[1 - s];
    const int64_t depth = side.rows.depth();
    const double scale = layer_.grad_scale / std::sqrt(form_.temperature);
    run_blocks(layer_.rows, 16, 16 * depth, [&](int64_t begin, int64_t end) {
      Buffer<T> gradient(depth), cross(depth), row(depth), other_row(depth), out_row(depth);
      for (int64_t i = begin; i < end; ++i) {
        T* out = side.needed ? side.gradient.begin(first_ + i, out_row.data()) : out_row.data();
        if (wanted(s)) {
          const T* x = side.rows.read(first_ + i, row.data());
          const T* other = others.rows.read(first_ + i, other_row.data());
          const int64_t a = start(s) + i, b = partner(a);
          const double inverse = similarity_.inverse_norms[a];
          double twice = 0;  // what both rows of a pair have of its logit
          similarity_.gradient().copy_row_out(a, gradient.data());
          if (form_.detach_keys) {
            twice = scale * inverse * kernels_.dot(depth, x, gradient.data());
            similarity_.cross_gradient().copy_row_out(a, cross.data());
            kernels_.add_scaled(depth, form_.apart() ? weight_[a] : T(1), cross.data(),
                                gradient.data());
          }
          const double missing = missing_[a] + (form_.detach_keys ? 0.0 : missing_[b]);
          const double positive = -layer_.grad_scale / form_.temperature * missing;
          const double along =
              unit_row_gradient(kernels_, depth, x, true, inverse, scale, gradient.data(),
                                positive * similarity_.inverse_norms[b], other, 1.0, out);
          terms_[a] += along - (form_.detach_keys ? twice : along) / 2;
        } else {
          std::fill_n(out, depth, T(0));
        }
        if (side.needed) side.gradient.finish(first_ + i, out);
      }
    });
  }

  static constexpr T kNone = -std::numeric_limits<T>::infinity();

  const TileKernels<T>& kernels_;
  const PairForm& form_;
  const PairLayer& layer_;
  const int64_t first_;
  SelfSimilarity<T> similarity_;
  // Of all rows, padded to whole slabs: what is subtracted before exp, and from there to the
  // softmax times the direction's share of the loss.
  const Buffer<T> offset_, weight_;
  std::vector<ExpSum> sums_;  // of all but the positive
  const Buffer<double> positive_;
  // The softmax's weight on all but the positive; parts of the temperature's gradient.
  const Buffer<double> missing_, terms_;
};

template <class T>
PairSums solve_image(const PairForm& form, const PairLayer& layer, int64_t image) {
  PairForm one = form;
  one.detach_keys = form.detach_keys || (!form.symmetric && !layer.sides[1].needed);
  if (!form.apart() || form.fixed_offset()) return ImagePairs<T>(one, layer, image).solve();
  // Then a pair has other exponentials for either of its rows. Each direction has its gradient to
  // itself.
  one.symmetric = false;
  PairSums sums;
  for (int s = 0; s < 2; ++s) {
    PairLayer direction = layer;
    if (s == 1) std::swap(direction.sides[0], direction.sides[1]);
    direction.sides[1].needed = false;
    direction.grad_scale /= 2;
    const PairSums found = ImagePairs<T>(one, direction, image).solve();
    sums.loss += found.loss / 2;
    sums.temperature += found.temperature;
  }
  return sums;
}

// The sums of each layer; fills the gradients. Small images are solved by one thread each if there
// are enough of them, others one after the other by all threads: results are the same.
template <class T>
std::vector<PairSums> solve_pairs(const PairForm& form, const std::vector<PairLayer>& layers) {
  constexpr int64_t kSmallBytes = int64_t{10} << 20;  // of exponentials
  struct Item {
    size_t layer;
    int64_t image;
    PairSums sums = {};
  };
  std::vector<Item> items;
  std::vector<Item*> small, others;
  int64_t work = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    for (int64_t b = 0; b < layers[l].images; ++b) items.push_back({l, b});
  }
  const auto solve = [&](Item& item) {
    item.sums = solve_image<T>(form, layers[item.layer], item.image);
  };
  for (Item& item : items) {
    const PairLayer& layer = layers[item.layer];
    const int64_t pairs = 2 * layer.rows * layer.rows;
    const bool fits = pairs * static_cast<int64_t>(sizeof(T)) <= kSmallBytes;
    (fits ? small : others).push_back(&item);
    if (fits) work += pairs * layer.sides[0].rows.depth();
  }
  const auto count = static_cast<int64_t>(small.size());
  if (count < static_cast<int64_t>(torch::stable::get_num_threads())) {
    others.insert(others.end(), small.begin(), small.end());
  } else if (count > 0) {
    run_tasks(count, work / count, [&](int64_t i) { solve(*small[i]); });
  }
  for (Item* item : others) solve(*item);
  std::vector<PairSums> sums(layers.size());
  for (const Item& item : items) {
    sums[item.layer].loss += item.sums.loss;
    sums[item.layer].temperature += item.sums.temperature;
  }
  return sums;
}

}  // namespace fastnce
