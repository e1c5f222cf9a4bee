// The launches of the sm_80 kernels, for one kind of element.
#pragma once

#include <algorithm>
#include <utility>

#include "launch.cuh"
#include "pairs_sm80.h"
#include "pairs_sm80_panel.cuh"
#include "pairs_sm80_resident.cuh"
#include "pairs_sm80_streamed.cuh"

namespace fastnce::cuda {

inline Launch launch_of(const Pairs& p, int64_t row_blocks, int64_t splits, int64_t row_block,
                        size_t shared_bytes, Stream stream) {
  return {p.op, dim3(static_cast<unsigned>(row_blocks), static_cast<unsigned>(splits)),
          dim3(static_cast<unsigned>(2 * row_block)),  // 32 threads for 16 rows
          shared_bytes, stream};
}

inline int64_t row_blocks_of(int64_t problems, int64_t rows, int64_t row_block) {
  return problems * ((rows + row_block - 1) / row_block);
}

template <class T, int kOut>
Launch resident_launch(const Pairs& p, int64_t splits, int64_t row_block, Stream stream) {
  const auto blocks =
      static_cast<int>((p.depth * static_cast<int64_t>(sizeof(ElementType<T>)) + 127) / 128);
  const ResidentMemory<T, kOut> memory{static_cast<int>(row_block), blocks};
  return launch_of(p, row_blocks_of(p.problems, p.rows, row_block), splits, row_block,
                   memory.bytes(), stream);
}

template <class T>
void launch_sums_of(const Pairs& p, const SumsPlan& plan, const Sums& out, Stream stream) {
  if (out.product == nullptr) {
    const StreamedMemory memory{static_cast<int>(plan.row_block)};
    launch(launch_of(p, p.problems * plan.row_blocks, plan.splits, plan.row_block, memory.bytes(),
                     stream),
           sums_streamed_kernel<T>, p, out, static_cast<int>(plan.row_blocks));
  } else if (resident_out(p.depth) == 128) {
    launch(resident_launch<T, 128>(p, plan.splits, plan.row_block, stream),
           sums_resident_kernel<T, 128>, p, out);
  } else {
    launch(resident_launch<T, 256>(p, plan.splits, plan.row_block, stream),
           sums_resident_kernel<T, 256>, p, out);
  }
}

template <class T>
void launch_row_products(const Pairs& p, int64_t splits, int64_t row_block, const Products& out,
                         Stream stream) {
  if (resident_out(p.depth) == 128) {
    launch(resident_launch<T, 128>(p, splits, row_block, stream), products_resident_kernel<T, 128>,
           p, out);
  } else {
    launch(resident_launch<T, 256>(p, splits, row_block, stream), products_resident_kernel<T, 256>,
           p, out);
  }
}

template <class T, bool kTransposed>
void launch_panel_product(const Pairs& p, int64_t problems, const PanelProduct& product,
                          Stream stream) {
  const auto tiles = [](int64_t count) {
    return static_cast<unsigned>((count + kPanelTile - 1) / kPanelTile);
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
  using E = ElementType<T>;
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
    of_x.b = static_cast<const E*>(p.y) + first_column * p.depth;
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
    of_y.b = static_cast<const E*>(p.x) + first_row * p.depth;
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

// The same pairs with rows and columns in each other's place.
inline Pairs transposed(const Pairs& p) {
  Pairs out = p;
  std::swap(out.x, out.y);
  std::swap(out.x_scale, out.y_scale);
  std::swap(out.x_labels, out.y_labels);
  std::swap(out.rows, out.columns);
  return out;
}

template <class T>
void launch_products_of(const Pairs& p, const ProductsPlan& plan, const Products& out,
                        Stream stream) {
  if (plan.panel_rows == 0) {
    if (out.x_product != nullptr) {
      launch_row_products<T>(p, plan.x_splits, plan.x_row_block, out, stream);
    }
    if (out.y_product != nullptr) {
      Products of_y;
      of_y.x_statistics = out.y_statistics;
      of_y.y_statistics = out.x_statistics;
      of_y.x_product = out.y_product;
      launch_row_products<T>(transposed(p), plan.y_splits, plan.y_row_block, of_y, stream);
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

}  // namespace fastnce::cuda
