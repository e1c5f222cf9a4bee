// What both schemes of the conditional contrastive loss share: the labels, what belongs to single
// rows, and the proxies, which meet their own rows alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "logit_blocks.h"
#include "op_arguments.h"
#include "unit_rows.h"

namespace fastnce::conditional_contrastive {

struct Arguments {
  const char* op;
  const Tensor& embeddings;
  const Tensor& proxies;
  const Tensor& labels;
  double temperature;
  bool need_embeddings, need_proxies, need_temperature;

  int64_t rows() const { return embeddings.size(0); }
  int64_t depth() const { return embeddings.size(1); }
  ScalarType acc() const { return accumulation_type(embeddings.scalar_type()); }
};

// Labels as the numbers of their classes, narrow enough to be compared in a logit's lane.
template <class Label>
void number_classes(const Tensor& labels, int64_t rows, const Buffer<Label>& out) {
  const int64_t* data = labels.const_data_ptr<int64_t>();
  const int64_t stride = labels.stride(0);
  std::vector<int64_t> values(rows);
  for (int64_t i = 0; i < rows; ++i) values[i] = data[i * stride];
  std::vector<int64_t> classes = values;
  std::sort(classes.begin(), classes.end());
  classes.erase(std::unique(classes.begin(), classes.end()), classes.end());
  for (int64_t i = 0; i < rows; ++i) {
    const auto at = std::lower_bound(classes.begin(), classes.end(), values[i]);
    out[i] = static_cast<Label>(at - classes.begin());
  }
}

template <class T>
class Rows {
 public:
  using Number = T;

  explicit Rows(const Arguments& arguments)
      : kernels(tile_kernels<T>()),
        a(arguments),
        scale(1 / std::sqrt(a.temperature)),
        rows(a.rows()),
        padded(slab_count(rows, kernels.width) * kernels.width),
        embedding_rows(a.embeddings),
        proxy_rows(a.proxies),
        labels(padded, -1),
        all(rows),
        same(rows),
        weights(rows),
        proxy_logit_(rows),
        proxy_inverse_(rows) {
    number_classes(a.labels, rows, labels);
  }

  // Starts the sums with the proxies. `units`: rows / sqrt(t).
  void add_proxies(const SlabMatrix<T>& units) {
    run_blocks(rows, 16, 8 * a.depth(), [&](int64_t begin, int64_t end) {
      UnitRowReader<T> reader(kernels, proxy_rows, true);
      Buffer<T> embedding(a.depth()), proxy(a.depth());
      for (int64_t i = begin; i < end; ++i) {
        units.copy_row_out(i, embedding.data());
        reader.read(i, scale, proxy.data());
        proxy_inverse_[i] = reader.inverse();
        proxy_logit_[i] = logit(kernels, a.depth(), embedding.data(), proxy.data());
        all[i].add_logit(proxy_logit_[i]);
        same[i].add_logit(proxy_logit_[i]);
      }
    });
  }

  // loss (N,), lse (2, N).
  void store_losses(T* loss, T* lse) const {
    for (int64_t i = 0; i < rows; ++i) {
      const double shift = all[i].maximum - same[i].maximum;
      loss[i] = static_cast<T>(shift + (std::log(all[i].sum) - std::log(same[i].sum)));
      lse[i] = static_cast<T>(all[i].log());
      lse[rows + i] = static_cast<T>(same[i].log());
    }
  }

  void sums_from_lse(const T* lse) {
    for (int64_t i = 0; i < rows; ++i) {
      all[i] = {lse[i], 1};
      same[i] = {lse[rows + i], 1};
    }
  }

  double proxy_logit(int64_t i) const { return proxy_logit_[i]; }
  // d L / d of the proxy's logit.
  double proxy_gradient(int64_t i) const {
    return weights[i] * (std::exp(proxy_logit_[i] - all[i].maximum) / all[i].sum -
                         std::exp(proxy_logit_[i] - same[i].maximum) / same[i].sum);
  }

  // Adds the proxies' part to rows r0 and on of the gradient with respect to unit rows, of which
  // `products` times `factor` is the embeddings' part, and goes back to the inputs. after_row(i,
  // u . gradient) is called for each row.
  template <class AfterRow>
  void finish_rows(int64_t r0, const SlabMatrix<T>& products, double factor,
                   const double* inverse_norms, const OutputRows& embeddings_out,
                   const OutputRows& proxies_out, const AfterRow& after_row) const {
    const int64_t depth = a.depth();
    run_blocks(products.rows(), 16, 16 * depth, [&](int64_t begin, int64_t end) {
      Buffer<T> gradient(depth), embedding_row(depth), proxy_row(depth), out_row(depth);
      for (int64_t i = r0 + begin; i < r0 + end; ++i) {
        const double g = proxy_gradient(i) / a.temperature;
        const T* embedding = embedding_rows.read(i, embedding_row.data());
        const T* proxy = proxy_rows.read(i, proxy_row.data());
        products.copy_row_out(i - r0, gradient.data());
        T* out = a.need_embeddings ? embeddings_out.begin(i, out_row.data()) : out_row.data();
        after_row(
            i, unit_row_gradient(kernels, depth, embedding, true, inverse_norms[i], factor * scale,
                                 gradient.data(), g * proxy_inverse_[i], proxy, 1.0, out));
        if (a.need_embeddings) embeddings_out.finish(i, out);
        if (!a.need_proxies) continue;
        out = proxies_out.begin(i, out_row.data());
        unit_row_gradient(kernels, depth, proxy, true, proxy_inverse_[i], g * inverse_norms[i],
                          embedding, 0.0, embedding, 1.0, out);
        proxies_out.finish(i, out);
      }
    });
  }

  const TileKernels<T>& kernels;
  const Arguments& a;
  // On both sides of every product, so that z_ij and z_ji are the same number to the last bit.
  const double scale;
  const int64_t rows, padded;
  const TensorRows embedding_rows, proxy_rows;
  const Buffer<typename TileKernels<T>::Label> labels;
  std::vector<ExpSum> all, same;
  std::vector<double> weights;  // d L / d loss_i

 private:
  Buffer<double> proxy_logit_, proxy_inverse_;
};

}  // namespace fastnce::conditional_contrastive
