// Shared by the bindings: the kernels in use, addresses as pointers, and a check of the batch.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>

#include "kernels.h"

namespace deepthin::python {

inline const Kernels* chosen = deepthin::find_kernels(nullptr);

inline const Kernels& kernels() {
    if (!chosen) throw std::runtime_error("this processor runs none of the instruction sets that were compiled");
    return *chosen;
}

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline void check_batch(const Plan& plan, int64_t batch) {
    const int64_t most = plan.rows > plan.cols ? plan.rows : plan.cols;
    if (batch < 0 || batch > (int64_t(1) << 58) / most) throw std::invalid_argument("the batch is negative or too large");
}

// Adds the bindings that take torch tensors directly: `use_torch`, `Product`, `Single`, `Chain`; `Rows`.
void bind_torch(nanobind::module_& m);
void bind_rows(nanobind::module_& m);

}  // namespace deepthin::python
