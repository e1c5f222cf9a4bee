// PatchNCE of all layers and images of a step: many small problems, solved by one kernel.
//
// Row i of a problem has the logits z_ij = cos(x_i, y_j) / t of its N columns, of which j = i is
// its positive, and the constant self_logit / t:  loss_i = log(e^(self_logit / t) + sum_j e^(z_ij))
// - z_ii. With the own side, the other rows are columns as well, and the constant is there twice.
#pragma once

#include <vector>

#include "arguments.h"

namespace fastnce::cuda {

// (batch, N) of the losses of rows, or of columns; null where they have none, or it is not wanted.
struct PatchStatistics {
  float* lse = nullptr;      // to base 2
  float* missing = nullptr;  // what the softmax of the positive lacks of 1
};

// A layer's problems; all layers of a call have one dtype. Losses are of rows, and their statistics
// are written. A gradient is with respect to rows, of their losses and of those of the columns.
struct PatchLayer {
  RowsView rows, columns;
  bool own_side = false;
  void* gradient = nullptr;  // (batch, N, depth), contiguous, like the rows; null: not wanted
  PatchStatistics of_rows, of_columns;
  float loss_scale = 0;  // of each row's loss in the result
  float grad_scale = 0;  // d L / d loss of each row
};

struct PatchCall {
  bool bfloat16_products;  // of float32 rows
  Temperature temperature;
  float self_logit;
  int capability, multiprocessors;
};

// Whether it is the kernel for such problems; of fewer rows it takes any.
bool can_run_patch_nce(int64_t depth, int64_t rows);

// The results' parts, pairs of floats: sum of loss_scale loss, and its derivative with respect to
// the temperature. The layers have so many:
int64_t patch_nce_blocks(const std::vector<PatchLayer>& layers, const PatchCall& call);

// The parts, and what the layers ask for: statistics, and gradients of what rows alone lose.
void launch_patch_nce(const std::vector<PatchLayer>& layers, const PatchCall& call, float* parts,
                      Stream stream);
// The gradients, from statistics.
void launch_patch_nce_gradients(const std::vector<PatchLayer>& layers, const PatchCall& call,
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
