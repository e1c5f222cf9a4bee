// The warp group that brings what the others multiply.
#pragma once

#include "pairs_sm90_work.cuh"

namespace fastnce::cuda::sm90 {

// One thread: x and the tiles of y. A copy overwrites what products have read; both are of the same
// proxy, and the barrier is between them, so that no fence is needed.
template <class C>
__device__ __forceinline__ void bring_tiles(const TensorMap& x_map, const TensorMap& y_map,
                                            const Arguments& a, const Memory<C::kColumns>& memory) {
  Barriers& barriers = memory.barriers();
  Turn ring, x;
  for (Piece<C::kColumns> piece(a); piece.there(a); piece.next(a)) {
    const Span span = piece.span(a);
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

// A warp copies what there is of kCount values; zeros beyond.
template <int kCount, class Value>
__device__ __forceinline__ void bring(Value (&to)[kCount], const Value* from, int there) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 2
  for (int i = 0; i < kCount; i += kWarp) {
    to[i + lane] = i + lane < there ? from[i + lane] : Value{0};
  }
}

// One warp: what else is known of the columns of a tile.
template <class C>
__device__ __forceinline__ void bring_data(const Arguments& a, const Memory<C::kColumns>& memory) {
  Barriers& barriers = memory.barriers();
  const int64_t total = a.pairs.problems * a.pairs.columns;
  const float* statistics = a.products.y_statistics;
  Turn turn;
  for (Piece<C::kColumns> piece(a); piece.there(a); piece.next(a)) {
    const Span span = piece.span(a);
    for (int column = span.begin; column < span.end; column += C::kColumns) {
      barrier_wait(&barriers.data_empty[turn.slot], turn.parity ^ 1);
      ColumnData<C::kColumns>& data = memory.data(turn.slot);
      const int64_t at = span.first_column + column;
      const int there = span.columns - column;
      bring(data.scale, a.pairs.y_scale + at, there);
      if (a.pairs.y_labels != nullptr) bring(data.label, a.pairs.y_labels + at, there);
      if (statistics != nullptr) {
#pragma unroll
        for (int i = 0; i < 3; ++i) bring(data.statistics[i], statistics + i * total + at, there);
      }
      barrier_arrive(&barriers.data_full[turn.slot]);
      turn.next(kDataSlots);
    }
  }
}

}  // namespace fastnce::cuda::sm90
