// The sigmoid loss of pairs (SigLIP) on the CPU. A pair's gradient waits for no other pair: while a
// block of keys against a few slabs of queries is in the cache, it becomes its own gradient and is
// multiplied with the keys and with the queries. Three products in one walk, and nothing is kept.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "labelled_logits.h"
#include "op_arguments.h"
#include "unit_rows.h"

namespace fastnce::sigmoid_contrastive {
namespace {

constexpr int64_t kKeyBlock = 144;
constexpr int64_t kGroupRows = 192;  // queries of a block; a multiple of every table's width,
constexpr int64_t kPanelRows = 768;  // as are those that are packed at a time

struct Arguments {
  const char* op;
  const Tensor &query, &key, &bias, &labels;
  double temperature;
  bool paired, normalize;
  bool need_query, need_key, need_bias, need_temperature;

  int64_t rows() const { return query.size(0); }
  int64_t columns() const { return key.size(0); }
  int64_t depth() const { return query.size(1); }
  ScalarType acc() const { return accumulation_type(query.scalar_type()); }
};

struct Gradients {
  Tensor query, key;
  double bias = 0, temperature = 0;
};

void check(const Arguments& a) {
  check_floating(a.op, "query", a.query, 2, "(N, D)");
  check_floating(a.op, "key", a.key, 2, "(M, D)");
  const ScalarType dtype = a.query.scalar_type();
  check_rows(a.op, "query", a.query, dtype, {a.rows(), a.depth()});
  check_rows(a.op, "key", a.key, dtype, {a.columns(), a.depth()});
  check_rows(a.op, "bias", a.bias, a.acc(), {});
  const int64_t labels = a.labels.numel() > 0 ? a.rows() + a.columns() : 0;
  if (labels > 0) check_rows(a.op, "labels", a.labels, ScalarType::Long, {labels});
  STD_TORCH_CHECK(!a.paired || (labels == 0 && a.columns() >= a.rows()), a.op,
                  ": paired needs a key for each query, and no labels.");
}

template <class T>
class Pairs {
 public:
  // weights: of the losses, or null for no gradients.
  Pairs(const Arguments& arguments, const double* weights)
      : kernels_(tile_kernels<T>()),
        a_(arguments),
        bias_(*a_.bias.const_data_ptr<T>()),
        weights_(weights),
        queries_(a_.query),
        keys_(a_.key),
        query_labels_(padded(a_.rows(), kernels_.width), 0),
        key_labels_(a_.columns(), 1) {
    set_labels();
    pack_unit_rows<T, T>(kernels_, keys_, 0, a_.columns(), a_.normalize, 1.0, {&units_});
    if (!wants_key()) return;
    key_gradient_ = SlabMatrix<T>(a_.columns(), a_.depth(), kernels_.width);
    key_gradient_.fill_zero();
  }

  // loss (N,), unless it is null.
  void run(T* loss, Gradients& out) {
    const OutputRows query_out(out.query);
    for (int64_t r0 = 0; r0 < a_.rows(); r0 += kPanelRows) {
      const Panel panel(*this, r0);
      walk(panel);
      finish(panel, loss, query_out, out);
    }
    if (wants_key()) {
      store_row_gradients(kernels_, keys_, a_.normalize, key_gradient_, OutputRows(out.key));
    }
  }

 private:
  using Label = typename TileKernels<T>::Label;

  bool wants_key() const { return weights_ != nullptr && a_.need_key; }
  bool wants_query() const { return weights_ != nullptr && (a_.need_query || a_.need_temperature); }

  // Runs of keys, one task each. They depend on the shapes alone, and so does the result.
  int64_t runs() const {
    const int64_t keys = a_.columns();
    return std::clamp<int64_t>(keys / 512, std::min<int64_t>(8, (keys + 47) / 48), 16);
  }

  // A positive is where the labels are the same.
  void set_labels() {
    if (a_.paired) {
      std::iota(query_labels_.data(), query_labels_.data() + a_.rows(), Label(0));
      std::iota(key_labels_.data(), key_labels_.data() + a_.columns(), Label(0));
    } else if (a_.labels.numel() > 0) {
      const std::vector<int64_t> all = label_values(a_.labels);
      number_classes({all.begin(), all.begin() + a_.rows()}, all, query_labels_);
      number_classes({all.begin() + a_.rows(), all.end()}, all, key_labels_);
    }
  }

  // Queries, and what each run of keys gives to them.
  struct Panel {
    int64_t r0, rows, padded_rows;
    SlabMatrix<T> straight, transposed;    // unit queries / temperature
    Buffer<double> inverse, losses, bias;  // 1 / ||x||; (runs, padded rows); (runs,)
    Buffer<T> weights;
    SlabMatrix<T> products;  // (runs * rows, D)

    Panel(const Pairs& p, int64_t first)
        : r0(first),
          rows(std::min(kPanelRows, p.a_.rows() - first)),
          padded_rows(padded(rows, p.kernels_.width)),
          inverse(rows),
          losses(p.runs() * padded_rows, 0.0),
          bias(p.runs(), 0.0) {
      pack_unit_rows<T, T>(
          p.kernels_, p.queries_, r0, rows, p.a_.normalize, 1 / p.a_.temperature,
          {p.wants_key() ? &straight : nullptr, &transposed, nullptr, inverse.data()});
      if (p.wants_query()) {
        products = SlabMatrix<T>(p.runs() * rows, p.a_.depth(), p.kernels_.width);
      }
      if (p.weights_ == nullptr) return;
      weights = Buffer<T>(padded_rows, T(0));
      std::transform(p.weights_ + r0, p.weights_ + r0 + rows, weights.data(),
                     [](double w) { return static_cast<T>(w); });
    }
  };

  void walk(const Panel& panel) {
    const int64_t keys = a_.columns(), run_count = runs(),
                  length = (keys + run_count - 1) / run_count;
    run_workers(run_count, 3 * length * panel.rows * a_.depth(), [&](TaskQueue& queue) {
      Buffer<T> z(kKeyBlock * kGroupRows), sums(2 * kernels_.width);
      for (int64_t run; queue.next(run);) {
        for (int64_t d = 0; d < panel.products.slabs() && panel.products; ++d) {
          std::fill_n(panel.products.at(run * panel.rows, d), panel.rows * kernels_.width, T(0));
        }
        const int64_t end = std::min(keys, (run + 1) * length);
        for (int64_t j0 = run * length; j0 < end; j0 += kKeyBlock) {
          for (int64_t g0 = 0; g0 < panel.rows; g0 += kGroupRows) {
            block(panel, run, j0, std::min(kKeyBlock, end - j0), g0, z.data(), sums.data());
          }
        }
      }
    });
  }

  // Keys [j0, j0 + count) against the panel's queries from g0 on.
  void block(const Panel& panel, int64_t run, int64_t j0, int64_t count, int64_t g0, T* z,
             T* sums) {
    const int64_t width = kernels_.width, depth = a_.depth(), slab_size = count * width;
    const int64_t rows = std::min(kGroupRows, panel.rows - g0);
    for (int64_t s = 0; s * width < rows; ++s) {
      const int64_t row = g0 + s * width, lanes = std::min(width, rows - s * width);
      T* values = z + s * slab_size;
      kernels_.multiply(count, depth, lanes, units_.at(j0, 0), units_.slab_size(),
                        panel.transposed.at(0, row / width), values, false);
      kernels_.sigmoid_block(
          count, lanes, values, bias_, &key_labels_[j0], &query_labels_[panel.r0 + row],
          weights_ == nullptr ? nullptr : &panel.weights[row], sums, sums + width);
      for (int64_t i = 0; i < lanes; ++i) {
        panel.losses[run * panel.padded_rows + row + i] += sums[i];
        if (weights_ != nullptr) panel.bias[run] += sums[width + i];
      }
      for (int64_t d = 0; d < units_.slabs() && panel.products; ++d) {
        kernels_.multiply_transposed(lanes, count, units_.lanes(d), values, units_.at(j0, d),
                                     panel.products.at(run * panel.rows + row, d));
      }
    }
    for (int64_t d = 0; d < key_gradient_.slabs() && key_gradient_; ++d) {
      kernels_.multiply(count, rows, key_gradient_.lanes(d), z, slab_size, panel.straight.at(g0, d),
                        key_gradient_.at(j0, d), true);
    }
  }

  // Adds up what the runs have left.
  void finish(const Panel& panel, T* loss, const OutputRows& query_out, Gradients& out) const {
    const int64_t depth = a_.depth(), run_count = runs();
    Buffer<double> along(panel.rows, 0.0);
    run_blocks(panel.rows, 16, (8 + run_count) * depth, [&](int64_t begin, int64_t end) {
      Buffer<T> gradient(depth), part(depth), row(depth), out_row(depth);
      for (int64_t i = begin; i < end; ++i) {
        double total = 0;
        for (int64_t run = 0; run < run_count; ++run) {
          total += panel.losses[run * panel.padded_rows + i];
        }
        if (loss != nullptr) loss[panel.r0 + i] = static_cast<T>(total);
        if (!panel.products) continue;
        panel.products.copy_row_out(i, gradient.data());
        for (int64_t run = 1; run < run_count; ++run) {
          panel.products.copy_row_out(run * panel.rows + i, part.data());
          kernels_.add_scaled(depth, T(1), part.data(), gradient.data());
        }
        const T* query = queries_.read(panel.r0 + i, row.data());
        T* target = a_.need_query ? query_out.begin(panel.r0 + i, out_row.data()) : out_row.data();
        along[i] =
            unit_row_gradient(kernels_, depth, query, a_.normalize, panel.inverse[i], 1.0,
                              gradient.data(), 0.0, gradient.data(), 1 / a_.temperature, target);
        if (a_.need_query) query_out.finish(panel.r0 + i, target);
      }
    });
    const double sum = std::accumulate(along.data(), along.data() + along.size(), 0.0);
    out.temperature -= sum / a_.temperature / a_.temperature;
    out.bias = std::accumulate(panel.bias.data(), panel.bias.data() + run_count, out.bias);
  }

  const TileKernels<T>& kernels_;
  const Arguments& a_;
  const T bias_;
  const double* weights_;
  const TensorRows queries_, keys_;
  const Buffer<Label> query_labels_, key_labels_;  // the first padded to whole slabs
  SlabMatrix<T> units_, key_gradient_;             // (M, D)
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Results results(const Arguments& a, const Gradients& g, bool wanted) {
  return {g.query, g.key, new_scalar(a.query, wanted && a.need_bias, g.bias),
          new_scalar(a.query, wanted && a.need_temperature, g.temperature)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_contrastive_forward(
    const Tensor& query, const Tensor& key, const Tensor& bias, const Tensor& labels,
    const std::optional<Tensor>& /*query_ids*/, const std::optional<Tensor>& /*key_ids*/,
    const std::optional<Tensor>& temperature_tensor, double temperature, bool paired,
    bool normalize, std::optional<double> grad_scale, bool mean, bool need_query, bool need_key,
    bool need_bias, bool need_temperature) {
  const char* op = "sigmoid_contrastive_forward";
  const double tau = temperature_value(op, temperature_tensor, temperature);
  const Arguments a{op,     query,     key,        bias,     labels,    tau,
                    paired, normalize, need_query, need_key, need_bias, need_temperature};
  check(a);
  const bool wanted =
      grad_scale.has_value() && (need_query || need_key || need_bias || need_temperature);
  const Tensor loss = new_tensor(query, {a.rows()}, a.acc());
  Gradients g{new_gradient(query, wanted && need_query), new_gradient(key, wanted && need_key)};
  std::vector<double> weights;
  if (wanted) {
    weights.assign(a.rows(), *grad_scale / (mean ? static_cast<double>(a.rows()) : 1.0));
  }
  with_sums(a.acc(), [&](auto zero) {
    using T = decltype(zero);
    Pairs<T>(a, wanted ? weights.data() : nullptr).run(loss.mutable_data_ptr<T>(), g);
  });
  return std::tuple_cat(std::make_tuple(loss), results(a, g, wanted));
}

Results sigmoid_contrastive_backward(const Tensor& grad_loss, const Tensor& query,
                                     const Tensor& key, const Tensor& bias, const Tensor& labels,
                                     const std::optional<Tensor>& /*query_ids*/,
                                     const std::optional<Tensor>& /*key_ids*/,
                                     const std::optional<Tensor>& temperature_tensor,
                                     double temperature, bool paired, bool normalize,
                                     bool need_query, bool need_key, bool need_bias,
                                     bool need_temperature) {
  const char* op = "sigmoid_contrastive_backward";
  const double tau = temperature_value(op, temperature_tensor, temperature);
  const Arguments a{op,     query,     key,        bias,     labels,    tau,
                    paired, normalize, need_query, need_key, need_bias, need_temperature};
  check(a);
  check_rows(op, "grad_loss", grad_loss, a.acc(), {a.rows()});
  Gradients g{new_gradient(query, need_query), new_gradient(key, need_key)};
  const std::vector<double> weights = to_vector<double>(grad_loss);
  with_sums(a.acc(), [&](auto zero) { Pairs<decltype(zero)>(a, weights.data()).run(nullptr, g); });
  return results(a, g, true);
}

STABLE_TORCH_LIBRARY_IMPL(fastnce, CPU, m) {
  m.impl("sigmoid_contrastive_forward", TORCH_BOX(&sigmoid_contrastive_forward));
  m.impl("sigmoid_contrastive_backward", TORCH_BOX(&sigmoid_contrastive_backward));
}

}  // namespace
}  // namespace fastnce::sigmoid_contrastive
