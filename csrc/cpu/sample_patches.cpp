// Gathering patches from feature maps on the CPU, straight from any strides, and scattering their
// gradients. One call serves all layers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "huge_pages.h"
#include "op_arguments.h"
#include "parallel.h"
#include "unit_rows.h"

namespace fastnce::sample_patches {
namespace {

// --- maps, the positions in them, and the cutting of all layers into tasks ---

// A task handles this many positions by this many channels, or the other way round where the
// channels of a position are neighbours in memory. Then 16 channels of a patch are at most two
// cache lines, and a tile of them stays in the first-level cache.
constexpr int64_t kLong = 256, kShort = 16;
constexpr int64_t kRowsPerTask = 16;

// A cache miss costs about as much as this many multiply-adds.
constexpr int64_t kWorkPerElement = 8;

// Positions in a map, checked to lie inside it.
std::vector<int64_t> read_ids(const char* op, const Tensor& ids, int64_t positions) {
  STD_TORCH_CHECK(ids.is_cpu() && ids.scalar_type() == ScalarType::Long && ids.dim() == 1, op,
                  ": patch_ids must be int64 tensors of one dimension on the CPU.");
  const int64_t* data = ids.const_data_ptr<int64_t>();
  std::vector<int64_t> out(ids.size(0));
  for (size_t s = 0; s < out.size(); ++s) {
    out[s] = data[static_cast<int64_t>(s) * ids.stride(0)];
    STD_TORCH_CHECK(out[s] >= 0 && out[s] < positions, op, ": patch id ", out[s],
                    " lies outside a map of ", positions, " positions.");
  }
  return out;
}

void check_feature(const char* op, const Tensor& feature) {
  STD_TORCH_CHECK(feature.is_cpu() && feature.dim() == 4 && is_supported(feature.scalar_type()), op,
                  ": features must be (B, C, H, W) floating tensors on the CPU.");
}

// A map and the positions in it: where a task finds its elements.
struct Layer {
  Layer(const Tensor& map, const std::vector<int64_t>& ids)
      : dtype(map.scalar_type()),
        item(static_cast<int64_t>(map.element_size())),
        images(map.size(0)),
        channels(map.size(1)),
        image_stride(map.stride(0)),
        channel_stride(map.stride(1)) {
    const int64_t width = map.size(3), down = map.stride(2), right = map.stride(3);
    offsets.reserve(ids.size());
    for (int64_t id : ids) offsets.push_back(id / width * down + id % width * right);
  }

  int64_t positions() const { return static_cast<int64_t>(offsets.size()); }

  ScalarType dtype;
  int64_t item, images, channels, image_stride, channel_stride;
  std::vector<int64_t> offsets;  // of each position, in elements
};

// Some positions and channels of one image.
struct Block {
  size_t layer;
  int64_t image, position, positions, channel, channels;
};

// Runs body(block) over all blocks of all layers.
template <class Body>
void run_layers(const std::vector<Layer>& layers, const Body& body) {
  std::vector<Block> blocks;
  int64_t elements = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    const int64_t positions = layer.positions(), channels = layer.channels;
    const bool rows = layer.channel_stride == 1;
    const int64_t tall = rows ? kShort : kLong, wide = rows ? kLong : kShort;
    for (int64_t image = 0; image < layer.images; ++image) {
      for (int64_t p = 0; p < positions; p += tall) {
        for (int64_t c = 0; c < channels; c += wide) {
          blocks.push_back(
              {l, image, p, std::min(tall, positions - p), c, std::min(wide, channels - c)});
        }
      }
    }
    elements += layer.images * positions * channels;
  }
  const auto tasks = static_cast<int64_t>(blocks.size());
  run_tasks(tasks, kWorkPerElement * elements / std::max<int64_t>(tasks, 1),
            [&](int64_t task) { body(blocks[task]); });
}

// Runs body(layer, begin, end) over the patches (images * positions) of all layers.
template <class Body>
void run_patches(const std::vector<Layer>& layers, const Body& body) {
  std::vector<std::pair<size_t, int64_t>> blocks;
  int64_t elements = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    const int64_t rows = layers[l].images * layers[l].positions();
    for (int64_t r = 0; r < rows; r += kRowsPerTask) blocks.emplace_back(l, r);
    elements += rows * layers[l].channels;
  }
  const auto tasks = static_cast<int64_t>(blocks.size());
  run_tasks(tasks, kWorkPerElement * elements / std::max<int64_t>(tasks, 1), [&](int64_t task) {
    const auto [l, begin] = blocks[task];
    const int64_t rows = layers[l].images * layers[l].positions();
    body(l, begin, std::min(rows, begin + kRowsPerTask));
  });
}

// --- gathering ---

// Copies a block of the map to its patches (images, positions, channels). Bits is an integer of the
// elements' size.
template <class Bits>
void gather_block(const Layer& layer, const Block& block, const char* data, char* patches) {
  const Bits* map = reinterpret_cast<const Bits*>(data) + block.image * layer.image_stride +
                    block.channel * layer.channel_stride;
  const int64_t* offsets = layer.offsets.data() + block.position;
  Bits* out = reinterpret_cast<Bits*>(patches) +
              (block.image * layer.positions() + block.position) * layer.channels + block.channel;
  if (layer.channel_stride == 1) {
    for (int64_t p = 0; p < block.positions; ++p) {
      std::memcpy(out + p * layer.channels, map + offsets[p],
                  static_cast<size_t>(block.channels) * sizeof(Bits));
    }
    return;
  }
  // Plane after plane: the misses do not wait for one another, and the positions of a plane share
  // pages and cache lines, which neighbouring channels of a position do not.
  Bits tile[kLong][kShort];
  for (int64_t c = 0; c < block.channels; ++c) {
    const Bits* plane = map + c * layer.channel_stride;
    for (int64_t p = 0; p < block.positions; ++p) tile[p][c] = plane[offsets[p]];
  }
  for (int64_t p = 0; p < block.positions; ++p) {
    std::copy_n(tile[p], block.channels, out + p * layer.channels);
  }
}

void gather(const std::vector<Layer>& layers, const Tensors& features, const Tensors& patches) {
  std::vector<const char*> maps;
  std::vector<char*> outs;
  for (size_t l = 0; l < layers.size(); ++l) {
    maps.push_back(static_cast<const char*>(features[l].const_data_ptr()));
    outs.push_back(static_cast<char*>(patches[l].mutable_data_ptr()));
  }
  run_layers(layers, [&](const Block& block) {
    const Layer& layer = layers[block.layer];
    const auto copy = layer.item == 2   ? gather_block<uint16_t>
                      : layer.item == 4 ? gather_block<uint32_t>
                                        : gather_block<uint64_t>;
    copy(layer, block, maps[block.layer], outs[block.layer]);
  });
}

// Divides the patches by their norms, in place.
template <class T>
void normalize_rows(const Layer& layer, int64_t begin, int64_t end, const Tensor& patches,
                    T* inverse_norms) {
  const TileKernels<T>& kernels = tile_kernels<T>();
  const OutputRows out(patches);
  const char* data = static_cast<const char*>(patches.const_data_ptr());
  Buffer<T> row(layer.channels);
  for (int64_t r = begin; r < end; ++r) {
    load_elements(layer.dtype, data + r * layer.channels * layer.item, 1, layer.channels,
                  row.data());
    const double inverse = inverse_norm(kernels, layer.channels, row.data());
    kernels.scale(layer.channels, row.data(), inverse, row.data());
    inverse_norms[r] = static_cast<T>(inverse);
    out.store(r, row.data());
  }
}

// --- scattering: adding the gradients of patches to those of the maps ---
//
// A position may be sampled several times. Its samples are summed first, always in the same order,
// so that one task alone writes to a position and the result does not depend on the threads.

// The samples of each distinct position: order[starts[p]] to order[starts[p + 1] - 1], ascending.
struct Groups {
  std::vector<int64_t> order, starts, ids;  // ids: the distinct positions
};

Groups group_by_position(const std::vector<int64_t>& ids, int64_t positions) {
  Groups groups;
  groups.order.resize(ids.size());
  std::iota(groups.order.begin(), groups.order.end(), 0);
  std::vector<bool> seen(positions);
  bool repeated = false;
  for (int64_t id : ids) {
    repeated |= seen[id];
    seen[id] = true;
  }
  if (repeated) {
    std::stable_sort(groups.order.begin(), groups.order.end(),
                     [&](auto a, auto b) { return ids[a] < ids[b]; });
  }
  for (size_t s = 0; s < ids.size(); ++s) {
    const int64_t id = ids[groups.order[s]];
    if (s > 0 && id == groups.ids.back()) continue;
    groups.starts.push_back(static_cast<int64_t>(s));
    groups.ids.push_back(id);
  }
  groups.starts.push_back(static_cast<int64_t>(ids.size()));
  return groups;
}

// d L / d x = (g - y (y . g)) / ||x|| for y = x / ||x||.
template <class T>
void project_normalized(const TileKernels<T>& kernels, int64_t channels, const T* patch,
                        double inverse_norm, T* gradient) {
  const double along = kernels.dot(channels, patch, gradient);
  for (int64_t c = 0; c < channels; ++c) {
    gradient[c] = static_cast<T>((gradient[c] - patch[c] * along) * inverse_norm);
  }
}

// Elements of gradients (images, samples, channels), with their strides.
template <class Source>
struct Gradients {
  const Source* data;
  int64_t image, sample, channel;
};

// map += gradients in one block, a position's samples summed first.
template <class T, class Source, class Element>
void scatter_block(const Layer& layer, const Block& block, const Groups& groups,
                   const Gradients<Source>& gradients, Element* data) {
  const int64_t* offsets = layer.offsets.data() + block.position;
  const Source* source =
      gradients.data + block.image * gradients.image + block.channel * gradients.channel;
  Element* map = data + block.image * layer.image_stride + block.channel * layer.channel_stride;
  // Wide enough for either shape of the block.
  T tile[kLong * kShort];
  const int64_t width = block.channels;
  for (int64_t p = 0; p < block.positions; ++p) {
    T* sum = tile + p * width;
    const int64_t first = groups.starts[block.position + p];
    const int64_t last = groups.starts[block.position + p + 1];
    for (int64_t s = first; s < last; ++s) {
      const Source* row = source + groups.order[s] * gradients.sample;
      for (int64_t c = 0; c < width; ++c) {
        const T x = static_cast<T>(row[c * gradients.channel]);
        sum[c] = s == first ? x : sum[c] + x;
      }
    }
  }
  const auto add = [](Element& to, T x) { to = static_cast<Element>(static_cast<T>(to) + x); };
  if (layer.channel_stride == 1) {
    for (int64_t p = 0; p < block.positions; ++p) {
      for (int64_t c = 0; c < width; ++c) add(map[offsets[p] + c], tile[p * width + c]);
    }
  } else {
    for (int64_t c = 0; c < width; ++c) {
      Element* plane = map + c * layer.channel_stride;
      for (int64_t p = 0; p < block.positions; ++p) add(plane[offsets[p]], tile[p * width + c]);
    }
  }
}

// Everything that the gradient of one layer is made from.
struct LayerGradient {
  Groups groups;
  Tensor gradient, patches, inverse_norms;  // the last two only where patches are normalised
  Buffer<float> projected;                  // (images, samples, channels), where normalised
  Buffer<double> projected_double;

  template <class T>
  Buffer<T>& scratch() {
    if constexpr (std::is_same_v<T, double>) {
      return projected_double;
    } else {
      return projected;
    }
  }
};

// Projects the gradients of normalised patches [begin, end) to those of the patches.
template <class T>
void project_rows(LayerGradient& layer, int64_t channels, int64_t begin, int64_t end) {
  const TileKernels<T>& kernels = tile_kernels<T>();
  const TensorRows gradient_rows(layer.gradient), patch_rows(layer.patches);
  const TensorRows inverse_rows(layer.inverse_norms);
  Buffer<T> patch(channels), inverse(inverse_rows.depth());
  const int64_t samples = inverse_rows.depth();
  for (int64_t r = begin; r < end; ++r) {
    if (r == begin || r % samples == 0) inverse_rows.load(r / samples, inverse.data());
    T* row = layer.scratch<T>().data() + r * channels;
    gradient_rows.load(r, row);
    patch_rows.load(r, patch.data());
    project_normalized(kernels, channels, patch.data(), inverse[r % samples], row);
  }
}

// maps += the patches' gradients.
void scatter(const char* op, const Tensors& maps, const Tensors& grad_patches,
             const Tensors& patches, const Tensors& inverse_norms, const Tensors& patch_ids,
             bool normalize) {
  const size_t count = maps.size();
  STD_TORCH_CHECK(grad_patches.size() == count && patch_ids.size() == count &&
                      (!normalize || (patches.size() == count && inverse_norms.size() == count)),
                  op, ": the lists differ in length.");
  std::vector<Layer> whole, layers;  // with all samples, and with the distinct positions
  std::vector<LayerGradient> gradients(count);
  std::vector<char*> data;
  for (size_t l = 0; l < count; ++l) {
    const Tensor& map = maps[l];
    check_feature(op, map);
    const int64_t positions = map.size(2) * map.size(3);
    const std::vector<int64_t> ids = read_ids(op, patch_ids[l], positions);
    const ScalarType dtype = map.scalar_type(), acc = accumulation_type(dtype);
    const int64_t batch = map.size(0), samples = static_cast<int64_t>(ids.size());
    const int64_t channels = map.size(1);
    LayerGradient& gradient = gradients[l];
    check_rows(op, "grad_patches", grad_patches[l], dtype, {batch, samples, channels});
    gradient.gradient = grad_patches[l];
    if (normalize) {
      check_rows(op, "patches", patches[l], dtype, {batch, samples, channels});
      check_rows(op, "inverse_norms", inverse_norms[l], acc, {batch, samples});
      gradient.patches = patches[l];
      gradient.inverse_norms = inverse_norms[l];
      with_sums(acc, [&](auto zero) {
        using T = decltype(zero);
        gradient.scratch<T>() = Buffer<T>(batch * samples * channels);
      });
    }
    gradient.groups = group_by_position(ids, positions);
    if (normalize) whole.emplace_back(map, ids);
    layers.emplace_back(map, gradient.groups.ids);
    data.push_back(static_cast<char*>(map.mutable_data_ptr()));
  }
  if (normalize) {
    run_patches(whole, [&](size_t l, int64_t begin, int64_t end) {
      with_sums(accumulation_type(whole[l].dtype), [&](auto zero) {
        project_rows<decltype(zero)>(gradients[l], whole[l].channels, begin, end);
      });
    });
  }
  run_layers(layers, [&](const Block& block) {
    const Layer& layer = layers[block.layer];
    LayerGradient& from = gradients[block.layer];
    with_element_type(layer.dtype, [&](auto zero) {
      using Element = decltype(zero);
      using T = std::conditional_t<std::is_same_v<Element, double>, double, float>;
      auto* map = reinterpret_cast<Element*>(data[block.layer]);
      if (normalize) {
        const int64_t samples = from.gradient.size(1), row = layer.channels;
        const Gradients<T> source{from.scratch<T>().data(), samples * row, row, 1};
        scatter_block<T>(layer, block, from.groups, source, map);
      } else {
        const Tensor& g = from.gradient;
        const Gradients<Element> source{static_cast<const Element*>(g.const_data_ptr()),
                                        g.stride(0), g.stride(1), g.stride(2)};
        scatter_block<T>(layer, block, from.groups, source, map);
      }
    });
  });
}

// --- operators ---

std::tuple<Tensors, Tensors> sample_patches_forward(const Tensors& features,
                                                    const Tensors& patch_ids, bool normalize) {
  const char* op = "sample_patches_forward";
  STD_TORCH_CHECK(features.size() == patch_ids.size(), op, ": got ", features.size(),
                  " features, but ", patch_ids.size(), " patch_ids.");
  Tensors patches, inverse_norms;
  std::vector<Layer> layers;
  for (size_t l = 0; l < features.size(); ++l) {
    const Tensor& feature = features[l];
    check_feature(op, feature);
    layers.emplace_back(feature, read_ids(op, patch_ids[l], feature.size(2) * feature.size(3)));
    const int64_t batch = feature.size(0), count = layers[l].positions();
    const ScalarType dtype = feature.scalar_type();
    patches.push_back(new_tensor(feature, {batch, count, feature.size(1)}, dtype));
    if (normalize) {
      inverse_norms.push_back(new_tensor(feature, {batch, count}, accumulation_type(dtype)));
    }
  }
  gather(layers, features, patches);
  if (normalize) {
    run_patches(layers, [&](size_t l, int64_t begin, int64_t end) {
      with_sums(accumulation_type(layers[l].dtype), [&](auto zero) {
        using T = decltype(zero);
        normalize_rows<T>(layers[l], begin, end, patches[l],
                          inverse_norms[l].mutable_data_ptr<T>());
      });
    });
  }
  return {patches, inverse_norms};
}

void fill_zero(const Tensors& tensors) {
  // Pieces end where huge pages do: two threads that touch one first would both make it.
  constexpr int64_t kPiece = int64_t{1} << 21;
  std::vector<std::pair<char*, int64_t>> pieces;
  for (const Tensor& tensor : tensors) {
    ask_for_huge_pages(tensor);
    char* data = static_cast<char*>(tensor.mutable_data_ptr());
    const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
    const int64_t head = -reinterpret_cast<intptr_t>(data) & (kPiece - 1);
    for (int64_t b = 0, e = std::min(head, bytes); b < bytes;) {
      if (e > b) pieces.emplace_back(data + b, e - b);
      b = e;
      e = std::min(bytes, e + kPiece);
    }
  }
  run_tasks(static_cast<int64_t>(pieces.size()), kPiece, [&](int64_t task) {
    std::memset(pieces[task].first, 0, static_cast<size_t>(pieces[task].second));
  });
}

Tensors sample_patches_backward(const Tensors& grad_patches, const Tensors& patches,
                                const Tensors& inverse_norms, const Tensors& patch_ids,
                                const Tensors& feature_likes, bool normalize) {
  const char* op = "sample_patches_backward";
  Tensors gradients;
  for (const Tensor& like : feature_likes) {
    check_feature(op, like);
    gradients.push_back(torch::stable::empty_like(like));
  }
  fill_zero(gradients);
  scatter(op, gradients, grad_patches, patches, inverse_norms, patch_ids, normalize);
  return gradients;
}

void sample_patches_add_(const Tensors& maps, const Tensors& grad_patches, const Tensors& patches,
                         const Tensors& inverse_norms, const Tensors& patch_ids, bool normalize) {
  scatter("sample_patches_add_", maps, grad_patches, patches, inverse_norms, patch_ids, normalize);
}

STABLE_TORCH_LIBRARY_IMPL(fastnce, CPU, m) {
  m.impl("sample_patches_forward", TORCH_BOX(&sample_patches_forward));
  m.impl("sample_patches_backward", TORCH_BOX(&sample_patches_backward));
  m.impl("sample_patches_add_", TORCH_BOX(&sample_patches_add_));
}

}  // namespace
}  // namespace fastnce::sample_patches
