#include "pairs_sm90.h"

#include <algorithm>
#include <utility>

#include "pairs_sm90.cuh"

namespace fastnce::cuda::sm90 {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Chunks of the output's depth that one block makes, and how many such parts a row has.
int parts_of(int64_t depth) { return depth > 256 ? 2 : 1; }
int out_chunks(int64_t depth) {
  return static_cast<int>(ceil_div(depth, parts_of(depth) * kLineElements));
}
int tile_columns(int out) { return out > 2 ? 64 : 128; }

// Parts of the columns: as few as keep the multiprocessors busy 7/8 of the time, a block being on
// each, and no part so short that its beginning and end count.
int64_t splits_of(int64_t blocks, int64_t columns, int tile, int64_t multiprocessors) {
  constexpr int64_t kFewestTiles = 4;
  const int64_t most = std::max<int64_t>(1, ceil_div(columns, tile) / kFewestTiles);
  for (int64_t splits = 1; splits < most; ++splits) {
    const int64_t waves = ceil_div(blocks * splits, multiprocessors);
    if (8 * blocks * splits >= 7 * waves * multiprocessors) return splits;
  }
  return most;
}

int64_t splits_of(const Pairs& pairs, const Machine& machine, int out) {
  const int64_t parts = out > 0 ? parts_of(pairs.depth) : 1;
  const int64_t blocks = pairs.problems * ceil_div(pairs.rows, kBlockRows) * parts;
  return splits_of(blocks, pairs.columns, tile_columns(out), machine.multiprocessors);
}

// Rows for columns.
Pairs exchanged(Pairs pairs) {
  std::swap(pairs.x, pairs.y);
  std::swap(pairs.x_scale, pairs.y_scale);
  std::swap(pairs.x_labels, pairs.y_labels);
  std::swap(pairs.rows, pairs.columns);
  return pairs;
}

Arguments arguments_of(const Pairs& pairs, int64_t splits, int out) {
  Arguments a{};
  a.x_scale = pairs.x_scale;
  a.y_scale = pairs.y_scale;
  a.x_labels = labelled(pairs.kind) ? pairs.x_labels : nullptr;
  a.y_labels = labelled(pairs.kind) ? pairs.y_labels : nullptr;
  a.rows = static_cast<int>(pairs.rows);
  a.columns = static_cast<int>(pairs.columns);
  a.problems = static_cast<int>(pairs.problems);
  a.depth = static_cast<int>(pairs.depth);
  a.kind = pairs.kind;
  // float16 products need the exponentials of at most 1 that the running maximum gives.
  a.fixed_offset = pairs.unit_rows && pairs.dtype != Dtype::kFloat16;
  a.temperature = pairs.temperature;
  a.row_blocks = static_cast<int>(ceil_div(pairs.rows, kBlockRows));
  a.splits = static_cast<int>(splits);
  a.parts = out > 0 ? parts_of(pairs.depth) : 1;
  a.work = a.problems * a.row_blocks * a.splits * a.parts;
  a.chunks = out > 0 ? a.parts * out : static_cast<int>(ceil_div(pairs.depth, kLineElements));
  return a;
}

template <class C>
void launch_config(const Pairs& pairs, Arguments a, int64_t blocks, Stream stream) {
  const bool sums = a.sums.column_sum != nullptr;
  const int fixed = Layout<C::kColumns>(a.chunks, 0).bytes(sums);
  a.slots = std::min(kMostSlots, (kSharedBytes - fixed) / C::kTileBytes);
  const Launch launch_of{
      pairs.op, dim3(static_cast<unsigned>(std::min<int64_t>(a.work, blocks))), dim3(kThreads),
      static_cast<size_t>(Layout<C::kColumns>(a.chunks, a.slots).bytes(sums)), stream};
  const TensorMap x = make_tensor_map(pairs.op, pairs.x, pairs.dtype, pairs.depth, pairs.rows,
                                      pairs.problems, kBlockRows);
  const TensorMap y = make_tensor_map(pairs.op, pairs.y, pairs.dtype, pairs.depth, pairs.columns,
                                      pairs.problems, C::kColumns);
  launch(launch_of, pairs_kernel<C>, x, y, a);
}

template <class T, Pass kPass>
void launch_product(const Pairs& pairs, const Arguments& a, int out, int64_t blocks,
                    Stream stream) {
  if (out == 1) return launch_config<Config<T, kPass, 1>>(pairs, a, blocks, stream);
  if (out == 2) return launch_config<Config<T, kPass, 2>>(pairs, a, blocks, stream);
  if (out == 3) return launch_config<Config<T, kPass, 3>>(pairs, a, blocks, stream);
  return launch_config<Config<T, kPass, 4>>(pairs, a, blocks, stream);
}

template <class T>
void launch_sums_of(const Pairs& pairs, const Arguments& a, int out, int64_t blocks,
                    Stream stream) {
  if (out == 0) return launch_config<Config<T, Pass::kSums, 0>>(pairs, a, blocks, stream);
  launch_product<T, Pass::kSumsWithProduct>(pairs, a, out, blocks, stream);
}

template <class T>
void launch_products_of(const Pairs& pairs, const ProductsPlan& plan, const Products& out,
                        Stream stream) {
  const int chunks = out_chunks(pairs.depth);
  const auto launch_one = [&](const Pairs& of, int64_t splits, const float* x_statistics,
                              const float* y_statistics, float* product, float* term) {
    Arguments a = arguments_of(of, splits, chunks);
    a.x_statistics = x_statistics;
    a.y_statistics = y_statistics;
    a.product = product;
    a.term = term;
    launch_product<T, Pass::kProducts>(of, a, chunks, plan.blocks, stream);
  };
  if (plan.x_splits > 0) {
    launch_one(pairs, plan.x_splits, out.x_statistics, out.y_statistics, out.x_product, out.x_term);
  }
  if (plan.y_splits > 0) {  // the same with the roles exchanged
    launch_one(exchanged(pairs), plan.y_splits, out.y_statistics, out.x_statistics, out.y_product,
               nullptr);
  }
}

}  // namespace

SumsPlan plan_sums(const Pairs& pairs, const Machine& machine, bool with_product) {
  const int64_t splits = splits_of(pairs, machine, with_product ? out_chunks(pairs.depth) : 0);
  return {splits, 64, ceil_div(pairs.rows, 64), machine.multiprocessors};
}

void launch_sums(const Pairs& pairs, const SumsPlan& plan, const Sums& out, Stream stream) {
  const int chunks = out.product != nullptr ? out_chunks(pairs.depth) : 0;
  Arguments a = arguments_of(pairs, plan.splits, chunks);
  a.sums = out;
  if (pairs.dtype == Dtype::kBfloat16) {
    launch_sums_of<bfloat16>(pairs, a, chunks, plan.blocks, stream);
  } else {
    launch_sums_of<float16>(pairs, a, chunks, plan.blocks, stream);
  }
}

ProductsPlan plan_products(const Pairs& pairs, const Machine& machine, bool of_x, bool of_y) {
  const int chunks = out_chunks(pairs.depth);
  ProductsPlan plan{};
  plan.blocks = machine.multiprocessors;
  if (of_x) plan.x_splits = splits_of(pairs, machine, chunks);
  if (of_y) plan.y_splits = splits_of(exchanged(pairs), machine, chunks);
  return plan;
}

void launch_products(const Pairs& pairs, const ProductsPlan& plan, const Products& out,
                     Stream stream) {
  if (pairs.dtype == Dtype::kBfloat16) {
    launch_products_of<bfloat16>(pairs, plan, out, stream);
  } else {
    launch_products_of<float16>(pairs, plan, out, stream);
  }
}

}  // namespace fastnce::cuda::sm90
