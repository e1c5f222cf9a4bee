// The passes of csrc/cuda/pairs.h for ctypes (test_cuda_pairs.py).
#include "pairs.h"

#include <cstdio>
#include <exception>

using namespace fastnce::cuda;

namespace {

struct Problem {
  Pairs pairs;
  Machine machine;
};

// sizes: problems, rows, columns, depth, dtype, precision, unit_rows, kind, multiprocessors, capability
Problem problem_of(const int64_t* sizes, const void* const* in, double temperature) {
  Problem p{};
  p.pairs.op = "test";
  p.pairs.x = in[0];
  p.pairs.x_scale = static_cast<const float*>(in[1]);
  p.pairs.y = in[2];
  p.pairs.y_scale = static_cast<const float*>(in[3]);
  p.pairs.x_labels = static_cast<const int64_t*>(in[4]);
  p.pairs.y_labels = static_cast<const int64_t*>(in[5]);
  p.pairs.temperature.tensor = in[6];
  p.pairs.temperature.is_double = true;
  p.pairs.temperature.value = static_cast<float>(temperature);
  p.pairs.problems = sizes[0];
  p.pairs.rows = sizes[1];
  p.pairs.columns = sizes[2];
  p.pairs.depth = sizes[3];
  p.pairs.dtype = static_cast<Dtype>(sizes[4]);
  p.pairs.precision = static_cast<Precision>(sizes[5]);
  p.pairs.unit_rows = sizes[6] != 0;
  p.pairs.kind = static_cast<Kind>(sizes[7]);
  p.machine = {static_cast<int>(sizes[9]), static_cast<int>(sizes[8])};
  return p;
}

template <class Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

}  // namespace

extern "C" {

// plan: can_sum_with_product, splits, row_blocks
int pairs_plan_sums(const int64_t* sizes, const void* const* in, double temperature,
                    int with_product, int64_t* plan) {
  return guarded([&] {
    const Problem p = problem_of(sizes, in, temperature);
    const SumsPlan s = plan_sums(p.pairs, p.machine, with_product != 0);
    plan[0] = can_sum_with_product(p.pairs, p.machine);
    plan[1] = s.splits;
    plan[2] = s.row_blocks;
  });
}

int pairs_sums(const int64_t* sizes, const void* const* in, double temperature, int with_product,
               float* const* out) {
  return guarded([&] {
    const Problem p = problem_of(sizes, in, temperature);
    const Sums sums{out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7]};
    launch_sums(p.pairs, plan_sums(p.pairs, p.machine, with_product != 0), sums, nullptr);
  });
}

// plan: x_splits, y_splits, term_splits, workspace_bytes, panel_rows, panel_problems. A panel of `panel_rows` rows of
// `panel_problems` problems instead of what is planned, if they are not 0.
ProductsPlan plan_of(const Problem& p, bool of_x, bool of_y, const int64_t* panel) {
  ProductsPlan plan = plan_products(p.pairs, p.machine, of_x, of_y);
  if (plan.panel_rows != 0 && panel[0] != 0) {
    plan.panel_rows = panel[0];
    plan.panel_problems = panel[1];
  }
  return plan;
}

int pairs_plan_products(const int64_t* sizes, const void* const* in, double temperature, int of_x,
                        int of_y, const int64_t* panel, int64_t* plan) {
  return guarded([&] {
    const Problem p = problem_of(sizes, in, temperature);
    const ProductsPlan s = plan_of(p, of_x != 0, of_y != 0, panel);
    const int64_t found[] = {s.x_splits,        s.y_splits,   s.term_splits,
                             s.workspace_bytes, s.panel_rows, s.panel_problems};
    for (int i = 0; i < 6; ++i) plan[i] = found[i];
  });
}

int pairs_products(const int64_t* sizes, const void* const* in, double temperature,
                   const float* const* statistics, const int64_t* panel, float* const* out,
                   void* workspace) {
  return guarded([&] {
    const Problem p = problem_of(sizes, in, temperature);
    Products products;
    products.x_statistics = statistics[0];
    products.y_statistics = statistics[1];
    products.x_product = out[0];
    products.y_product = out[1];
    products.x_term = out[2];
    products.workspace = workspace;
    const ProductsPlan plan = plan_of(p, out[0] != nullptr, out[1] != nullptr, panel);
    launch_products(p.pairs, plan, products, nullptr);
  });
}

}  // extern "C"
