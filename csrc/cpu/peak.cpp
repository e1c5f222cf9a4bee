// What the kernels run on: the instruction set, and its peak rate of multiply-adds. A share of the
// peak is comparable between machines.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <string>
#include <vector>

#include "tile_kernels.h"

namespace fastnce {
namespace {

// About a tenth of a millisecond: long beside reading the clock, short beside the turns that other
// processes get.
constexpr int64_t kRoundsPerLook = 50'000;

// GFLOP/s of the calling thread: the median of short looks, so that those in which it had to wait
// for its turn do not count. `seconds` are measured, after half as long to reach the clock
// frequency.
double thread_rate(int64_t (*work)(int64_t rounds), double seconds) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> rates;
  const auto begin = Clock::now();
  for (double elapsed = 0; elapsed < 1.5 * seconds;) {
    const auto look = Clock::now();
    const auto flop = static_cast<double>(work(kRoundsPerLook));
    const auto now = Clock::now();
    elapsed = std::chrono::duration<double>(now - begin).count();
    const double rate = flop / std::chrono::duration<double>(now - look).count() / 1e9;
    if (elapsed > seconds / 2) rates.push_back(rate);
  }
  const auto middle = rates.begin() + static_cast<int64_t>(rates.size() / 2);
  std::nth_element(rates.begin(), middle, rates.end());
  return *middle;
}

double fma_peak(double seconds, const std::string& dtype) {
  STD_TORCH_CHECK(seconds > 0 && seconds <= 60, "fma_peak: seconds must lie in (0, 60], got ",
                  seconds, ".");
  const TileKernels<float>& kernels = tile_kernels<float>();
  auto* work = kernels.multiply_add_rounds;
  if (dtype == "float64") {
    work = tile_kernels<double>().multiply_add_rounds;
  } else if (dtype == "bfloat16" && kernels.pairs != nullptr) {
    work = kernels.pairs->multiply_add_rounds;
  } else {
    STD_TORCH_CHECK(dtype == "float32" || dtype == "bfloat16", "fma_peak: dtype must be float64, ",
                    "float32 or bfloat16, got ", dtype, ".");
  }
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  std::vector<double> rates(threads, 0.0);
  // A thread that gets several indices measures once: they would run one after another.
  torch::stable::parallel_for(
      0, threads, 1, [&](int64_t begin, int64_t) { rates[begin] = thread_rate(work, seconds); });
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

std::string instruction_set() { return instruction_set_name(); }

// There is no tensor by which to find a device.
STABLE_TORCH_LIBRARY_IMPL(fastnce, CompositeExplicitAutograd, m) {
  m.impl("fma_peak", TORCH_BOX(&fma_peak));
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

}  // namespace
}  // namespace fastnce
