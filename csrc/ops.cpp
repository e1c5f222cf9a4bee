// The schemas of torch.ops.fastnce.*; common/schemas.h says what is common to all. Kernels register
// themselves in cpu/<op>.cpp.
#include "common/schemas.h"

STABLE_TORCH_LIBRARY(fastnce, m) {
  fastnce::define_shared_ops(m);

  // One block of a larger matrix: rows x (N, D) against columns y (M, D), labels int64; rows are
  // L2-normalised, t the temperature; own: row i leaves out column i.
  //   lse (N, 2) float64 = log of the sums of exp(x_i . y_j / t) over all j, over those with
  //   y_labels_j = x_labels_i; -inf where there is none
  m.def(
      "labelled_lse_forward(Tensor x, Tensor y, Tensor x_labels, Tensor y_labels, "
      "Tensor? temperature_tensor, float temperature, bool own) -> Tensor");

  // state (count, 4) float64: lse of the whole matrix, and the gradients that arrive for it, of the
  // rows and of the columns. grad_x (N, D) in acc: the block's part, as rows and as columns of the
  // whole, which is symmetric; grad_temperature, float64: as rows alone.
  m.def(
      "labelled_lse_backward(Tensor x, Tensor y, Tensor x_labels, Tensor y_labels, "
      "Tensor? temperature_tensor, float temperature, Tensor x_state, Tensor y_state, bool own) -> "
      "(Tensor grad_x, Tensor grad_temperature)");

  // x (..., N, D), y (..., M, D), none for x itself -> (..., N, M) in their dtype: the cosines of
  // all rows of x with all rows of y, divided by the temperature.
  m.def(
      "pairwise_cosine_similarity_forward(Tensor x, Tensor? y, Tensor? temperature_tensor, "
      "float temperature, bool bfloat16_products) -> Tensor");

  // The gradients of sum(grad * result), grad (..., N, M) of any strides. Without y that of x is
  // the sum over both its uses.
  m.def(
      "pairwise_cosine_similarity_backward(Tensor grad, Tensor x, Tensor? y, "
      "Tensor? temperature_tensor, float temperature, bool bfloat16_products, bool need_x, "
      "bool need_y, bool need_temperature) -> (Tensor grad_x, Tensor grad_y, "
      "Tensor grad_temperature)");

  // Maps x (B, H, W, C), grad (B, H, W, K), contiguous, float32 or bfloat16, C and K multiples of
  // 16; weight (K, C, 3, 3), float32, contiguous. The convolution of x, padded by 1 with zeros or,
  // if `reflect`, its mirror image.
  m.def("conv3x3_forward(Tensor x, Tensor weight, Tensor? bias, bool reflect) -> Tensor");
  m.def("conv3x3_input_gradient(Tensor grad, Tensor weight, bool reflect) -> Tensor");
  // (K, C, 3, 3) in float32.
  m.def("conv3x3_weight_gradient(Tensor grad, Tensor x, bool reflect) -> Tensor");

  // Maps as above. y = act((x - mean) / sqrt(variance + eps)) + residual with the moments of each
  // image and channel, act(z) = z for z > 0, else slope z.
  //   moments (2, B, C), float32: 1 / sqrt(variance + eps), and -mean times it
  m.def(
      "instance_norm_forward(Tensor x, Tensor? residual, float eps, float slope) -> (Tensor y, "
      "Tensor moments)");
  // The gradient of x; that of residual is grad.
  m.def("instance_norm_backward(Tensor grad, Tensor x, Tensor moments, float slope) -> Tensor");

  // A map as above -> (B, height, width, C): half the size, blurred by (1, 2, 1) / 4 in both
  // directions, mirrored at the border; or twice the size, by (1, 3, 3, 1) / 4, the border
  // repeated. The adjoint takes a gradient of the result's size to one of height x width.
  m.def("blur_resample(Tensor x, bool halve, bool adjoint, int height, int width) -> Tensor");

  // GFLOP/s of multiply-adds in registers, of all threads together over `seconds`: what no product
  // exceeds. Of the instruction set in use; dtype: float64, float32 or, where there are such
  // products and otherwise in float32, bfloat16.
  m.def("fma_peak(float seconds, str dtype) -> float");

  // portable, avx2, avx512 or avx512bf16: the processor's widest, or what FASTNCE_CPU_ISA asks for.
  m.def("instruction_set() -> str");
}
