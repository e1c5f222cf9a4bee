// The kernel of all passes of pairs_sm90.cu: one warp group brings, two multiply.
//
// A block of 128 rows of x stays in shared memory, chunk by chunk of 64 elements; tiles of y,
// kColumns rows of a chunk, go through a ring. A consumer has 64 of the rows. Of each kColumns
// columns it
//   1. makes the similarities S = x y^T, accumulators in registers (kColumns / 2 each), x and y
//   from shared memory;
//   2. turns them there into exponentials or coefficients E, and adds up what sums there are;
//   3. multiplies O += E y with E from registers and the same tiles of y, read across (64
//   accumulators for 2 chunks).
// While one consumer is at 2, the other one's products have the tensor cores.
//
// Registers of a thread for the three, at most: 64 columns and 4 chunks of output take 32 for S, 16
// for E in 16 bits, 128 for O; 128 columns and 2 chunks take 64, 32 and 64. Shared memory of 227
// KiB: x takes 16 KiB a chunk, a slot of the ring 16 KiB (64 columns: 8), which leaves 11 slots at
// depth 128 and 512, where a tile takes 2 and 8 of them, and 16, the most, at 256.
//
// Depths beyond 256 would need 64 x 512 accumulators, more than a warp group's registers: there the
// output's depth is done in two parts, each with similarities of its own: 3 products instead of 2,
// no worse than what else there is: two warp groups that share 64 rows, halves of S exchanged
// through shared memory, make 2 products, but S then is 64 x 32 a time, whose operands' 24 cycles
// of shared memory bound its 16 cycles of products, and each tile of y serves 64 rows instead of
// 128, 32 bytes a cycle from the second-level cache, which gives less. Chunks that the output does
// not need go back to the ring as soon as S has them; the ones that it does need are the last, so
// that the ring turns.
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
  Sums sums;          // of the passes that sum
  Products products;  // of the others: x_product and x_term
  int row_blocks;     // of one problem, with `row_steps` blocks of 128 rows each
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

// --- the warp group that brings what the others multiply ---

// One thread: x and the tiles of y. A copy overwrites what products have read; both are of the same
// proxy, and the barrier is between them, so that no fence is needed.
template <class C>
__device__ __forceinline__ void bring_tiles(const TensorMap& x_map, const TensorMap& y_map,
                                            const Arguments& a, const Memory<C::kColumns>& memory) {
  Barriers& barriers = memory.barriers();
  Turn ring, x;
  for (Piece<C::kColumns> piece(a); piece.there(a); piece.next(a)) {
    const Span& span = piece.span;
    // Chunks go round so that the output's are the last.
    const int first = (piece.part + 1) * C::kOut % a.chunks;
    const auto element = [&](int c) { return (first + c) % a.chunks * kLineElements; };
    barrier_wait(&barriers.x_empty, x.parity ^ 1);
    barrier_arrive_expecting(&barriers.x_full, a.chunks * kXTileBytes);
#pragma unroll 1
    for (int c = 0; c < a.chunks; ++c) {
      copy_tensor(memory.x() + c * kXTileBytes, &x_map, &barriers.x_full, element(c), span.row,
                  piece.problem);
    }
    x.next(1);
    for (int column = span.begin; column < span.end; column += C::kColumns) {
#pragma unroll 1
      for (int c = 0; c < a.chunks; ++c) {
        barrier_wait(&barriers.empty[ring.slot], ring.parity ^ 1);
        barrier_arrive_expecting(&barriers.full[ring.slot], C::kTileBytes);
        copy_tensor(memory.tile(ring.slot), &y_map, &barriers.full[ring.slot], element(c), column,
                    piece.problem);
        ring.next(a.slots);
      }
    }
  }
}

// One warp: what else is known of the columns of a tile, in the background too: one after another,
// loads would take longer than the tile's products. Beyond the last column, zeros.
template <class C>
__device__ __forceinline__ void bring_data(const Arguments& a, const Memory<C::kColumns>& memory) {
  Barriers& barriers = memory.barriers();
  Turn turn;
  for (Piece<C::kColumns> piece(a); piece.there(a); piece.next(a)) {
    const Span& span = piece.span;
    for (int column = span.begin; column < span.end; column += C::kColumns) {
      barrier_wait(&barriers.data_empty[turn.slot], turn.parity ^ 1);
      copy_column_data(memory.data(turn.slot), a.pairs, a.products.y_statistics, span, column,
                       threadIdx.x % kWarp, kWarp);
      copy_async_commit();
      copy_async_wait<0>();
      barrier_arrive(&barriers.data_full[turn.slot]);
      turn.next(kDataSlots);
    }
  }
}

// --- sums of the columns of a tile over the 64 rows of a warp group, in a fixed order ---

// Half of the sums to each of two lanes: kCount values become kCount / 2, of the first half where
// the lane's bit is not set. Three steps over the lanes of a column cost 28 exchanges for 32
// columns, where sums for all would cost 96.
template <int kCount>
__device__ __forceinline__ void share_sums(float (&v)[32], int bit) {
  const bool upper = (static_cast<int>(threadIdx.x) & bit) != 0;
#pragma unroll
  for (int k = 0; k < kCount / 2; ++k) {
    const float keep = upper ? v[k + kCount / 2] : v[k];
    const float give = upper ? v[k] : v[k + kCount / 2];
    v[k] = keep + shuffle_xor(give, bit);
  }
}

// One warp's sums to its line of the scratch, of logits with maxima over its own 16 rows where the
// offset is running, else of exponentials. A thread's share of the columns is 2 n + r for column
// 8 n + 2 t + r.
template <bool kRunning>
__device__ __forceinline__ void sum_columns_of_warp(const float (&tile)[16][4], Offset offset,
                                                    float (&largest)[128], float (&sum)[128]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, t2 = 2 * (lane % 4);
  float v[32];
#pragma unroll
  for (int k = 0; k < 32; ++k) {
    float first = tile[k / 2][k % 2], second = tile[k / 2][k % 2 + 2], top = offset.fixed;
    if constexpr (kRunning) {
      top = over_rows_max(fmaxf(first, second));
      first = exp2_fast(first - finite(top));
      second = exp2_fast(second - finite(top));
    }
    v[k] = first + second;
    if (lane < 4) largest[8 * (k / 2) + t2 + k % 2] = top;
  }
  share_sums<32>(v, 16);
  share_sums<16>(v, 8);
  share_sums<8>(v, 4);
#pragma unroll
  for (int k = 0; k < 4; ++k) sum[8 * (((lane & 28) + k) / 2) + t2 + k % 2] = v[k];
}

// --- the two that multiply ---

// One of two warp groups of consumers.
template <class C>
struct Consumer {
  using T = typename C::T;
  static constexpr int kColumns = C::kColumns, kOut = C::kOut;
  using Tile = float[kColumns / 8][4];
  using Output = float[kOut > 0 ? kOut : 1][8][4];

  const Arguments& a;
  const Memory<kColumns>& memory;
  const int group, warp, lane;  // of the consumers, in the group, in the warp
  Turn ring, data, x;
  int buffer = 0;  // of the scratch for column sums

  // For the warp; its lanes have met.
  __device__ __forceinline__ void arrive(uint64_t* barrier) const {
    if (lane == 0) barrier_arrive(barrier);
  }

  // Adds S to a tile of zeros. At most one chunk's products are on their way when the chunk before
  // it is given back.
  __device__ __forceinline__ void similarities(Tile& s) {
    Barriers& barriers = memory.barriers();
    const int kept = a.chunks - kOut;  // the first chunk that the output needs
    uint64_t* last = nullptr;
    pin(s);
    for (int c = 0; c < a.chunks; ++c) {
      barrier_wait(&barriers.full[ring.slot], ring.parity);
      const uint64_t x_rows =
          tile_descriptor(memory.x() + c * kXTileBytes + group * 64 * kLineBytes);
      const uint64_t y_rows = tile_descriptor(memory.tile(ring.slot));
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma_tiles<T, kColumns>(s, x_rows + 2 * k, y_rows + 2 * k);
      }
      wgmma_commit();
      if (c > 0) {
        wgmma_wait<1>();
        if (c <= kept) arrive(last);
      }
      last = &barriers.empty[ring.slot];
      ring.next(a.slots);
    }
    wgmma_wait<0>();
    pin(s);
    if (kOut == 0) arrive(last);
  }

  // O += E y from the last kOut slots, which are then given back.
  __device__ __forceinline__ void multiply(Output& o, Factor<kColumns / 8>& e) {
    const auto slot = [&](int c) {
      const int at = ring.slot - kOut + c;
      return at < 0 ? at + a.slots : at;
    };
#pragma unroll
    for (int c = 0; c < kOut; ++c) pin(o[c]);
    pin(e);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kOut; ++c) {
      const uint64_t tile = tile_descriptor(memory.tile(slot(c)));
#pragma unroll
      for (int k = 0; k < kColumns / 16; ++k) wgmma_registers<T>(o[c], e[k], tile + 128 * k);
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int c = 0; c < kOut; ++c) {
      pin(o[c]);
      arrive(&memory.barriers().empty[slot(c)]);
    }
  }

  // Calls body(tile of products, first column, column data, factor) for each tile of the columns,
  // which fills the factor of y, if there is an output.
  template <class Body>
  __device__ __forceinline__ void for_each_tile(const Span& span, Output& o, Body body) {
    Barriers& barriers = memory.barriers();
    barrier_wait(&barriers.x_full, x.parity);
    for (int column = span.begin; column < span.end; column += kColumns) {
      Tile s = {};
      similarities(s);
      barrier_wait(&barriers.data_full[data.slot], data.parity);
      Factor<kColumns / 8> factor;
      body(s, column, memory.data(data.slot), factor);
      sync_warp();  // all lanes have read the data
      arrive(&barriers.data_empty[data.slot]);
      data.next(kDataSlots);
      if constexpr (kOut > 0) multiply(o, factor);
    }
    arrive(&barriers.x_empty);
    x.next(1);
  }

  __device__ __forceinline__ void store_output(const Output& o, float* to, const ThreadRows& rows,
                                               const Span& span, const Piece<kColumns>& piece,
                                               float factor) const {
    const auto depth = static_cast<int>(a.pairs.depth);
    const int first = piece.part * kOut * kLineElements + 2 * (lane % 4);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (rows.row[h] >= span.rows) continue;
      float* line = to + (first_row_of(piece) + rows.at(span, h)) * depth;
#pragma unroll
      for (int c = 0; c < kOut; ++c) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int d = first + c * kLineElements + 8 * i;
          if (d >= depth) continue;
          *reinterpret_cast<float2*>(line + d) =
              make_float2(o[c][i][2 * h] * factor, o[c][i][2 * h + 1] * factor);
        }
      }
    }
  }
  __device__ __forceinline__ int64_t first_row_of(const Piece<kColumns>& piece) const {
    return piece.split * a.pairs.problems * a.pairs.rows;
  }

  static __device__ __forceinline__ void clear(Output& o) {
#pragma unroll
    for (auto& chunk : o) {
#pragma unroll
      for (auto& four : chunk) {
#pragma unroll
        for (float& value : four) value = 0.0f;
      }
    }
  }

  // The two warp groups of a block have parts of their own: neither waits for the other.
  template <bool kRunning>
  __device__ __forceinline__ void add_columns(const Tile& tile, Offset offset, const Span& span,
                                              const Piece<kColumns>& piece, int column) {
    ColumnScratch& scratch = memory.scratch();
    auto& largest = scratch.largest[buffer][group];
    auto& sum = scratch.sum[buffer][group];
    sum_columns_of_warp<kRunning>(tile, offset, largest[warp], sum[warp]);
    sync_named(1 + group, kWarpGroup);
    const int mine = warp * kWarp + lane;
    if (column + mine < span.columns && span.row + 64 * group < span.rows) {
      const int64_t part = piece.block * kConsumers + group;
      const int64_t at = part * a.pairs.problems * span.columns + span.first_column + column + mine;
      store_column(largest, sum, 4, mine, a.sums, at, piece.step > 0);
    }
    buffer ^= 1;  // whoever writes there next has met those who read here
  }

  __device__ __forceinline__ void sum() {
    const double temperature = value_of(a.pairs.temperature);
    const Offset offset = offset_of(a.pairs, temperature);
    for (Piece<kColumns> piece(a); piece.there(a); piece.next(a)) {
      const Span& span = piece.span;
      const ThreadRows rows = rows_of_thread(a.pairs, span, 4 * group + warp, temperature);
      RowSums sums(offset, kOut > 0 && a.sums.term != nullptr && piece.part == 0);
      LabelSums labels(a.pairs.kind, offset);
      Output o;
      clear(o);
      for_each_tile(span, o,
                    [&](Tile& tile, int column, const ColumnData<kColumns>& values,
                        Factor<kColumns / 8>& factor) {
                      to_logits(tile, values, rows, span, column, a.pairs.kind);
                      float shrink[2];
                      if constexpr (kOut == 0) {
                        if (a.pairs.x_labels != nullptr) labels.add(tile, values, rows);
                        const bool columns = a.column_sums();
                        if (columns && offset.running)
                          add_columns<true>(tile, offset, span, piece, column);
                        sums.add(tile, shrink);
                        if (columns && !offset.running)
                          add_columns<false>(tile, offset, span, piece, column);
                      } else {
                        sums.add(tile, shrink);
                        if (!(shrink[0] == 1.0f && shrink[1] == 1.0f)) {  // a new maximum is rare
#pragma unroll
                          for (auto& chunk : o) {
#pragma unroll
                            for (auto& four : chunk) {
#pragma unroll
                              for (int i = 0; i < 4; ++i) four[i] *= shrink[i / 2];
                            }
                          }
                        }
                        scale_columns<T>(factor, tile, values.scale);
                      }
                    });
      if (piece.part == 0) sums.store(a.sums, rows, span, first_row_of(piece));
      if constexpr (kOut > 0) {
        store_output(o, a.sums.product, rows, span, piece, 1.0f);
      } else if (a.pairs.x_labels != nullptr) {
        labels.store(a.sums, rows, span, first_row_of(piece));
      }
    }
  }

  __device__ __forceinline__ void weigh() {
    const double temperature = value_of(a.pairs.temperature);
    const float scale = coefficient_scale(a.pairs.dtype);
    for (Piece<kColumns> piece(a); piece.there(a); piece.next(a)) {
      const Span& span = piece.span;
      const ThreadRows rows = rows_of_thread(a.pairs, span, 4 * group + warp, temperature);
      const bool with_term = a.products.x_term != nullptr && piece.part == 0;
      Coefficients coefficients(a.pairs, a.products, span, rows, with_term);
      Output o;
      clear(o);
      for_each_tile(span, o,
                    [&](Tile& tile, int column, const ColumnData<kColumns>& values,
                        Factor<kColumns / 8>& factor) {
                      to_logits(tile, values, rows, span, column, a.pairs.kind);
                      coefficients.template find<T>(factor, tile, values, rows, {scale, scale});
                    });
      if (with_term) {
        coefficients.store_term(a.products.x_term, rows, span, first_row_of(piece));
      }
      store_output(o, a.products.x_product, rows, span, piece, 1.0f / scale);
    }
  }
};

__device__ __forceinline__ void init_barriers(Barriers& b, int slots) {
  barrier_init(&b.x_full, 1);
  barrier_init(&b.x_empty, kConsumerWarps);
  for (int i = 0; i < kDataSlots; ++i) {
    barrier_init(&b.data_full[i], kWarp);
    barrier_init(&b.data_empty[i], kConsumerWarps);
  }
  for (int i = 0; i < slots; ++i) {
    barrier_init(&b.full[i], 1);
    barrier_init(&b.empty[i], kConsumerWarps);
  }
  barrier_init_done();
}

// Registers of a thread. The pool that the warp groups share is what the block was launched with:
// as many for each thread as the compiler may use, a multiple of 8. A claim beyond it waits for
// ever (PTX ISA, "setmaxnreg").
constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
              (1 + kConsumers) * kLaunchRegisters);

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    pairs_kernel(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map,
                 const __grid_constant__ Arguments a) {
#ifdef FASTNCE_SM90A
  const Memory<C::kColumns> memory(a.chunks, a.slots, a.column_sums());
  const auto thread = static_cast<int>(threadIdx.x);
  if (thread == 0) init_barriers(memory.barriers(), a.slots);
  sync_threads();
  if (thread < kWarpGroup) {
    release_registers<kProducerRegisters>();
    if (thread == 0) bring_tiles<C>(x_map, y_map, a, memory);
    if (thread / kWarp == 1) bring_data<C>(a, memory);
  } else {
    claim_registers<kConsumerRegisters>();
    Consumer<C> consumer{a, memory, thread / kWarpGroup - 1, thread / kWarp % 4, thread % kWarp};
    if constexpr (C::kPass == Pass::kProducts) {
      consumer.weigh();
    } else {
      consumer.sum();
    }
  }
#endif
}

}  // namespace fastnce::cuda::sm90
