// The passes of pairs.h for every GPU since Ampere.
#include "pairs_sm80.cuh"

#include <algorithm>
#include <type_traits>

namespace fastnce::cuda {
namespace {

Launch launch_of(const Pairs& p, int64_t row_blocks, int64_t splits, int64_t row_block,
                 size_t shared_bytes, Stream stream) {
  return {p.op, dim3(static_cast<unsigned>(row_blocks), static_cast<unsigned>(splits)),
          dim3(static_cast<unsigned>(2 * row_block)),  // 32 threads for 16 rows
          shared_bytes, stream};
}

int64_t row_blocks_of(int64_t problems, int64_t rows, int64_t row_block) {
  return problems * blocks_of(rows, row_block);
}

template <int kOut>
Launch resident_launch(const Pairs& p, int64_t splits, int64_t row_block, Stream stream) {
  const auto blocks = static_cast<int>((p.depth * kElementBytes + 127) / 128);
  const ResidentMemory<kOut> memory{static_cast<int>(row_block), blocks};
  return launch_of(p, row_blocks_of(p.problems, p.rows, row_block), splits, row_block,
                   memory.bytes(), stream);
}

// Calls run(an integral constant) with the resident kernels' instance for a depth.
template <class Run>
void with_resident_out(int64_t depth, const Run& run) {
  if (resident_out(depth) == 128) return run(std::integral_constant<int, 128>{});
  run(std::integral_constant<int, 256>{});
}

template <class T>
void launch_sums_of(const Pairs& p, const SumsPlan& plan, const Sums& out, Stream stream) {
  if (out.product == nullptr) {
    const StreamedMemory memory{static_cast<int>(plan.row_block)};
    launch(launch_of(p, p.problems * plan.row_blocks, plan.splits, plan.row_block, memory.bytes(),
                     stream),
           sums_streamed_kernel<T>, p, out, static_cast<int>(plan.row_blocks));
    return;
  }
  with_resident_out(p.depth, [&](auto kOut) {
    launch(resident_launch<kOut>(p, plan.splits, plan.row_block, stream),
           sums_resident_kernel<T, kOut>, p, out);
  });
}

template <class T>
void launch_row_products(const Pairs& p, int64_t splits, int64_t row_block, const Products& out,
                         Stream stream) {
  with_resident_out(p.depth, [&](auto kOut) {
    launch(resident_launch<kOut>(p, splits, row_block, stream), products_resident_kernel<T, kOut>,
           p, out);
  });
}

template <class T, bool kTransposed>
void launch_panel_product(const Pairs& p, int64_t problems, const PanelProduct& product,
                          Stream stream) {
  const auto tiles = [](int64_t count) {
    return static_cast<unsigned>(blocks_of(count, kPanelTile));
  };
  launch({p.op,
          dim3(tiles(product.m), tiles(product.depth),
               static_cast<unsigned>(problems * product.splits)),
          dim3(256), 2 * kPanelBufferBytes, stream},
         panel_product_kernel<T, kTransposed>, product);
}

// The coefficients of rows `start` to start + size of problems `problem` to problem + count, and
// both products with them.
template <class T>
void launch_panel(const Pairs& p, const ProductsPlan& plan, const Products& out, Stream stream,
                  int64_t problem, int64_t count, int64_t start, int64_t size) {
  const int64_t pitch = padded_depth(p.columns), total = p.problems * p.rows;
  const int64_t first_row = problem * p.rows + start, first_column = problem * p.columns;
  const int64_t blocks = row_blocks_of(1, p.rows, plan.x_row_block);
  // The workspace: the parts of the terms, then the panel.
  float* const terms = out.x_term == nullptr ? nullptr : static_cast<float*>(out.workspace);
  auto* const coefficients =
      static_cast<unsigned char*>(out.workspace) + term_bytes(p, plan.panel_splits);
  const Panel panel{coefficients, pitch, first_row, problem * blocks + start / plan.x_row_block,
                    terms};
  const StreamedMemory memory{static_cast<int>(plan.x_row_block)};
  launch(launch_of(p, row_blocks_of(count, size, plan.x_row_block), plan.panel_splits,
                   plan.x_row_block, memory.bytes(), stream),
         coefficients_kernel<T>, p, out, panel);

  PanelProduct product{};
  product.a = coefficients;
  product.a_pitch = pitch;
  product.a_problem = size * pitch;
  product.depth = static_cast<int>(p.depth);
  product.factor = 1.0f / coefficient_scale(p.dtype);
  if (out.x_product != nullptr) {
    PanelProduct of_x = product;
    of_x.b = static_cast<const T*>(p.y) + first_column * p.depth;
    of_x.b_problem = p.columns;
    of_x.m = static_cast<int>(size);
    of_x.k = static_cast<int>(p.columns);
    of_x.splits = static_cast<int>(plan.x_splits);
    of_x.out = out.x_product + first_row * p.depth;
    of_x.out_problem = size;
    of_x.out_split = total;
    of_x.row_scale = p.x_scale + first_row;
    if (terms != nullptr) {
      of_x.terms = terms + first_row;
      of_x.term_parts = static_cast<int>(plan.panel_splits);
      of_x.term = out.x_term + first_row;
    }
    launch_panel_product<T, false>(p, count, of_x, stream);
  }
  if (out.y_product != nullptr) {
    PanelProduct of_y = product;
    of_y.b = static_cast<const T*>(p.x) + first_row * p.depth;
    of_y.b_problem = size;
    of_y.m = static_cast<int>(p.columns);
    of_y.k = static_cast<int>(size);
    of_y.splits = static_cast<int>(plan.y_splits);
    of_y.out = out.y_product + first_column * p.depth;
    of_y.out_problem = p.columns;
    of_y.out_split = p.problems * p.columns;
    of_y.row_scale = p.y_scale + first_column;
    of_y.accumulate = start > 0;
    launch_panel_product<T, true>(p, count, of_y, stream);
  }
}

template <class T>
void launch_products_of(const Pairs& p, const ProductsPlan& plan, const Products& out,
                        Stream stream) {
  if (plan.panel_rows == 0) {
    if (out.x_product != nullptr) {
      launch_row_products<T>(p, plan.x_splits, plan.x_row_block, out, stream);
    }
    if (out.y_product != nullptr) {
      launch_row_products<T>(exchanged(p), plan.y_splits, plan.y_row_block, exchanged(out), stream);
    }
    return;
  }
  for (int64_t problem = 0; problem < p.problems; problem += plan.panel_problems) {
    const int64_t count = std::min(plan.panel_problems, p.problems - problem);
    for (int64_t start = 0; start < p.rows; start += plan.panel_rows) {
      const int64_t size = std::min(plan.panel_rows, p.rows - start);
      launch_panel<T>(p, plan, out, stream, problem, count, start, size);
    }
  }
}

}  // namespace

void launch_sums_sm80(const Pairs& pairs, const SumsPlan& plan, const Sums& out, Stream stream) {
  const bool brain = pairs.dtype == Dtype::kBfloat16;
  (brain ? launch_sums_of<bfloat16> : launch_sums_of<float16>)(pairs, plan, out, stream);
}

void launch_products_sm80(const Pairs& pairs, const ProductsPlan& plan, const Products& out,
                          Stream stream) {
  const bool brain = pairs.dtype == Dtype::kBfloat16;
  (brain ? launch_products_of<bfloat16> : launch_products_of<float16>)(pairs, plan, out, stream);
}

}  // namespace fastnce::cuda
