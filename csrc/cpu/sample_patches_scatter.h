// Adding the gradients of patches to those of the maps that they were gathered from.
//
// A position may be sampled several times. Its samples are summed first, always in the same order,
// so that one task alone writes to a position and the result does not depend on the threads.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "sample_patches_layers.h"
#include "unit_rows.h"

namespace fastnce::sample_patches {

// The samples of each distinct position: order[starts[p]] to order[starts[p + 1] - 1], ascending.
struct Groups {
  std::vector<int64_t> order, starts, ids;  // ids: the distinct positions
};

inline Groups group_by_position(const std::vector<int64_t>& ids, int64_t positions) {
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
inline void scatter(const char* op, const Tensors& maps, const Tensors& grad_patches,
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
      if (acc == ScalarType::Double) {
        gradient.projected_double = Buffer<double>(batch * samples * channels);
      } else {
        gradient.projected = Buffer<float>(batch * samples * channels);
      }
    }
    gradient.groups = group_by_position(ids, positions);
    if (normalize) whole.emplace_back(map, ids);
    layers.emplace_back(map, gradient.groups.ids);
    data.push_back(static_cast<char*>(map.mutable_data_ptr()));
  }
  if (normalize) {
    run_patches(whole, [&](size_t l, int64_t begin, int64_t end) {
      if (accumulation_type(whole[l].dtype) == ScalarType::Double) {
        project_rows<double>(gradients[l], whole[l].channels, begin, end);
      } else {
        project_rows<float>(gradients[l], whole[l].channels, begin, end);
      }
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

}  // namespace fastnce::sample_patches
