// The problems of InfoNCE calls, and how the threads share them.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "info_nce_schemes.h"
#include "op_arguments.h"

namespace fastnce::info_nce {

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
  bool bfloat16_products;
  Needs needs;

  int64_t batch() const { return query.size(0); }
  int64_t rows() const { return query.size(1); }
  int64_t depth() const { return query.size(2); }
  ScalarType acc() const { return accumulation_type(query.scalar_type()); }
  bool own_negatives() const { return negatives.has_value() && negatives->dim() == 4; }
  bool shared_negatives() const { return negatives.has_value() && !own_negatives(); }
};

struct Gradients {
  Tensor query, key, negatives;
  double temperature = 0;
};

// One call's problems: one per batch element, for only rows of the same element share columns; but
// one alone without in-batch keys, where all rows see the same.
template <class T, class P>
class Job {
 public:
  const int64_t rows, problems, size;  // of the whole call; `size` rows in each problem

  Job(const Arguments& a, const double* weights, Gradients& gradients, T* loss, T* lse)
      : rows(a.batch() * a.rows()),
        problems(a.in_batch ? a.batch() : 1),
        size(rows / problems),
        kernels_(tile_kernels<T>()),
        gradients_(gradients),
        temperature_terms_(rows, 0.0) {
    call_.query = TensorRows(a.query);
    call_.key = TensorRows(a.key);
    if (a.negatives.has_value()) call_.negatives = TensorRows(*a.negatives);
    call_.depth = a.depth();
    call_.own_negatives = a.own_negatives() ? a.negatives->size(2) : 0;
    call_.normalize = a.normalize;
    call_.symmetric = a.symmetric;
    call_.in_batch = a.in_batch;
    call_.temperature = a.temperature;
    if (a.self_logit) call_.constant_logit = static_cast<T>(*a.self_logit / a.temperature);
    call_.need_query = a.needs.query;
    call_.need_key = a.needs.key;
    call_.need_negatives = a.needs.negatives && a.negatives.has_value();
    call_.need_temperature = a.needs.temperature;
    call_.weights = weights;
    call_.grad_query = OutputRows(gradients.query);
    call_.grad_key = OutputRows(gradients.key);
    call_.grad_negatives = OutputRows(gradients.negatives);
    call_.temperature_terms = temperature_terms_.data();
    call_.loss = loss;
    call_.row_lse = lse;
    call_.column_lse = a.symmetric ? lse + rows : nullptr;
    if (!a.shared_negatives()) return;
    shared_.source = call_.negatives;
    shared_.count = a.negatives->size(0);
    // Few queries meet each key once: then keys are packed on the way.
    if (problems > 1 || size > kFewRows || shared_.count < 4 * size) {
      shared_.pack(kernels_, a.normalize, nullptr);
    }
    if (weights != nullptr && call_.need_negatives) {
      shared_.gradient = SlabMatrix<T>(shared_.count, a.depth(), kernels_.width);
      shared_.gradient.fill_zero();
    }
  }

  std::unique_ptr<InfoNceProblem<T, P>> problem(int64_t b) const {
    return std::make_unique<InfoNceProblem<T, P>>(kernels_, call_, b * size, size,
                                                  shared_.count > 0 ? &shared_ : nullptr);
  }
  int64_t columns() const { return (call_.in_batch ? size : 0) + shared_.count; }
  // In multiply-adds.
  int64_t packing_per_row() const { return 4 * call_.depth; }
  int64_t work_per_row() const { return (2 * columns() + 16) * call_.depth; }
  // Whether its problems may be solved at the same time, each by one thread.
  bool small() const {
    constexpr int64_t kSmallBytes = int64_t{4} << 20;
    const int64_t bytes = size * columns() * static_cast<int64_t>(sizeof(T));
    return bytes <= kSmallBytes && !shared_.gradient;
  }

  // What its problems' gradients share.
  void finish() const {
    if (shared_.gradient) {
      store_row_gradients(kernels_, call_.negatives, 0, call_.normalize, shared_.gradient,
                          call_.grad_negatives);
    }
    const double sum = std::accumulate(temperature_terms_.begin(), temperature_terms_.end(), 0.0);
    gradients_.temperature = -sum / call_.temperature;
  }

 private:
  const TileKernels<T>& kernels_;
  Gradients& gradients_;
  std::vector<double> temperature_terms_;
  InfoNceCall<T> call_;
  KeySet<T, P> shared_;
};

// Calls run(problem, range) until all rows of all problems are solved.
//
// Problems that are large, or alone, or add to the same gradient are solved one after the other by
// all threads together. The others are shared out: whole where there are many, else by groups of
// rows where the rows do not depend on one another. Their shapes alone decide.
template <class T, class P, class Run>
void solve(const std::vector<std::unique_ptr<Job<T, P>>>& jobs, const Run& run) {
  constexpr size_t kMany = 64;
  struct Item {
    const Job<T, P>* job;
    int64_t b;
    std::unique_ptr<InfoNceProblem<T, P>> problem = nullptr;
  };
  std::vector<Item> items;
  int64_t packing = 0, work = 0;  // multiply-adds
  for (const auto& job : jobs) {
    for (int64_t b = 0; job->small() && b < job->problems; ++b) items.push_back({job.get(), b});
    if (!job->small()) continue;
    packing += job->rows * job->packing_per_row();
    work += job->rows * job->work_per_row();
  }
  const bool together = items.size() == 1;
  for (const auto& job : jobs) {
    if (job->small() && !together) continue;
    for (int64_t b = 0; b < job->problems; ++b) {
      const auto problem = job->problem(b);
      run(*problem, all_rows(*problem));
      problem->finish_keys();
    }
  }
  if (together || items.empty()) return;
  const auto count = static_cast<int64_t>(items.size());
  if (items.size() >= kMany) {
    run_tasks(count, work / count, [&](int64_t i) {
      const auto problem = items[i].job->problem(items[i].b);
      run(*problem, {0, problem->rows, true});
      problem->finish_keys();
    });
    return;
  }
  run_tasks(count, packing / count,
            [&](int64_t i) { items[i].problem = items[i].job->problem(items[i].b); });
  std::vector<std::pair<InfoNceProblem<T, P>*, RowRange>> parts;
  for (const Item& item : items) {
    const int64_t step = item.problem->separable() ? kPartRows : item.problem->rows;
    for (int64_t r = 0; r < item.problem->rows; r += step) {
      parts.push_back({item.problem.get(), {r, std::min(item.problem->rows, r + step), true}});
    }
  }
  const auto tasks = static_cast<int64_t>(parts.size());
  run_tasks(tasks, work / tasks, [&](int64_t i) {
    const auto& [problem, range] = parts[i];
    run(*problem, range);
    if (!problem->separable()) problem->finish_keys();
  });
}

template <class T, class P, class Run>
void solve_one(std::unique_ptr<Job<T, P>> job, const Run& run) {
  std::vector<std::unique_ptr<Job<T, P>>> jobs;
  jobs.push_back(std::move(job));
  solve<T, P>(jobs, run);
  jobs[0]->finish();
}

}  // namespace fastnce::info_nce
