// How the passes over pairs are cut up, for test_cuda_plans.py; part of the library for the host.
#include "pairs.h"

using namespace fastnce::cuda;

// Blocks of rows, and parts of columns, of a pass over (problems, rows, columns, depth): 0: sums,
// 1: sums with the product, 2: the rows' product, 3: the columns' product.
extern "C" __attribute__((visibility("default"))) void fastnce_plan(int capability,
                                                                    int multiprocessors,
                                                                    const int64_t* sizes, int pass,
                                                                    int64_t* found) {
  const Machine machine{capability, multiprocessors};
  Pairs pairs{};
  pairs.op = "a plan";
  pairs.dtype = Dtype::kBfloat16;
  pairs.problems = sizes[0];
  pairs.rows = sizes[1];
  pairs.columns = sizes[2];
  pairs.depth = sizes[3];
  int64_t row_block = 0;
  if (pass < 2) {
    const SumsPlan plan = plan_sums(pairs, machine, pass == 1);
    row_block = plan.row_block;
    found[1] = plan.splits;
  } else {
    const ProductsPlan plan = plan_products(pairs, machine, pass == 2, pass == 3);
    row_block = pass == 2 ? plan.x_row_block : plan.y_row_block;
    found[1] = pass == 2 ? plan.x_splits : plan.y_splits;
  }
  if (row_block == 0) row_block = 128;  // of Hopper's products
  const int64_t rows = pass == 3 ? pairs.columns : pairs.rows;
  found[0] = pairs.problems * ((rows + row_block - 1) / row_block);
}
