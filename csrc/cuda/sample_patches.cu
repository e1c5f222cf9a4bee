// A warp gathers, or adds, one patch: its lanes are channels.
//
// Where the channels of a position are neighbours (channels_last), a lane moves 16 bytes. Where
// they are whole planes apart, each element is in a sector (32 bytes) of its own whatever lanes
// are, since positions are drawn at random: for 256 positions and 899 channels (the five maps of
// CUT) 7.4 MB of sectors an image, of which a transposition in shared memory would save none. Lanes
// along channels write whole sectors, without one.
#include "sample_patches.h"

#include <algorithm>

#include "launch.cuh"
#include "scalars.cuh"

namespace fastnce::cuda {
namespace {

constexpr int kMaps = 16;  // of one launch: what describes them is its parameter, of up to 4 KB
// Few warps a block: the 1280 patches of CUT at batch 1 are then 320 blocks, which spread evenly.
constexpr int kWarpsPerBlock = 4;
constexpr int kFillThreads = 256;
// What a block fills: large beside the ids that it looks through (2 KB for 256), small enough for
// hundreds of blocks.
constexpr int64_t kFillBytes = 64 * 1024;

struct Maps {
  PatchMap map[kMaps];
  int end[kMaps];         // items (patches, or tiles to fill) of this map and those before
  bool vectors[kMaps];    // 16 bytes at a time along the channels
  bool positions[kMaps];  // likewise along the positions
  int tile_channels[kMaps], tile_positions[kMaps];
};
static_assert(sizeof(Maps) <= 4096);

// The map of an item, which becomes its number in that map.
__device__ __forceinline__ int find_map(const Maps& maps, int& item) {
  int i = 0;
  while (item >= maps.end[i]) ++i;
  if (i > 0) item -= maps.end[i - 1];
  return i;
}

template <class T, int V>
__device__ __forceinline__ void load(T (&x)[V], const T* from) {
  if constexpr (V == 1) {
    x[0] = *from;
  } else {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    memcpy(x, &bits, sizeof(bits));
  }
}
template <class T, int V>
__device__ __forceinline__ void store(T* to, const T (&x)[V]) {
  if constexpr (V == 1) {
    *to = x[0];
  } else {
    uint4 bits;
    memcpy(&bits, x, sizeof(bits));
    *reinterpret_cast<uint4*>(to) = bits;
  }
}

// Elements that a lane has on their way at once: 8 loads, or 32 bytes.
template <int V>
constexpr int kUnroll = V == 1 ? 8 : 2;

// The offset of a position of an image.
__device__ __forceinline__ int64_t place_of(const PatchMap& map, int image, int position) {
  return image * map.strides[0] + position / map.width * map.strides[2] +
         position % map.width * map.strides[3];
}

// -1 for an id that is no position of the map.
__device__ __forceinline__ int load_id(const PatchMap& map, int s) {
  const int64_t id = map.ids[s * map.id_stride];
  return id >= 0 && id < int64_t{map.height} * map.width ? static_cast<int>(id) : -1;
}

__device__ __forceinline__ const void* row_of(const PatchRows& rows, int image, int s,
                                              size_t size) {
  return static_cast<const char*>(rows.data) +
         (image * rows.strides[0] + s * rows.strides[1]) * static_cast<int64_t>(size);
}

// --- map to patches ---

// Squares are summed in double, where those of no float overflow or vanish.
template <class T, int V>
__device__ __forceinline__ void gather_row(const PatchMap& map, int image, int s, int lane) {
  const int channels = map.channels;
  const int64_t row = int64_t{image} * map.count + s;
  const int id = load_id(map, s);
  T* out = static_cast<T*>(map.patches.data) + row * channels;
  if (id < 0) {
    const float nan = __int_as_float(0x7fc00000);
    for (int c = lane; c < channels; c += kWarp) out[c] = from_float<T>(nan);
    if (map.inverse_norms != nullptr && lane == 0) map.inverse_norms[row] = nan;
    return;
  }
  const T* from = static_cast<const T*>(map.map) + place_of(map, image, id);
  double squares = 0;
  for (int begin = lane * V; begin < channels; begin += kUnroll<V> * kWarp * V) {
    T x[kUnroll<V>][V];
#pragma unroll
    for (int u = 0; u < kUnroll<V>; ++u) {
      const int c = begin + u * kWarp * V;
      if (c < channels) load(x[u], from + c * map.strides[1]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll<V>; ++u) {
      const int c = begin + u * kWarp * V;
      if (c >= channels) break;
      store(out + c, x[u]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const double wide = to_float(x[u][v]);
        squares += wide * wide;
      }
    }
  }
  if (map.inverse_norms == nullptr) return;

  squares = warp_sum_double(squares);
  const double inverse = squares == 0 ? 0.0 : 1 / sqrt(squares);
  if (lane == 0) map.inverse_norms[row] = static_cast<float>(inverse);
  for (int c = lane * V; c < channels; c += kWarp * V) {  // what this lane wrote
    T x[V];
    load(x, out + c);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      x[v] = from_float<T>(static_cast<float>(to_float(x[v]) * inverse));
    }
    store(out + c, x);
  }
}

// Calls run(map, image, patch, whether by vectors) for this warp.
template <class Run>
__device__ __forceinline__ void for_patch(const Maps& maps, int items, const Run& run) {
  int item = static_cast<int>(blockIdx.x * kWarpsPerBlock + threadIdx.x / kWarp);
  if (item >= items) return;
  const int i = find_map(maps, item);
  const PatchMap& map = maps.map[i];
  run(map, item / map.count, item % map.count, maps.vectors[i]);
}

template <class T>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    gather_kernel(const __grid_constant__ Maps maps, int items) {
  const int lane = threadIdx.x % kWarp;
  for_patch(maps, items, [&](const PatchMap& map, int image, int s, bool vectors) {
    if (vectors) return gather_row<T, 16 / sizeof(T)>(map, image, s, lane);
    gather_row<T, 1>(map, image, s, lane);
  });
}

// --- gradients of patches to map ---

// The first patch behind `after` at the position `id`; count if there is none. A warp looks through
// 256 ids, 2 KB that stay in the cache, with 8 loads.
__device__ __forceinline__ int next_at(const PatchMap& map, int id, int after, int lane) {
  for (int begin = (after + 1) / kWarp * kWarp; begin < map.count; begin += kWarp) {
    const int t = begin + lane;
    const bool same = t > after && t < map.count && map.ids[t * map.id_stride] == id;
    const uint32_t found = ballot(same);
    if (found != 0) return begin + __ffs(static_cast<int>(found)) - 1;
  }
  return map.count;
}

// The product of a patch with its gradient.
template <class T, int V>
__device__ __forceinline__ float along_patch(const PatchMap& map, const T* grad, const T* patch,
                                             int lane) {
  float sum = 0;
  for (int c = lane * V; c < map.channels; c += kWarp * V) {
    T g[V], y[V];
    load(g, grad + c * map.gradients.strides[2]);
    load(y, patch + c * map.patches.strides[2]);
#pragma unroll
    for (int v = 0; v < V; ++v) sum += to_float(g[v]) * to_float(y[v]);
  }
  return warp_sum(sum);
}

// map (+)= the gradients of the patches at the position of patch s, unless an earlier patch is
// there too and does it. Through the normalisation y = x / ||x||, g becomes (g - y (y . g)) /
// ||x||.
template <class T, int V, bool Add>
__device__ __forceinline__ void scatter_row(const PatchMap& map, int image, int s, int begin,
                                            int end, int lane) {
  const auto id = static_cast<int>(map.ids[s * map.id_stride]);  // a position of the map
  if (next_at(map, id, -1, lane) != s) return;
  T* to = static_cast<T*>(map.map) + place_of(map, image, id);
  const bool normalize = map.inverse_norms != nullptr;
  for (; begin < end; begin += kUnroll<V> * kWarp * V) {
    float total[kUnroll<V>][V] = {};
    for (int t = s; t < map.count; t = next_at(map, id, t, lane)) {
      const auto* grad = static_cast<const T*>(row_of(map.gradients, image, t, sizeof(T)));
      const T* patch = nullptr;
      float along = 0, inverse = 1;
      if (normalize) {
        patch = static_cast<const T*>(row_of(map.patches, image, t, sizeof(T)));
        along = along_patch<T, V>(map, grad, patch, lane);
        inverse = map.inverse_norms[int64_t{image} * map.count + t];
      }
#pragma unroll
      for (int u = 0; u < kUnroll<V>; ++u) {
        const int c = begin + (u * kWarp + lane) * V;
        if (c >= end) break;
        T g[V], y[V];
        load(g, grad + c * map.gradients.strides[2]);
        if (normalize) load(y, patch + c * map.patches.strides[2]);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float x = to_float(g[v]);
          total[u][v] += normalize ? (x - to_float(y[v]) * along) * inverse : x;
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll<V>; ++u) {
      const int c = begin + (u * kWarp + lane) * V;
      if (c >= end) break;
      T x[V];
      if constexpr (Add) load(x, to + c * map.strides[1]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float old = Add ? to_float(x[v]) : 0.0f;
        x[v] = from_float<T>(old + total[u][v]);
      }
      store(to + c * map.strides[1], x);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    add_kernel(const __grid_constant__ Maps maps, int items) {
  const int lane = threadIdx.x % kWarp;
  for_patch(maps, items, [&](const PatchMap& map, int image, int s, bool vectors) {
    if (load_id(map, s) < 0) return;
    if (vectors) {
      return scatter_row<T, 16 / sizeof(T), true>(map, image, s, 0, map.channels, lane);
    }
    scatter_row<T, 1, true>(map, image, s, 0, map.channels, lane);
  });
}

// Zeros for channels [c, c_end) of positions [p, p_end) of an image, V elements at a time along the
// inner dimension.
template <class T, int V>
__device__ __forceinline__ void fill_zeros(const PatchMap& map, int image, bool inner_channels,
                                           int c, int c_end, int p, int p_end) {
  const int inner = (inner_channels ? c_end - c : p_end - p) / V;
  const int total = inner * (inner_channels ? p_end - p : c_end - c);
  T* to = static_cast<T*>(map.map);
  T zeros[V];
#pragma unroll
  for (int v = 0; v < V; ++v) zeros[v] = from_float<T>(0.0f);
  for (int i = static_cast<int>(threadIdx.x); i < total; i += kFillThreads) {
    const int along = i % inner * V, across = i / inner;
    const int channel = c + (inner_channels ? along : across);
    const int position = p + (inner_channels ? across : along);
    store(to + place_of(map, image, position) + channel * map.strides[1], zeros);
  }
}

// Every byte of the map goes to memory once: a block fills its tile with zeros, then overwrites the
// sampled positions in it while the tile is in the cache. Zeros first and add_kernel after would
// read and write each sampled sector again.
template <class T>
__global__ void __launch_bounds__(kFillThreads, 2) fill_kernel(const __grid_constant__ Maps maps) {
  constexpr int V = 16 / sizeof(T);
  const int lane = threadIdx.x % kWarp;
  int tile = static_cast<int>(blockIdx.x);
  const int i = find_map(maps, tile);
  const PatchMap& map = maps.map[i];
  const int channels = map.channels, positions = map.height * map.width;
  const int wide = maps.tile_channels[i], tall = maps.tile_positions[i];
  const int across = (channels + wide - 1) / wide, down = (positions + tall - 1) / tall;
  const int image = tile / (across * down);
  const int c = tile / down % across * wide, c_end = min(c + wide, channels);
  const int p = tile % down * tall, p_end = min(p + tall, positions);
  if (maps.vectors[i] || maps.positions[i]) {
    fill_zeros<T, V>(map, image, maps.vectors[i], c, c_end, p, p_end);
  } else {
    fill_zeros<T, 1>(map, image, map.strides[1] == 1, c, c_end, p, p_end);
  }
  sync_threads();

  for (int begin = static_cast<int>(threadIdx.x) - lane; begin < map.count; begin += kFillThreads) {
    const int id = begin + lane < map.count ? load_id(map, begin + lane) : -1;
    for (uint32_t found = ballot(id >= p && id < p_end); found != 0; found &= found - 1) {
      const int s = begin + __ffs(static_cast<int>(found)) - 1;
      if (maps.vectors[i]) {
        scatter_row<T, V, false>(map, image, s, c, c_end, lane);
      } else {
        scatter_row<T, 1, false>(map, image, s, c, c_end, lane);
      }
    }
  }
}

// --- launches ---

bool aligned(const void* data, int64_t element, int count, const int64_t* strides,
             const int64_t* sizes, int inner) {
  bool all = reinterpret_cast<uintptr_t>(data) % 16 == 0 && sizes[inner] * element % 16 == 0;
  for (int d = 0; d < count; ++d) {
    if (d == inner) {
      all &= strides[d] == 1;
    } else {
      all &= sizes[d] == 1 || strides[d] * element % 16 == 0;
    }
  }
  return all;
}

bool vectors_along_channels(const PatchMap& m, int64_t element) {
  const int64_t sizes[4] = {m.batch, m.channels, m.height, m.width};
  const int64_t rows[3] = {m.batch, m.count, m.channels};
  bool all = aligned(m.map, element, 4, m.strides, sizes, 1);
  for (const PatchRows* r : {&m.patches, &m.gradients}) {
    all &= r->data == nullptr || aligned(r->data, element, 3, r->strides, rows, 2);
  }
  return all;
}

bool vectors_along_positions(const PatchMap& m, int64_t element) {
  const int64_t sizes[3] = {m.batch, m.channels, int64_t{m.height} * m.width};
  const int64_t strides[3] = {m.strides[0], m.strides[1], m.strides[3]};
  return (m.height == 1 || m.strides[2] == m.width) &&
         aligned(m.map, element, 3, strides, sizes, 2);
}

int divide_up(int a, int b) { return (a + b - 1) / b; }

// A warp's worth of channels, or all where they are neighbours; positions in whole vectors.
int set_tiles(const PatchMap& m, int64_t element, int* channels, int* positions) {
  const int of_map = m.height * m.width;
  *channels = m.strides[1] == 1 ? m.channels : std::min(m.channels, kWarp);
  *positions = std::max(8, static_cast<int>(kFillBytes / element / *channels) / 8 * 8);
  return m.batch * divide_up(m.channels, *channels) * divide_up(of_map, *positions);
}

// Calls run(maps, items) for every kMaps maps.
template <class Run>
void for_groups(const std::vector<PatchMap>& maps, int64_t element, bool fill, const Run& run) {
  for (size_t first = 0; first < maps.size(); first += kMaps) {
    Maps group{};
    int items = 0;
    for (size_t i = 0; i < std::min<size_t>(kMaps, maps.size() - first); ++i) {
      const PatchMap& m = group.map[i] = maps[first + i];
      group.vectors[i] = vectors_along_channels(m, element);
      group.positions[i] = vectors_along_positions(m, element);
      const int tiles = set_tiles(m, element, &group.tile_channels[i], &group.tile_positions[i]);
      items += fill ? tiles : m.batch * m.count;
      group.end[i] = items;
    }
    run(group, items);
  }
}

template <class T>
void for_patches(const std::vector<PatchMap>& maps, Stream stream, void (*kernel)(Maps, int)) {
  for_groups(maps, sizeof(T), false, [&](const Maps& group, int items) {
    const auto blocks = static_cast<unsigned>(divide_up(items, kWarpsPerBlock));
    launch({"sample_patches", blocks, kWarpsPerBlock * kWarp, 0, stream}, kernel, group, items);
  });
}

}  // namespace

void gather_patches(Dtype dtype, const std::vector<PatchMap>& maps, Stream stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_patches<T>(maps, stream, gather_kernel<T>);
  });
}

void add_patch_gradients(Dtype dtype, const std::vector<PatchMap>& maps, Stream stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_patches<T>(maps, stream, add_kernel<T>);
  });
}

void fill_patch_gradients(Dtype dtype, const std::vector<PatchMap>& maps, Stream stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_groups(maps, sizeof(T), true, [&](const Maps& group, int tiles) {
      const auto blocks = static_cast<unsigned>(tiles);
      launch({"sample_patches", blocks, kFillThreads, 0, stream}, fill_kernel<T>, group);
    });
  });
}

}  // namespace fastnce::cuda
