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
// Depths beyond 256 would need 64 x 512 accumulators, more than a warp group's registers: there the
// output's depth is done in two parts, each with similarities of its own: 3 products instead of 2,
// no worse than what else there is: two warp groups that share 64 rows, halves of S exchanged
// through shared memory, make 2 products, but S then is 64 x 32 a time, whose operands' 24 cycles
// of shared memory bound its 16 cycles of products, and each tile of y serves 64 rows instead of
// 128, 32 bytes a cycle from the second-level cache, which gives less. Chunks that the output does
// not need go back to the ring as soon as S has them; the ones that it does need are the last, so
// that the ring turns.
#pragma once

#include "pairs_sm90_columns.cuh"
#include "pairs_sm90_producer.cuh"

namespace fastnce::cuda::sm90 {

// One of two warp groups of consumers.
template <class C>
struct Consumer {
  using T = typename C::T;
  static constexpr int kColumns = C::kColumns, kOut = C::kOut;
  static constexpr bool kSumming = C::kPass != Pass::kProducts;

  const Arguments& a;
  const Shared& shared;
  const int group, warp, in_warp;  // group of consumers, warp in it, lane
  Turn ring, values, x;
  int buffer = 0;  // of column sums

  __device__ __forceinline__ void arrive(uint64_t* barrier) const {
    if (in_warp == 0) barrier_arrive(barrier);
  }

  __device__ __forceinline__ int64_t output_row(const Work& work, int row) const {
    return (int64_t{work.split} * a.problems + work.problem) * a.rows + row;
  }

  __device__ __forceinline__ Lane lane_at(const Work& work, double temperature) const {
    Lane lane;
    lane.t = in_warp % 4;
    lane.first = work.row + 64 * group + 16 * warp + in_warp / 4;
    lane.end = a.rows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t at = int64_t{work.problem} * a.rows + lane.row(h);
      lane.scale[h] = lane.inside(h) ? to_base_2(a.x_scale[at], temperature) : 0.0f;
      lane.label[h] = lane.inside(h) && a.x_labels != nullptr ? a.x_labels[at] : 0;
    }
    return lane;
  }

  __device__ __forceinline__ Statistics statistics_at(const Work& work, const Lane& lane) const {
    Statistics out;
    const int64_t all = int64_t{a.problems} * a.rows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (a.x_statistics == nullptr || !lane.inside(h)) continue;
      const float* from = a.x_statistics + int64_t{work.problem} * a.rows + lane.row(h);
      out.lse[h] = from[0] * kLog2E;
      out.weight[h] = from[all];
      out.third[h] = from[2 * all] * (a.kind == Kind::kTwoC ? kLog2E : 1.0f);
    }
    return out;
  }

  // S of a tile. At most one chunk's products are on their way when the chunk before it is given
  // back.
  __device__ __forceinline__ void similarities(float (&s)[kColumns / 2]) {
    const int held = a.chunks - kOut;  // the first chunk that is kept for the output
    const char* x_tiles = shared.x + group * 64 * kLineBytes;
    uint64_t* last = nullptr;
    for (int c = 0; c < a.chunks; ++c) {
      barrier_wait(&shared.barriers->full[ring.slot], ring.parity);
      const uint64_t rows = tile_descriptor(x_tiles + c * kXTileBytes);
      const uint64_t columns = tile_descriptor(shared.tiles + ring.slot * C::kTileBytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma_tiles<T, kColumns>(s, rows + 2 * k, columns + 2 * k, c + k > 0);
      }
      wgmma_commit();
      if (c > 0) {
        wgmma_wait<1>();
        if (c <= held) arrive(last);
      }
      last = &shared.barriers->empty[ring.slot];
      ring.next(a.slots);
    }
    wgmma_wait<0>();
    pin(s);
    if (kOut == 0) arrive(last);
  }

  // O += E y from the last kOut slots, which are then given back.
  __device__ __forceinline__ void product(float (&o)[kOut > 0 ? kOut : 1][32],
                                          const uint32_t (&p)[kColumns / 16][4]) {
    if constexpr (kOut > 0) {
      const auto slot = [&](int c) {
        const int at = ring.slot - kOut + c;
        return at < 0 ? at + a.slots : at;
      };
#pragma unroll
      for (int c = 0; c < kOut; ++c) pin(o[c]);
      wgmma_fence();
#pragma unroll
      for (int c = 0; c < kOut; ++c) {
        const uint64_t tile = tile_descriptor(shared.tiles + slot(c) * C::kTileBytes);
#pragma unroll
        for (int k = 0; k < kColumns / 16; ++k) wgmma_registers<T>(o[c], p[k], tile + 128 * k);
      }
      wgmma_commit();
      wgmma_wait<0>();
#pragma unroll
      for (int c = 0; c < kOut; ++c) {
        pin(o[c]);
        arrive(&shared.barriers->empty[slot(c)]);
      }
    }
  }

  // Both warp groups of a block write parts of their own: neither waits for the other.
  __device__ __forceinline__ void store_columns(const ColumnSums<kColumns>& sums, const Work& work,
                                                int tile) {
    if constexpr (kOut == 0) {
      sync_named(1 + group, kWarpGroup);
      const int at = warp * kWarp + in_warp, column = tile * kColumns + at;
      const int part = work.row / 64 + group;
      if (column < a.columns && part * 64 < a.rows) {
        const float2 joined = join_warps(sums.largest[buffer][group], sums.sum[buffer][group], at);
        const int64_t to = (int64_t{part} * a.problems + work.problem) * a.columns + column;
        a.sums.column_largest[to] = joined.x;
        a.sums.column_sum[to] = joined.y;
      }
      buffer ^= 1;
    }
  }

  __device__ __forceinline__ void store_product(const float (&o)[kOut > 0 ? kOut : 1][32],
                                                const Work& work, const Lane& lane, float* out) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!lane.inside(h)) continue;
      const int64_t row = output_row(work, lane.row(h));
#pragma unroll
      for (int c = 0; c < kOut; ++c) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int d = (work.part * kOut + c) * kLineElements + 8 * i + 2 * lane.t;
          if (d >= a.depth) continue;
          *reinterpret_cast<float2*>(out + row * a.depth + d) = make_float2(
              o[c][4 * i + 2 * h] * (1 / C::kScale), o[c][4 * i + 2 * h + 1] * (1 / C::kScale));
        }
      }
    }
  }

  __device__ __forceinline__ void store_sums(const RowSums& sums, const Work& work,
                                             const Lane& lane, bool running, float offset) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = quad_sum(sums.sum[h]), term = quad_sum(sums.term[h]);
      const float label_a = quad_sum(sums.label_a[h]), label_b = quad_sum(sums.label_b[h]);
      if (!lane.inside(h) || lane.t != 0) continue;
      const int64_t at = output_row(work, lane.row(h));
      a.sums.largest[at] = running ? sums.top[h].largest : offset;
      a.sums.sum[at] = total;
      if (a.sums.term != nullptr) a.sums.term[at] = term * kLn2;
      if (kOut > 0 || a.x_labels == nullptr) continue;
      const float label_top = running ? sums.label_top[h].largest : offset;
      a.sums.label_a[at] = a.kind == Kind::kSupCon ? label_a * kLn2 : label_top;
      a.sums.label_b[at] = label_b;
    }
  }

  __device__ __forceinline__ void run() {
    const double temperature = read_temperature(a.temperature);
    const auto inverse = static_cast<float>(1 / temperature);
    const bool running = !a.fixed_offset || !(inverse <= kLargestFixedLogit);
    const float offset = fmaxf(inverse - kExponentTop, 0.0f) * kLog2E;
    const bool with_columns = kOut == 0 && a.sums.column_sum != nullptr;
    for (int index = blockIdx.x; index < a.work; index += gridDim.x) {
      const Work work = work_at<kColumns>(a, index);
      const Lane lane = lane_at(work, temperature);
      const Statistics statistics = kSumming ? Statistics{} : statistics_at(work, lane);
      RowSums sums;
      float o[kOut > 0 ? kOut : 1][32];
#pragma unroll
      for (auto& chunk : o) {
#pragma unroll
        for (float& value : chunk) value = 0.0f;
      }
      barrier_wait(&shared.barriers->x_full, x.parity);
      for (int tile = work.first_tile; tile < work.last_tile; ++tile) {
        float s[kColumns / 2];
        similarities(s);
        barrier_wait(&shared.barriers->values_full[values.slot], values.parity);
        const auto& columns =
            reinterpret_cast<const ColumnValues<kColumns>*>(shared.values)[values.slot];
        const int first = tile * kColumns, row = work.row + 64 * group;
        const bool without_own = a.kind != Kind::kQueue;
        const bool on_diagonal = without_own && first < row + 64 && row < first + kColumns;
        const bool whole = first + kColumns <= a.columns && row + 64 <= a.rows && !on_diagonal;
        to_logits<kColumns>(s, lane, columns, first, a.columns, whole, without_own);
        if constexpr (kSumming) {
          auto& column_sums = *reinterpret_cast<ColumnSums<kColumns>*>(shared.column_sums);
          if (kOut == 0 && a.x_labels != nullptr) {
            add_labels<kColumns>(sums, s, lane, columns, a.kind, running, offset);
          }
          float shrink[2];
          if constexpr (kOut == 0) {
            const WarpColumns by_warp{column_sums.largest[buffer][group][warp],
                                      column_sums.sum[buffer][group][warp]};
            if (with_columns && running) by_warp.from_logits(s, lane);
            to_exponentials<kColumns>(s, sums, running, offset, a.sums.term != nullptr, shrink);
            if (with_columns && !running) by_warp.from_exponentials(s, offset, lane);
            if (with_columns) store_columns(column_sums, work, tile);
          } else {
            to_exponentials<kColumns>(s, sums, running, offset, a.sums.term != nullptr, shrink);
            if (running) {
#pragma unroll
              for (auto& chunk : o) {
#pragma unroll
                for (int i = 0; i < 32; ++i) chunk[i] *= shrink[i / 2 % 2];
              }
            }
          }
        } else {
          to_coefficients<kColumns>(s, lane, columns, statistics, a.kind, a.x_statistics != nullptr,
                                    a.y_statistics != nullptr, a.term != nullptr, sums.term);
        }
        uint32_t p[kColumns / 16][4];
        pin(s);  // the columns' scales are read again: there are no registers to keep them
        if constexpr (kOut > 0) pack_factor<T, kColumns>(p, s, lane, columns, C::kScale);
        sync_warp();  // all lanes have read the values
        arrive(&shared.barriers->values_empty[values.slot]);
        values.next(kColumnSlots);
        product(o, p);
      }
      arrive(&shared.barriers->x_empty);
      x.next(1);
      finish(work, lane, sums, o, running, offset);
    }
  }

  __device__ __forceinline__ void finish(const Work& work, const Lane& lane, const RowSums& sums,
                                         const float (&o)[kOut > 0 ? kOut : 1][32], bool running,
                                         float offset) {
    if constexpr (kSumming) {
      if (work.part == 0) store_sums(sums, work, lane, running, offset);
      if (kOut > 0) store_product(o, work, lane, a.sums.product);
    } else {
      store_product(o, work, lane, a.product);
      if (a.term == nullptr || work.part != 0) return;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float term = quad_sum(sums.term[h]);
        if (!lane.inside(h) || lane.t != 0) continue;
        a.term[output_row(work, lane.row(h))] = term * kLn2;
      }
    }
  }
};

// 32 registers for a thread that copies, 240 for one that multiplies: 128 x 32 + 256 x 240 = 65536.
template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    pairs_kernel(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map,
                 const __grid_constant__ Arguments a) {
#ifdef FASTNCE_SM90A
  const Shared shared = shared_of<C>(a);
  const auto thread = static_cast<int>(threadIdx.x);
  if (thread == 0) init_barriers(*shared.barriers, a.slots);
  sync_threads();
  if (thread < kWarpGroup) {
    release_registers<32>();
    if (thread == 0) bring_tiles<C>(x_map, y_map, a, shared);
    if (thread / kWarp == 1) bring_values<C>(a, shared);
  } else {
    claim_registers<240>();
    Consumer<C>{a, shared, thread / kWarpGroup - 1, thread / kWarp % 4, thread % kWarp}.run();
  }
#endif
}

}  // namespace fastnce::cuda::sm90
