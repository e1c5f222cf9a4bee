// The warp group that brings what the others multiply.
#pragma once

#include "pairs_sm90_work.cuh"

namespace fastnce::cuda::sm90 {

// One thread: x and the tiles of y. A copy overwrites what products have read; both are of the same
// proxy, and the barrier is between them, so that no fence is needed.
template <class C>
__device__ __forceinline__ void bring_tiles(const TensorMap& x_map, const TensorMap& y_map,
                                            const Arguments& a, const Shared& shared) {
  Barriers& barriers = *shared.barriers;
  Turn ring, x;
  for (int index = blockIdx.x; index < a.work; index += gridDim.x) {
    const Work work = work_at<C::kColumns>(a, index);
    // Chunks go round so that the output's are the last.
    const int first = (work.part + 1) * C::kOut % a.chunks;
    const auto element = [&](int c) { return (first + c) % a.chunks * kLineElements; };
    barrier_wait(&barriers.x_empty, x.parity ^ 1);
    barrier_arrive_expecting(&barriers.x_full, a.chunks * kXTileBytes);
#pragma unroll 1
    for (int c = 0; c < a.chunks; ++c) {
      copy_tensor(shared.x + c * kXTileBytes, &x_map, &barriers.x_full, element(c), work.row,
                  work.problem);
    }
    x.next(1);
    for (int tile = work.first_tile; tile < work.last_tile; ++tile) {
#pragma unroll 1
      for (int c = 0; c < a.chunks; ++c) {
        barrier_wait(&barriers.empty[ring.slot], ring.parity ^ 1);
        barrier_arrive_expecting(&barriers.full[ring.slot], C::kTileBytes);
        copy_tensor(shared.tiles + ring.slot * C::kTileBytes, &y_map, &barriers.full[ring.slot],
                    element(c), tile * C::kColumns, work.problem);
        ring.next(a.slots);
      }
    }
  }
}

// A warp copies what there is of kCount values, times `unit`; zeros beyond.
template <int kCount, class Value>
__device__ __forceinline__ void bring(Value* to, const Value* from, int there, Value unit) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 2
  for (int i = 0; i < kCount; i += kWarp) {
    to[i + lane] = i + lane < there ? from[i + lane] * unit : Value{0};
  }
}

// One warp: what else is known of the columns of a tile. Beyond the last, zeros.
template <class C>
__device__ __forceinline__ void bring_values(const Arguments& a, const Shared& shared) {
  constexpr int kColumns = C::kColumns;
  auto* slots = reinterpret_cast<ColumnValues<kColumns>*>(shared.values);
  const int64_t all = static_cast<int64_t>(a.problems) * a.columns;
  const float third_unit = a.kind == Kind::kTwoC ? kLog2E : 1.0f;
  Turn turn;
  for (int index = blockIdx.x; index < a.work; index += gridDim.x) {
    const Work work = work_at<kColumns>(a, index);
    for (int tile = work.first_tile; tile < work.last_tile; ++tile) {
      const int left = a.columns - tile * kColumns;
      const int64_t at = static_cast<int64_t>(work.problem) * a.columns + tile * kColumns;
      barrier_wait(&shared.barriers->values_empty[turn.slot], turn.parity ^ 1);
      ColumnValues<kColumns>& out = slots[turn.slot];
      bring<kColumns>(out.scale, a.y_scale + at, left, 1.0f);
      if (a.y_labels != nullptr) bring<kColumns>(out.label, a.y_labels + at, left, int64_t{1});
      if (a.y_statistics != nullptr) {
        const float* from = a.y_statistics + at;
        bring<kColumns>(out.lse, from, left, kLog2E);
        bring<kColumns>(out.weight, from + all, left, 1.0f);
        bring<kColumns>(out.third, from + 2 * all, left, third_unit);
      }
      barrier_arrive(&shared.barriers->values_full[turn.slot]);
      turn.next(kColumnSlots);
    }
  }
}

}  // namespace fastnce::cuda::sm90
