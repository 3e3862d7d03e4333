// The kernels of one instruction set: compiled once for each, with DEEPTHIN_TABLE naming the table that it fills.
//
// Batches are laid out as [position][lane], one item per SIMD lane (lanes.h, lane_gradients.h); a single item has one
// position per lane (single.h).
// Nothing here may come from the C++ library's templates: an inline function of theirs, compiled for this instruction set,
// could be the one copy that the linker keeps for all.
#include "kernels.h"

#include "cores.h"
#include "filters.h"
#include "gates.h"
#include "lane_gradients.h"
#include "single.h"
#include "sparse.h"
#include "symbols.h"

namespace {

#if DEEPTHIN_WIDTH > 8
constexpr int FEW = 8;  // lanes for batches of at most so many items
#define DEEPTHIN_BY_WIDTH(call) (width == FEW ? call<FEW> : call<DEEPTHIN_WIDTH>)
#else
constexpr int FEW = 0;
#define DEEPTHIN_BY_WIDTH(call) call<DEEPTHIN_WIDTH>
#endif

template <int W>
int64_t space_of(const Job& job, bool backward) {
    Job part = job;
    part.plan = piece_of(job.plan, 0);  // none is larger
    return Space<W>(part, nullptr, backward).floats;
}

int64_t forward_scratch(const Job& job, [[maybe_unused]] int width) { return DEEPTHIN_BY_WIDTH(space_of)(job, false); }
int64_t backward_scratch(const Job& job, [[maybe_unused]] int width) { return DEEPTHIN_BY_WIDTH(space_of)(job, true); }
int64_t single_scratch(const Job& job) { return SingleSpace(job, nullptr).floats; }

uint32_t forward(const Job& job, [[maybe_unused]] int width, int64_t first, int64_t items, float* scratch) {
    return DEEPTHIN_BY_WIDTH(forward_block)(job, first, items, scratch);
}
void backward(const Job& job, [[maybe_unused]] int width, int64_t first, int64_t items, float* scratch) {
    DEEPTHIN_BY_WIDTH(backward_bundle)(job, first, items, scratch);
}
void finish_grad_wf(const Job& job, [[maybe_unused]] int width, float* lanes, float* grad_wf) {
    DEEPTHIN_BY_WIDTH(finish_gradient)(job, lanes, grad_wf);
}
int64_t csr_scratch(int64_t rows, int64_t cols, int width) { return width == 1 ? 0 : (rows + cols) * width; }
void csr(const float* values, const int32_t* columns, const int64_t* starts, int64_t rows, int64_t cols,
         const float* bias, const float* x, float* y, int width, int64_t items, float* scratch) {
    if (width == 1)
        csr_single(values, columns, starts, rows, bias, x, y);
    else
        DEEPTHIN_BY_WIDTH(csr_block)(values, columns, starts, rows, cols, bias, x, y, items, scratch);
}

int64_t symbols_scratch(int64_t cols) { return round_up(cols, DEEPTHIN_WIDTH) * deepthin::SYMBOL_ITEMS; }
uint32_t symbols(const Symbols& s, const float* x, float* y, int64_t items, int64_t first, int64_t stop, float* scratch) {
    constexpr int W = DEEPTHIN_WIDTH;
    if constexpr (MOST_BITS > 0) {
        if (s.table && s.levels <= 1 << FEW_BITS)
            return symbol_block<W>(s, Shared<FEW_BITS>{s.table}, x, y, items, first, stop, scratch);
        if (s.table) return symbol_block<W>(s, Shared<MOST_BITS>{s.table}, x, y, items, first, stop, scratch);
    }
    return symbol_block<W>(s, Numbers{uint8_t(s.least ? 128 : 0)}, x, y, items, first, stop, scratch);
}

void one_step(const deepthin::Step& s) { step<DEEPTHIN_WIDTH>(s); }
void one_step_gradient(const deepthin::StepGradient& s) { step_gradient<DEEPTHIN_WIDTH>(s); }

}  // namespace

namespace deepthin {
#define DEEPTHIN_TEXT(x) #x
#define DEEPTHIN_NAME(x) DEEPTHIN_TEXT(x)
#define DEEPTHIN_JOIN(a, b) a##b
#define DEEPTHIN_SYMBOL(x) DEEPTHIN_JOIN(kernels_, x)
extern const Kernels DEEPTHIN_SYMBOL(DEEPTHIN_TABLE);
const Kernels DEEPTHIN_SYMBOL(DEEPTHIN_TABLE) = {
    DEEPTHIN_NAME(DEEPTHIN_TABLE), {DEEPTHIN_WIDTH, FEW}, SINGLE, BUNDLE, ::forward_scratch, ::backward_scratch, ::forward,
    ::backward,
    ::single_scratch, ::single_item, ::packed_floats, ::pack, ::spectra, ::spectra1, ::finish_grad_wf, ::csr_scratch, ::csr,
    {MOST_BITS ? 1 << FEW_BITS : 0, MOST_BITS ? 1 << MOST_BITS : 0}, ::symbols_scratch, ::symbols,
    ::one_step, ::one_step_gradient, ::cores_floats, ::pack_cores, ::cores_scratch, ::cores_item, ::cores_sums, ::cores_gradient,
    ::finish_cores};
}  // namespace deepthin
