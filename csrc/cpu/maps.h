// Feature maps as the kernels of images see them: channels-last, contiguous, float32 or bfloat16.
#pragma once

#include <cstring>
#include <vector>

#include "image_kernels.h"
#include "op_arguments.h"
#include "parallel.h"
#include "slabs.h"

namespace fastnce {

// (B, H, W, C) contiguous; C a multiple of kChannelStep.
struct MapSize {
  int64_t images, height, width, channels;

  MapSize(const char* op, const char* name, const Tensor& map) {
    STD_TORCH_CHECK(map.is_cpu() && map.dim() == 4, op, ": ", name,
                    " must be a map (B, H, W, C) on the CPU.");
    STD_TORCH_CHECK(
        map.scalar_type() == ScalarType::Float || map.scalar_type() == ScalarType::BFloat16, op,
        ": ", name, " must be float32 or bfloat16.");
    images = map.size(0), height = map.size(1), width = map.size(2), channels = map.size(3);
    STD_TORCH_CHECK(map.is_contiguous() && map.numel() > 0, op, ": ", name,
                    " must be contiguous and not empty.");
    STD_TORCH_CHECK(channels % kChannelStep == 0, op, ": ", name,
                    " must have a multiple of 16 channels, got ", channels, ".");
  }
  int64_t pixels() const { return height * width; }
};

// Calls f with a value of the C++ type of a map's elements.
template <class F>
void with_map_type(const Tensor& map, const F& f) {
  if (map.scalar_type() == ScalarType::Float) {
    f(float{});
  } else {
    f(Bfloat16{});
  }
}

template <class Element>
const Element* map_data(const Tensor& map) {
  return static_cast<const Element*>(map.const_data_ptr());
}
template <class Element>
Element* new_map_data(const Tensor& map) {
  return static_cast<Element*>(map.mutable_data_ptr());
}

// An element as a number, and a number as an element.
inline float widened(float x) { return x; }
inline float widened(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, Bfloat16& out) { out.bits = torch::headeronly::BFloat16(x).x; }

}  // namespace fastnce
