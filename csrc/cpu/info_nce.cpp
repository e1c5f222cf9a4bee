// InfoNCE on the CPU: registration, arguments and the list of problems.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/op_arguments.h"
#include "info_nce_schemes.h"

namespace fastnce {
namespace {

struct Needs {
  bool query, key, negatives, temperature;
};

struct Arguments {
  const char* op;
  const Tensor& query;
  const Tensor& key;
  const std::optional<Tensor>& negatives;
  double temperature;
  bool normalize, symmetric, in_batch;
  std::optional<double> self_logit;
  Needs needs;

  int64_t batch() const { return query.size(0); }
  int64_t rows() const { return query.size(1); }
  int64_t depth() const { return query.size(2); }
  ScalarType acc() const { return accumulation_type(query.scalar_type()); }
  bool own_negatives() const { return negatives.has_value() && negatives->dim() == 4; }
  bool shared_negatives() const { return negatives.has_value() && !own_negatives(); }
};

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

struct Gradients {
  Tensor query, key, negatives;
  double temperature = 0;
};

Gradients new_gradients(const Arguments& a, bool wanted) {
  const bool negatives = a.negatives.has_value() && wanted && a.needs.negatives;
  return {new_gradient(a.query, wanted && a.needs.query),
          new_gradient(a.key, wanted && a.needs.key),
          new_gradient(negatives ? *a.negatives : a.query, negatives), 0};
}

// Calls run(problem) for every problem of the call and stores what their gradients share. Without
// in-batch keys all rows see the same columns and are one problem.
template <class T, class Run>
void for_problems(const Arguments& a, const double* weights, Gradients& gradients, T* loss, T* lse,
                  const Run& run) {
  const TileKernels<T>& kernels = tile_kernels<T>();
  const int64_t rows = a.batch() * a.rows();
  std::vector<double> temperature_terms(rows, 0.0);
  InfoNceCall<T> call;
  call.query = TensorRows(a.query);
  call.key = TensorRows(a.key);
  if (a.negatives.has_value()) call.negatives = TensorRows(*a.negatives);
  call.depth = a.depth();
  call.own_negatives = a.own_negatives() ? a.negatives->size(2) : 0;
  call.normalize = a.normalize;
  call.symmetric = a.symmetric;
  call.in_batch = a.in_batch;
  call.temperature = a.temperature;
  if (a.self_logit) call.constant_logit = static_cast<T>(*a.self_logit / a.temperature);
  call.need_query = a.needs.query;
  call.need_key = a.needs.key;
  call.need_negatives = a.needs.negatives && a.negatives.has_value();
  call.need_temperature = a.needs.temperature;
  call.weights = weights;
  call.grad_query = OutputRows(gradients.query);
  call.grad_key = OutputRows(gradients.key);
  call.grad_negatives = OutputRows(gradients.negatives);
  call.temperature_terms = temperature_terms.data();
  call.loss = loss;
  call.row_lse = lse;
  call.column_lse = a.symmetric ? lse + rows : nullptr;

  const int64_t problems = a.in_batch ? a.batch() : 1, size = rows / problems;
  KeySet<T> shared;
  if (a.shared_negatives()) {
    shared.source = call.negatives;
    shared.count = a.negatives->size(0);
    // Few queries meet each key once: then keys are packed on the way.
    if (problems > 1 || size > kFewRows || shared.count < 4 * size) {
      pack_unit_rows<T>(kernels, call.negatives, 0, shared.count, a.normalize, 1.0, &shared.units,
                        nullptr);
    }
    if (weights != nullptr && call.need_negatives) {
      shared.gradient = SlabMatrix<T>(shared.count, a.depth(), kernels.width);
      shared.gradient.fill_zero();
    }
  }

  const auto solve = [&](int64_t b) {
    InfoNceProblem<T> problem(kernels, call, b * size, size, shared.count > 0 ? &shared : nullptr);
    run(problem);
    if (weights != nullptr) problem.finish_keys();
  };
  // Small problems are shared out whole; else, or where they add to the same gradient, the threads
  // work together on one after the other.
  constexpr int64_t kSmallBytes = int64_t{4} << 20;
  const int64_t columns = (a.in_batch ? size : 0) + shared.count;
  const bool small = size * columns * static_cast<int64_t>(sizeof(T)) <= kSmallBytes;
  if (small && problems > 1 && !shared.gradient) {
    run_tasks(problems, 2 * size * columns * a.depth(), solve);
  } else {
    for (int64_t b = 0; b < problems; ++b) solve(b);
  }

  if (shared.gradient) {
    store_row_gradients(kernels, call.negatives, 0, a.normalize, shared.gradient,
                        call.grad_negatives);
  }
  const double sum = std::accumulate(temperature_terms.begin(), temperature_terms.end(), 0.0);
  gradients.temperature = -sum / a.temperature;
}

template <class T>
void forward(const Arguments& a, const std::optional<double>& grad_scale, Gradients& gradients,
             const Tensor& loss, const Tensor& lse) {
  std::vector<double> weights;
  if (grad_scale) weights.assign(a.batch() * a.rows(), *grad_scale);
  for_problems<T>(a, grad_scale ? weights.data() : nullptr, gradients, loss.mutable_data_ptr<T>(),
                  lse.mutable_data_ptr<T>(), [&](InfoNceProblem<T>& problem) {
                    a.symmetric ? solve_symmetric(problem) : solve_rows(problem);
                  });
}

template <class T>
void backward(const Arguments& a, const Tensor& grad_loss, const Tensor& lse,
              Gradients& gradients) {
  const std::vector<double> weights = to_vector<double>(grad_loss);
  const T* row_lse = lse.const_data_ptr<T>();
  const T* column_lse = a.symmetric ? row_lse + a.batch() * a.rows() : nullptr;
  for_problems<T>(a, weights.data(), gradients, nullptr, nullptr, [&](InfoNceProblem<T>& problem) {
    if (a.symmetric) {
      solve_symmetric_from_lse(problem, row_lse, column_lse);
    } else {
      solve_rows_from_lse(problem, row_lse);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_forward(
    const Tensor& query, const Tensor& key, const std::optional<Tensor>& negatives,
    const std::optional<Tensor>& temperature_tensor, double temperature, bool normalize,
    bool symmetric, bool in_batch, std::optional<double> self_logit,
    std::optional<double> grad_scale, bool need_query, bool need_key, bool need_negatives,
    bool need_temperature) {
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
                    {need_query, need_key, need_negatives, need_temperature}};
  check(a);
  Gradients gradients = new_gradients(a, grad_scale.has_value());
  const Tensor loss = new_tensor(query, {a.batch(), a.rows()}, a.acc());
  const Tensor lse = symmetric ? new_tensor(query, {2, a.batch(), a.rows()}, a.acc())
                               : new_tensor(query, {a.batch(), a.rows()}, a.acc());
  if (a.acc() == ScalarType::Double) {
    forward<double>(a, grad_scale, gradients, loss, lse);
  } else {
    forward<float>(a, grad_scale, gradients, loss, lse);
  }
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
    std::optional<double> self_logit, bool need_query, bool need_key, bool need_negatives,
    bool need_temperature) {
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
                    {need_query, need_key, need_negatives, need_temperature}};
  check(a);
  check_rows(op, "grad_loss", grad_loss, a.acc(), {a.batch(), a.rows()});
  std::vector<int64_t> shape = {a.batch(), a.rows()};
  if (symmetric) shape.insert(shape.begin(), 2);
  check_rows(op, "lse", lse, a.acc(), shape);
  const Tensor sums = torch::stable::contiguous(lse);
  Gradients gradients = new_gradients(a, true);
  if (a.acc() == ScalarType::Double) {
    backward<double>(a, grad_loss, sums, gradients);
  } else {
    backward<float>(a, grad_loss, sums, gradients);
  }
  return {gradients.query, gradients.key, gradients.negatives,
          new_scalar(query, need_temperature, gradients.temperature)};
}

STABLE_TORCH_LIBRARY_IMPL(fastnce, CPU, m) {
  m.impl("info_nce_forward", TORCH_BOX(&info_nce_forward));
  m.impl("info_nce_backward", TORCH_BOX(&info_nce_backward));
}

}  // namespace
}  // namespace fastnce
