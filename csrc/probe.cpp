// Whether a compiler can build the kernels: C++20 and the vector extensions of GCC and Clang.
#include "vector.h"

int main() {
    Vec<8> rows[8] = {};
    transpose<8>(rows);
    const auto zero = [&]<int I>() { return rows[I][0]; };
    return int(sum_lanes<8>(rows[1]) + zero.template operator()<2>());
}
