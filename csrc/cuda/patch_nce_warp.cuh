// What a warp of patch_nce does between the tiles of columns that its block loads.
#pragma once

#include "patch_nce_block.cuh"

namespace fastnce::cuda {

// The work of one warp: its 16 rows, of which a lane has two, with its share of the columns.
template <class S>
struct Warp {
  using P = typename S::P;
  Products<P, S::kDepth> products;
  float total[S::kDepth / 8][4] = {};  // sum of exp times x^
  float largest[2], sum[2], term[2];  // of this lane's columns; the maximum is of all of the warp's
  float scale[2];                     // from x' . y^ to a logit to base 2
  int lane, split, row;               // of the block: the first of the two, the other is 8 behind

  __device__ __forceinline__ void start(const Shared<S>& shared, float constant, float to_logit) {
    lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    split = warp / S::kRowTiles;
    row = warp % S::kRowTiles * 16 + lane / 4;
    products.load(shared.rows + warp % S::kRowTiles * 16 * S::kRowPitch, lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // The constant logit is one column of the first warp.
      largest[h] = split == 0 ? constant : -INFINITY;
      sum[h] = split == 0 && lane % 4 == 0 ? 1.0f : 0.0f;
      term[h] = sum[h] * constant;
      scale[h] = shared.row_scales.unit[row + 8 * h] * to_logit;
    }
  }

  // This warp's columns of a tile that begins at the column `begin`.
  __device__ __forceinline__ void step(Shared<S>& shared, const P* tile, int begin) {
    const Problem& problem = shared.problem;
    const float* const lse = problem.column_lse;
    const int columns = problem.columns, first = problem.first;
    const P* y = tile + 16 * split * S::kRowPitch;
    float z[2][4] = {};
    products.similarities(z, y, lane);
    float unit[2][2];
    float top[2] = {largest[0], largest[1]};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int in_tile = 16 * split + 8 * n + 2 * (lane % 4) + i % 2, h = i / 2;
        const int column = begin + in_tile;
        unit[n][i % 2] = shared.column_scales.unit[in_tile];
        z[n][i] *= scale[h] * unit[n][i % 2];
        const bool own = column == first + row + 8 * h;
        if (own) shared.positive[row + 8 * h] = z[n][i];
        if (own || column >= columns) z[n][i] = -INFINITY;
        top[h] = fmaxf(top[h], z[n][i]);
      }
    }
    if (lse == nullptr) move_maximum(top);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int h = i / 2, column = begin + 16 * split + 8 * n + 2 * (lane % 4) + i % 2;
        const float offset = lse == nullptr ? top[h] : column < columns ? lse[column] : 0.0f;
        const float e = exp2_fast(z[n][i] - offset);
        sum[h] += e;
        term[h] += z[n][i] == -INFINITY ? 0.0f : e * z[n][i];
        z[n][i] = e * unit[n][i % 2];
      }
    }
    if (problem.layer.gradient != nullptr) products.accumulate(total, z, y, lane);
  }

  // To the maximum over the lanes that have a row; `top` becomes a finite stand-in for it.
  __device__ __forceinline__ void move_maximum(float (&top)[2]) {
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = fmaxf(top[h], shuffle_xor(top[h], 1));
      top[h] = fmaxf(top[h], shuffle_xor(top[h], 2));
      const float old = largest[h];
      largest[h] = top[h];
      if (top[h] == -INFINITY) top[h] = 0;
      shrink[h] = exp2_fast(old - top[h]);
      sum[h] *= shrink[h];
      term[h] *= shrink[h];
    }
    if (ballot(shrink[0] != 1 || shrink[1] != 1) == 0) return;
#pragma unroll
    for (auto& tile : total) {
#pragma unroll
      for (int i = 0; i < 4; ++i) tile[i] *= shrink[i / 2];
    }
  }

  // Sums over the lanes that have a row, into shared memory.
  __device__ __forceinline__ void finish(Shared<S>& shared) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const P* x = shared.rows + (row + 8 * h) * S::kRowPitch + 2 * (lane % 4);
      float along = 0;
#pragma unroll
      for (int n = 0; n < S::kDepth / 8; ++n) {
        along += total[n][2 * h] * to_float(x[8 * n]);
        along += total[n][2 * h + 1] * to_float(x[8 * n + 1]);
      }
      float all[3] = {sum[h], term[h], along};
#pragma unroll
      for (float& each : all) {
        each += shuffle_xor(each, 1);
        each += shuffle_xor(each, 2);
      }
      if (lane % 4 != 0) continue;
      shared.largest[split][row + 8 * h] = largest[h];
      shared.sum[split][row + 8 * h] = all[0];
      shared.term[split][row + 8 * h] = all[1];
      shared.along[split][row + 8 * h] = all[2];
    }
  }

  // A part of the products, into shared memory.
  __device__ __forceinline__ void store_part(Shared<S>& shared, int part) const {
    auto& to = shared.products[threadIdx.x / kWarp];
#pragma unroll
    for (int n = 0; n < kCombined / 8; ++n) {
      const auto& from = total[part * kCombined / 8 + n];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        auto* const pair = &to[lane / 4 + 8 * h][8 * n + 2 * (lane % 4)];
        *reinterpret_cast<float2*>(pair) = make_float2(from[2 * h], from[2 * h + 1]);
      }
    }
  }
};

}  // namespace fastnce::cuda
