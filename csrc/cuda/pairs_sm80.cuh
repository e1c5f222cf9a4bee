// The kernels of all passes of pairs_sm80.cu, by mma.sync and cp.async.
#pragma once

#include "launch.cuh"
#include "pairs_kernels.h"
#include "pairs_tile.cuh"

namespace fastnce::cuda {

// --- tiles in shared memory, and their products by mma.sync ---
//
// One step of a product takes 32 bytes of a row's depth, 16 elements. ldmatrix moves 8 rows of 16
// bytes, just where the fragments a and b of the instruction want them.

constexpr int kPerChunk = 16 / kElementBytes;  // elements in 16 bytes, a chunk

// Rows in shared memory, as blocks of 128 bytes of depth: block, row, then 8 chunks of 16 bytes,
// the chunk at place chunk ^ (row % 8). An ldmatrix reads one chunk of 8 neighbouring rows, which
// so lie in 8 different places of the 128 bytes that are all 32 banks: no two meet in a bank. The
// layout is that of TMA's 128-byte swizzle.
struct SharedRows {
  unsigned char* base;
  int rows;  // a multiple of 8

  __device__ __forceinline__ unsigned char* chunk(int row, int chunk) const {
    return base + (chunk / 8 * rows + row) * 128 + ((chunk ^ row) & 7) * 16;
  }
};

// Copies `chunks` chunks of each of the rows, contiguous with `pitch` bytes, zeros from row `there`
// on. 8 threads take 128 bytes of a row. All threads of the block take part.
__device__ __forceinline__ void copy_rows(const SharedRows& to, const unsigned char* from,
                                          int64_t pitch, int there, int chunks) {
  const int own = threadIdx.x % 8;
  for (int row = threadIdx.x / 8; row < to.rows; row += blockDim.x / 8) {
    const unsigned char* line = from + row * pitch;
    for (int chunk = own; chunk < chunks; chunk += 8) {
      copy_async<16>(to.chunk(row, chunk), line + 16 * chunk, row < there);
    }
  }
}

// The a of 16 rows from `row` on, at chunks `chunk` and chunk + 1.
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const SharedRows& x, int row, int chunk) {
  const int lane = threadIdx.x % kWarp;
  load_matrix_x4(a, x.chunk(row + lane % 16, chunk + lane / 16));
}

// tile += x y^T of the warp's 16 rows from x_row on and all rows of y, over `chunks` chunks of
// depth, an even number.
template <class T, int kTiles>
__device__ __forceinline__ void multiply_similarities(float (&tile)[kTiles][4], const SharedRows& x,
                                                      int x_row, const SharedRows& y, int chunks) {
  static_assert(kTiles % 2 == 0);
  const int lane = threadIdx.x % kWarp;
  constexpr int kSteps = kTiles < 16 ? 2 : 1;  // side by side, as registers allow
#pragma unroll kSteps
  for (int chunk = 0; chunk < chunks; chunk += 2) {
    uint32_t a[4];
    load_a(a, x, x_row, chunk);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];  // of columns 8n ... 8n + 7, and of the next 8
      load_matrix_x4(b, y.chunk(8 * n + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
      multiply_m16n8k16<T>(tile[n], a, {b[0], b[1]});
      multiply_m16n8k16<T>(tile[n + 1], a, {b[2], b[3]});
    }
  }
}

// y as the b of a product over its rows: 16 of them from `row` on, and its elements d ... d + 15 as
// columns, two fragments of 8.
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const SharedRows& y, int row, int d) {
  const int lane = threadIdx.x % kWarp;
  load_matrix_x4_transposed(b, y.chunk(row + lane % 16, d / 8 + lane / 16));
}

// out += factor y, the factor the warp's 16 rows by all rows of y, y's depth a multiple of 16.
template <class T, int kTiles, int kOut>
__device__ __forceinline__ void multiply_outputs(float (&out)[kOut / 8][4],
                                                 const Factor<kTiles>& factor, const SharedRows& y,
                                                 int depth) {
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
#pragma unroll
    for (int d = 0; d < kOut / 8; d += 2) {
      if (8 * d >= depth) break;
      uint32_t b[4];
      load_b(b, y, 8 * n, 8 * d);
      multiply_m16n8k16<T>(out[d], factor[n / 2], {b[0], b[1]});
      multiply_m16n8k16<T>(out[d + 1], factor[n / 2], {b[2], b[3]});
    }
  }
}

// --- passes with a product, where the depth is at most 256 ---
//
// A block keeps its rows x in shared memory and reads the columns y once, two tiles ahead of each
// other; a tile serves both products, s = x y^T and, by what becomes of s in registers, out += E y.
// A warp has 16 rows, all columns of a tile, and all of the depth of `out`.
//
// Sizes: x takes at most 64 KiB and a tile of y 16 KiB, twice: 96 KiB and the columns' data fit the
// 99 KiB of every GPU since Ampere. `out` takes kOut / 2 registers of a thread, of 255.

// Columns of a tile for an `out` of kOut elements.
template <int kOut>
constexpr int kResidentColumns = kTileBytes / (kOut * kElementBytes);

// The block's shared memory: its rows x, twice a tile of y, twice what belongs to its columns.
template <int kOut>
struct ResidentMemory {
  static constexpr int kColumns = kResidentColumns<kOut>;
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
  constexpr int kColumns = kResidentColumns<kOut>;
  const int row_block = blockDim.x / 2, warp = threadIdx.x / kWarp;  // 16 rows for each 32 threads
  const int chunks = static_cast<int>(pairs.depth) / kPerChunk;
  const int64_t pitch = int64_t{chunks} * 16;
  const auto* x = static_cast<const unsigned char*>(pairs.x) + span.first_row * pitch;
  const auto* y = static_cast<const unsigned char*>(pairs.y) + span.first_column * pitch;
  const ResidentMemory<kOut> memory{row_block, (chunks + 7) / 8};
  const auto fetch = [&](int first, int buffer) {
    if (first < span.end) {
      copy_rows(memory.y(buffer), y + first * pitch, pitch, span.columns - first, chunks);
      copy_column_data(memory.data(buffer), pairs, y_statistics, span, first, threadIdx.x,
                       blockDim.x);
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
    float* line = to + (part + rows.at(span, h)) * depth + t2;
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
  constexpr int kColumns = kResidentColumns<kOut>;
  const double temperature = value_of(pairs.temperature);
  const Span span = span_of(pairs, blockIdx.x, blockDim.x / 2, kColumns);
  const ThreadRows rows = rows_of_thread(pairs, span, threadIdx.x / kWarp, temperature);
  const auto depth = static_cast<int>(pairs.depth);
  RowSums sums(offset_of(pairs, temperature), out.term != nullptr);
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
        Factor<kColumns / 8> factor;
        scale_columns<T>(factor, tile, data.scale);
        multiply_outputs<T, kColumns / 8, kOut>(product, factor, y, depth);
      });
  const int64_t part = int64_t{blockIdx.y} * pairs.problems * pairs.rows;
  sums.store(out, rows, span, part);
  store_outputs<kOut>(product, out.product, rows, span, part, depth, 1.0f);
}

template <class T, int kOut>
__global__ void __launch_bounds__(256, 1)
    products_resident_kernel(const Pairs pairs, const Products out) {
  constexpr int kColumns = kResidentColumns<kOut>;
  const double temperature = value_of(pairs.temperature);
  const Span span = span_of(pairs, blockIdx.x, blockDim.x / 2, kColumns);
  const ThreadRows rows = rows_of_thread(pairs, span, threadIdx.x / kWarp, temperature);
  const auto depth = static_cast<int>(pairs.depth);
  const float scale = coefficient_scale(pairs.dtype);
  Coefficients coefficients(pairs, out, span, rows, out.x_term != nullptr);
  float product[kOut / 8][4] = {};
  for_each_resident_tile<T, kOut>(pairs, span, out.y_statistics,
                                  [&](float (&tile)[kColumns / 8][4], int first,
                                      const SharedRows& y, const ColumnData<kColumns>& data) {
                                    to_logits(tile, data, rows, span, first, pairs.kind);
                                    Factor<kColumns / 8> factor;
                                    coefficients.find<T>(factor, tile, data, rows, {scale, scale});
                                    multiply_outputs<T, kColumns / 8, kOut>(product, factor, y,
                                                                            depth);
                                  });
  const int64_t part = int64_t{blockIdx.y} * pairs.problems * pairs.rows;
  if (coefficients.with_term) coefficients.store_term(out.x_term, rows, span, part);
  store_outputs<kOut>(product, out.x_product, rows, span, part, depth, 1.0f / scale);
}

// --- passes without a product, at any depth ---
//
// Sums of rows, labels and columns; and coefficients into a panel in memory, for the products
// below. Rows x and columns y go by in blocks of 128 bytes of their depth, two blocks ahead of each
// other, through one tile after another.
//
// Sizes: a tile of 128 x 128 reads 32 KiB for each block of depth, for 128 x 128 x 64 multiply-adds
// of 16 bits, which take 1024 cycles of a multiprocessor: enough to wait for the next 32 KiB, and
// 32 bytes a cycle from the L2 cache. A thread keeps 64 registers of the tile.

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
  const int chunks = static_cast<int>(pairs.depth) / kPerChunk, blocks = (chunks + 7) / 8;
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
      if (block == 0) {
        copy_column_data(memory.data(tile), pairs, y_statistics, span, first, threadIdx.x,
                         blockDim.x);
      }
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
    RowSums sums(offset, false);
    LabelSums labels(pairs.kind, offset);
    for_each_streamed_tile<T>(pairs, span, memory, nullptr,
                              [&](StreamedTile& tile, int first, const StreamedMemory::Data& data) {
                                to_logits(tile, data, rows, span, first, pairs.kind);
                                if (out.label_a != nullptr) labels.add(tile, data, rows);
                                if (columns && offset.running)
                                  sum_columns_of_warp<true>(tile, offset, memory.scratch());
                                float shrink[2];
                                sums.add(tile, shrink);
                                if (columns) {
                                  if (!offset.running)
                                    sum_columns_of_warp<false>(tile, offset, memory.scratch());
                                  sync_threads();
                                  const auto& [largest, sum] = memory.scratch();
                                  for (int j = threadIdx.x;
                                       j < kStreamedColumns && first + j < span.columns;
                                       j += blockDim.x) {
                                    store_column(largest, sum, blockDim.x / kWarp, j, out,
                                                 column_part + first + j, block > begin);
                                  }
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
  const int row_block = blockDim.x / 2;
  const double temperature = value_of(pairs.temperature);
  const Span span = span_of(pairs, panel.first_block + blockIdx.x, row_block, kStreamedColumns);
  const ThreadRows rows = rows_of_thread(pairs, span, threadIdx.x / kWarp, temperature);
  const float factor = coefficient_scale(pairs.dtype);
  const float scale[2] = {pairs.x_scale[rows.at(span, 0)] * factor,
                          pairs.x_scale[rows.at(span, 1)] * factor};
  Coefficients coefficients(pairs, out, span, rows, panel.terms != nullptr);
  for_each_streamed_tile<T>(pairs, span, StreamedMemory{row_block}, out.y_statistics,
                            [&](StreamedTile& tile, int first, const StreamedMemory::Data& data) {
                              to_logits(tile, data, rows, span, first, pairs.kind);
                              Factor<kStreamedColumns / 8> factor;
                              coefficients.find<T>(factor, tile, data, rows, scale);
                              const int column = first + 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
                              for (int h = 0; h < 2; ++h) {
                                if (rows.row[h] >= span.rows) continue;
                                T* line = static_cast<T*>(panel.data) +
                                          (rows.at(span, h) - panel.first_row) * panel.pitch;
#pragma unroll
                                for (int n = 0; n < kStreamedColumns / 8; ++n) {
                                  if (column + 8 * n >= panel.pitch) break;
                                  T* to = line + column + 8 * n;
                                  *reinterpret_cast<uint32_t*>(to) = factor[n / 2][2 * (n % 2) + h];
                                }
                              }
                            });
  if (coefficients.with_term) {
    const int64_t part = int64_t{blockIdx.y} * pairs.problems * pairs.rows;
    coefficients.store_term(panel.terms, rows, span, part);
  }
}

// --- products of a panel of coefficients with packed rows ---
//
// A B with A the panel or its transpose, and B the rows, (k, P).
//
// Sizes: a block makes 128 x 128 results, a warp 32 x 64 of them, in steps of 16 KiB of A and as
// many of B, two steps ahead of each other; A and B each as above.

constexpr int kPanelBufferBytes = 2 * kTileBytes;

// Of `problems` problems one after another in a, b and out; grid (tiles of m, tiles of depth,
// problems * splits).
struct PanelProduct {
  const void* a;      // (m, a_pitch), or, transposed, (k, a_pitch)
  int64_t a_pitch;    // elements, a multiple of 16
  int64_t a_problem;  // elements from one problem to the next
  const void* b;      // (k, depth)
  int64_t b_problem;  // rows from one problem to the next
  int m, k, depth, splits;
  float* out;  // (splits, all rows, depth), from the first problem's first row on
  int64_t out_problem, out_split;  // rows from one to the next
  const float* row_scale;          // of out's rows: what A holds of it is taken out again
  float factor;
  bool accumulate;  // onto `out`
  // Parts of the rows' terms, (term_parts, all rows), to be added up in `splits` parts (splits, all
  // rows); or none.
  const float* terms;
  int term_parts;
  float* term;
};

// Depth of the product in a step: 128 bytes of A's rows; transposed, as many of its columns.
constexpr int kPanelStep = 128 / kElementBytes;

template <bool kTransposed>
__device__ __forceinline__ void load_panel(uint32_t (&a)[4], const SharedRows& panel, int row,
                                           int k) {
  if constexpr (!kTransposed) {
    load_a(a, panel, row, k / kPerChunk);
  } else {
    const int lane = threadIdx.x % kWarp;
    load_matrix_x4_transposed(a, panel.chunk(k + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2));
  }
}

template <class T, bool kTransposed>
__global__ void __launch_bounds__(256, 1) panel_product_kernel(const PanelProduct p) {
  const int64_t problem = blockIdx.z / p.splits, split = blockIdx.z % p.splits;
  const int m = blockIdx.x * kPanelTile, d = blockIdx.y * kPanelTile;
  const int steps = (p.k + kPanelStep - 1) / kPanelStep, part = (steps + p.splits - 1) / p.splits;
  const int begin = static_cast<int>(split) * part * kPanelStep;
  const int end = begin + part * kPanelStep < p.k ? begin + part * kPanelStep : p.k;
  const T* a = static_cast<const T*>(p.a) + problem * p.a_problem;
  const T* b = static_cast<const T*>(p.b) + problem * p.b_problem * p.depth + d;
  const auto chunks_to = [](int64_t elements, int most) {
    return static_cast<int>(elements < most ? elements : most) / kPerChunk;
  };
  const auto a_of = [&](int buffer) {
    return SharedRows{shared_memory<unsigned char>() + buffer * kPanelBufferBytes,
                      kTransposed ? kPanelStep : kPanelTile};
  };
  const auto b_of = [&](int buffer) {
    return SharedRows{shared_memory<unsigned char>() + buffer * kPanelBufferBytes + kTileBytes,
                      kPanelStep};
  };
  const auto fetch = [&](int k, int buffer) {
    if (k < end) {
      const int64_t pitch = p.a_pitch * kElementBytes;
      if constexpr (kTransposed) {
        copy_rows(a_of(buffer), reinterpret_cast<const unsigned char*>(a + k * p.a_pitch + m),
                  pitch, p.k - k, chunks_to(p.a_pitch - m, kPanelTile));
      } else {
        // Beyond the panel's end nothing is copied, and so nothing multiplied.
        copy_rows(a_of(buffer), reinterpret_cast<const unsigned char*>(a + m * p.a_pitch + k),
                  pitch, p.m - m, chunks_to(p.a_pitch - k, kPanelStep));
      }
      copy_rows(b_of(buffer), reinterpret_cast<const unsigned char*>(b + int64_t{k} * p.depth),
                p.depth * kElementBytes, p.k - k, chunks_to(p.depth - d, kPanelTile));
    }
    copy_async_commit();
  };
  const int warp = threadIdx.x / kWarp, row = warp / 2 * 32, column = warp % 2 * 64;
  float out[2][8][4] = {};
  fetch(begin, 0);
  int buffer = 0;
  for (int k = begin; k < end; k += kPanelStep, buffer ^= 1) {
    copy_async_wait<0>();
    sync_threads();  // this step's parts are there, and nobody reads the other ones any more
    fetch(k + kPanelStep, buffer ^ 1);
    const int inside = (p.k - k + 15) / 16 * 16;  // the panel has zeros up to there
#pragma unroll
    for (int s = 0; s < kPanelStep; s += 16) {
      if (s >= inside) break;
      uint32_t of_a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) load_panel<kTransposed>(of_a[i], a_of(buffer), row + 16 * i, s);
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        uint32_t of_b[4];
        load_b(of_b, b_of(buffer), s, column + 8 * n);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          multiply_m16n8k16<T>(out[i / 2][n + i % 2], of_a[i / 2],
                               {of_b[i % 2 * 2], of_b[i % 2 * 2 + 1]});
        }
      }
    }
  }
  copy_async_wait<0>();

  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = m + row + 16 * (i / 2) + 8 * (i % 2) + lane / 4;
    if (at >= p.m) continue;
    const float scale = p.row_scale[problem * p.out_problem + at];
    const float factor = scale == 0.0f ? 0.0f : p.factor / scale;
    float* line = p.out + (split * p.out_split + problem * p.out_problem + at) * p.depth;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int to = d + column + 8 * n + 2 * (lane % 4);
      if (to >= p.depth) break;
      auto* pair = reinterpret_cast<float2*>(line + to);
      const float2 old = p.accumulate ? *pair : make_float2(0.0f, 0.0f);
      *pair = make_float2(old.x + out[i / 2][n][2 * (i % 2)] * factor,
                          old.y + out[i / 2][n][2 * (i % 2) + 1] * factor);
    }
  }

  const int own = m + static_cast<int>(threadIdx.x);
  if (p.term == nullptr || blockIdx.y != 0 || threadIdx.x >= kPanelTile || own >= p.m) return;
  const int64_t at = problem * p.out_problem + own;
  float sum = 0.0f;
  for (int i = static_cast<int>(split); i < p.term_parts; i += p.splits) {
    sum += p.terms[i * p.out_split + at];
  }
  p.term[split * p.out_split + at] = sum;
}

}  // namespace fastnce::cuda
