// A block takes a query, each of its warps every eighth negative. Both kernels read a negative
// once; for the gradients, different blocks take chunks of 128 elements. Squares are summed up in
// double, which has room for those of any float.
#include "own_negatives.h"

#include "launch.cuh"
#include "scalars.cuh"

namespace fastnce::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kChunk = 4 * kWarp;  // elements

struct Table {
  OwnNegatives own;
  bool whole;
};

template <class T, class U>
__global__ void __launch_bounds__(kWarp* kWarps)
    own_sums_kernel(const __grid_constant__ Table table, float* largest, float* sum) {
  const OwnNegatives& own = table.own;
  const int64_t i = blockIdx.x, depth = own.depth, stride = own.strides[3];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const T* negatives = row_of<T>(own.data, own.queries, own.strides, i);
  const U* query = static_cast<const U*>(own.query.data) + i * own.padded_depth;
  const float unit = to_base_2(own.query.scale[i], base_2_factor(own.temperature));
  float top = -__builtin_inff(), total = 0;  // of this warp, in every lane
  for (int64_t m = warp; m < own.count; m += kWarps) {
    const T* row = negatives + m * own.strides[2];
    float product = 0;
    double squares = 0;
    for (int64_t d = 4 * lane; d < depth; d += kChunk) {
      const float4 n = load_four(row, d, depth, stride, table.whole);
      product += dot(n, load_four(query, d, own.padded_depth, 1, true));
      squares += dot_double(n, n);
    }
    const float length = own.normalize ? inverse_root(warp_sum_double(squares)) : 1.0f;
    const float z = warp_sum(product) * length * unit;
    if (lane == 0) {
      own.logits[i * own.count + m] = z;
      own.inverse[i * own.count + m] = length;
    }
    const float now = fmaxf(top, z), finite = now == -__builtin_inff() ? 0.0f : now;
    total = total * exp2f(top - finite) + exp2f(z - finite);
    top = now;
  }
  float* shared = shared_memory<float>();
  if (lane == 0) {
    shared[warp] = top;
    shared[kWarps + warp] = total;
  }
  sync_threads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) top = fmaxf(top, shared[w]);
  const float finite = top == -__builtin_inff() ? 0.0f : top;
  total = 0;
  for (int w = 0; w < kWarps; ++w) total += shared[kWarps + w] * exp2f(shared[w] - finite);
  largest[i] = top;
  sum[i] = total;
}

template <class T, class U>
__global__ void __launch_bounds__(kWarp* kWarps)
    own_gradients_kernel(const __grid_constant__ Table table,
                         const __grid_constant__ OwnGradients out) {
  const OwnNegatives& own = table.own;
  const int64_t i = blockIdx.x, depth = own.depth, padded = own.padded_depth;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t d = static_cast<int64_t>(blockIdx.y) * kChunk + 4 * lane;
  const double temperature = value_of(own.temperature);
  const float upstream = out.upstream.tensor ? *out.upstream.tensor : out.upstream.value;
  const auto to_input = static_cast<float>(upstream / temperature);
  const auto to_cosine = static_cast<float>(kLn2 * temperature);
  const T* negatives = row_of<T>(own.data, own.queries, own.strides, i);
  const U* packed = static_cast<const U*>(own.query.data) + i * padded;
  const float4 query = load_four(packed, d, padded, 1, true) * own.query.scale[i];
  const float lse = out.row_statistics[i] * kLog2E, weight = out.row_statistics[own.total + i];
  float4 product = make_float4(0, 0, 0, 0);
  float term = 0;
  for (int64_t m = warp; m < own.count; m += kWarps) {
    const int64_t at = i * own.count + m;
    const float length = own.inverse[at], z = own.logits[at];
    const float g = exp2f(z - lse) * weight;
    const T* row = negatives + m * own.strides[2];
    const float4 n = load_four(row, d, depth, own.strides[3], table.whole) * length;
    term += g * z;
    add_product(product, g, n);
    if (out.negatives == nullptr) continue;
    float4 gradient = query;
    if (own.normalize) {
      add_product(gradient, -z * to_cosine, n);
      gradient = gradient * length;
    }
    store_four(static_cast<T*>(out.negatives) + at * depth, d, depth, gradient * (g * to_input),
               table.whole);
  }
  if (out.product == nullptr) return;
  auto* products = shared_memory<float4>();  // (warps, lanes)
  auto* terms = reinterpret_cast<float*>(products + kWarps * kWarp);
  products[threadIdx.x] = product;
  if (lane == 0) terms[warp] = term;
  sync_threads();
  if (warp != 0) return;
  for (int w = 1; w < kWarps; ++w) {
    add_product(product, 1, products[w * kWarp + lane]);
    term += terms[w];
  }
  if (d < padded) *reinterpret_cast<float4*>(out.product + i * padded + d) = product;
  if (blockIdx.y == 0 && lane == 0) out.term[i] = term * kLn2;
}

Table table_of(const OwnNegatives& own) {
  return {own, lie_in_fours(own.data, own.dtype, own.depth, own.strides, 4)};
}

}  // namespace

void launch_own_sums(const OwnNegatives& own, float* largest, float* sum, Stream stream) {
  const Launch l{own.op, dim3(static_cast<unsigned>(own.total)), dim3(kWarp * kWarps),
                 2 * kWarps * sizeof(float), stream};
  with_types(own.dtype, own.packed, [&](auto t, auto u) {
    launch(l, own_sums_kernel<decltype(t), decltype(u)>, table_of(own), largest, sum);
  });
}

void launch_own_gradients(const OwnNegatives& own, const OwnGradients& out, Stream stream) {
  const auto chunks = static_cast<unsigned>((own.padded_depth + kChunk - 1) / kChunk);
  const Launch l{own.op, dim3(static_cast<unsigned>(own.total), chunks), dim3(kWarp * kWarps),
                 kWarps * (kWarp * sizeof(float4) + sizeof(float)), stream};
  with_types(own.dtype, own.packed, [&](auto t, auto u) {
    launch(l, own_gradients_kernel<decltype(t), decltype(u)>, table_of(own), out);
  });
}

}  // namespace fastnce::cuda
