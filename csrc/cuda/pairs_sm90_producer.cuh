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
      ColumnData<C::kColumns>& data = memory.data(turn.slot);
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x) % kWarp; i < C::kColumns; i += kWarp) {
        const int64_t at = span.first_column + column + i;
        const bool there = column + i < span.columns;
        copy_async<4>(&data.scale[i], a.pairs.y_scale + at, there);
        if (a.pairs.y_labels != nullptr) {
          copy_async<8>(&data.label[i], a.pairs.y_labels + at, there);
        }
        if (a.products.y_statistics == nullptr) continue;
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          copy_async<4>(&data.statistics[k][i], a.products.y_statistics + k * a.all_columns + at,
                        there);
        }
      }
      copy_async_commit();
      copy_async_wait<0>();
      barrier_arrive(&barriers.data_full[turn.slot]);
      turn.next(kDataSlots);
    }
  }
}

}  // namespace fastnce::cuda::sm90
