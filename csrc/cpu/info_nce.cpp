// InfoNCE on the CPU: registration and arguments.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "info_nce_jobs.h"

namespace fastnce::info_nce {
namespace {

void check(const Arguments& a) {
  const ScalarType dtype = a.query.scalar_type();
  STD_TORCH_CHECK(is_supported(dtype), a.op, ": query has the unsupported dtype ",
                  torch::headeronly::toString(dtype), ".");
  STD_TORCH_CHECK(a.query.dim() == 3, a.op, ": query must be (B, N, D).");
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

// Calls f with values of the types of sums and of operands.
template <class F>
void with_operands(const Arguments& a, const F& f) {
  if (a.acc() == ScalarType::Double) {
    f(double{}, double{});
  } else if (a.bfloat16_products && tile_kernels<float>().pairs != nullptr) {
    f(float{}, Pair{});
  } else {
    f(float{}, float{});
  }
}

Gradients new_gradients(const Arguments& a, bool wanted) {
  const bool negatives = a.negatives.has_value() && wanted && a.needs.negatives;
  return {new_gradient(a.query, wanted && a.needs.query),
          new_gradient(a.key, wanted && a.needs.key),
          new_gradient(negatives ? *a.negatives : a.query, negatives), 0};
}

template <class T, class P>
void solve_forward(InfoNceProblem<T, P>& problem, const RowRange& range) {
  problem.call.symmetric ? solve_symmetric(problem) : solve_rows(problem, range);
}

template <class T, class P>
void forward(const Arguments& a, const std::optional<double>& grad_scale, Gradients& gradients,
             const Tensor& loss, const Tensor& lse) {
  std::vector<double> weights;
  if (grad_scale) weights.assign(a.batch() * a.rows(), *grad_scale);
  solve_one(std::make_unique<Job<T, P>>(a, grad_scale ? weights.data() : nullptr, gradients,
                                        loss.mutable_data_ptr<T>(), lse.mutable_data_ptr<T>()),
            solve_forward<T, P>);
}

template <class T, class P>
void backward(const Arguments& a, const Tensor& grad_loss, const Tensor& lse,
              Gradients& gradients) {
  const std::vector<double> weights = to_vector<double>(grad_loss);
  const T* row_lse = lse.const_data_ptr<T>();
  const T* column_lse = a.symmetric ? row_lse + a.batch() * a.rows() : nullptr;
  solve_one(std::make_unique<Job<T, P>>(a, weights.data(), gradients, nullptr, nullptr),
            [&](InfoNceProblem<T, P>& problem, const RowRange& range) {
              if (a.symmetric) {
                solve_symmetric_from_lse(problem, row_lse, column_lse);
              } else {
                solve_rows_from_lse(problem, range, row_lse);
              }
            });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_forward(
    const Tensor& query, const Tensor& key, const std::optional<Tensor>& negatives,
    const std::optional<Tensor>& temperature_tensor, double temperature, bool normalize,
    bool symmetric, bool in_batch, std::optional<double> self_logit, bool bfloat16_products,
    std::optional<double> grad_scale, bool mean, bool need_query, bool need_key,
    bool need_negatives, bool need_temperature) {
  const char* op = "info_nce_forward";
  const Arguments a{op,
                    query,
                    key,
                    negatives,
                    temperature_value(op, temperature_tensor, temperature),
                    normalize,
                    symmetric,
                    in_batch,
                    self_logit,
                    bfloat16_products,
                    {need_query, need_key, need_negatives, need_temperature}};
  check(a);
  if (grad_scale && mean) *grad_scale /= static_cast<double>(a.batch() * a.rows());
  Gradients gradients = new_gradients(a, grad_scale.has_value());
  const Tensor loss = new_tensor(query, {a.batch(), a.rows()}, a.acc());
  const Tensor lse = symmetric ? new_tensor(query, {2, a.batch(), a.rows()}, a.acc())
                               : new_tensor(query, {a.batch(), a.rows()}, a.acc());
  with_operands(a, [&](auto sum, auto operand) {
    forward<decltype(sum), decltype(operand)>(a, grad_scale, gradients, loss, lse);
  });
  return {loss,
          lse,
          gradients.query,
          gradients.key,
          gradients.negatives,
          new_scalar(query, grad_scale.has_value() && need_temperature, gradients.temperature)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_backward(
    const Tensor& grad_loss, const Tensor& query, const Tensor& key,
    const std::optional<Tensor>& negatives, const std::optional<Tensor>& temperature_tensor,
    double temperature, const Tensor& lse, bool normalize, bool symmetric, bool in_batch,
    std::optional<double> self_logit, bool bfloat16_products, bool need_query, bool need_key,
    bool need_negatives, bool need_temperature) {
  const char* op = "info_nce_backward";
  const Arguments a{op,
                    query,
                    key,
                    negatives,
                    temperature_value(op, temperature_tensor, temperature),
                    normalize,
                    symmetric,
                    in_batch,
                    self_logit,
                    bfloat16_products,
                    {need_query, need_key, need_negatives, need_temperature}};
  check(a);
  check_rows(op, "grad_loss", grad_loss, a.acc(), {a.batch(), a.rows()});
  std::vector<int64_t> shape = {a.batch(), a.rows()};
  if (symmetric) shape.insert(shape.begin(), 2);
  check_rows(op, "lse", lse, a.acc(), shape);
  const Tensor sums = torch::stable::contiguous(lse);
  Gradients gradients = new_gradients(a, true);
  with_operands(a, [&](auto sum, auto operand) {
    backward<decltype(sum), decltype(operand)>(a, grad_loss, sums, gradients);
  });
  return {gradients.query, gradients.key, gradients.negatives,
          new_scalar(query, need_temperature, gradients.temperature)};
}

using Tensors = std::vector<Tensor>;

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

std::tuple<Tensor, Tensors, Tensors, Tensor> patch_nce_forward(
    const Tensors& queries, const Tensors& keys, const std::optional<Tensor>& temperature_tensor,
    double temperature, double self_logit, bool bfloat16_products, std::vector<double> loss_scales,
    std::vector<double> grad_scales, int64_t loss_layers, int64_t grad_layers,
    const std::vector<bool>& need_queries, const std::vector<bool>& need_keys,
    bool need_temperature) {
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
  with_operands(layers[0], [&](auto sum, auto operand) {
    loss =
        solve_layers<decltype(sum), decltype(operand)>(layers, loss_scales, grad_scales, gradients);
  });
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
}

}  // namespace
}  // namespace fastnce::info_nce
