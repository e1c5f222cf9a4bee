// Patches of feature maps: gathered straight from any strides, and their gradients on the way back.
// Without float atomics.
#pragma once

#include <cstdint>
#include <vector>

#include "arguments.h"

namespace fastnce::cuda {

// (batch, count, channels), strides in elements.
struct PatchRows {
  void* data;
  int64_t strides[3];
};

// One map with its patches. All maps of a call have one dtype.
struct PatchMap {
  void* map;  // (batch, channels, height, width), strides in elements
  int batch, channels, height, width;
  int64_t strides[4];
  const int64_t* ids;  // (count,) positions h * width + w, on the device; may repeat
  int64_t id_stride;
  int count;
  PatchRows patches;
  float* inverse_norms;  // (batch, count), contiguous; null: patches are not normalised
  PatchRows gradients;   // of the patches
};

// patches = the map at ids, divided by their norms if those are asked for; NaN where an id is no
// position of the map, which gradients then leave out.
void gather_patches(Dtype dtype, const std::vector<PatchMap>& maps, Stream stream);

// map += the gradients of the patches, those of a repeated position in the order of ids.
void add_patch_gradients(Dtype dtype, const std::vector<PatchMap>& maps, Stream stream);

// map = the same, zero where nothing was sampled; the map need not be initialised.
void fill_patch_gradients(Dtype dtype, const std::vector<PatchMap>& maps, Stream stream);

}  // namespace fastnce::cuda
