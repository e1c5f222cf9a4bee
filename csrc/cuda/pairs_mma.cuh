// Tiles in shared memory, and their products by mma.sync.
//
// Whatever the element, one step of a product takes 32 bytes of a row's depth: 16 elements of 16
// bits (m16n8k16) or 8 of tf32 (m16n8k8). ldmatrix moves 8 rows of 16 bytes, a 32-bit word to each
// lane: two 16-bit elements, or one of tf32, just where the fragments a and b of both instructions
// want them. So both take the same loads.
#pragma once

#include "device.cuh"
#include "pairs_sm80.h"

namespace fastnce::cuda {

// What the elements are multiplied as. A float is the sum of two tf32 numbers to 22 bits, and a
// product of two floats three products of those; the fourth, of both low parts, is below 2^-22 of
// the whole.
struct Tf32 {};
struct Tf32Pair {};

template <class T>
struct Element {
  using Type = T;
  static constexpr int kParts = 1;
};
template <>
struct Element<Tf32> {
  using Type = float;
  static constexpr int kParts = 1;
};
template <>
struct Element<Tf32Pair> {
  using Type = float;
  static constexpr int kParts = 2;
};
template <class T>
using ElementType = typename Element<T>::Type;
template <class T>
constexpr bool kHalf = sizeof(ElementType<T>) == 2;
// Elements in 16 bytes, a chunk.
template <class T>
constexpr int kPerChunk = 16 / static_cast<int>(sizeof(ElementType<T>));

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

// N registers of an operand, in parts of tf32.
template <class T, int N>
struct Fragment {
  uint32_t part[Element<T>::kParts][N];
};

template <class T, int N>
__device__ __forceinline__ Fragment<T, N> fragment_of(const uint32_t (&bits)[N]) {
  Fragment<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (kHalf<T>) {
      out.part[0][i] = bits[i];
    } else {
      const float x = __uint_as_float(bits[i]);
      out.part[0][i] = round_to_tf32(x);
      if constexpr (Element<T>::kParts == 2) {
        // What is left has 13 bits, of which the instruction takes 11.
        out.part[1][i] = __float_as_uint(x - __uint_as_float(out.part[0][i]));
      }
    }
  }
  return out;
}

template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const Fragment<T, 4>& a,
                                         const Fragment<T, 2>& b) {
  if constexpr (kHalf<T>) {
    multiply_m16n8k16<T>(c, a.part[0], b.part[0]);
  } else {
    if constexpr (Element<T>::kParts == 2) {
      multiply_m16n8k8_tf32(c, a.part[1], b.part[0]);
      multiply_m16n8k8_tf32(c, a.part[0], b.part[1]);
    }
    multiply_m16n8k8_tf32(c, a.part[0], b.part[0]);
  }
}

// The a of 16 rows from `row` on, at chunks `chunk` and chunk + 1.
template <class T>
__device__ __forceinline__ Fragment<T, 4> load_a(const SharedRows& x, int row, int chunk) {
  const int lane = threadIdx.x % kWarp;
  uint32_t bits[4];
  load_matrix_x4(bits, x.chunk(row + lane % 16, chunk + lane / 16));
  return fragment_of<T>(bits);
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
    const Fragment<T, 4> a = load_a<T>(x, x_row, chunk);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t bits[4];  // b of columns 8n ... 8n + 7, and of the next 8
      load_matrix_x4(bits, y.chunk(8 * n + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
      multiply<T>(tile[n], a, fragment_of<T>({bits[0], bits[1]}));
      multiply<T>(tile[n + 1], a, fragment_of<T>({bits[2], bits[3]}));
    }
  }
}

// y as the b of a product over its rows: 16 of them from `row` on (of tf32 8), and its elements d
// ... d + 15 as columns, in two fragments of 8. For tf32 a lane's two rows are chosen:
struct RowOrder {
  int first, second;
};
// So the c of a 16 x 8 tile is the a of the next product, and the lanes of a load are in
// different banks: rows 2t in places ^ 2t, so that a quad's 4 rows times 2 chunks are 8 places.
__device__ __forceinline__ RowOrder paired_rows() {
  const int t = threadIdx.x % 4;
  return {2 * t, 2 * t + 1};
}
// As ldmatrix gives a: two lanes meet in each bank.
__device__ __forceinline__ RowOrder natural_rows() {
  const int t = threadIdx.x % 4;
  return {t, t + 4};
}
template <class T>
__device__ __forceinline__ uint32_t load_word(const SharedRows& y, int row, int d) {
  return *reinterpret_cast<const uint32_t*>(y.chunk(row, d / 4) + d % 4 * 4);
}
template <class T>
__device__ __forceinline__ void load_b(Fragment<T, 2> (&b)[2], const SharedRows& y, int row, int d,
                                       RowOrder order) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (kHalf<T>) {
    uint32_t bits[4];
    load_matrix_x4_transposed(bits, y.chunk(row + lane % 16, d / 8 + lane / 16));
    b[0] = fragment_of<T>({bits[0], bits[1]});
    b[1] = fragment_of<T>({bits[2], bits[3]});
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = d + 8 * i + lane / 4;
      b[i] = fragment_of<T>(
          {load_word<T>(y, row + order.first, at), load_word<T>(y, row + order.second, at)});
    }
  }
}

// out += tile y, tile the warp's 16 rows by all rows of y, y's depth a multiple of 16.
template <class T, int kTiles, int kOut>
__device__ __forceinline__ void multiply_outputs(float (&out)[kOut / 8][4],
                                                 const float (&tile)[kTiles][4],
                                                 const SharedRows& y, int depth) {
  constexpr int kTilesOfStep = kHalf<T> ? 2 : 1;
#pragma unroll
  for (int n = 0; n < kTiles; n += kTilesOfStep) {
    Fragment<T, 4> a;
    if constexpr (kHalf<T>) {
      a = fragment_of<T>({pack_pair<T>(tile[n][0], tile[n][1]),
                          pack_pair<T>(tile[n][2], tile[n][3]),
                          pack_pair<T>(tile[n + 1][0], tile[n + 1][1]),
                          pack_pair<T>(tile[n + 1][2], tile[n + 1][3])});
    } else {
      a = fragment_of<T>({__float_as_uint(tile[n][0]), __float_as_uint(tile[n][2]),
                          __float_as_uint(tile[n][1]), __float_as_uint(tile[n][3])});
    }
#pragma unroll
    for (int d = 0; d < kOut / 8; d += 2) {
      if (8 * d >= depth) break;
      Fragment<T, 2> b[2];
      load_b<T>(b, y, 8 * n, 8 * d, paired_rows());
      multiply<T>(out[d], a, b[0]);
      multiply<T>(out[d + 1], a, b[1]);
    }
  }
}

}  // namespace fastnce::cuda
