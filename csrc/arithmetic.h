// Adaptive binary arithmetic coding of integers, byte for byte as deepthin/coding/arithmetic.py, which is the definition.
#pragma once
#include <cstdint>
#include <vector>

namespace deepthin {

enum class Binarisation { levels, tree, numbers };

// `parameter`: the stride of levels, from 0; the width of a tree, 1 to 12; nothing for numbers. Values are in range.
// `Integer` is int32_t or int64_t.
template <class Integer>
std::vector<uint8_t> arithmetic_encode(Binarisation kind, const Integer* values, int64_t count, int64_t parameter);

// Writes `count` values to `out`. False where `data` is not what `arithmetic_encode` makes for any values up to `most`.
bool arithmetic_decode(Binarisation kind, const uint8_t* data, int64_t bytes, int64_t* out, int64_t count, int64_t parameter,
                       int64_t most);

}  // namespace deepthin
