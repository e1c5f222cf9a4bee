// What a call of an op over rows knows before it begins, the arguments that its launches share, and
// its temporary memory.
#pragma once

#include <utility>
#include <vector>

#include "op.h"
#include "pairs.h"
#include "rows.h"

namespace fastnce::cuda {

struct RowsCall {
  const char* op;
  Dtype dtype;  // of the rows, packed or not
  int64_t depth, padded;
  bool normalize;
  Temperature temperature;
  Machine machine;
  Stream stream;

  // rows (N, D) or (B, N, D).
  RowsCall(const char* op, const Tensor& rows, const std::optional<Tensor>& temperature_tensor,
           double temperature, bool normalize)
      : op(op),
        dtype(dtype_of(op, rows)),
        depth(rows.size(rows.dim() - 1)),
        padded(padded_depth(depth)),
        normalize(normalize),
        temperature(temperature_of(op, temperature_tensor, temperature)),
        machine{compute_capability(rows), multiprocessors(rows)},
        stream(current_stream(rows)) {
    STD_TORCH_CHECK(dtype != Dtype::kFloat32, op,
                    ": the CUDA kernels take bfloat16 and float16 rows, got float32. Use "
                    "backend='blocks'.");
  }

  PackOptions pack_options() const { return {op, padded, dtype, normalize}; }
  RowGradientOptions gradient_options(const Upstream& upstream) const {
    return {op, depth, padded, dtype, normalize, temperature, upstream};
  }
  // Addresses are null where a plan alone is wanted.
  Pairs pairs(Kind kind, int64_t problems, int64_t rows, int64_t columns, const PackedRows& x,
              const PackedRows& y, const int64_t* labels = nullptr) const {
    return {op,     x.data, x.scale,   y.data, y.scale, problems, rows,       columns,
            padded, dtype,  normalize, kind,   labels,  labels,   temperature};
  }
};

// Temporary memory of a call: what it needs is collected first, and is then one allocation of
// PyTorch's.
class Workspace {
 public:
  // After allocate(), *where is the address of `count` elements, aligned to 256 bytes; null for
  // none.
  template <class T>
  void want(T** where, int64_t count) {
    *where = nullptr;
    if (count > 0)
      want_bytes(where, count * sizeof(T),
                 [](void* w, char* at) { *static_cast<T**>(w) = reinterpret_cast<T*>(at); });
  }
  void want(void** where, int64_t bytes) {
    *where = nullptr;
    if (bytes > 0)
      want_bytes(where, bytes, [](void* w, char* at) { *static_cast<void**>(w) = at; });
  }
  void want(PackedRows* rows, int64_t count, int64_t padded_depth) {
    want(&rows->data, count * padded_depth * 2);
    want(&rows->scale, count);
    want(&rows->inverse, count);
  }

  // The memory is there as long as this object is; the stream orders its next use.
  void allocate(const Tensor& like) {
    if (bytes_ == 0) return;
    memory_ = new_tensor(like, {bytes_}, ScalarType::Byte);
    auto* base = static_cast<char*>(memory_->mutable_data_ptr());
    for (const Item& item : items_) item.set(item.where, base + item.offset);
  }

 private:
  using Set = void (*)(void* where, char* at);
  struct Item {
    void* where;
    Set set;
    int64_t offset;
  };
  void want_bytes(void* where, int64_t bytes, Set set) {
    items_.push_back({where, set, bytes_});
    bytes_ += (bytes + 255) / 256 * 256;
#ifdef FASTNCE_EMULATED
    bytes_ += 256;  // that nobody writes: NaN in the tests
#endif
  }

  std::vector<Item> items_;
  int64_t bytes_ = 0;
  std::optional<Tensor> memory_;
};

}  // namespace fastnce::cuda
