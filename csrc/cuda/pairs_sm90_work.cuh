// How the passes of pairs_sm90.cu are cut into pieces of work, and what lies where in shared
// memory.
#pragma once

#include "device_sm90.cuh"
#include "pairs_tile.cuh"

namespace fastnce::cuda::sm90 {

constexpr int kConsumers = 2;  // warp groups, each with 64 rows
constexpr int kConsumerWarps = kConsumers * 4;
constexpr int kThreads = (kConsumers + 1) * kWarpGroup;
constexpr int kBlockRows = kConsumers * 64;
constexpr int kXTileBytes = kBlockRows * kLineBytes;  // 64 elements of each row
constexpr int kMostSlots = 16;
constexpr int kSharedBytes = 227 * 1024;

enum class Pass { kSums, kSumsWithProduct, kProducts };

// kOut chunks of 64 elements of the output's depth; 0 without product. 128 columns, or 64 where the
// output takes 96 registers or more.
template <class T_, Pass kPass_, int kOut_>
struct Config {
  using T = T_;
  static constexpr Pass kPass = kPass_;
  static constexpr int kOut = kOut_, kColumns = kOut_ > 2 ? 64 : 128;
  static constexpr int kTileBytes = kColumns * kLineBytes;
};

struct Arguments {
  Pairs pairs;
  Sums sums;            // of the passes that sum
  Products products;    // of the others: x_product and x_term
  int64_t all_columns;  // of all problems
  int row_blocks;       // of one problem, with `row_steps` blocks of 128 rows each
  int row_steps;
  int splits;  // of the columns
  int parts;   // of the depth of the product, each with similarities of its own
  int pieces;  // of work
  int chunks;  // of 64 elements, in a row
  int slots;   // of the ring of tiles of y

  __host__ __device__ __forceinline__ bool column_sums() const {
    return sums.column_sum != nullptr;
  }
};

// --- work ---

// Neighbouring pieces, which run at the same time, have the columns in common, and find them in the
// second-level cache. A piece takes its blocks of rows one after another; what a part of the column
// sums has of the earlier ones is in memory.
template <int kColumns>
struct Piece {
  int problem, block, part, split, step;
  Span span;  // the columns are whole tiles but for the problem's last

  __device__ __forceinline__ explicit Piece(const Arguments& a)
      : index_(static_cast<int>(blockIdx.x)) {
    find(a);
  }
  __device__ __forceinline__ bool there(const Arguments& a) const { return index_ < a.pieces; }
  __device__ __forceinline__ void next(const Arguments& a) {
    if (--steps_left_ > 0) {
      ++step;
      span.row += kBlockRows;
      span.first_row += kBlockRows;
      return;
    }
    index_ += static_cast<int>(gridDim.x);
    find(a);
  }

 private:
  int index_, steps_left_;

  __device__ __forceinline__ void find(const Arguments& a) {
    const auto problems = static_cast<int>(a.pairs.problems);
    const auto rows = static_cast<int>(a.pairs.rows), columns = static_cast<int>(a.pairs.columns);
    block = index_ % a.row_blocks;
    problem = index_ / a.row_blocks % problems;
    const int rest = index_ / a.row_blocks / problems;
    part = rest % a.parts;
    split = rest / a.parts;
    const int row = block * a.row_steps * kBlockRows;
    step = 0;
    steps_left_ = min(a.row_steps, (rows - row + kBlockRows - 1) / kBlockRows);
    const int tiles = (columns + kColumns - 1) / kColumns;
    const int width = (tiles + a.splits - 1) / a.splits;
    const int first = min(split * width, tiles);
    span = {problem * a.pairs.rows + row,
            problem * a.pairs.columns,
            row,
            rows,
            columns,
            first * kColumns,
            min((first + width) * kColumns, columns)};
  }
};

// The place in a ring, and the parity of the phase that a barrier there is in.
struct Turn {
  int slot = 0, parity = 0;
  __device__ __forceinline__ void next(int slots) {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// --- shared memory ---

constexpr int kDataSlots = 2;  // of what belongs to the columns of a tile: one ahead

// Sums of columns on their way from the four warps of a warp group to one number, twice in turn.
struct ColumnScratch {
  float largest[2][kConsumers][4][128], sum[2][kConsumers][4][128];
};

struct Barriers {
  uint64_t x_full, x_empty;
  uint64_t data_full[kDataSlots], data_empty[kDataSlots];
  uint64_t full[kMostSlots], empty[kMostSlots];
};

// One after another: x, the ring of tiles of y, the columns' data, sums of columns, barriers.
template <int kColumns>
struct Memory {
  using Data = ColumnData<kColumns>;
  int x_bytes, ring_bytes, scratch_bytes;

  __host__ __device__ __forceinline__ Memory(int chunks, int slots, bool column_sums)
      : x_bytes(chunks * kXTileBytes),
        ring_bytes(slots * kColumns * kLineBytes),
        scratch_bytes(column_sums ? static_cast<int>(sizeof(ColumnScratch)) : 0) {}
  __host__ __device__ __forceinline__ int data_at() const { return x_bytes + ring_bytes; }
  __host__ __device__ __forceinline__ int scratch_at() const {
    return data_at() + kDataSlots * static_cast<int>(sizeof(Data));
  }
  int bytes() const { return scratch_at() + scratch_bytes + static_cast<int>(sizeof(Barriers)); }

  __device__ __forceinline__ char* x() const { return shared_memory<char>(); }
  __device__ __forceinline__ char* tile(int slot) const {
    return x() + x_bytes + slot * kColumns * kLineBytes;
  }
  __device__ __forceinline__ Data& data(int slot) const {
    return reinterpret_cast<Data*>(x() + data_at())[slot];
  }
  __device__ __forceinline__ ColumnScratch& scratch() const {
    return *reinterpret_cast<ColumnScratch*>(x() + scratch_at());
  }
  __device__ __forceinline__ Barriers& barriers() const {
    return *reinterpret_cast<Barriers*>(x() + scratch_at() + scratch_bytes);
  }
};

}  // namespace fastnce::cuda::sm90
