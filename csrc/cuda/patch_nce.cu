// A block has 16 rows or 64 of one image of one layer, goes through all columns of that image, and
// finishes its rows: loss and gradient. Where a gradient needs the columns' losses too, or a row
// is a column of its own side, losses come first, and gradients in a second launch.
//
// The 5 layers of CUT, 256 rows, 256 columns and depth 256, are 2 * 5 * 256 * 256 * 256 = 168 M
// multiply-adds an image, and each block reads all columns of its image: 128 KB in bfloat16.
//
// Batch 1: with 64 rows there would be 20 blocks for a hundred multiprocessors or more; with 16
// there are 80, of 2.1 M multiply-adds each. A matrix instruction has 16 rows, so the warps of a
// block share the columns and add up their results at the end.
//
// Batch 16: 64 rows make 320 blocks, which read 42 MB, mostly from the cache; with 16 rows it would
// be 168 MB.
//
// Exponentials are relative to a running maximum always: a warp sees few columns, so that it seldom
// moves, and one way serves every temperature.
#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "patch_nce.cuh"

namespace fastnce::cuda {
namespace {

constexpr int64_t kMostDepth = 256;  // the sums of products of 16 rows fill the registers of a warp
// Beyond, a problem alone fills a GPU, and the larger tiles of InfoNCE, which has none of float32,
// read less.
constexpr int64_t kMostRows = 4096;
constexpr int kLayers = 16;  // of one launch
constexpr int kSumThreads = 256;
constexpr size_t kSumBytes = kSumThreads / kWarp * sizeof(double);

struct Layers {
  PatchLayer layer[kLayers];
  int end[kLayers];                                  // blocks of this layer and those before
  bool whole_rows[kLayers], whole_columns[kLayers];  // can be copied 16 bytes at a time
};

struct Options {
  Temperature temperature;
  float self_logit;
  bool by_lse;    // gradients: the statistics are given
  float2* parts;  // of each block: its losses, and their derivative with respect to the temperature
};
static_assert(sizeof(Layers) + sizeof(Options) <= 4096);  // the parameters of a kernel

// The block's problem, into shared memory by its first thread.
template <class S>
__device__ __forceinline__ void find_problem(Shared<S>& shared, const Layers& layers, bool by_lse) {
  int l = 0, block = static_cast<int>(blockIdx.x);
  while (block >= layers.end[l]) ++l;
  if (l > 0) block -= layers.end[l - 1];
  Problem& p = shared.problem;
  p.layer = layers.layer[l];
  p.whole_rows = layers.whole_rows[l];
  p.whole_columns = layers.whole_columns[l];
  p.columns = static_cast<int>(p.layer.columns.rows);
  const int blocks = (p.columns + S::kRows - 1) / S::kRows;
  p.image = block / blocks;
  p.first = block % blocks * S::kRows;
  p.by_lse = by_lse;
  p.of_rows = p.of_image(p.layer.of_rows);
  p.of_columns = p.of_image(p.layer.of_columns);
}

// Tiles of one side's columns.
template <class S>
__device__ __forceinline__ int tiles_of_side(const Problem& problem) {
  return (problem.columns + S::kColumns - 1) / S::kColumns;
}

template <class S>
__device__ __forceinline__ void load_columns(Shared<S>& shared, int tile) {
  const Problem& p = shared.problem;
  const int tiles = tiles_of_side<S>(p);
  auto* const to = shared.columns[tile % kStages];
  if (tile < tiles) {
    load_rows<S>(to, S::kColumns, p.layer.columns, p.image, tile * S::kColumns, p.whole_columns);
  } else if (p.layer.own_side && tile < 2 * tiles) {
    const int begin = (tile - tiles) * S::kColumns;
    load_rows<S>(to, S::kColumns, p.layer.rows, p.image, begin, p.whole_rows);
  }
  copy_async_commit();
}

// Keeps the scales of those columns of a tile that are positives of the block's rows.
template <class S>
__device__ __forceinline__ void keep_positives(Shared<S>& shared, int begin) {
  const int thread = static_cast<int>(threadIdx.x), row = begin + thread - shared.problem.first;
  if (thread >= S::kColumns || row < 0 || row >= S::kRows) return;
  shared.positive_scales.unit[row] = shared.column_scales.unit[thread];
  shared.positive_scales.power[row] = shared.column_scales.power[thread];
}

// One query: its loss, the factors from the warps' sums to the softmax, and the others' share of
// it.
template <class S>
__device__ __forceinline__ void finish_query(Shared<S>& s, int row, double temperature) {
  const PatchLayer& layer = s.problem.layer;
  const PatchStatistics& to = s.problem.of_rows;
  const float positive = s.positive[row];
  float top = s.largest[0][row], sum = 0, term = 0;
#pragma unroll
  for (int k = 1; k < S::kSplits; ++k) top = fmaxf(top, s.largest[k][row]);
#pragma unroll
  for (int k = 0; k < S::kSplits; ++k) {
    const float factor = exp2_fast(s.largest[k][row] - top);
    s.largest[k][row] = factor;
    sum += factor * s.sum[k][row];
    term += factor * s.term[k][row];
  }
  // Large numbers meet before anything is rounded.
  const float d = ((top - positive) + log2f(sum)) * kLn2;
  const float loss = fmaxf(d, 0.0f) + log1pf(expf(-fabsf(d)));
  const float missing = 1 / (1 + expf(-d)), to_softmax = missing / sum;
#pragma unroll
  for (int k = 0; k < S::kSplits; ++k) s.largest[k][row] *= to_softmax;
  s.missing[row] = missing;
  if (to.lse != nullptr) {
    to.lse[s.problem.first + row] = positive + loss * kLog2E;
    to.missing[s.problem.first + row] = missing;
  }
  s.loss[row] = layer.loss_scale * loss;
  s.by_temperature[row] = static_cast<float>(
      layer.loss_scale * kLn2 * (missing * positive - to_softmax * term) / temperature);
}

// One row, before its gradient.
template <class S>
__device__ __forceinline__ void finish_row(Shared<S>& s, int row, double temperature) {
  const Problem& p = s.problem;
  if (p.by_lse) {
    float missing = p.of_rows.lse == nullptr ? 0.0f : p.of_rows.missing[p.first + row];
    if (p.of_columns.lse != nullptr) missing += p.of_columns.missing[p.first + row];
    s.missing[row] = missing;
#pragma unroll
    for (int k = 0; k < S::kSplits; ++k) s.largest[k][row] = 1;
  } else {
    finish_query(s, row, temperature);
  }
  float along = 0;
#pragma unroll
  for (int k = 0; k < S::kSplits; ++k) along += s.largest[k][row] * s.along[k][row];
  const auto cosine = static_cast<float>(s.positive[row] * (temperature * kLn2));
  s.along_row[row] = along * s.row_scales.unit[row] - s.missing[row] * cosine;
}

// With x^ = x / ||x||, p the softmax and w the row's weight, dx^ = w / t (sum_j p_j y^_j - missing
// y^_row), and dx = (dx^ - x^ (x^ . dx^)) / ||x||.
template <int Part, class S>
__device__ __forceinline__ void store_gradient(Shared<S>& s, const Warp<S>& warp, float weight) {
  warp.store_part(s, Part);
  sync_threads();
  const Problem& p = s.problem;
  const RowsView& y = p.layer.columns;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < S::kRows * kCombined; i += S::kThreads) {
    const int row = i / kCombined, in_part = i % kCombined, d = Part * kCombined + in_part;
    if (p.first + row >= p.columns || d >= y.depth) continue;
    float g = 0;
#pragma unroll
    for (int k = 0; k < S::kSplits; ++k) {
      const int of_warp = k * S::kRowTiles + row / 16;
      g += s.largest[k][row] * s.products[of_warp][row % 16][in_part];
    }
    const int64_t own = p.image * y.strides[0] + (p.first + row) * y.strides[1] + d * y.strides[2];
    g -= s.missing[row] * (load_element(y.data, y.dtype, own) * s.positive_scales.power[row] *
                           s.positive_scales.unit[row]);
    const float unit = s.row_scales.unit[row];
    g -= to_float(s.rows[row * S::kRowPitch + d]) * unit * s.along_row[row];
    g *= weight * (unit * s.row_scales.power[row]);
    store_element(p.layer.gradient, y.dtype, p.of_image(p.first + row) * y.depth + d, g);
  }
  sync_threads();
  if constexpr ((Part + 1) * kCombined < S::kDepth) store_gradient<Part + 1>(s, warp, weight);
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    patch_nce_kernel(const __grid_constant__ Layers layers, const Options options) {
  auto& shared = *shared_memory<Shared<S>>();
  const Problem& problem = shared.problem;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) find_problem(shared, layers, options.by_lse);
  sync_threads();
  load_rows<S>(shared.rows, S::kRows, problem.layer.rows, problem.image, problem.first,
               problem.whole_rows);
  copy_async_commit();
#pragma unroll 1
  for (int tile = 0; tile < kStages; ++tile) load_columns(shared, tile);
  copy_async_wait<kStages>();
  sync_threads();
  scale_rows<S>(shared.rows, shared.row_scales);
  sync_threads();

  Warp<S> warp;
  const double to_logit = base_2_factor(options.temperature);
  warp.start(shared, static_cast<float>(options.self_logit * to_logit),
             static_cast<float>(to_logit));
  const int tiles = tiles_of_side<S>(problem);
  for (int tile = 0; tile < (problem.layer.own_side ? 2 * tiles : tiles); ++tile) {
    const bool own_side = tile >= tiles;
    const int begin = (own_side ? tile - tiles : tile) * S::kColumns;
    auto& at_work = shared.columns[tile % kStages];
    copy_async_wait<kStages - 1>();
    sync_threads();
    scale_rows<S>(at_work, shared.column_scales);
    sync_threads();
    if (!own_side) keep_positives(shared, begin);
    warp.step(shared, at_work, begin, own_side);
    sync_threads();
    load_columns(shared, tile + kStages);
  }
  copy_async_wait<0>();
  warp.finish(shared);
  sync_threads();

  const double temperature = value_of(options.temperature);
  if (thread < S::kRows) {
    shared.loss[thread] = shared.by_temperature[thread] = 0;
    if (problem.first + thread < problem.columns) {
      finish_row(shared, thread, temperature);
    }
  }
  sync_threads();
  if (!options.by_lse && thread < kWarp) {
    float loss = 0, by_temperature = 0;
    for (int row = thread; row < S::kRows; row += kWarp) {
      loss += shared.loss[row];
      by_temperature += shared.by_temperature[row];
    }
    loss = warp_sum(loss), by_temperature = warp_sum(by_temperature);
    if (thread == 0) options.parts[blockIdx.x] = make_float2(loss, by_temperature);
  }
  if (problem.layer.gradient == nullptr) return;
  store_gradient<0>(shared, warp, static_cast<float>(problem.layer.grad_scale / temperature));
}

// In a launch of its own: a block that knew itself to be the last one would need a counter that is
// zero before, and that calls on other streams and in graphs do not share.
__global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(const float2* parts, int64_t count, float* loss, float* grad_temperature) {
  double sums[2] = {0, 0};
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) {
    sums[0] += parts[i].x;
    sums[1] += parts[i].y;
  }
  for (double& sum : sums) {
    sum = block_sum(sum);
    sync_threads();
  }
  if (threadIdx.x != 0) return;
  *loss = static_cast<float>(sums[0]);
  if (grad_temperature != nullptr) *grad_temperature = static_cast<float>(sums[1]);
}

__global__ void __launch_bounds__(kSumThreads) sum_layer_kernel(LargeLayer layer, float2* part) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < layer.count; i += kSumThreads) sum += layer.loss[i];
  sum = block_sum(sum) * layer.loss_scale;
  if (threadIdx.x != 0) return;
  float term = 0;
  if (layer.grad_temperature != nullptr) term = *layer.grad_temperature * layer.to_loss_scale;
  *part = make_float2(static_cast<float>(sum), term);
}

// --- launches ---

// Bytes that a block may have.
constexpr size_t kLeastSharedBytes = 99 * 1024;
size_t most_shared_bytes(int capability) {
  if (capability >= 90 && capability < 120) return 227 * 1024;
  return capability == 80 || capability == 87 ? 163 * 1024 : kLeastSharedBytes;
}

template <class S>
bool fits(const PatchCall& call) {
  return sizeof(Shared<S>) <= most_shared_bytes(call.capability);
}

// Calls run(Shape) with the shape for many problems, or that for few, where it fits. float32 rows
// take so much room that four warps' tiles are what fits, and two warps' where there is little.
template <class Run>
auto with_shape(Dtype dtype, int64_t depth, bool few, const PatchCall& call, const Run& run) {
  const auto with_depth = [&](auto zero, auto depth_constant) {
    using P = decltype(zero);
    constexpr int kDepth = decltype(depth_constant)::value;
    using Few = Shape<P, kDepth, 1, sizeof(P) == 2 ? 8 : 4>;
    using Many = Shape<P, kDepth, 4, 2>;
    if (few && fits<Few>(call)) return run(Few{});
    if constexpr (sizeof(Shared<Many>) > kLeastSharedBytes) {
      if (!fits<Many>(call)) return run(Shape<P, kDepth, 2, 1>{});
    }
    return run(Many{});
  };
  const auto with_products = [&](auto zero) {
    if (depth <= 64) return with_depth(zero, std::integral_constant<int, 64>{});
    if (depth <= 128) return with_depth(zero, std::integral_constant<int, 128>{});
    return with_depth(zero, std::integral_constant<int, 256>{});
  };
  const bool rounded = dtype == Dtype::kFloat32 && call.bfloat16_products;
  if (dtype == Dtype::kBfloat16 || rounded) return with_products(bfloat16{});
  return dtype == Dtype::kFloat16 ? with_products(float16{}) : with_products(float{});
}

int64_t count_blocks(const PatchLayer& layer, int rows) {
  return layer.rows.batch * ((layer.rows.rows + rows - 1) / rows);
}

// Runs run(Shape) with the shape for all layers of the call.
template <class Run>
auto with_shape_of(const std::vector<PatchLayer>& layers, const PatchCall& call, const Run& run) {
  int64_t blocks = 0, depth = 0;
  for (const PatchLayer& layer : layers) {
    blocks += count_blocks(layer, 64);
    depth = std::max(depth, layer.rows.depth);
  }
  return with_shape(layers[0].rows.dtype, depth, blocks < call.multiprocessors, call, run);
}

template <class P>
bool is_whole(const RowsView& view, Dtype of_products) {
  bool whole = view.dtype == of_products && view.strides[2] == 1 &&
               view.depth * sizeof(P) % 16 == 0 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int i = 0; i < 2; ++i) whole &= view.strides[i] * static_cast<int64_t>(sizeof(P)) % 16 == 0;
  return whole;
}

template <class S>
void run_layers(const std::vector<PatchLayer>& layers, const PatchCall& call, bool by_lse,
                float2* parts, Stream stream) {
  using P = typename S::P;
  const Dtype of_products = std::is_same_v<P, float>      ? Dtype::kFloat32
                            : std::is_same_v<P, bfloat16> ? Dtype::kBfloat16
                                                          : Dtype::kFloat16;
  for (size_t begin = 0; begin < layers.size(); begin += kLayers) {
    Layers group{};
    int64_t blocks = 0;
    for (size_t i = 0; i < std::min<size_t>(kLayers, layers.size() - begin); ++i) {
      const PatchLayer& layer = group.layer[i] = layers[begin + i];
      group.whole_rows[i] = is_whole<P>(layer.rows, of_products);
      group.whole_columns[i] = is_whole<P>(layer.columns, of_products);
      blocks += count_blocks(layer, S::kRows);
      group.end[i] = static_cast<int>(blocks);
    }
    launch({"patch_nce", static_cast<unsigned>(blocks), S::kThreads, sizeof(Shared<S>), stream},
           patch_nce_kernel<S>, group, Options{call.temperature, call.self_logit, by_lse, parts});
    if (!by_lse) parts += blocks;
  }
}

}  // namespace

bool can_run_patch_nce(int64_t depth, int64_t rows) {
  return depth <= kMostDepth && rows <= kMostRows;
}

int64_t patch_nce_blocks(const std::vector<PatchLayer>& layers, const PatchCall& call) {
  if (layers.empty()) return 0;
  return with_shape_of(layers, call, [&](auto shape) {
    int64_t blocks = 0;
    for (const PatchLayer& layer : layers) blocks += count_blocks(layer, decltype(shape)::kRows);
    return blocks;
  });
}

void launch_patch_nce(const std::vector<PatchLayer>& layers, const PatchCall& call, float* parts,
                      Stream stream) {
  if (layers.empty()) return;
  with_shape_of(layers, call, [&](auto shape) {
    run_layers<decltype(shape)>(layers, call, false, reinterpret_cast<float2*>(parts), stream);
  });
}

void launch_patch_nce_gradients(const std::vector<PatchLayer>& layers, const PatchCall& call,
                                Stream stream) {
  if (layers.empty()) return;
  with_shape_of(layers, call, [&](auto shape) {
    run_layers<decltype(shape)>(layers, call, true, nullptr, stream);
  });
}

void launch_sum_of_layer(const LargeLayer& layer, float* part, Stream stream) {
  launch({"patch_nce", 1, kSumThreads, kSumBytes, stream}, sum_layer_kernel, layer,
         reinterpret_cast<float2*>(part));
}

void launch_sum_of_parts(const float* parts, int64_t count, float* loss, float* grad_temperature,
                         Stream stream) {
  launch({"patch_nce", 1, kSumThreads, kSumBytes, stream}, sum_parts_kernel,
         reinterpret_cast<const float2*>(parts), count, loss, grad_temperature);
}

}  // namespace fastnce::cuda
