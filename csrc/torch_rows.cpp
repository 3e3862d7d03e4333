// Rows of a matrix that is cut from the product of two factors, decoded alone: the look-up of an embedding.
#include <nanobind/nanobind.h>

#include <algorithm>

#include "python.h"
#include "torch_state.h"

namespace nb = nanobind;
using namespace deepthin::python;

namespace {

class Rows {
  public:
    // The matrix, rows x cols, begins at entry `start` of the product of xf, m x rank, and wf, rank x n. Zero row: one that
    // is zero; negative for none. Most: the number of rows up to which they are decoded alone.
    Rows(int64_t rows, int64_t cols, int64_t start, int64_t m, int64_t rank, int64_t n, float scale, int64_t zero_row,
         int64_t most)
        : rows_(rows), cols_(cols), start_(start), m_(m), rank_(rank), n_(n), scale_(scale), zero_row_(zero_row), most_(most) {
        if (rows < 0 || cols < 1 || start < 0 || m < 1 || rank < 1 || n < 1 || start + rows * cols > m * n)
            throw std::invalid_argument("the matrix is not within the product of the factors");
    }

    // From unchecked tensors; None where they do not fit, an index is out of range, or a gradient is needed.
    nb::object operator()(nb::handle places, nb::handle xf, nb::handle wf) const {
        const Torch* torch = torch_of_process;
        if (!torch || !is_quiet(*torch) || Py_TYPE(places.ptr()) != torch->tensor) return nb::none();
        const bool grad = is_true(call(PyObject_CallNoArgs(torch->is_grad_enabled.ptr())));
        deepthin::dlpack::Tensor at, left, right;
        if (torch->api->from_python(places.ptr(), &at) != 0) {
            PyErr_Clear();
            return nb::none();
        }
        const bool wide = at.dtype.bits == 64;
        int64_t count = 1;
        for (int32_t i = 0; i < at.ndim; i++) count *= at.shape[i];
        if (at.device.type != deepthin::dlpack::CPU || at.dtype.code != deepthin::dlpack::INTEGER || at.dtype.lanes != 1 ||
            !(wide || at.dtype.bits == 32) || !at.is_row_major() || count > most_ ||
            !read_tensor(*torch, xf.ptr(), grad, left) || !read_tensor(*torch, wf.ptr(), grad, right) || left.ndim != 2 ||
            left.shape[0] != m_ || left.shape[1] != rank_ || right.ndim != 2 || right.shape[0] != rank_ ||
            right.shape[1] != n_ || is_negated(*torch, xf.ptr()) || is_negated(*torch, wf.ptr()))
            return nb::none();
        auto made = std::make_unique<Result>(*torch, at, at.ndim, cols_);
        // Python's lock is held, so that no other thread exchanges the memory that is read.
        for (int64_t i = 0; i < count; i++) {
            const void* memory = at.floats();
            const int64_t place = wide ? static_cast<const int64_t*>(memory)[i] : static_cast<const int32_t*>(memory)[i];
            if (place < 0 || place >= rows_) return nb::none();
            decode(place, left.floats(), right.floats(), made->floats() + i * cols_);
        }
        return make_tensor(*torch, std::move(made));
    }

  private:
    void decode(int64_t place, const float* xf, const float* wf, float* y) const {
        if (place == zero_row_) {
            std::fill_n(y, cols_, 0.0f);
            return;
        }
        const int64_t entry = start_ + place * cols_;
        int64_t row = entry / n_, first = entry % n_;
        for (int64_t done = 0; done < cols_; row++, first = 0) {
            const int64_t length = std::min(n_ - first, cols_ - done);
            for (int64_t a = 0; a < rank_; a++) add(xf[row * rank_ + a], wf + a * n_ + first, y + done, length, a == 0);
            done += length;
        }
        if (scale_ != 1.0f)
            for (int64_t j = 0; j < cols_; j++) y[j] *= scale_;
    }

    static void add(float factor, const float* __restrict from, float* __restrict to, int64_t length, bool first) {
        if (first)
            for (int64_t j = 0; j < length; j++) to[j] = factor * from[j];
        else
            for (int64_t j = 0; j < length; j++) to[j] += factor * from[j];
    }

    int64_t rows_, cols_, start_, m_, rank_, n_;
    float scale_;
    int64_t zero_row_, most_;
};

}  // namespace

void deepthin::python::bind_rows(nb::module_& m) {
    nb::class_<Rows>(m, "Rows")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, int64_t, int64_t>())
        .def("__call__", &Rows::operator(), nb::arg(), nb::arg().none(), nb::arg().none());
}
