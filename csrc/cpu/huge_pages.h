// Large arrays are usually fresh memory, of which the kernel makes one page after the other at the
// first touch. Pages of 2 MiB take a fraction of the time of those of 4 KiB, and walks over many
// slabs at once find their addresses.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastnce {

constexpr size_t kHugePage = size_t{1} << 21;

inline void ask_for_huge_pages(void* data, size_t bytes) {
#ifdef __linux__
  constexpr size_t kPage = size_t{1} << 12;
  if (bytes < 2 * kHugePage) return;
  const size_t head = -reinterpret_cast<uintptr_t>(data) & (kPage - 1);
  madvise(static_cast<char*>(data) + head, (bytes - head) & -kPage, MADV_HUGEPAGE);
#endif
}

template <class Tensor>
void ask_for_huge_pages(const Tensor& tensor) {
  ask_for_huge_pages(tensor.mutable_data_ptr(),
                     static_cast<size_t>(tensor.numel()) * tensor.element_size());
}

}  // namespace fastnce
