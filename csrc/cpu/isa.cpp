// Chooses the table of inner loops: the best that the processor runs, or the one that the
// environment variable FASTNCE_CPU_ISA names.
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string_view>

#include "image_kernels.h"
#include "tile_kernels.h"

namespace fastnce {

#define FASTNCE_DECLARE_TABLES(isa)                    \
  namespace isa {                                      \
  extern const TileKernels<float> kFloatKernels;       \
  extern const TileKernels<double> kDoubleKernels;     \
  extern const ImageKernels<float> kFloatImages;       \
  extern const ImageKernels<Bfloat16> kBfloat16Images; \
  extern const WinogradKernels kWinograd;              \
  }
FASTNCE_DECLARE_TABLES(portable)
#ifdef __x86_64__
FASTNCE_DECLARE_TABLES(avx2)
FASTNCE_DECLARE_TABLES(avx512)
namespace avx512bf16 {
extern const PairKernels kPairKernels;
}
#endif
#undef FASTNCE_DECLARE_TABLES

namespace {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };
constexpr std::array<std::string_view, 4> kNames = {"portable", "avx2", "avx512", "avx512bf16"};

Isa best_isa() {
#ifdef __x86_64__
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kPortable;
  if (!__builtin_cpu_supports("avx512f")) return Isa::kAvx2;
  const bool pairs = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl");
  return pairs ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kPortable;
#endif
}

Isa chosen_isa() {
  static const Isa best = best_isa();
  const char* name = std::getenv("FASTNCE_CPU_ISA");
  if (name == nullptr || *name == '\0') return best;
  const auto found = std::find(kNames.begin(), kNames.end(), std::string_view(name));
  STD_TORCH_CHECK(found != kNames.end(), "fastnce: FASTNCE_CPU_ISA=", name,
                  " is unknown. Use portable, avx2, avx512 or avx512bf16, or unset it.");
  const auto isa = static_cast<Isa>(found - kNames.begin());
  STD_TORCH_CHECK(isa <= best, "fastnce: FASTNCE_CPU_ISA=", name,
                  ", but this processor does not have it. Use a lower level, or unset it.");
  return isa;
}

#ifdef __x86_64__
const TileKernels<float>& float_kernels_with_pairs() {
  static const TileKernels<float> kernels = [] {
    TileKernels<float> table = avx512::kFloatKernels;
    table.pairs = &avx512bf16::kPairKernels;
    return table;
  }();
  return kernels;
}
#endif

}  // namespace

// The levels beyond AVX-512 add pairs alone.
#ifdef __x86_64__
#define FASTNCE_CHOOSE(name) \
  switch (chosen_isa()) {    \
    case Isa::kAvx512Bf16:   \
    case Isa::kAvx512:       \
      return avx512::name;   \
    case Isa::kAvx2:         \
      return avx2::name;     \
    default:                 \
      return portable::name; \
  }
#else
#define FASTNCE_CHOOSE(name) return portable::name;
#endif

template <>
const TileKernels<float>& tile_kernels<float>() {
#ifdef __x86_64__
  if (chosen_isa() == Isa::kAvx512Bf16) return float_kernels_with_pairs();
#endif
  FASTNCE_CHOOSE(kFloatKernels)
}
template <>
const TileKernels<double>& tile_kernels<double>() {
  FASTNCE_CHOOSE(kDoubleKernels)
}
template <>
const ImageKernels<float>& image_kernels<float>() {
  FASTNCE_CHOOSE(kFloatImages)
}
template <>
const ImageKernels<Bfloat16>& image_kernels<Bfloat16>() {
  FASTNCE_CHOOSE(kBfloat16Images)
}
const WinogradKernels& winograd_kernels() { FASTNCE_CHOOSE(kWinograd) }

#undef FASTNCE_CHOOSE

const char* instruction_set_name() { return kNames[static_cast<size_t>(chosen_isa())].data(); }

}  // namespace fastnce
