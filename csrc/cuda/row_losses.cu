// A thread takes a row, or, where a row has many parts (few rows against many columns), a warp: its
// lanes then load the parts side by side, and all compute and write the same. Numbers that all rows
// share (the largest gradient that arrives, the number of rows with a positive) every block finds
// for itself, from all rows: at most two blocks for each multiprocessor read R floats from the
// cache, which up to many thousand rows takes less time than another launch, and beyond is nothing
// beside R^2.
#include "row_losses.h"

#include "launch.cuh"
#include "scalars.cuh"

namespace fastnce::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTemperatureThreads = 1024;  // one block takes all rows
// As many as a thread asks for at a time; a warp takes a row of more.
constexpr int kManyParts = 4;
constexpr float kInfinity = __builtin_inff();

__device__ float loss_gradient(const LossGradient& g, int64_t row) {
  const int64_t outer = row / g.inner;
  return g.data[outer * g.strides[0] + (row - outer * g.inner) * g.strides[1]];
}

// The largest magnitude of the gradients that arrive, 1 where that is no number to divide by.
__device__ float largest_gradient(const LossGradient& g, int64_t total) {
  float mine = 0;
  for (int64_t row = threadIdx.x; row < total; row += kThreads) {
    mine = fmaxf(mine, fabsf(loss_gradient(g, row)));
  }
  const float top = of_block(mine, [](float a, float b) { return fmaxf(a, b); });
  return top > 0 && top < kInfinity ? top : 1.0f;
}

// Calls of(row, weight) for this thread's rows, with the weights of their losses. Of `lanes`
// neighbours, 1 or a warp, all have the same rows.
template <class Of>
__device__ void for_rows(const LossGradient& g, int64_t total, int lanes, const Of& of) {
  const float top = g.data ? largest_gradient(g, total) : 1.0f;
  if (blockIdx.x == 0 && threadIdx.x == 0 && g.data) *g.upstream = top;
  const int rows = kThreads / lanes;  // of a block
  int64_t row = static_cast<int64_t>(blockIdx.x) * rows + static_cast<int>(threadIdx.x) / lanes;
  for (; row < total; row += static_cast<int64_t>(gridDim.x) * rows) {
    of(row, g.data ? loss_gradient(g, row) / top : 1.0f);
  }
}

__device__ void store_statistics(float* statistics, int64_t total, int64_t row, float lse,
                                 float weight, float third) {
  if (statistics == nullptr) return;
  statistics[row] = lse;
  statistics[total + row] = weight;
  statistics[2 * total + row] = third;
}

// To base 2, rounded as the logits of a tile are.
__device__ float pair_logit(const PairLogits& p, int64_t row, double factor) {
  return p.products[row] * to_base_2(p.x_scale[row], factor) * p.y_scale[row];
}

// Maximum and sum over the parts, and a constant logit, to base 2.
struct Merged {
  float top, sum;
};
__device__ Merged merged(const SumParts& p, int64_t total, int64_t row, float constant, int lanes) {
  const int first = static_cast<int>(threadIdx.x) % lanes;
  float top = constant;
#pragma unroll 4
  for (int64_t part = first; part < p.parts; part += lanes) {
    top = fmaxf(top, p.largest[part * total + row]);
  }
  if (lanes > 1) top = warp_max(top);
  const float finite = top == -kInfinity ? 0.0f : top;
  float sum = 0;
#pragma unroll 4
  for (int64_t part = first; part < p.parts; part += lanes) {
    const int64_t at = part * total + row;
    sum += p.sum[at] * exp2f(p.largest[at] - finite);
  }
  if (lanes > 1) sum = warp_sum(sum);
  return {top, sum + exp2f(constant - finite)};
}
__device__ float log_sum(Merged m) { return (m.top + log2f(m.sum)) * kLn2; }

// Of a row or a column: loss, log-sum-exp (natural), and the softmax's weight on all but the
// positive.
struct Direction {
  float loss, lse, missing;
};
__device__ Direction from_sums(Merged others, float positive) {
  // Large numbers meet before anything is rounded. An infinite positive makes the loss inf - inf.
  const float d = ((others.top - positive) + log2f(others.sum)) * kLn2 + 0 * fmaxf(positive, 0.0f);
  const float loss = fmaxf(d, 0.0f) + log1pf(expf(-fabsf(d)));
  return {loss, positive * kLn2 + loss, 1 / (1 + expf(-d))};
}

__global__ void __launch_bounds__(kThreads)
    info_nce_losses_kernel(const __grid_constant__ InfoNceLosses l, int lanes) {
  const double factor = base_2_factor(l.temperature);
  const float constant = l.has_self_logit ? to_base_2(l.self_logit, factor) : -kInfinity;
  for_rows(l.grad_loss, l.total, lanes, [&](int64_t row, float weight) {
    const float positive = pair_logit(l.positive, row, factor);
    Direction along, down = {};
    if (l.loss) {
      along = from_sums(merged(l.rows, l.total, row, constant, lanes), positive);
      l.lse[row] = along.lse;
      if (l.symmetric) {
        down = from_sums(merged(l.columns, l.total, row, -kInfinity, lanes), positive);
        l.lse[l.total + row] = down.lse;
      }
      l.loss[row] = l.symmetric ? 0.5f * (along.loss + down.loss) : along.loss;
    } else {
      along = {0, l.lse[row], -expm1f(positive * kLn2 - l.lse[row])};
      if (l.symmetric) {
        const float lse = l.lse[l.total + row];
        down = {0, lse, -expm1f(positive * kLn2 - lse)};
      }
    }
    if (l.positive.weight) {
      const float missing = l.symmetric ? 0.5f * (along.missing + down.missing) : along.missing;
      l.positive.logit[row] = positive * kLn2;
      l.positive.weight[row] = -missing * weight;
    }
    const float half = l.symmetric ? 0.5f * weight : weight;
    store_statistics(l.row_statistics, l.total, row, along.lse, half, half);
    store_statistics(l.column_statistics, l.total, row, down.lse, half, half);
    const int first = static_cast<int>(threadIdx.x) % lanes;
    for (int64_t part = first; part < l.factor_parts; part += lanes) {
      const int64_t at = part * l.total + row;
      l.factor[at] = exp2f(l.rows.largest[at] - along.lse * kLog2E);
    }
  });
}

__global__ void __launch_bounds__(kThreads)
    conditional_contrastive_losses_kernel(const __grid_constant__ ConditionalContrastiveLosses l) {
  const double factor = base_2_factor(l.temperature);
  for_rows(l.grad_loss, l.total, 1, [&](int64_t row, float weight) {
    const float proxy = pair_logit(l.proxy, row, factor);
    if (l.loss) {
      const float denominator = log_sum(merged(l.rows, l.total, row, proxy, 1));
      const float numerator = log_sum(merged(l.same, l.total, row, proxy, 1));
      l.loss[row] = denominator - numerator;
      l.lse[row] = denominator;
      l.lse[l.total + row] = numerator;
    }
    const float denominator = l.lse[row], numerator = l.lse[l.total + row];
    if (l.proxy.weight) {
      const float logit = proxy * kLn2;
      l.proxy.logit[row] = logit;
      l.proxy.weight[row] = weight * (expf(logit - denominator) - expf(logit - numerator));
    }
    store_statistics(l.statistics, l.total, row, denominator, weight, numerator);
  });
}

__device__ float positives_of(const SupConLosses& l, int64_t row) {
  float count = 0;
  for (int64_t part = 0; part < l.count_parts; ++part) {
    count += l.positive_counts[part * l.total + row];
  }
  return count;
}

__global__ void __launch_bounds__(kThreads)
    sup_con_losses_kernel(const __grid_constant__ SupConLosses l) {
  if (l.mean) {
    int mine = 0;
    for (int64_t row = threadIdx.x; row < l.total; row += kThreads) {
      mine += positives_of(l, row) > 0 ? 1 : 0;
    }
    const int number = block_sum(mine);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      *l.grad_loss.upstream = l.grad_scale / (number < 1 ? 1 : number);
    }
  }
  for_rows(l.grad_loss, l.total, 1, [&](int64_t row, float weight) {
    const float count = positives_of(l, row);
    if (l.loss) {
      const Merged all = merged(l.rows, l.total, row, -kInfinity, 1);
      float logits = 0;
      for (int64_t part = 0; part < l.count_parts; ++part) {
        logits += l.positive_logits[part * l.total + row];
      }
      const float lse = all.sum == 0 ? 0.0f : log_sum(all);  // 0 for a single row
      l.loss[row] = count > 0 ? lse - logits / count : 0.0f;
      l.lse[row] = lse;
      l.has_positive[row] = count > 0;
    }
    weight = count > 0 ? weight : 0.0f;
    store_statistics(l.statistics, l.total, row, l.lse[row], weight,
                     weight / (count < 1 ? 1.0f : count));
  });
}

// A comparison for each pair of rows, where the products take D multiplications.
__global__ void __launch_bounds__(kThreads)
    label_counts_kernel(const int64_t* labels, int64_t total, float* counts) {
  int64_t* shared = shared_memory<int64_t>();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t label = labels[row < total ? row : 0];
  int count = -1;  // itself
  for (int64_t begin = 0; begin < total; begin += kThreads) {
    const int64_t size = total - begin < kThreads ? total - begin : kThreads;
    if (threadIdx.x < size) shared[threadIdx.x] = labels[begin + threadIdx.x];
    sync_threads();
    for (int i = 0; i < size; ++i) count += shared[i] == label ? 1 : 0;
    sync_threads();
  }
  if (row < total) counts[row] = static_cast<float>(count);
}

// Of one block: there is one result, and a second launch or blocks that wait for one another cost
// more than R floats.
__global__ void __launch_bounds__(kTemperatureThreads, 1)
    temperature_gradient_kernel(const __grid_constant__ TemperatureGradient g) {
  const double temperature = value_of(g.temperature);
  const auto constant = static_cast<float>(g.self_logit / temperature);
  double mine = 0;
  const int64_t with_factor = g.factor_parts * g.total;
#pragma unroll 4
  for (int64_t at = threadIdx.x; at < g.parts * g.total; at += kTemperatureThreads) {
    mine += g.scale * g.term[at] * (at < with_factor ? g.factor[at] : 1.0f);
  }
  if (g.pair_weight) {
    for (int64_t row = threadIdx.x; row < g.total; row += kTemperatureThreads) {
      mine += g.pair_weight[row] * g.pair_logit[row];
    }
  }
  if (g.row_statistics) {
    for (int64_t row = threadIdx.x; row < g.total; row += kTemperatureThreads) {
      const float softmax = expf(constant - g.row_statistics[row]);
      mine += g.row_statistics[g.total + row] * softmax * constant;
    }
  }
  const double sum = block_sum(mine);
  if (threadIdx.x != 0) return;
  const float upstream = g.upstream.tensor ? *g.upstream.tensor : g.upstream.value;
  *g.out = static_cast<float>(-sum * (upstream / temperature));
}

Launch launch_of_rows(const char* op, int64_t total, int multiprocessors, Stream stream,
                      int lanes = 1) {
  const int64_t rows = kThreads / lanes, wanted = (total + rows - 1) / rows;
  const int64_t most = 2 * multiprocessors;
  return {op, dim3(static_cast<unsigned>(wanted < most ? wanted : most)), dim3(kThreads),
          kThreads / kWarp * sizeof(float), stream};
}

}  // namespace

void launch_info_nce_losses(const InfoNceLosses& losses, int multiprocessors, Stream stream) {
  const bool many = losses.rows.parts > kManyParts || losses.columns.parts > kManyParts;
  const int lanes = many ? kWarp : 1;
  launch(launch_of_rows(losses.op, losses.total, multiprocessors, stream, lanes),
         info_nce_losses_kernel, losses, lanes);
}

void launch_conditional_contrastive_losses(const ConditionalContrastiveLosses& losses,
                                           int multiprocessors, Stream stream) {
  launch(launch_of_rows(losses.op, losses.total, multiprocessors, stream),
         conditional_contrastive_losses_kernel, losses);
}

void launch_sup_con_losses(const SupConLosses& losses, int multiprocessors, Stream stream) {
  launch(launch_of_rows(losses.op, losses.total, multiprocessors, stream), sup_con_losses_kernel,
         losses);
}

void launch_label_counts(const char* op, const int64_t* labels, int64_t total, float* counts,
                         Stream stream) {
  const auto blocks = static_cast<unsigned>((total + kThreads - 1) / kThreads);
  launch({op, dim3(blocks), dim3(kThreads), kThreads * sizeof(int64_t), stream},
         label_counts_kernel, labels, total, counts);
}

void launch_temperature_gradient(const TemperatureGradient& gradient, Stream stream) {
  launch({gradient.op, dim3(1), dim3(kTemperatureThreads),
          kTemperatureThreads / kWarp * sizeof(double), stream},
         temperature_gradient_kernel, gradient);
}

}  // namespace fastnce::cuda
