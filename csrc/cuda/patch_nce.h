// PatchNCE of all layers and images of a step: many small problems, solved by one kernel.
//
// Row i of a problem has the logits z_ij = cos(x_i, y_j) / t of its N columns, of which j = i is
// its positive, and the constant self_logit / t:  loss_i = log(e^(self_logit / t) + sum_j e^(z_ij))
// - z_ii.
#pragma once

#include <vector>

#include "arguments.h"

namespace fastnce::cuda {

// A layer's problems; all layers of a call have one dtype. Rows are queries and columns keys. For
// the gradients of keys it is the other way round, and lse and missing, which are of queries, are
// read.
struct PatchLayer {
  RowsView rows, columns;
  void* gradient = nullptr;  // (batch, N, depth), contiguous, like the rows; null: not wanted
  float* lse = nullptr;      // (batch, N) to base 2; null: not wanted
  float* missing = nullptr;  // (batch, N) what the softmax of the positive lacks of 1; likewise
  float loss_scale = 0;      // of each row's loss in the result
  float grad_scale = 0;      // d L / d loss of each row
};

struct PatchCall {
  bool bfloat16_products;  // of float32 rows
  Temperature temperature;
  float self_logit;
  int capability, multiprocessors;
};

bool can_run_patch_nce(Dtype dtype, int64_t depth, int64_t rows);

// The results' parts, pairs of floats: sum of loss_scale loss, and its derivative with respect to
// the temperature. The layers have so many:
int64_t patch_nce_blocks(const std::vector<PatchLayer>& layers, const PatchCall& call);

// The parts, and what the layers ask for.
void launch_patch_nce(const std::vector<PatchLayer>& layers, const PatchCall& call, float* parts,
                      Stream stream);
// The gradients of the keys.
void launch_patch_nce_keys(const std::vector<PatchLayer>& layers, const PatchCall& call,
                           Stream stream);

// A layer that was solved otherwise.
struct LargeLayer {
  const float* loss;  // (count,)
  int64_t count;
  float loss_scale;
  const float* grad_temperature = nullptr;  // 0-d, or null
  float to_loss_scale = 0;                  // its factor
};
// Its part, a pair.
void launch_sum_of_layer(const LargeLayer& layer, float* part, Stream stream);

// The sums of all parts, always in the same order; grad_temperature may be null.
void launch_sum_of_parts(const float* parts, int64_t count, float* loss, float* grad_temperature,
                         Stream stream);

}  // namespace fastnce::cuda
