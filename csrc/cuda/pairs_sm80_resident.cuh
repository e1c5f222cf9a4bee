// The passes with a product where the depth is at most 256: a block keeps its rows x in shared
// memory and reads the columns y once, two tiles ahead of each other; a tile serves both products,
// s = x y^T and, by what becomes of s in registers, out += E y. A warp has 16 rows, all columns of
// a tile, and all of the depth of `out`.
//
// Sizes: x takes at most 64 KiB and a tile of y 16 KiB, twice: 96 KiB and the columns' data fit the
// 99 KiB of every GPU since Ampere. `out` takes kOut / 2 registers of a thread, of 255.
#pragma once

#include "pairs_coefficients.cuh"
#include "pairs_mma.cuh"
#include "pairs_sums.cuh"

namespace fastnce::cuda {

// Columns of a tile for an `out` of kOut elements.
template <class T, int kOut>
constexpr int kResidentColumns = kTileBytes / (kOut * static_cast<int>(sizeof(ElementType<T>)));

// The block's shared memory: its rows x, twice a tile of y, twice what belongs to its columns.
template <class T, int kOut>
struct ResidentMemory {
  static constexpr int kColumns = kResidentColumns<T, kOut>;
  using Data = ColumnData<kColumns>;
  int row_block, blocks;  // rows of x, and blocks of 128 bytes of depth

  size_t bytes() const {
    return static_cast<size_t>((row_block + 2 * kColumns) * blocks) * 128 + 2 * sizeof(Data);
  }
  __device__ __forceinline__ SharedRows x() const {
    return {shared_memory<unsigned char>(), row_block};
  }
  __device__ __forceinline__ SharedRows y(int buffer) const {
    return {shared_memory<unsigned char>() + (row_block + buffer * kColumns) * blocks * 128,
            kColumns};
  }
  __device__ __forceinline__ Data& data(int buffer) const {
    return reinterpret_cast<Data*>(shared_memory<unsigned char>() +
                                   (row_block + 2 * kColumns) * blocks * 128)[buffer];
  }
};

// Calls body(tile of products, first column, y, data) for each tile of the block's columns.
template <class T, int kOut, class Body>
__device__ __forceinline__ void for_each_resident_tile(const Pairs& pairs, const Span& span,
                                                       const float* y_statistics, Body body) {
  constexpr int kColumns = kResidentColumns<T, kOut>;
  const int row_block = blockDim.x / 2, warp = threadIdx.x / kWarp;  // 16 rows for each 32 threads
  const int chunks = static_cast<int>(pairs.depth) / kPerChunk<T>;
  const int64_t pitch = int64_t{chunks} * 16;
  const auto* x = static_cast<const unsigned char*>(pairs.x) + span.first_row * pitch;
  const auto* y = static_cast<const unsigned char*>(pairs.y) + span.first_column * pitch;
  const ResidentMemory<T, kOut> memory{row_block, (chunks + 7) / 8};
  const auto fetch = [&](int first, int buffer) {
    if (first < span.end) {
      copy_rows(memory.y(buffer), y + first * pitch, pitch, span.columns - first, chunks);
      copy_column_data(memory.data(buffer), pairs, y_statistics, span, first);
    }
    copy_async_commit();
  };
  copy_rows(memory.x(), x, pitch, span.rows - span.row, chunks);
  fetch(span.begin, 0);
  int buffer = 0;
  for (int first = span.begin; first < span.end; first += kColumns, buffer ^= 1) {
    copy_async_wait<0>();
    sync_threads();  // this tile is there, and nobody reads the other any more
    fetch(first + kColumns, buffer ^ 1);
    float tile[kColumns / 8][4] = {};
    multiply_similarities<T>(tile, memory.x(), 16 * warp, memory.y(buffer), chunks);
    body(tile, first, memory.y(buffer), memory.data(buffer));
  }
  copy_async_wait<0>();
}

// `out` (R, P) of the block's part, times `factor`.
template <int kOut>
__device__ __forceinline__ void store_outputs(const float (&out)[kOut / 8][4], float* to,
                                              const ThreadRows& rows, const Span& span,
                                              int64_t part, int depth, float factor) {
  const int t2 = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (rows.row[h] >= span.rows) continue;
    float* line = to + (part + rows.at[h]) * depth + t2;
#pragma unroll
    for (int d = 0; d < kOut / 8; ++d) {
      if (8 * d >= depth) break;
      *reinterpret_cast<float2*>(line + 8 * d) =
          make_float2(out[d][2 * h] * factor, out[d][2 * h + 1] * factor);
    }
  }
}

template <class T, int kOut>
__global__ void __launch_bounds__(256, 1) sums_resident_kernel(const Pairs pairs, const Sums out) {
  constexpr int kColumns = kResidentColumns<T, kOut>;
  const double temperature = value_of(pairs.temperature);
  const Span span = span_of(pairs, blockIdx.x, blockDim.x / 2, kColumns);
  const ThreadRows rows = rows_of_thread(pairs, span, threadIdx.x / kWarp, temperature);
  const auto depth = static_cast<int>(pairs.depth);
  RowSums<true> sums(offset_of(pairs, temperature));
  float product[kOut / 8][4] = {};
  for_each_resident_tile<T, kOut>(
      pairs, span, nullptr,
      [&](float (&tile)[kColumns / 8][4], int first, const SharedRows& y,
          const ColumnData<kColumns>& data) {
        to_logits(tile, data, rows, span, first, pairs.kind);
        float shrink[2];
        sums.add(tile, shrink);
        if (!(shrink[0] == 1.0f && shrink[1] == 1.0f)) {  // a new maximum is rare
#pragma unroll
          for (int d = 0; d < kOut / 8; ++d) {
#pragma unroll
            for (int i = 0; i < 4; ++i) product[d][i] *= shrink[i / 2];
          }
        }
        scale_columns(tile, data.scale);
        multiply_outputs<T, kColumns / 8, kOut>(product, tile, y, depth);
      });
  const int64_t part = int64_t{blockIdx.y} * pairs.problems * pairs.rows;
  sums.store(out, rows, span, part);
  store_outputs<kOut>(product, out.product, rows, span, part, depth, 1.0f);
}

template <class T, int kOut>
__global__ void __launch_bounds__(256, 1)
    products_resident_kernel(const Pairs pairs, const Products out) {
  constexpr int kColumns = kResidentColumns<T, kOut>;
  const double temperature = value_of(pairs.temperature);
  const Span span = span_of(pairs, blockIdx.x, blockDim.x / 2, kColumns);
  const ThreadRows rows = rows_of_thread(pairs, span, threadIdx.x / kWarp, temperature);
  const auto depth = static_cast<int>(pairs.depth);
  const float scale = coefficient_scale(pairs.dtype);
  Coefficients<true> coefficients(pairs, out, rows);
  float product[kOut / 8][4] = {};
  for_each_resident_tile<T, kOut>(pairs, span, out.y_statistics,
                                  [&](float (&tile)[kColumns / 8][4], int first,
                                      const SharedRows& y, const ColumnData<kColumns>& data) {
                                    to_logits(tile, data, rows, span, first, pairs.kind);
                                    coefficients.replace(tile, data, rows, {scale, scale});
                                    multiply_outputs<T, kColumns / 8, kOut>(product, tile, y,
                                                                            depth);
                                  });
  const int64_t part = int64_t{blockIdx.y} * pairs.problems * pairs.rows;
  if (out.x_term != nullptr) coefficients.store_term(out.x_term, rows, span, part);
  store_outputs<kOut>(product, out.x_product, rows, span, part, depth, 1.0f / scale);
}

}  // namespace fastnce::cuda
