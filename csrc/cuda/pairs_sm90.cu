#include <algorithm>
#include <climits>
#include <string>

#include "pairs_kernels.h"
#include "pairs_sm90.cuh"

namespace fastnce::cuda::sm90 {
namespace {

// Chunks of the output's depth that one block makes, and how many such parts a row has.
int parts_of(int64_t depth) { return depth > 256 ? 2 : 1; }
int out_chunks(int64_t depth) {
  return static_cast<int>(blocks_of(depth, parts_of(depth) * kLineElements));
}
int tile_columns(int out) { return out > 2 ? 64 : 128; }

// `row_steps` blocks of 128 rows belong together.
int64_t splits_of(const Pairs& pairs, const Machine& machine, int out, int64_t row_steps = 1) {
  const int64_t parts = out > 0 ? parts_of(pairs.depth) : 1;
  const int64_t blocks = pairs.problems * blocks_of(pairs.rows, kBlockRows * row_steps) * parts;
  const int64_t tiles = blocks_of(pairs.columns, tile_columns(out));
  return splits_that_fill(blocks, tiles, machine.multiprocessors);
}

Arguments arguments_of(const Pairs& pairs, int64_t splits, int out, int64_t row_steps = 1) {
  Arguments a{};
  a.pairs = pairs;
  a.row_steps = static_cast<int>(row_steps);
  a.row_blocks = static_cast<int>(blocks_of(pairs.rows, kBlockRows * row_steps));
  a.splits = static_cast<int>(splits);
  a.parts = out > 0 ? parts_of(pairs.depth) : 1;
  a.chunks = out > 0 ? a.parts * out : static_cast<int>(blocks_of(pairs.depth, kLineElements));
  const int64_t pieces = pairs.problems * a.row_blocks * a.splits * a.parts;
  if (pieces > INT_MAX) {
    throw LaunchError(std::string(pairs.op) + ": " + std::to_string(pairs.problems) +
                      " problems are too many for one launch. Use fewer at a time.");
  }
  a.pieces = static_cast<int>(pieces);
  return a;
}

template <class C>
void launch_config(Arguments a, int64_t blocks, Stream stream) {
  const Pairs& pairs = a.pairs;
  const int others = Memory<C::kColumns>(a.chunks, 0, a.column_sums()).bytes();
  a.slots = std::min(kMostSlots, (kSharedBytes - others) / C::kTileBytes);
  const Launch l{
      pairs.op, dim3(static_cast<unsigned>(std::min<int64_t>(a.pieces, blocks))), dim3(kThreads),
      static_cast<size_t>(Memory<C::kColumns>(a.chunks, a.slots, a.column_sums()).bytes()), stream};
  const TensorMap x = make_tensor_map(pairs.op, pairs.x, pairs.dtype, pairs.depth, pairs.rows,
                                      pairs.problems, kBlockRows);
  const TensorMap y = make_tensor_map(pairs.op, pairs.y, pairs.dtype, pairs.depth, pairs.columns,
                                      pairs.problems, C::kColumns);
  launch(l, pairs_kernel<C>, x, y, a);
}

template <class T, Pass kPass>
void launch_product(const Arguments& a, int out, int64_t blocks, Stream stream) {
  if (out == 1) return launch_config<Config<T, kPass, 1>>(a, blocks, stream);
  if (out == 2) return launch_config<Config<T, kPass, 2>>(a, blocks, stream);
  if (out == 3) return launch_config<Config<T, kPass, 3>>(a, blocks, stream);
  return launch_config<Config<T, kPass, 4>>(a, blocks, stream);
}

template <class T>
void launch_sums_of(const Arguments& a, int out, int64_t blocks, Stream stream) {
  if (out == 0) return launch_config<Config<T, Pass::kSums, 0>>(a, blocks, stream);
  launch_product<T, Pass::kSumsWithProduct>(a, out, blocks, stream);
}

}  // namespace

SumsPlan plan_sums(const Pairs& pairs, const Machine& machine, bool with_product) {
  SumsPlan plan{};
  plan.blocks = machine.multiprocessors;
  const int64_t row_blocks = blocks_of(pairs.rows, kBlockRows);
  // Sums of columns are in memory once for each piece's rows and warp group: where there are more
  // blocks of rows than multiprocessors, they follow one another in groups.
  const int64_t most = blocks_of(pairs.problems * row_blocks, machine.multiprocessors);
  const int64_t row_steps = with_product ? 1 : std::min(most, row_blocks);
  plan.splits = splits_of(pairs, machine, with_product ? out_chunks(pairs.depth) : 0, row_steps);
  plan.row_block = row_steps * kBlockRows;
  const int64_t whole = (pairs.rows - 1) / plan.row_block;
  plan.row_blocks = whole * kConsumers + (pairs.rows - whole * plan.row_block > 64 ? 2 : 1);
  return plan;
}

void launch_sums(const Pairs& pairs, const SumsPlan& plan, const Sums& out, Stream stream) {
  const int chunks = out.product != nullptr ? out_chunks(pairs.depth) : 0;
  Arguments a = arguments_of(pairs, plan.splits, chunks, plan.row_block / kBlockRows);
  a.sums = out;
  if (pairs.dtype == Dtype::kBfloat16) {
    launch_sums_of<bfloat16>(a, chunks, plan.blocks, stream);
  } else {
    launch_sums_of<float16>(a, chunks, plan.blocks, stream);
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
  const int chunks = out_chunks(pairs.depth);
  const auto launch_one = [&](const Pairs& of, int64_t splits, const Products& products) {
    Arguments a = arguments_of(of, splits, chunks);
    a.products = products;
    if (pairs.dtype == Dtype::kBfloat16) {
      launch_product<bfloat16, Pass::kProducts>(a, chunks, plan.blocks, stream);
    } else {
      launch_product<float16, Pass::kProducts>(a, chunks, plan.blocks, stream);
    }
  };
  if (plan.x_splits > 0) launch_one(pairs, plan.x_splits, out);
  if (plan.y_splits > 0) launch_one(exchanged(pairs), plan.y_splits, exchanged(out));
}

}  // namespace fastnce::cuda::sm90
