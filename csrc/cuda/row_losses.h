// From sums of exponentials by parts (pairs.h) to the losses of rows, and from those, or from the
// log-sum-exps of an earlier call, to what the gradients need.
#pragma once

#include "arguments.h"
#include "rows.h"

namespace fastnce::cuda {

// Sums of exponentials in parts, `sum 2^largest`, (parts, R) each.
struct SumParts {
  const float* largest = nullptr;
  const float* sum = nullptr;
  int64_t parts = 0;
};

// The gradients that arrive for the losses, (outer, inner) of these strides; none: 1 for each.
// Before products they are divided by their largest magnitude, which goes to `upstream`: float16
// holds a number of at most 1 times a softmax.
struct LossGradient {
  const float* data = nullptr;
  int64_t inner = 1;
  int64_t strides[2] = {0, 0};
  float* upstream = nullptr;  // (1,)
};

// Statistics are those of Products in pairs.h, (3, R): log-sum-exp, weight, third. What is not
// wanted is null.

// The logits of pairs (i, i), and what their losses' gradients need.
struct PairLogits {
  const float* products;  // (R,) of the packed rows
  const float* x_scale;
  const float* y_scale;
  float* logit = nullptr;   // (R,)
  float* weight = nullptr;  // (R,): d L / d logit
};

// InfoNCE. The positive of a row is kept out of the sums: with s the sum of the other exponentials
// relative to the positive's, the loss is log(1 + s) and the gradient at the positive -s / (1 + s).
// Nothing cancels where the positive dominates.
struct InfoNceLosses {
  const char* op;
  int64_t total;  // R
  Temperature temperature;
  bool symmetric, has_self_logit;
  float self_logit;
  PairLogits positive;
  // Forward: fills loss (R,) and lse, (R,) or (2, R) if symmetric. Backward: loss is null, lse
  // given.
  SumParts rows, columns;  // columns if symmetric
  float* loss = nullptr;
  float* lse = nullptr;
  LossGradient grad_loss;
  float* row_statistics = nullptr;
  float* column_statistics = nullptr;
  // (factor_parts, R): from exponentials of a part of the rows to the softmax.
  float* factor = nullptr;
  int64_t factor_parts = 0;
};
void launch_info_nce_losses(const InfoNceLosses& losses, int multiprocessors, Stream stream);

// 2C: a row's own proxy is in both sums.
struct ConditionalContrastiveLosses {
  const char* op;
  int64_t total;
  Temperature temperature;
  PairLogits proxy;
  SumParts rows, same;    // of all other rows, of those with the row's label
  float* loss = nullptr;  // as above
  float* lse = nullptr;   // (2, R): log denominator, log numerator
  LossGradient grad_loss;
  float* statistics = nullptr;
};
void launch_conditional_contrastive_losses(const ConditionalContrastiveLosses& losses,
                                           int multiprocessors, Stream stream);

// SupCon. Positives, by parts: the sum of their logits, and their number; backward: the number
// alone, one part.
struct SupConLosses {
  const char* op;
  int64_t total;
  SumParts rows;
  const float* positive_logits = nullptr;
  const float* positive_counts;
  int64_t count_parts;
  float* loss = nullptr;  // as above
  float* lse = nullptr;   // (R,)
  bool* has_positive = nullptr;
  LossGradient grad_loss;
  // Forward: `upstream` becomes grad_scale, divided by the number of rows with a positive if
  // `mean`.
  float grad_scale = 1.0f;
  bool mean = false;
  float* statistics = nullptr;
};
void launch_sup_con_losses(const SupConLosses& losses, int multiprocessors, Stream stream);

// counts (R,): how many other rows have each row's label.
void launch_label_counts(const char* op, const int64_t* labels, int64_t total, float* counts,
                         Stream stream);

// The gradient of the temperature, -upstream / t * sum_i (pair_weight_i pair_logit_i + scale sum_p
// factor_pi term_pi
// + weight_i e^(c / t - lse_i) c / t) with c the constant logit.
struct TemperatureGradient {
  const char* op;
  int64_t total;
  Temperature temperature;
  Upstream upstream;
  const float* pair_weight = nullptr;  // (R,)
  const float* pair_logit = nullptr;
  const float* term = nullptr;  // (parts, R): sum_j G_ij z_ij, or of exponentials
  int64_t parts = 0;
  const float* factor = nullptr;  // (factor_parts, R), of the first parts; others count as they are
  int64_t factor_parts = 0;
  float scale = 1.0f;
  const float* row_statistics = nullptr;  // with a constant logit
  float self_logit = 0.0f;
  float* out = nullptr;  // a scalar
};
void launch_temperature_gradient(const TemperatureGradient& gradient, Stream stream);

}  // namespace fastnce::cuda
