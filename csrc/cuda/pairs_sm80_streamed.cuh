// The passes without a product, at any depth: sums of rows, labels and columns; and coefficients
// into a panel in memory, for the products of pairs_sm80_panel.cuh. Rows x and columns y go by in
// blocks of 128 bytes of their depth, two blocks ahead of each other, through one tile after
// another.
//
// Sizes: a tile of 128 x 128 reads 32 KiB for each block of depth, for 128 x 128 x 64 multiply-adds
// of 16 bits, which take 1024 cycles of a multiprocessor: enough to wait for the next 32 KiB, and
// 32 bytes a cycle from the L2 cache. A thread keeps 64 registers of the tile.
#pragma once

#include "pairs_coefficients.cuh"
#include "pairs_mma.cuh"
#include "pairs_sums.cuh"

namespace fastnce::cuda {

constexpr int kStreamedWarps = 8;  // at most
using StreamedTile = float[kStreamedColumns / 8][4];

// The block's shared memory: twice a block of x's depth and of y's, twice what belongs to the
// columns, the columns' sums.
struct StreamedMemory {
  using Data = ColumnData<kStreamedColumns>;
  using Scratch = ColumnScratch<kStreamedColumns, kStreamedWarps>;
  int row_block;

  __host__ __device__ __forceinline__ int buffer_bytes() const {
    return (row_block + kStreamedColumns) * 128;
  }
  size_t bytes() const { return 2 * buffer_bytes() + 2 * sizeof(Data) + sizeof(Scratch); }
  __device__ __forceinline__ SharedRows x(int buffer) const {
    return {shared_memory<unsigned char>() + buffer * buffer_bytes(), row_block};
  }
  __device__ __forceinline__ SharedRows y(int buffer) const {
    return {x(buffer).base + row_block * 128, kStreamedColumns};
  }
  __device__ __forceinline__ Data& data(int tile) const {
    return reinterpret_cast<Data*>(shared_memory<unsigned char>() + 2 * buffer_bytes())[tile % 2];
  }
  __device__ __forceinline__ Scratch& scratch() const {
    return *reinterpret_cast<Scratch*>(&data(0) + 2);
  }
};

// Calls body(tile of products, first column, column data) for each tile of the block's columns.
template <class T, class Body>
__device__ __forceinline__ void for_each_streamed_tile(const Pairs& pairs, const Span& span,
                                                       const StreamedMemory& memory,
                                                       const float* y_statistics, Body body) {
  const int warp = threadIdx.x / kWarp;
  const int chunks = static_cast<int>(pairs.depth) / kPerChunk<T>, blocks = (chunks + 7) / 8;
  const int64_t pitch = int64_t{chunks} * 16;
  const auto* x = static_cast<const unsigned char*>(pairs.x) + span.first_row * pitch;
  const auto* y = static_cast<const unsigned char*>(pairs.y) + span.first_column * pitch;
  const int tiles = (span.end - span.begin + kStreamedColumns - 1) / kStreamedColumns;
  const auto chunks_of = [&](int block) { return chunks - 8 * block < 8 ? chunks - 8 * block : 8; };
  const auto fetch = [&](int tile, int block, int buffer) {
    if (tile < tiles) {
      const int first = span.begin + tile * kStreamedColumns, count = chunks_of(block);
      copy_rows(memory.x(buffer), x + block * 128, pitch, span.rows - span.row, count);
      copy_rows(memory.y(buffer), y + first * pitch + block * 128, pitch, span.columns - first,
                count);
      if (block == 0) copy_column_data(memory.data(tile), pairs, y_statistics, span, first);
    }
    copy_async_commit();
  };
  fetch(0, 0, 0);
  int buffer = 0;
  for (int t = 0; t < tiles; ++t) {
    StreamedTile tile = {};
    for (int block = 0; block < blocks; ++block, buffer ^= 1) {
      const bool last = block + 1 == blocks;
      copy_async_wait<0>();
      sync_threads();  // this block is there, and nobody reads the other any more
      fetch(t + (last ? 1 : 0), last ? 0 : block + 1, buffer ^ 1);
      multiply_similarities<T>(tile, memory.x(buffer), 16 * warp, memory.y(buffer),
                               chunks_of(block));
    }
    body(tile, span.begin + t * kStreamedColumns, memory.data(t));
  }
  copy_async_wait<0>();
}

// Block blockIdx.x takes the blocks of rows of one of the `groups` of its problem one after the
// other: there are no more parts of the column sums than groups.
template <class T>
__global__ void __launch_bounds__(256, 1)
    sums_streamed_kernel(const Pairs pairs, const Sums out, const int groups) {
  const int row_block = blockDim.x / 2;
  const int blocks = (static_cast<int>(pairs.rows) + row_block - 1) / row_block;
  const int each = (blocks + groups - 1) / groups;
  const int64_t problem = blockIdx.x / groups;
  const int group = static_cast<int>(blockIdx.x) % groups, begin = group * each;
  const int end = begin + each < blocks ? begin + each : blocks;
  const double temperature = value_of(pairs.temperature);
  const Offset offset = offset_of(pairs, temperature);
  const StreamedMemory memory{row_block};
  const bool columns = out.column_sum != nullptr;
  for (int block = begin; block < end; ++block) {
    const Span span = span_of(pairs, problem * blocks + block, row_block, kStreamedColumns);
    const ThreadRows rows = rows_of_thread(pairs, span, threadIdx.x / kWarp, temperature);
    const int64_t column_part = group * pairs.problems * pairs.columns + span.first_column;
    RowSums<false> sums(offset);
    LabelSums labels(pairs.kind, offset);
    for_each_streamed_tile<T>(pairs, span, memory, nullptr,
                              [&](StreamedTile& tile, int first, const StreamedMemory::Data& data) {
                                to_logits(tile, data, rows, span, first, pairs.kind);
                                if (out.label_a != nullptr) labels.add(tile, data, rows);
                                if (columns && offset.running)
                                  sum_columns_of_warp(tile, offset, memory.scratch());
                                float shrink[2];
                                sums.add(tile, shrink);
                                if (columns) {
                                  if (!offset.running)
                                    sum_columns_of_warp(tile, offset, memory.scratch());
                                  sync_threads();
                                  store_column_sums(memory.scratch(), out, column_part, first,
                                                    span.columns, block > begin);
                                }
                              });
    const int64_t part = int64_t{blockIdx.y} * pairs.problems * pairs.rows;
    sums.store(out, rows, span, part);
    if (out.label_a != nullptr) labels.store(out, rows, span, part);
    sync_threads();  // nobody reads this block's tiles any more
  }
}

// Coefficients G_ij r_i r_j of a range of x's rows, which are blocks from `first_block` on, and the
// parts of their terms.
struct Panel {
  void* data;         // (rows of the range, pitch), in the products' dtype
  int64_t pitch;      // columns of a problem, rounded up to 16; zeros beyond the end
  int64_t first_row;  // in x
  int64_t first_block;
  float* terms;  // (gridDim.y, R), or none
};

template <class T>
__global__ void __launch_bounds__(256, 1)
    coefficients_kernel(const Pairs pairs, const Products out, const Panel panel) {
  using E = ElementType<T>;
  const int row_block = blockDim.x / 2;
  const double temperature = value_of(pairs.temperature);
  const Span span = span_of(pairs, panel.first_block + blockIdx.x, row_block, kStreamedColumns);
  const ThreadRows rows = rows_of_thread(pairs, span, threadIdx.x / kWarp, temperature);
  const float factor = coefficient_scale(pairs.dtype);
  const float scale[2] = {pairs.x_scale[rows.at[0]] * factor, pairs.x_scale[rows.at[1]] * factor};
  Coefficients<true> coefficients(pairs, out, rows);
  for_each_streamed_tile<T>(pairs, span, StreamedMemory{row_block}, out.y_statistics,
                            [&](StreamedTile& tile, int first, const StreamedMemory::Data& data) {
                              to_logits(tile, data, rows, span, first, pairs.kind);
                              coefficients.replace(tile, data, rows, scale);
                              const int column = first + 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
                              for (int h = 0; h < 2; ++h) {
                                if (rows.row[h] >= span.rows) continue;
                                E* line = static_cast<E*>(panel.data) +
                                          (rows.at[h] - panel.first_row) * panel.pitch;
#pragma unroll
                                for (int n = 0; n < kStreamedColumns / 8; ++n) {
                                  if (column + 8 * n >= panel.pitch) break;
                                  E* to = line + column + 8 * n;
                                  const float low = tile[n][2 * h], high = tile[n][2 * h + 1];
                                  if constexpr (kHalf<T>) {
                                    *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(low, high);
                                  } else {
                                    *reinterpret_cast<float2*>(to) = make_float2(low, high);
                                  }
                                }
                              }
                            });
  if (panel.terms != nullptr) {
    const int64_t part = int64_t{blockIdx.y} * pairs.problems * pairs.rows;
    coefficients.store_term(panel.terms, rows, span, part);
  }
}

}  // namespace fastnce::cuda
