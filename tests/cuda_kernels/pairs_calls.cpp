// The passes of csrc/cuda/pairs.h for ctypes: see pairs_library.py.
#include "pairs.h"

#include <exception>
#include <string>

namespace {

using namespace fastnce::cuda;

// In the order of pairs_library.Problem.
struct Problem {
  const void* x;
  const float* x_scale;
  const void* y;
  const float* y_scale;
  const int64_t *x_labels, *y_labels;
  int64_t problems, rows, columns, depth;
  double temperature;
  const double* temperature_tensor;
  int64_t panel_rows, panel_problems;  // of a plan that has panels; 0 for what is planned
  int dtype, kind, unit_rows, capability, multiprocessors;

  Pairs pairs() const {
    Pairs p{};
    p.op = "pairs";
    p.x = x;
    p.x_scale = x_scale;
    p.y = y;
    p.y_scale = y_scale;
    p.problems = problems;
    p.rows = rows;
    p.columns = columns;
    p.depth = depth;
    p.dtype = static_cast<Dtype>(dtype);
    p.unit_rows = unit_rows != 0;
    p.kind = static_cast<Kind>(kind);
    p.x_labels = x_labels;
    p.y_labels = y_labels;
    p.temperature = {temperature_tensor, true, static_cast<float>(temperature)};
    return p;
  }
  Machine machine() const { return {capability, multiprocessors}; }
  ProductsPlan products(bool of_x, bool of_y) const {
    ProductsPlan plan = plan_products(pairs(), machine(), of_x, of_y);
    if (plan.panel_rows != 0 && panel_rows != 0) {
      plan.panel_rows = panel_rows;
      plan.panel_problems = panel_problems;
    }
    return plan;
  }
};

std::string message;

template <class Call>
const char* caught(Call call) {
  message.clear();
  try {
    call();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

#pragma GCC visibility push(default)

// Each function's result is the error's message, or "".
extern "C" const char* plan_sums_of(const Problem* p, int with_product, int64_t* out) {
  return caught([=] {
    const SumsPlan plan = plan_sums(p->pairs(), p->machine(), with_product != 0);
    out[0] = plan.splits;
    out[1] = plan.row_blocks;
  });
}

// Pointers in the order of Case.sums.
extern "C" const char* sums_of(const Problem* p, int with_product, float* const* out) {
  return caught([=] {
    const SumsPlan plan = plan_sums(p->pairs(), p->machine(), with_product != 0);
    Sums sums{};
    sums.largest = out[0];
    sums.sum = out[1];
    sums.label_a = out[2];
    sums.label_b = out[3];
    sums.term = out[4];
    sums.product = out[5];
    sums.column_largest = out[6];
    sums.column_sum = out[7];
    launch_sums(p->pairs(), plan, sums, nullptr);
  });
}

extern "C" const char* plan_products_of(const Problem* p, int of_x, int of_y, int64_t* out) {
  return caught([=] {
    const ProductsPlan plan = p->products(of_x != 0, of_y != 0);
    out[0] = plan.x_splits;
    out[1] = plan.y_splits;
    out[2] = plan.workspace_bytes;
  });
}

// Statistics of x and y, products of x and y, term, workspace.
extern "C" const char* products_of(const Problem* p, float* const* values) {
  return caught([=] {
    const ProductsPlan plan = p->products(values[2] != nullptr, values[3] != nullptr);
    Products products{};
    products.x_statistics = values[0];
    products.y_statistics = values[1];
    products.x_product = values[2];
    products.y_product = values[3];
    products.x_term = values[4];
    products.workspace = values[5];
    launch_products(p->pairs(), plan, products, nullptr);
  });
}
