#include "op.h"

#include <string>

#ifndef FASTNCE_EMULATED
// In libtorch_cuda, which a torch for CPUs lacks: weak, so that the library can be linked against
// one.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace fastnce::cuda {
namespace {

int device_of(const Tensor& tensor) {
#ifdef FASTNCE_EMULATED
  return 0;
#else
  return tensor.get_device_index();
#endif
}

bool on_current_device(const Tensor& tensor) {
#ifdef FASTNCE_EMULATED
  return tensor.is_cpu();
#else
  return tensor.is_cuda() &&
         tensor.get_device_index() == torch::stable::accelerator::getCurrentDeviceIndex();
#endif
}

}  // namespace

Stream current_stream(const Tensor& tensor) {
  void* stream = nullptr;
#ifndef FASTNCE_EMULATED
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "fastnce: this torch has no CUDA. Install a torch for CUDA.");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_of(tensor), &stream));
#endif
  return static_cast<Stream>(stream);
}

int multiprocessors(const Tensor& tensor) {
  return device_properties(device_of(tensor)).multiprocessors;
}

int compute_capability(const Tensor& tensor) {
  return device_properties(device_of(tensor)).capability;
}

Dtype dtype_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBfloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": the CUDA kernels take float32, bfloat16 and float16, got ",
                      torch::headeronly::toString(tensor.scalar_type()),
                      ". Use backend='torch' for others.");
  }
}

Temperature temperature_of(const char* op, const std::optional<Tensor>& tensor, double value) {
  if (!tensor.has_value()) return {nullptr, false, static_cast<float>(value)};
  const bool is_double = tensor->scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(tensor->dim() == 0 && on_current_device(*tensor), op,
                  ": temperature must be a 0-d tensor on the device of the rows.");
  STD_TORCH_CHECK(is_double || tensor->scalar_type() == ScalarType::Float, op,
                  ": temperature must be float32 or float64, got ",
                  torch::headeronly::toString(tensor->scalar_type()), ".");
  return {tensor->const_data_ptr(), is_double, 0.0f};
}

RowsView rows_of(const char* op, const Tensor& tensor) {
  const bool batched = tensor.dim() == 3;
  STD_TORCH_CHECK(batched || tensor.dim() == 2, op,
                  ": rows must have the shape (N, D) or (B, N, D), got ", tensor.dim(),
                  " dimensions.");
  STD_TORCH_CHECK(on_current_device(tensor), op,
                  ": all tensors must be on the GPU that the first one is on.");
  const int64_t last = tensor.dim() - 1;
  return {tensor.const_data_ptr(),
          dtype_of(op, tensor),
          batched ? tensor.size(0) : 1,
          tensor.size(last - 1),
          tensor.size(last),
          {batched ? tensor.stride(0) : 0, tensor.stride(last - 1), tensor.stride(last)}};
}

void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                  const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(on_current_device(tensor), op, ": ", name,
                  " must be on the GPU that the first tensor is on.");
  check_shape(op, name, tensor, dtype, shape);
}

Tensor new_scalar(const Tensor& like, bool needed) {
  return needed ? new_tensor(like, {}, ScalarType::Float) : Tensor();
}

namespace {

// "ok", or why no kernel runs on the GPU of this index.
std::string probe(int64_t device) {
#ifndef FASTNCE_EMULATED
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
#endif
  return try_a_kernel();
}

// There is no tensor by which to find a device.
STABLE_TORCH_LIBRARY_IMPL(fastnce_cuda, CompositeExplicitAutograd, m) {
  m.impl("probe", TORCH_BOX(&probe));
}

}  // namespace

}  // namespace fastnce::cuda
