// Products of a panel of coefficients with packed rows: A B with A the panel or its transpose, and
// B the rows, (k, P).
//
// Sizes: a block makes 128 x 128 results, a warp 32 x 64 of them, in steps of 16 KiB of A and as
// many of B, two steps ahead of each other; A and B each as in pairs_sm80_streamed.cuh.
#pragma once

#include "pairs_coefficients.cuh"
#include "pairs_mma.cuh"

namespace fastnce::cuda {

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
template <class T>
constexpr int kPanelStep = 128 / static_cast<int>(sizeof(ElementType<T>));

template <class T, bool kTransposed>
__device__ __forceinline__ Fragment<T, 4> load_panel(const SharedRows& a, int row, int k) {
  if constexpr (!kTransposed) {
    return load_a<T>(a, row, k / kPerChunk<T>);
  } else if constexpr (kHalf<T>) {
    const int lane = threadIdx.x % kWarp;
    uint32_t bits[4];
    load_matrix_x4_transposed(bits, a.chunk(k + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2));
    return fragment_of<T>(bits);
  } else {
    const int g = threadIdx.x % kWarp / 4;
    const RowOrder order = paired_rows();
    return fragment_of<T>({load_word<T>(a, k + order.first, row + g),
                           load_word<T>(a, k + order.first, row + g + 8),
                           load_word<T>(a, k + order.second, row + g),
                           load_word<T>(a, k + order.second, row + g + 8)});
  }
}

template <class T, bool kTransposed>
__global__ void __launch_bounds__(256, 1) panel_product_kernel(const PanelProduct p) {
  using E = ElementType<T>;
  constexpr int kStep = kPanelStep<T>, kStepOfProduct = 32 / static_cast<int>(sizeof(E));
  const int64_t problem = blockIdx.z / p.splits, split = blockIdx.z % p.splits;
  const int m = blockIdx.x * kPanelTile, d = blockIdx.y * kPanelTile;
  const int steps = (p.k + kStep - 1) / kStep, part = (steps + p.splits - 1) / p.splits;
  const int begin = static_cast<int>(split) * part * kStep;
  const int end = begin + part * kStep < p.k ? begin + part * kStep : p.k;
  const E* a = static_cast<const E*>(p.a) + problem * p.a_problem;
  const E* b = static_cast<const E*>(p.b) + problem * p.b_problem * p.depth + d;
  const auto chunks_to = [](int64_t elements, int most) {
    return static_cast<int>(elements < most ? elements : most) / kPerChunk<T>;
  };
  const auto a_of = [&](int buffer) {
    return SharedRows{shared_memory<unsigned char>() + buffer * kPanelBufferBytes,
                      kTransposed ? kStep : kPanelTile};
  };
  const auto b_of = [&](int buffer) {
    return SharedRows{shared_memory<unsigned char>() + buffer * kPanelBufferBytes + kTileBytes,
                      kStep};
  };
  const auto fetch = [&](int k, int buffer) {
    if (k < end) {
      const int64_t pitch = p.a_pitch * static_cast<int64_t>(sizeof(E));
      if constexpr (kTransposed) {
        copy_rows(a_of(buffer), reinterpret_cast<const unsigned char*>(a + k * p.a_pitch + m),
                  pitch, p.k - k, chunks_to(p.a_pitch - m, kPanelTile));
      } else {
        // Beyond the panel's end nothing is copied, and so nothing multiplied.
        copy_rows(a_of(buffer), reinterpret_cast<const unsigned char*>(a + m * p.a_pitch + k),
                  pitch, p.m - m, chunks_to(p.a_pitch - k, kStep));
      }
      copy_rows(b_of(buffer), reinterpret_cast<const unsigned char*>(b + int64_t{k} * p.depth),
                p.depth * static_cast<int64_t>(sizeof(E)), p.k - k,
                chunks_to(p.depth - d, kPanelTile));
    }
    copy_async_commit();
  };
  const int warp = threadIdx.x / kWarp, row = warp / 2 * 32, column = warp % 2 * 64;
  float out[2][8][4] = {};
  fetch(begin, 0);
  int buffer = 0;
  for (int k = begin; k < end; k += kStep, buffer ^= 1) {
    copy_async_wait<0>();
    sync_threads();  // this step's parts are there, and nobody reads the other ones any more
    fetch(k + kStep, buffer ^ 1);
    const int inside = (p.k - k + 15) / 16 * 16;  // the panel has zeros up to there
#pragma unroll
    for (int s = 0; s < kStep; s += kStepOfProduct) {
      if (s >= inside) break;
      Fragment<T, 4> of_a[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        of_a[i] = load_panel<T, kTransposed>(a_of(buffer), row + 16 * i, s);
      }
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        Fragment<T, 2> of_b[2];
        load_b<T>(of_b, b_of(buffer), s, column + 8 * n,
                  kTransposed ? paired_rows() : natural_rows());
#pragma unroll
        for (int i = 0; i < 4; ++i) multiply<T>(out[i / 2][n + i % 2], of_a[i / 2], of_b[i % 2]);
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
