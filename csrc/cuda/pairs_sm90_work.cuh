// How the passes of pairs_sm90.cu are cut into pieces of work, and what lies where in shared
// memory.
#pragma once

#include "device_sm90.cuh"
#include "pairs.h"

namespace fastnce::cuda::sm90 {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

constexpr int kConsumers = 2;  // warp groups, each with 64 rows
constexpr int kConsumerWarps = kConsumers * 4;
constexpr int kThreads = (kConsumers + 1) * kWarpGroup;
constexpr int kBlockRows = kConsumers * 64;
constexpr int kXTileBytes = kBlockRows * kLineBytes;  // 64 elements of each row
constexpr int kMostSlots = 16;
constexpr int kSharedBytes = 227 * 1024;

enum class Pass { kSums, kSumsWithProduct, kProducts };

// kOut chunks of the output's depth; 0 without product. 128 columns, or 64 where the output takes
// 96 registers or more.
template <class T_, Pass kPass_, int kOut_>
struct Config {
  using T = T_;
  static constexpr Pass kPass = kPass_;
  static constexpr int kOut = kOut_, kColumns = kOut_ > 2 ? 64 : 128;
  static constexpr int kTileBytes = kColumns * kLineBytes;
  // float16 has too few small numbers for the weights of many columns; weights are at most 1.
  static constexpr float kScale =
      kPass_ == Pass::kProducts && std::is_same_v<T_, float16> ? 1024.0f : 1.0f;
};

// What a tile of columns needs besides y; slots of two tiles, so that one is loaded ahead.
constexpr int kColumnSlots = 2;
template <int kColumns>
struct alignas(16) ColumnValues {
  float scale[kColumns], lse[kColumns], weight[kColumns], third[kColumns];
  int64_t label[kColumns];
};

// Sums of columns on their way from the four warps of a warp group to one number, twice in turn.
template <int kColumns>
struct ColumnSums {
  float largest[2][kConsumers][4][kColumns], sum[2][kConsumers][4][kColumns];
};

struct Barriers {
  uint64_t x_full, x_empty;
  uint64_t values_full[kColumnSlots], values_empty[kColumnSlots];
  uint64_t full[kMostSlots], empty[kMostSlots];
};

// Rows and columns are those of one problem unless said otherwise.
struct Arguments {
  const float *x_scale, *y_scale;
  const int64_t *x_labels, *y_labels;
  int rows, columns, problems, depth;
  Kind kind;
  bool fixed_offset;  // where the temperature allows it
  Temperature temperature;
  int row_blocks, splits, work;  // `work` pieces, see below
  int parts;                     // of the depth of the product, each with similarities of its own
  int chunks;                    // of 64 elements, in a row
  int slots;                     // of the ring of tiles of y
  Sums sums;
  // Products:
  const float *x_statistics, *y_statistics;
  float *product, *term;
};

// Where the regions of shared memory begin: x, the ring, values of columns, sums of columns,
// barriers.
template <int kColumns>
struct Layout {
  int x_bytes, ring_bytes;
  __host__ __device__ explicit Layout(int chunks, int slots)
      : x_bytes(chunks * kXTileBytes), ring_bytes(slots * kColumns * kLineBytes) {}
  __host__ __device__ int values() const { return x_bytes + ring_bytes; }
  __host__ __device__ int column_sums() const {
    return values() + kColumnSlots * static_cast<int>(sizeof(ColumnValues<kColumns>));
  }
  __host__ __device__ int barriers(bool sums) const {
    return column_sums() + (sums ? static_cast<int>(sizeof(ColumnSums<kColumns>)) : 0);
  }
  __host__ __device__ int bytes(bool sums) const {
    return barriers(sums) + static_cast<int>(sizeof(Barriers));
  }
};

// One piece: a block of rows of a problem, a part of its columns, and a part of the product's
// depth. Neighbouring pieces, which run at the same time, have the columns in common, and find them
// in the second-level cache.
struct Work {
  int problem, row, split, part, first_tile, last_tile;
};
template <int kColumns>
__device__ __forceinline__ Work work_at(const Arguments& a, int index) {
  const int block = index % a.row_blocks;
  index /= a.row_blocks;
  const int problem = index % a.problems;
  index /= a.problems;
  const int part = index % a.parts, split = index / a.parts;
  const int tiles = (a.columns + kColumns - 1) / kColumns;
  const int steps = (tiles + a.splits - 1) / a.splits;
  const int first = min(split * steps, tiles);
  return {problem, block * kBlockRows, split, part, first, min(first + steps, tiles)};
}

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

struct Shared {
  char *x, *tiles, *values, *column_sums;
  Barriers* barriers;
};
template <class C>
__device__ __forceinline__ Shared shared_of(const Arguments& a) {
  const Layout<C::kColumns> layout(a.chunks, a.slots);
  char* base = shared_memory<char>();
  const bool sums = a.sums.column_sum != nullptr;
  return {base, base + layout.x_bytes, base + layout.values(), base + layout.column_sums(),
          reinterpret_cast<Barriers*>(base + layout.barriers(sums))};
}

__device__ __forceinline__ void init_barriers(Barriers& b, int slots) {
  barrier_init(&b.x_full, 1);
  barrier_init(&b.x_empty, kConsumerWarps);
  for (int i = 0; i < kColumnSlots; ++i) {
    barrier_init(&b.values_full[i], kWarp);
    barrier_init(&b.values_empty[i], kConsumerWarps);
  }
  for (int i = 0; i < slots; ++i) {
    barrier_init(&b.full[i], 1);
    barrier_init(&b.empty[i], kConsumerWarps);
  }
  barrier_init_done();
}

}  // namespace fastnce::cuda::sm90
