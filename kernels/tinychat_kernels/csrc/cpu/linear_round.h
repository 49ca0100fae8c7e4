// Rows to int8, by the largest_of and the round_values of linear_ymm.h or linear_neon.h that stand before it.

namespace tinychat {
namespace {

void quantize(const float* x, int64_t inputs, int64_t group, const Quantized& out, int64_t row) {
    int8_t* values = out.values + row * out.stride;
    for (int64_t g = 0; g < inputs / group; ++g) {
        const Rounding rounding = rounding_of(largest_of(x + g * group, group));
        int32_t sum = 0;
        if (rounding.inverse == 0.0f) __builtin_memset(values + g * group, 0, static_cast<size_t>(group));
        else sum = round_values(x + g * group, group, rounding.inverse, values + g * group);
        out.scales[row * out.groups + g] = rounding.scale;
        out.sums[row * out.groups + g] = sum;
    }
    __builtin_memset(values + inputs, 0, static_cast<size_t>(out.stride - inputs));
}

}  // namespace
}  // namespace tinychat
