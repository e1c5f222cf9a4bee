// Gathering patches from feature maps, straight from any strides, and their gradients. One launch
// serves all maps.
#include "sample_patches.h"

#include <tuple>

#include "op.h"

namespace fastnce::cuda {
namespace {

void check_lengths(const char* op, size_t maps, std::initializer_list<size_t> others) {
  for (const size_t length : others) {
    STD_TORCH_CHECK(length == maps, op, ": the lists differ in length.");
  }
}

PatchRows rows_with_strides(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), {x.stride(0), x.stride(1), x.stride(2)}};
}

// All but the patches and their gradients.
PatchMap map_of(const char* op, const Tensor& map, const Tensor& ids, Dtype dtype) {
  STD_TORCH_CHECK(map.dim() == 4, op, ": maps must have the shape (B, C, H, W), got ", map.dim(),
                  " dimensions.");
  STD_TORCH_CHECK(ids.dim() == 1, op, ": patch_ids must have one dimension, got ", ids.dim(), ".");
  STD_TORCH_CHECK(dtype_of(op, map) == dtype, op, ": the maps must have one dtype.");
  const int64_t largest = INT32_MAX / 2;
  STD_TORCH_CHECK(map.size(0) * ids.size(0) < largest && map.size(1) < largest &&
                      map.size(2) * map.size(3) < largest,
                  op, ": a map of ", map.size(2), " x ", map.size(3), " positions and ",
                  map.size(0), " x ", ids.size(0),
                  " patches is beyond 32-bit numbers. Use backend='torch'.");
  check_tensor(op, "a map", map, map.scalar_type(),
               {map.size(0), map.size(1), map.size(2), map.size(3)});
  check_tensor(op, "patch_ids", ids, ScalarType::Long, {ids.size(0)});
  PatchMap out{};
  out.map = const_cast<void*>(map.const_data_ptr());
  int* const sizes[4] = {&out.batch, &out.channels, &out.height, &out.width};
  for (int d = 0; d < 4; ++d) *sizes[d] = static_cast<int>(map.size(d));
  for (int d = 0; d < 4; ++d) out.strides[d] = map.stride(d);
  out.ids = ids.const_data_ptr<int64_t>();
  out.id_stride = ids.stride(0);
  out.count = static_cast<int>(ids.size(0));
  return out;
}

std::tuple<Tensors, Tensors> sample_patches_forward(Tensors features, Tensors patch_ids,
                                                    bool normalize) {
  const char* op = "sample_patches_forward";
  check_lengths(op, features.size(), {patch_ids.size()});
  Tensors patches, inverse_norms;
  if (features.empty()) return {patches, inverse_norms};
  const Dtype dtype = dtype_of(op, features[0]);
  std::vector<PatchMap> maps;
  for (size_t l = 0; l < features.size(); ++l) {
    const Tensor& feature = features[l];
    PatchMap map = map_of(op, feature, patch_ids[l], dtype);
    patches.push_back(
        new_tensor(feature, {map.batch, map.count, map.channels}, feature.scalar_type()));
    map.patches = rows_with_strides(patches.back());
    if (normalize) {
      inverse_norms.push_back(new_tensor(feature, {map.batch, map.count}, ScalarType::Float));
      map.inverse_norms = inverse_norms.back().mutable_data_ptr<float>();
    }
    maps.push_back(map);
  }
  gather_patches(dtype, maps, current_stream(features[0]));
  return {patches, inverse_norms};
}

// The maps with the gradients of their patches.
std::vector<PatchMap> with_gradients(const char* op, const Tensors& maps,
                                     const Tensors& grad_patches, const Tensors& patches,
                                     const Tensors& inverse_norms, const Tensors& patch_ids,
                                     bool normalize) {
  check_lengths(op, maps.size(), {grad_patches.size(), patch_ids.size()});
  if (normalize) check_lengths(op, maps.size(), {patches.size(), inverse_norms.size()});
  std::vector<PatchMap> out;
  for (size_t l = 0; l < maps.size(); ++l) {
    PatchMap map = map_of(op, maps[l], patch_ids[l], dtype_of(op, maps[0]));
    const std::vector<int64_t> shape = {map.batch, map.count, map.channels};
    check_tensor(op, "grad_patches", grad_patches[l], maps[l].scalar_type(), shape);
    map.gradients = rows_with_strides(grad_patches[l]);
    if (normalize) {
      check_tensor(op, "patches", patches[l], maps[l].scalar_type(), shape);
      map.patches = rows_with_strides(patches[l]);
      const Tensor& norms = inverse_norms[l];
      check_tensor(op, "inverse_norms", norms, ScalarType::Float, {map.batch, map.count});
      STD_TORCH_CHECK(norms.is_contiguous(), op, ": inverse_norms must be contiguous.");
      map.inverse_norms = const_cast<float*>(norms.const_data_ptr<float>());
    }
    out.push_back(map);
  }
  return out;
}

Tensors sample_patches_backward(Tensors grad_patches, Tensors patches, Tensors inverse_norms,
                                Tensors patch_ids, Tensors feature_likes, bool normalize) {
  const char* op = "sample_patches_backward";
  Tensors gradients;
  for (const Tensor& like : feature_likes) gradients.push_back(torch::stable::empty_like(like));
  if (gradients.empty()) return gradients;
  fill_patch_gradients(
      dtype_of(op, gradients[0]),
      with_gradients(op, gradients, grad_patches, patches, inverse_norms, patch_ids, normalize),
      current_stream(gradients[0]));
  return gradients;
}

void sample_patches_add_(Tensors maps, Tensors grad_patches, Tensors patches, Tensors inverse_norms,
                         Tensors patch_ids, bool normalize) {
  const char* op = "sample_patches_add_";
  if (maps.empty()) return;
  add_patch_gradients(
      dtype_of(op, maps[0]),
      with_gradients(op, maps, grad_patches, patches, inverse_norms, patch_ids, normalize),
      current_stream(maps[0]));
}

FASTNCE_CUDA_LIBRARY_IMPL(m) {
  m.impl("sample_patches_forward", FASTNCE_CUDA_BOX(&sample_patches_forward));
  m.impl("sample_patches_backward", FASTNCE_CUDA_BOX(&sample_patches_backward));
  m.impl("sample_patches_add_", FASTNCE_CUDA_BOX(&sample_patches_add_));
}

}  // namespace
}  // namespace fastnce::cuda
